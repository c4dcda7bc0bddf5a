"""One LTX-2 network for a host to load: a causal checkpoint, and the base for what it lacks.

OmniForcing's release holds the transformer alone, as TaoMate's does; the two connectors that
prepare the prompt, and anything that a checkpoint leaves out, are LTX-2's own and come from the
base file (docs/omniforcing.md, section 2; docs/ltx23.md, section 2). A file with the connectors
alone is base enough, and none is needed where a host's text encoder has them. Tensors keep the
rows, the dtype and the packing that they have in the file: see `host/transformer_view.py` for why.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..networks.checked import some
from ..networks.config import TransformerConfig
from ..networks.few_step import FEW_STEP
from ..networks.memory_branch import is_memory
from ..networks.tensor_parallel import Part
from ..networks.transformer import CausalAVTransformer
from ..samplers.tensor_file import TensorFileError
from .blank import BlankWeights
from .containers import REMEDY, Checkpoint
from .identity import BASE, CONNECTORS, LATER_BASE, SINKS, Preset, Role
from .keymap import KeyMap, check_shapes, map_keys, to_split
from .ltx2 import PRESETS, Mark, check_file, describe, marked, transformer_header

logger = logging.getLogger("mutualforcing")

STEP_SIZE = ".step_size_embedder."
# What marks a quantised layer, in the host's names; its scales, whatever the format calls them, lie
# beside it.
QUANTISED = ".comfy_quant"
# By this key an older quantised file says that it is one, and by these in its header a newer one.
_OLD_MARK, _NAMED = "scaled_fp8", "_quantization_metadata"
_FP8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
# Scales as files call them that name no format, and as the host does.
_SCALES = {
    ".weight_scale": ".weight_scale",
    ".scale_weight": ".weight_scale",
    ".input_scale": ".input_scale",
    ".scale_input": ".input_scale",
}
_HOST_SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "in_channels",
    "out_channels",
    "audio_in_channels",
    "audio_out_channels",
    "cross_attention_dim",
    "audio_cross_attention_dim",
    "caption_channels",
)
_HOST_FLAGS = ("cross_attention_adaln", "apply_gated_attention", "caption_proj_before_connector")

Tensors = dict[str, Tensor]
Normaliser = Callable[[Tensors, str, Mapping[str, str]], Tensors]
"""(tensors, transformer's prefix, metadata) -> tensors, quantised in the host's format."""


@dataclass(frozen=True)
class Generator:
    """A network that is whole.

    Attributes:
        tensors: of transformer and connectors, by LTX-2's names without a prefix; views of mapped
            files.
        additions: parameters that LTX-2 does not have (sink tokens, step-size embedders, few-step
            adapters, a memory branch).
        config: how to run it.
        header: LTX-2's own description of it, for the host. Its positions are those of the file
            that the connectors came from, which go by them; the causal network goes by `config`.
        model_id: fingerprint of its vectors, the same in every precision.
        from_base: names of the tensors that came from the base file.
        connected: whether the connectors are among the tensors.
        remarks: what an artist should know of the files, in sentences.
    """

    tensors: Tensors = field(repr=False)
    additions: Tensors = field(repr=False)
    config: TransformerConfig
    header: dict[str, object]
    model_id: str
    from_base: tuple[str, ...]
    connected: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def mark(self) -> Tensor:
        """What is to lie beside the weights when a host saves them."""
        return Mark(config=self.config.to_dict(), header=self.header).packed()


def assemble(
    path: Path,
    base: Path | None = None,
    *,
    preset: Preset | None = None,
    ema: bool = False,
    normalise: Normaliser = lambda tensors, _prefix, _metadata: tensors,
) -> Generator:
    """Put a generator together; only headers and a few vectors are read.

    Args:
        path: any container that `Checkpoint` opens.
        base: LTX-2's own file, for connectors and for what the checkpoint lacks; or its connectors
            alone. None: the checkpoint has them, or every prompt will have been through them.
        preset: whose positions to go by; None as for `load_transformer`.
        ema: take the averaged weights of a .pt.
        normalise: makes quantised tensors what the host expects.

    Raises:
        TensorFileError: a file that cannot be used, or tensors that are in neither; says which and
            what to do.
    """
    checkpoint = Checkpoint(path, ema=ema)
    base_file = None if base is None else Checkpoint(base)
    base_header = {} if base_file is None else transformer_header(base_file)
    check_file(checkpoint)
    if base_file is not None:
        _check_base(checkpoint, base_file)
    described = describe(checkpoint, preset=preset, header=base_header)
    config, mark = described.config, marked(checkpoint)
    tensors = _network(checkpoint, described.keys, normalise)
    with BlankWeights():
        expected = CausalAVTransformer(config, device="meta").state_dict()
    missing = {name for name in expected if not is_addition(name)} - tensors.keys()
    layers = {_layer(name) for name in missing}
    spare = {} if base_file is None else _network(base_file, _keys(base_file), normalise, layers)
    from_base = _fill(tensors, spare, missing)
    _check(checkpoint, base, tensors, expected)
    if from_base:
        logger.info("%s: %d tensors come from %s", path.name, len(from_base), base)
    additions = {name: tensors.pop(name) for name in list(tensors) if is_addition(name)}
    # What the connectors are like is told by the file that they came from.
    told = [transformer_header(checkpoint) if mark is None else mark.header, base_header]
    if any(name.startswith(CONNECTORS) for name in from_base):
        told.reverse()
    header = header_of(config) | (told[0] or told[1])
    connected = any(name.startswith(CONNECTORS) for name in tensors)
    if not connected:
        header["connector_num_layers"] = 0
    model_id = _fingerprint(config, tensors, expected)
    # Whoever names the positions of a causal model says that it is one.
    remarks = [] if preset in ("omniforcing", "taomate") else _remarks(checkpoint, "file")
    remarks += [] if base_file is None else _remarks(base_file, "base")
    made = tensors, additions, config, header, model_id, tuple(from_base)
    return Generator(*made, connected, tuple(remarks))


def load_part(
    path: Path,
    base: Path | None,
    *,
    preset: Preset | None = None,
    ema: bool = False,
    dtype: torch.dtype,
    device: torch.device,
    part: Callable[[TransformerConfig], Part],
) -> CausalAVTransformer:
    """What one process holds of a generator's transformer; its connectors are left out.

    Raises:
        TensorFileError: as `assemble`, or weights that are not in 16 bits or more.
    """
    return part_of_generator(
        assemble(path, base, preset=preset, ema=ema), path, dtype, device, part
    )


def part_of_generator(
    generator: Generator,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    part: Callable[[TransformerConfig], Part],
) -> CausalAVTransformer:
    """The same of one that is put together; arguments and errors likewise."""
    config = replace(generator.config, rope_type="split")
    with BlankWeights():
        transformer = CausalAVTransformer(config, dtype=dtype, device="meta")
    tensors = generator.tensors | generator.additions
    names = transformer.state_dict().keys()
    packed = [name for name in names if name not in tensors or tensors[name].itemsize < 2]
    if packed or _quantised_layers(tensors):
        raise TensorFileError(
            f"the weights of {path.name} are in 8 bits or fewer, and those cannot be shared out to "
            "several devices: choose its 16-bit file, or one device"
        )
    mine = part(config)
    mine.divide(transformer)
    held = {}
    for name in names:
        value = mine.cut(name, to_split(name, tensors[name], generator.config))
        held[name] = value.to(device=device, dtype=dtype, copy=True).contiguous()
    transformer.load_state_dict(held, strict=True, assign=True)
    return transformer.eval().requires_grad_(False)


def _remarks(checkpoint: Checkpoint, role: Role) -> list[str]:
    return checkpoint.identity.remarks(checkpoint.path.name, role)


def _check_base(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Refuse a base that is something else, or another version's."""
    found = base.identity
    if found.is_known and not found.has_connectors and not found.fits("file"):
        needed = LATER_BASE if checkpoint.identity.is_later else BASE
        raise TensorFileError(
            f"the base {base.path} holds no connectors of LTX-2: {found.refusal()}; as base choose "
            f"{needed}"
        )
    if found.is_later != checkpoint.identity.is_later:
        kinds = ("LTX-2 19B", BASE), ("LTX-2.3", LATER_BASE)
        (made_of, needed), (other, _) = kinds[:: -1 if checkpoint.identity.is_later else 1]
        raise TensorFileError(
            f"the checkpoint {checkpoint.path} is made of {made_of}, and the base {base.path.name} "
            f"is {other}'s; choose {needed} as base"
        )


def _keys(base: Checkpoint) -> KeyMap:
    """What the keys of a base mean, which need not have a transformer."""
    if base.identity.key == "connectors":
        return KeyMap("", {}, {}, [])
    return map_keys(base.shapes, f"the checkpoint {base.path}", REMEDY)


def header_of(config: TransformerConfig) -> dict[str, object]:
    """LTX-2's own words for a network, for a host that builds it."""
    # What is off is not LTX-2's word for it, and would change what an older host understands.
    flags = {name: True for name in _HOST_FLAGS if getattr(config, name)}
    return PRESETS["ltx2_base"] | {name: getattr(config, name) for name in _HOST_SIZES} | flags


def is_addition(name: str) -> bool:
    """Whether a tensor is of what LTX-2 does not have."""
    return name == SINKS or STEP_SIZE in name or FEW_STEP in name or is_memory(name)


def _network(
    checkpoint: Checkpoint,
    keys: KeyMap,
    normalise: Normaliser,
    layers: Container[str] | None = None,
) -> Tensors:
    """Tensors of transformer and connectors under bare names; of the transformer only these layers,
    if any are given. Nothing else of the file is touched, not even its first page."""
    if keys.unknown:
        raise TensorFileError(
            f"the checkpoint {checkpoint.path} has weights that this model has no place for: "
            f"{some(keys.unknown)}; {REMEDY}"
        )
    names = {
        name: key
        for name, key in keys.names.items()
        if layers is None or _layer(name) in layers or name == _OLD_MARK
    }
    for key in checkpoint.shapes:
        part = next((part for part in CONNECTORS if f"{part}." in key), None)
        if part is not None:
            names[key[key.index(part) :]] = key
    tensors = {keys.prefix + name: checkpoint.tensor(key, keep=True) for name, key in names.items()}
    if _NAMED not in checkpoint.metadata and keys.prefix + _OLD_MARK not in tensors:
        tensors = _named(tensors)
    tensors = normalise(tensors, keys.prefix, checkpoint.metadata)
    return {key.removeprefix(keys.prefix): value for key, value in tensors.items()}


def _named(tensors: Tensors) -> Tensors:
    """The same, where weights of 8 bits have a scale each and nothing names the format."""
    weights = {
        _layer(name): _FP8[value.dtype]
        for name, value in tensors.items()
        if name.endswith(".weight") and value.dtype in _FP8
    }
    named, formats = {}, {}
    for name, value in tensors.items():
        own = next((end for end in _SCALES if name.endswith(end)), None)
        layer = name.removesuffix(own or "")
        scaled = own is not None and layer in weights and value.numel() == 1
        named[layer + _SCALES[own] if scaled else name] = value
        if scaled:
            formats[f"{layer}{QUANTISED}"] = json.dumps({"format": weights[layer]})
    marks = {n: torch.tensor(list(x.encode()), dtype=torch.uint8) for n, x in formats.items()}
    return marks | named


def _fill(tensors: Tensors, spare: Tensors, missing: set[str]) -> list[str]:
    """Put what is missing into `tensors`; the names of what was put in. A weight brings its own
    scales, and scales come with their weight only: another file's would not be its own."""
    connectors = {name for name in spare if name.startswith(CONNECTORS)}
    missing = missing | (connectors - tensors.keys())
    beside = _beside(spare)
    taken = [
        name for name in spare if (f"{_layer(name)}.weight" if name in beside else name) in missing
    ]
    tensors.update({name: spare[name] for name in taken})
    return taken


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _quantised_layers(tensors: Tensors) -> set[str]:
    return {_layer(name) for name in tensors if name.endswith(QUANTISED)}


def _beside(tensors: Tensors) -> set[str]:
    """What quantised layers have besides weight and bias."""
    packed = _quantised_layers(tensors)
    own = (".weight", ".bias")
    return {name for name in tensors if _layer(name) in packed and not name.endswith(own)}


def _check(
    checkpoint: Checkpoint, base: Path | None, tensors: Tensors, expected: Mapping[str, Tensor]
) -> None:
    what = f"the checkpoint {checkpoint.path}"
    lacking = [part for part in CONNECTORS if not any(name.startswith(part) for name in tensors)]
    # Without a base all prompts may come from a text encoder that has them.
    if lacking and not (base is None and len(lacking) == len(CONNECTORS)):
        own = LATER_BASE if checkpoint.identity.is_later else f"{BASE} or its fp8 version"
        remedy = (
            f"choose LTX-2's own file ({own}) as base"
            if base is None
            else f"and {base} lacks them too; choose LTX-2's own file as base"
        )
        raise TensorFileError(
            f"{what} holds no {' and no '.join(lacking)}, which prepare the prompt; {remedy}"
        )
    packed, beside = _quantised_layers(tensors), _beside(tensors)
    plain = {
        name: tuple(value.shape)
        for name, value in tensors.items()
        if not name.startswith(CONNECTORS) and name not in beside
    }
    wanted = {
        name: plain[name] if _layer(name) in packed and name in plain else tuple(value.shape)
        for name, value in expected.items()
    }
    scales = [name for name in plain.keys() - wanted.keys() if name.endswith(tuple(_SCALES))]
    if scales:
        raise TensorFileError(
            f"{what} is quantised in a way that it does not name ({some(sorted(scales))}); take it "
            "in 16 bit, or as ComfyUI quantises"
        )
    check_shapes(what, wanted, plain, f"{REMEDY}, or choose a base file that has what it lacks")


def _fingerprint(
    config: TransformerConfig, tensors: Tensors, expected: Mapping[str, Tensor]
) -> str:
    """16 hex digits from the config and a few values of every vector, which stay as they are when a
    file is quantised; rounded as bfloat16 does, so that the precision in which they are stored
    makes no difference."""
    digest = hashlib.blake2b(json.dumps(config.to_dict(), sort_keys=True).encode(), digest_size=8)
    for name in sorted(name for name, value in expected.items() if value.ndim == 1):
        if name in tensors:
            value = tensors[name]
            few = value[:: max(1, len(value) // 8)].to(torch.bfloat16).float()
            digest.update(name.encode() + few.numpy().tobytes())
    return digest.hexdigest()
