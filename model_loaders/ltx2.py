"""An LTX-2 file, base or a causal generator made of it, to a network in this pack's layout.

What the file says of itself comes first: sizes from the shapes of its tensors, positions and block
layout from its header where it has one. The rest is a preset, because the two kinds of file need
different numbers under the same names (docs/omniforcing.md, section 0, point 2; docs/ltx23.md,
section 1), and every part of it can be overridden.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ..networks.checked import quoted, reason_of, some
from ..networks.config import TransformerConfig
from ..networks.few_step import FEW_STEP
from ..networks.layout import PAPER_LAYOUT, RELEASED_LAYOUT, BlockLayout
from ..networks.tensor_parallel import Part
from ..networks.transformer import CausalAVTransformer
from ..samplers.tensor_file import TensorFileError
from .blank import BlankWeights
from .containers import REMEDY, Checkpoint, Container
from .identity import MEMORY, SINKS, Preset, is_later
from .keymap import CAUSAL_MARK, KeyMap, check_shapes, is_rotated, map_keys, to_split

logger = logging.getLogger("mutualforcing")

PRESETS: dict[Preset, dict[str, object]] = {
    "omniforcing": {
        "rope_type": "interleaved",
        "frequencies_precision": "float32",
        "av_ca_timestep_scale_multiplier": 1.0,
    },
    "taomate": {
        "rope_type": "split",
        "frequencies_precision": "float32",
        "av_ca_timestep_scale_multiplier": 1.0,
        "absolute_positions": True,
        "opening_blocks": 5,
    },
    "ltx2_base": {
        "rope_type": "split",
        "frequencies_precision": "float64",
        "av_ca_timestep_scale_multiplier": 1000.0,
    },
}
SINK_COUNT = "num_audio_sink_tokens"
_LAYOUT_KEYS = ("video_first_block", "audio_first_block", "video_next_block", "audio_next_block")
_TELL = f"{REMEDY}, or say what is right in the overrides"
_LAYER = re.compile(r"transformer_blocks\.([0-9]{1,3})\.")
# What quantised files keep beside their weights.
_SCALES = ("_scale", ".scale_weight", ".scale_input", ".comfy_quant", "_scale_2")


class _Header(BaseModel):
    """LTX-2's metadata key `config`; what is inside is checked by `TransformerConfig`."""

    transformer: dict[str, object] = {}


@dataclass(frozen=True)
class LoadReport:
    """What was made of a checkpoint.

    Attributes:
        container, part: what it was stored in, and the entry of a .pt that was taken.
        prefix: in front of the transformer's keys.
        preset: where positions came from if the header did not say.
        left_out: other parts of the file, with their number of tensors.
        tensors, parameters: of the transformer.
    """

    path: Path
    container: Container
    part: str | None
    prefix: str
    preset: Preset
    left_out: dict[str, int]
    tensors: int
    parameters: int

    def __str__(self) -> str:
        part = f", entry {self.part!r}" if self.part else ""
        left_out = ", ".join(f"{name} ({count})" for name, count in sorted(self.left_out.items()))
        return (
            f"{self.path} ({self.container}{part}): {self.tensors} tensors, "
            f"{self.parameters / 1e9:.3f} B parameters under {self.prefix!r}, preset "
            f"{self.preset}; "
            f"left out: {left_out or 'nothing'}"
        )


@dataclass(frozen=True)
class LoadedTransformer:
    """A network ready to run, and where it came from."""

    transformer: CausalAVTransformer
    report: LoadReport


@dataclass(frozen=True)
class Description:
    """What a checkpoint's names, shapes and header say of the network in it."""

    keys: KeyMap
    preset: Preset
    config: TransformerConfig


def describe(
    checkpoint: Checkpoint,
    *,
    preset: Preset | None = None,
    overrides: Mapping[str, object] | None = None,
    header: Mapping[str, object] | None = None,
) -> Description:
    """Read off a checkpoint how its network is built and run; no weight is read.

    Args:
        preset, overrides: as for `load_transformer`.
        header: of another file of the same architecture, for a checkpoint that has none.

    Raises:
        TensorFileError: no LTX-2 transformer in it, one that cannot be built, or one that is
            causal in a way that this network is not.
        ValueError: an override or preset that does not exist.
    """
    overrides = overrides or {}
    _check_arguments(preset, overrides)
    what = f"the checkpoint {checkpoint.path}"
    check_file(checkpoint)
    keys = map_keys(checkpoint.shapes, what, REMEDY)
    mark = marked(checkpoint)
    own = transformer_header(checkpoint) if mark is None else mark.config
    shapes = {name: checkpoint.shapes[key] for name, key in keys.names.items()}
    chosen = preset or (checkpoint.identity.preset if mark is None else "ltx2_base")
    config = _config(shapes, own or header or {}, chosen, overrides, what)
    return Description(keys, chosen, config)


def load_transformer(
    path: Path | str,
    *,
    preset: Preset | None = None,
    overrides: Mapping[str, object] | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: object = nn,
    part: Callable[[TransformerConfig], Part] | None = None,
) -> LoadedTransformer:
    """Load a checkpoint.

    On the CPU and in the file's own dtype most weights stay views of the mapped file, so the file
    must not be written over while the network is in use.

    Args:
        path: folder, index, safetensors file or .pt.
        preset: "omniforcing" and "taomate" hold whatever the header says, as in the references,
            which never read it; "ltx2_base" gives way to the header. None: what the file
            says of itself, or else `Identity.preset`.
        overrides: fields of `TransformerConfig`, and `layout` as a `BlockLayout`; they win over
            everything.
        ema: take the averaged weights of a .pt.
        dtype: of the network; None = the one that most of the file is in (bfloat16 for an 8-bit
            file).
        operations: namespace with `Linear` and `RMSNorm`.
        part: what this process is to hold of the network, where several share it; of each tensor
            only that is read.

    Raises:
        TensorFileError: the file cannot be used or does not hold exactly one whole network; says
            what was found and the next step.
        ValueError: an override or preset that does not exist.
    """
    checkpoint = Checkpoint(path, ema=ema)
    what = f"the checkpoint {checkpoint.path}"
    described = describe(checkpoint, preset=preset, overrides=overrides)
    keys, config = described.keys, described.config
    dtype = dtype or _main_dtype(checkpoint, keys)
    device = torch.device(device)
    with BlankWeights():
        transformer = CausalAVTransformer(config, operations=operations, dtype=dtype, device="meta")
    wanted = transformer.state_dict()
    _check(checkpoint, keys, wanted, what)
    mine = None if part is None else part(config)
    if mine is not None:
        mine.divide(transformer)
    weights = {}
    for own, key in keys.names.items():
        rotated = config.rope_type == "interleaved" and is_rotated(own)
        keep = not rotated and checkpoint.dtypes[key] == dtype and device.type == "cpu"
        value = checkpoint.tensor(key, keep=keep)
        if not keep:
            value = to_split(own, value, config)
        if mine is not None:
            value = mine.cut(own, value)
        if not keep:
            # `copy`: a view of the pages that are about to go must not live on.
            copy = not rotated or mine is not None
            value = value.to(device=device, dtype=dtype, copy=copy)
        weights[own] = value.contiguous()
        del value
    transformer.load_state_dict(weights, strict=True, assign=True)
    transformer.eval().requires_grad_(False)
    report = LoadReport(
        checkpoint.path,
        checkpoint.container,
        checkpoint.part,
        keys.prefix,
        described.preset,
        keys.left_out,
        len(wanted),
        sum(value.numel() for value in wanted.values()),
    )
    logger.info("loaded %s", report)
    return LoadedTransformer(transformer, report)


def check_file(checkpoint: Checkpoint) -> None:
    """Refuse a file that is known to be something else than a transformer of LTX-2.

    Raises:
        TensorFileError: says what it is and what to do with it.
    """
    found = checkpoint.identity
    if found.is_known and not found.fits("file"):
        raise TensorFileError(
            f"the checkpoint {checkpoint.path} cannot be run as a stream: {found.refusal()}"
        )


class Mark(BaseModel):
    """What `CAUSAL_MARK` holds.

    Attributes:
        config: how the network is run, as `TransformerConfig.to_dict` has it.
        header: LTX-2's own description of it, which its connectors go by.
    """

    config: dict[str, object]
    header: dict[str, object] = {}

    def packed(self) -> Tensor:
        """As a tensor of bytes, to lie beside the weights."""
        return torch.tensor(list(self.model_dump_json().encode()), dtype=torch.uint8)


def marked(checkpoint: Checkpoint) -> Mark | None:
    """How a network is run that a host's saving node wrote; None where no mark lies beside it.

    Raises:
        TensorFileError: a mark that cannot be read.
    """
    key = next((key for key in checkpoint.shapes if key.endswith(CAUSAL_MARK)), None)
    if key is None:
        return None
    try:
        return Mark.model_validate_json(checkpoint.tensor(key, keep=True).numpy().tobytes())
    except ValueError as error:
        raise TensorFileError(
            f"the checkpoint {checkpoint.path} has a mark {CAUSAL_MARK!r} that cannot be read "
            f"({reason_of(error)}); save it again"
        ) from error


def transformer_header(checkpoint: Checkpoint) -> dict[str, object]:
    """LTX-2's own description of the transformer; empty where there is none.

    Raises:
        TensorFileError: there is one that cannot be read.
    """
    what = f"the checkpoint {checkpoint.path}"
    if "config" not in checkpoint.metadata:
        return {}
    try:
        return _Header.model_validate_json(checkpoint.metadata["config"]).transformer
    except ValueError as error:
        raise TensorFileError(
            f"{what} has a 'config' in its metadata that is not JSON with an object 'transformer' "
            f"({reason_of(error)}); {REMEDY}"
        ) from error


def _config(
    shapes: Mapping[str, tuple[int, ...]],
    header: Mapping[str, object],
    preset: Preset,
    overrides: Mapping[str, object],
    what: str,
) -> TransformerConfig:
    """Shapes, preset, header, overrides, each over the last; a causal preset beats the header."""
    sinks = shapes.get(SINKS)
    layout = RELEASED_LAYOUT if sinks is None else PAPER_LAYOUT
    held = {} if preset == "ltx2_base" else PRESETS[preset]
    said = {**PRESETS[preset], **header, **held}
    asked = dict(overrides)
    try:
        blocks = said.pop("video_blocks", None), said.pop("audio_blocks", None)
        if None not in blocks:
            layout = BlockLayout.from_blocks(*map(list, blocks))
        asked_layout = asked.pop("layout", None)
        if asked_layout is not None:
            asked = {**_layout_values(asked_layout), **asked}
        values = {
            **_layout_values(layout),
            SINK_COUNT: 0 if sinks is None else sinks[-2] if len(sinks) > 1 else 1,
            **_sizes(shapes, {**said, **asked}, what),
            **said,
            **asked,
        }
        return TransformerConfig.from_dict(values)
    except TensorFileError:
        raise
    except (ValueError, TypeError) as error:
        raise TensorFileError(f"{what} cannot be built ({reason_of(error)}); {_TELL}") from error


def _layout_values(layout: BlockLayout) -> dict[str, object]:
    counts = (layout.video_first, layout.audio_first, layout.video_next, layout.audio_next)
    return dict(zip(_LAYOUT_KEYS, counts, strict=True))


def _check_arguments(preset: str | None, overrides: Mapping[str, object]) -> None:
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} does not exist, expected one of {', '.join(PRESETS)}")
    strange = sorted(
        overrides.keys() - {field.name for field in fields(TransformerConfig)} - {"layout"}
    )
    if strange:
        raise ValueError(
            f"overrides has {some(strange)}, expected fields of TransformerConfig or 'layout'"
        )
    if not isinstance(overrides.get("layout"), BlockLayout | None):
        raise ValueError(f"overrides has layout={overrides['layout']!r}, expected a BlockLayout")


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, object], what: str
) -> dict[str, object]:
    """Every size that the shapes tell; the number of heads is not one of them."""
    # Of few digits: a layer's number is only a name until its tensors are found.
    numbers = (_LAYER.match(key) for key in shapes)
    layers = 1 + max((int(number[1]) for number in numbers if number), default=-1)

    def usual(axis: int, names: Iterable[str]) -> int:
        """The most common length of an axis, so that one broken tensor is not believed."""
        found = Counter(
            shapes[name][axis] for name in names if name in shapes and len(shapes[name]) > axis
        )
        if not found:
            raise TensorFileError(f"{what} lacks {some(names)}; {REMEDY}")
        return found.most_common(1)[0][0]

    def layered(*names: str) -> list[str]:
        return [f"transformer_blocks.{i}.{name}" for i in range(layers) for name in names]

    sizes: dict[str, object] = {"num_layers": layers}
    for stream, attention, text, channels in (
        ("", "attn1", "attn2", ("patchify_proj", "proj_out")),
        ("audio_", "audio_attn1", "audio_attn2", ("audio_patchify_proj", "audio_proj_out")),
    ):
        width = usual(0, layered(f"{attention}.to_q.bias", f"{attention}.q_norm.weight"))
        sizes[f"{stream}in_channels"] = usual(1, [f"{channels[0]}.weight"])
        sizes[f"{stream}out_channels"] = usual(0, [f"{channels[1]}.weight", f"{channels[1]}.bias"])
        sizes[f"{stream}cross_attention_dim"] = usual(
            1, layered(f"{text}.to_k.weight", f"{text}.to_v.weight")
        )
        heads_key, head_dim_key = f"{stream}num_attention_heads", f"{stream}attention_head_dim"
        heads = given.get(heads_key, getattr(TransformerConfig, heads_key))
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise TensorFileError(
                f"{what} has an attention width of {width}, which {heads_key} = {quoted(heads)} "
                "does not divide; "
                f"{_TELL} ({heads_key})"
            )
        sizes[head_dim_key] = width // heads
    projections = [f"{name}caption_projection.linear_1.weight" for name in ("", "audio_")]
    later = is_later(shapes)
    # Whatever lacks, LTX-2.3's gates alone say that no projection has to be there.
    sizes["caption_proj_before_connector"] = later and not any(x in shapes for x in projections)
    if not sizes["caption_proj_before_connector"]:
        sizes["caption_channels"] = usual(1, projections)
    sizes["apply_gated_attention"] = later
    sizes["cross_attention_adaln"] = any("prompt_adaln_single." in key for key in shapes)
    branches = layered("video_memory_attn.to_k.weight")
    if MEMORY in shapes:
        interval = next((i for i, name in enumerate(branches, start=1) if name in shapes), 0)
        sizes |= {
            "memory_interval": interval,
            "memory_video_dim": usual(0, [MEMORY]),
            "memory_audio_dim": usual(0, ["learned_memory_audio_encoder.weight"]),
            "memory_film_hidden": usual(0, layered("video_color_film.net.0.weight")),
            "anchored_colours": True,
        }
    sizes["step_size_embedding"] = any(".step_size_embedder." in key for key in shapes)
    # Adapters of few-step mode: one matrix of each has their rank as its rows.
    adapters = [key for key in shapes if key.endswith(f"{FEW_STEP}down.weight")]
    sizes["few_step_rank"] = usual(0, adapters) if adapters else 0
    return sizes


def _main_dtype(checkpoint: Checkpoint, keys: KeyMap) -> torch.dtype:
    values: Counter[torch.dtype] = Counter()
    for key in keys.names.values():
        values[checkpoint.dtypes[key]] += torch.Size(checkpoint.shapes[key]).numel()
    dtype = values.most_common(1)[0][0]
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def _check(checkpoint: Checkpoint, keys: KeyMap, wanted: Mapping[str, Tensor], what: str) -> None:
    """Refuse a file that is not exactly this network; its own keys are named."""
    quantised = [
        f"{key} is {checkpoint.dtypes[key]}"
        for key in keys.names.values()
        if key.endswith(_SCALES) or not checkpoint.dtypes[key].is_floating_point
    ]
    if quantised:
        raise TensorFileError(
            f"{what} is quantised ({some(quantised)}), expected plain floating point; load it with "
            "ComfyUI's own loader, or take the unquantised file"
        )
    expected = {
        keys.names.get(own, keys.prefix + own): tuple(value.shape) for own, value in wanted.items()
    }
    found = {key: checkpoint.shapes[key] for key in (*keys.names.values(), *keys.unknown)}
    check_shapes(what, expected, found, REMEDY)
