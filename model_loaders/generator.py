"""One LTX-2 network for a host to load: a causal checkpoint, and the base for what it lacks.

OmniForcing's release holds the transformer alone, as TaoMate's does; the two connectors that
prepare the prompt, and anything that a checkpoint leaves out, are LTX-2's own and come from the
base file (docs/omniforcing.md, section 2; docs/ltx23.md, section 2). Tensors keep the rows, the
dtype and the packing that they have in the file: see `host/transformer_view.py` for why.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..networks.checked import some
from ..networks.config import TransformerConfig
from ..networks.few_step import FEW_STEP
from ..networks.memory_branch import is_memory
from ..networks.transformer import CausalAVTransformer
from ..samplers.tensor_file import TensorFileError
from .blank import BlankWeights
from .containers import REMEDY, Checkpoint
from .keymap import check_shapes, map_keys
from .ltx2 import PRESETS, SINKS, Preset, describe, is_later, transformer_header

logger = logging.getLogger("mutualforcing")

BASE, LATER_BASE = "ltx-2-19b-dev.safetensors", "ltx-2.3-22b-dev.safetensors"
CONNECTORS = ("video_embeddings_connector", "audio_embeddings_connector")
STEP_SIZE = ".step_size_embedder."
# What marks a quantised layer, in the host's names; its scales, whatever the format calls them, lie
# beside it.
QUANTISED = ".comfy_quant"
# By this key an older quantised file says that it is one.
_OLD_MARK = "scaled_fp8"
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
    """

    tensors: Tensors = field(repr=False)
    additions: Tensors = field(repr=False)
    config: TransformerConfig
    header: dict[str, object]
    model_id: str
    from_base: tuple[str, ...]


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
        base: LTX-2's own file, for connectors and for what the checkpoint lacks.
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
    if base_file is not None and is_later(base_file.shapes) != is_later(checkpoint.shapes):
        kinds = ("LTX-2 19B", BASE), ("LTX-2.3", LATER_BASE)
        (made_of, needed), (found, _) = kinds[:: -1 if is_later(checkpoint.shapes) else 1]
        raise TensorFileError(
            f"the checkpoint {path} is made of {made_of}, and the base {base.name} is {found}'s; "
            f"choose {needed} as base"
        )
    described = describe(checkpoint, preset=preset, header=base_header)
    config = described.config
    tensors = _network(checkpoint, normalise)
    with BlankWeights():
        expected = CausalAVTransformer(config, device="meta").state_dict()
    missing = {name for name in expected if not is_addition(name)} - tensors.keys()
    layers = {_layer(name) for name in missing}
    spare = {} if base_file is None else _network(base_file, normalise, layers)
    from_base = _fill(tensors, spare, missing)
    _check(checkpoint, base, tensors, expected)
    if from_base:
        logger.info("%s: %d tensors come from %s", path.name, len(from_base), base)
    additions = {name: tensors.pop(name) for name in list(tensors) if is_addition(name)}
    # What the connectors are like is told by the file that they came from.
    told = [transformer_header(checkpoint), base_header]
    if any(name.startswith(CONNECTORS) for name in from_base):
        told.reverse()
    header = header_of(config) | (told[0] or told[1])
    model_id = _fingerprint(config, tensors, expected)
    return Generator(tensors, additions, config, header, model_id, tuple(from_base))


def header_of(config: TransformerConfig) -> dict[str, object]:
    """LTX-2's own words for a network, for a host that builds it."""
    # What is off is not LTX-2's word for it, and would change what an older host understands.
    flags = {name: True for name in _HOST_FLAGS if getattr(config, name)}
    return PRESETS["ltx2_base"] | {name: getattr(config, name) for name in _HOST_SIZES} | flags


def is_addition(name: str) -> bool:
    """Whether a tensor is of what LTX-2 does not have."""
    return name == SINKS or STEP_SIZE in name or FEW_STEP in name or is_memory(name)


def _network(
    checkpoint: Checkpoint, normalise: Normaliser, layers: Container[str] | None = None
) -> Tensors:
    """Tensors of transformer and connectors under bare names; of the transformer only these layers,
    if any are given. Nothing else of the file is touched, not even its first page."""
    what = f"the checkpoint {checkpoint.path}"
    keys = map_keys(checkpoint.shapes, what, REMEDY)
    if keys.unknown:
        raise TensorFileError(
            f"{what} has weights that this model has no place for: {some(keys.unknown)}; {REMEDY}"
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
    tensors = normalise(tensors, keys.prefix, checkpoint.metadata)
    return {key.removeprefix(keys.prefix): value for key, value in tensors.items()}


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
    if lacking:
        own = LATER_BASE if is_later(checkpoint.shapes) else f"{BASE} or its fp8 version"
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
