"""Stream states on disk: stop today, go on tomorrow, bit for bit as if nothing had happened.

b batch, c channels, f h w video latent grid, s audio latents.
One safetensors file holds the clean latents of all blocks, `video` (b, c, f, h, w) and `audio` (b,
s, c), and the keys and values of the window; the header is JSON in the metadata. Without the keys
the file is small and they are made again when the stream goes on, which takes one pass per block.
What the decoders remember (`memory.`), and what a network with a memory branch does (`past.`), lies
beside them, so that going on costs the same at any age.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..networks.checked import reason_of, some
from ..networks.config import Latents
from ..networks.kept_keys import AS_COMPUTED, ATTENTIONS, EIGHT_BITS, BlockKeys, Kept
from ..networks.kept_keys import FORMAT as SHORT
from ..networks.kv_cache import RollingCache, kept_blocks
from ..networks.layout import BlockLayout
from . import version
from .schedule import Line, written
from .speech import Speech
from .state import (
    SCALES,
    STATE_VERSION,
    BlockLatents,
    DecodeState,
    Memory,
    StreamSettings,
    StreamState,
    check_shapes,
    clock_of,
    parts_of,
)
from .stream_memory import StreamMemory
from .tensor_file import Joined, TensorFileError, read_tensors, write_tensors

FORMAT = "mutual-forcing-state"
_REMEDY = "choose a file that was saved as a stream state"
Branch = Literal["cache", "unguided"]
_BRANCHES: tuple[Branch, ...] = get_args(Branch)
_LATENTS = (torch.float32,)
_KEYS = (torch.float32, torch.bfloat16, torch.float16)


class _Version(BaseModel):
    """The one entry that the header has in every version."""

    version: int


class _Memory(BaseModel):
    """Of the decoders: after how many blocks and samples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    blocks: Annotated[int, Field(ge=1)]
    sample: Annotated[int, Field(ge=0, lt=2**62)]


class _Header(BaseModel):
    """The metadata of a state file; its numbers are held against the tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int
    model_id: Annotated[str, Field(max_length=64)]
    model_title: str = ""
    layout: tuple[Latents, Latents, Latents, Latents]
    height: int
    width: int
    window: int
    opening: Annotated[int, Field(ge=0, le=64)] = 0
    kept: Kept = AS_COMPUTED
    seeds: Annotated[tuple[int, ...], Field(min_length=1, max_length=256)]
    blocks: int = Field(ge=0)
    dropped: int = Field(default=0, ge=0)
    """Blocks, counted from the first, whose latents are not here any more."""
    memory: _Memory | None = None
    keys: dict[Branch, Annotated[int, Field(ge=0)]] = {}
    """Blocks, counted from the first, up to which each branch's keys were saved."""
    schedule: tuple[Line, ...] = ()
    speeches: tuple[Speech, ...] = ()

    @model_validator(mode="after")
    def _keys_are_of_blocks(self) -> _Header:
        for branch, end in self.keys.items():
            if end > self.blocks:
                raise ValueError(
                    f"{branch} has keys of {end} blocks, expected at most {self.blocks}"
                )
        if self.dropped > max(0, self.blocks - 1):
            raise ValueError(f"{self.dropped} of {self.blocks} blocks are dropped")
        if any(a.start >= b.start for a, b in pairwise(self.schedule)):
            raise ValueError("the schedule's times do not rise")
        if self.memory is not None and self.memory.blocks > self.blocks:
            raise ValueError(
                f"memory is of {self.memory.blocks} blocks, expected at most {self.blocks}"
            )
        return self


def save_state(
    path: Path,
    state: StreamState,
    *,
    keys: bool = True,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a state.

    Args:
        keys: keep the keys and values too: a larger file that goes on at once, and exactly even
            where its prompts cannot be encoded again.
        notes: further entries of the file's metadata, such as the graph that made it.

    Raises:
        OSError: it cannot be written; an older file at `path` stays as it was.
    """
    layout, settings = state.layout, state.settings
    tensors: dict[str, Tensor | Joined] = {}
    if state.latents:
        tensors["video"] = Joined([block.video for block in state.latents], dim=2)
        tensors["audio"] = Joined([block.audio for block in state.latents], dim=1)
    if state.prefix is not None:
        tensors |= {f"prefix.{name}": x for name, x in state.prefix._asdict().items()}
    if state.past is not None:
        tensors |= {f"past.{name}": x for name, x in state.past.tensors().items()}
    saved, opening = {}, 0
    for branch in _BRANCHES if keys else ():
        cache = getattr(state, branch)
        if cache is not None:
            saved[branch], opening = cache.next_block, cache.opening
            tensors |= dict(_key_tensors(branch, cache))
    memory = state.memory
    remembered = None
    if memory is not None:
        sample = memory.decoders.audio.vocoder.sample
        remembered = _Memory(blocks=memory.blocks, sample=sample)
        tensors |= {f"memory.{name}": x for name, x in memory.decoders.tensors().items()}
    header = _Header(
        version=state.version,
        model_id=state.model_id,
        model_title=state.model_title,
        layout=(layout.video_first, layout.audio_first, layout.video_next, layout.audio_next),
        height=settings.height,
        width=settings.width,
        window=settings.window,
        opening=opening,
        kept=settings.kept,
        seeds=settings.seeds,
        blocks=state.next_block,
        dropped=state.dropped,
        memory=remembered,
        keys=saved,
        schedule=state.schedule,
        speeches=state.speeches,
    )
    notes = {version.NOTE: version.VERSION, **(notes or {})}
    metadata = {**notes, "format": FORMAT, "header": header.model_dump_json()}
    write_tensors(Path(path), tensors, metadata, "the stream state")


class Summary(NamedTuple):
    """What a stream is: its seconds, a line of facts, and the prompts that it followed."""

    seconds: float
    facts: str
    schedule: str


def summary_of(header: StreamState | _Header) -> Summary:
    """Of a stream, or of what its file says of it."""
    if isinstance(header, StreamState):
        settings, layout, blocks = header.settings, header.layout, header.next_block
    else:
        size = header.height, header.width
        settings = StreamSettings(*size, header.window, header.seeds, header.kept)
        layout, blocks = BlockLayout(*header.layout), header.blocks
    seconds, (height, width) = float(clock_of(layout).seconds(blocks)), settings.pixels
    model, seeds = header.model_title or header.model_id, ", ".join(map(str, settings.seeds))
    facts = f"{seconds:.1f} s of {width} x {height}, {model}, seed {seeds}"
    return Summary(seconds, facts, written(header.schedule))


def saved_summary(metadata: Mapping[str, str]) -> Summary:
    """Of a stream by its file's metadata alone, unchecked against its tensors.

    Raises:
        ValueError: it is none, or of another version of this pack.
    """
    header = _Header.model_validate_json(metadata.get("header", ""))
    if header.version != STATE_VERSION:
        raise ValueError(f"it has version {header.version}, expected {STATE_VERSION}")
    return summary_of(header)


def load_state(path: Path) -> StreamState:
    """Read a state. Whether it fits a model is checked where it goes on (`check_state`).

    Raises:
        TensorFileError: not a state file, cut short, of another version of this pack, or not whole.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path, "the stream state", _REMEDY)
    if metadata.get("format") != FORMAT or "header" not in metadata:
        raise TensorFileError(f"{path} is a safetensors file but not a stream state; {_REMEDY}")
    try:
        found = _Version.model_validate_json(metadata["header"]).version
        if found != STATE_VERSION:
            raise TensorFileError(
                f"the stream state {path} has version {found}, expected {STATE_VERSION}: it was "
                "saved by another version of this pack; open it with that version, or make the "
                "stream again"
            )
        header = _Header.model_validate_json(metadata["header"])
        layout = BlockLayout(*header.layout)
        size = header.height, header.width
        settings = StreamSettings(*size, header.window, header.seeds, header.kept)
    except TensorFileError:
        raise
    except ValueError as error:
        raise TensorFileError(
            f"the stream state {path} has a damaged header ({reason_of(error)}); {_REMEDY}"
        ) from error
    left = dict(tensors)
    try:
        latents = tuple(_blocks(left, header, layout))
        caches = {branch: _cache(branch, left, header) for branch in header.keys}
        memory = _memory(left, header)
        past = None
        if any(name.startswith("past.") for name in left):
            found = {name: _taken(left, name, _LATENTS) for name in tensors if name[:5] == "past."}
            past = StreamMemory.of({name[5:]: tensor for name, tensor in found.items()})
        prefix = None
        if any(name.startswith("prefix.") for name in left):
            names = (f"prefix.{name}" for name in BlockLatents._fields)
            prefix = BlockLatents(*(_taken(left, name, _LATENTS) for name in names))
        if left:
            raise ValueError(f"it has {some(left)}, which no stream state has")
        state = StreamState(
            settings,
            header.model_id,
            layout,
            latents,
            **caches,
            schedule=header.schedule,
            speeches=header.speeches,
            memory=memory,
            dropped=header.dropped,
            prefix=prefix,
            past=past,
            model_title=header.model_title,
        )
        check_shapes(state, {})
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{some([name])} has NaN or infinite values")
    except KeyError as error:
        raise TensorFileError(
            f"the stream state {path} lacks the tensor {error}; save the state again"
        ) from error
    except ValueError as error:
        raise TensorFileError(
            f"the stream state {path} cannot be used: {reason_of(error)}; {_REMEDY}"
        ) from error
    return state


def _key_tensors(branch: str, cache: RollingCache) -> Iterator[tuple[str, Tensor]]:
    for index, block in zip(cache.indices, cache.blocks, strict=True):
        for attention, pair in zip(ATTENTIONS, block, strict=True):
            for part, tensor in zip(parts_of(cache.kept), pair, strict=True):
                yield f"{branch}.{index}.{attention}.{part}", tensor.detach().cpu()


def _taken(tensors: dict[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """One of the tensors, which is no longer among them then, in memory of its own."""
    tensor = tensors.pop(name)
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {found}, expected {expected}")
    return tensor.clone()


def _cache(branch: Branch, tensors: dict[str, Tensor], header: _Header) -> RollingCache:
    kept = kept_blocks(header.keys[branch], header.window, header.opening)

    dtypes = (SHORT,) if header.kept == EIGHT_BITS else _KEYS

    def keys_values(index: int, attention: str) -> tuple[Tensor, ...]:
        name = f"{branch}.{index}.{attention}"
        return tuple(
            _taken(tensors, f"{name}.{part}", _LATENTS if part in SCALES else dtypes)
            for part in parts_of(header.kept)
        )

    blocks = tuple(
        BlockKeys(*(keys_values(index, attention) for attention in ATTENTIONS)) for index in kept
    )
    return RollingCache(header.window, kept, blocks, header.opening, header.kept)


def _memory(tensors: dict[str, Tensor], header: _Header) -> Memory | None:
    """What the decoders remember; whether it is of these decoders, they say (`remember`)."""
    if header.memory is None:
        return None
    names = [name for name in tensors if name.startswith("memory.")]
    found = {
        name.removeprefix("memory."): _taken(
            tensors, name, (torch.float64,) if name == "memory.phase" else _LATENTS
        )
        for name in names
    }
    return Memory(header.memory.blocks, DecodeState.of(found, header.memory.sample))


def _blocks(
    tensors: dict[str, Tensor], header: _Header, layout: BlockLayout
) -> Iterator[BlockLatents]:
    if not header.blocks:
        return
    video, audio = (_taken(tensors, name, _LATENTS) for name in ("video", "audio"))
    first, last = header.dropped, header.blocks
    gone = layout.video_latents(first), layout.audio_latents(first)
    lengths = layout.video_latents(last) - gone[0], layout.audio_latents(last) - gone[1]
    if video.ndim != 5 or audio.ndim != 3 or (video.shape[2], audio.shape[1]) != lengths:
        raise ValueError(
            f"its latents are video {tuple(video.shape)} and audio {tuple(audio.shape)}, expected "
            f"{lengths[0]} and {lengths[1]} of them for its {last - first} blocks"
        )
    if not video.numel() or not audio.numel():
        # No size of theirs is worth anything then, the number of blocks included.
        raise ValueError("its latents hold no number")
    for block in range(first, last):
        frames = slice(*(at - gone[0] for at in layout.video_span(block)))
        samples = slice(*(at - gone[1] for at in layout.audio_span(block)))
        yield BlockLatents(video[:, :, frames].contiguous(), audio[:, samples].contiguous())
