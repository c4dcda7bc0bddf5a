"""Stream states on disk: stop today, go on tomorrow, bit for bit as if nothing had happened.

b batch, c channels, f h w video latent grid, s audio latents.
One safetensors file holds the clean latents of all blocks, `video` (b, c, f, h, w) and `audio` (b,
s, c), and the keys and values of the window; the header is JSON in the metadata. Without the keys
the file is small and they are made again when the stream goes on, which takes one pass per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..networks.kv_cache import PATHS, BlockKeys, RollingCache
from ..networks.layout import BlockLayout
from .state import STATE_VERSION, BlockLatents, StreamSettings, StreamState
from .tensor_file import TensorFileError, read_tensors, write_tensors

FORMAT = "mutual-forcing-state"
_REMEDY = "choose a file that was saved as a stream state"
_BRANCHES: tuple[Literal["cache", "unguided"], ...] = ("cache", "unguided")


class _Header(BaseModel):
    """The metadata of a state file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    model_id: str
    layout: tuple[int, int, int, int]
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    window: int = Field(ge=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    blocks: int = Field(ge=0)
    keys: dict[str, int] = {}
    """Blocks, counted from the first, up to which each branch's keys were saved."""


def save_state(path: Path, state: StreamState, *, keys: bool = True) -> None:
    """Write a state.

    Args:
        keys: keep the keys and values too: a larger file that goes on at once, and exactly even
            where the prompt was changed in mid-stream.

    Raises:
        OSError: it cannot be written; an older file at `path` stays as it was.
    """
    layout, settings = state.layout, state.settings
    tensors: dict[str, Tensor] = {}
    if state.latents:
        tensors["video"] = torch.cat([block.video for block in state.latents], dim=2)
        tensors["audio"] = torch.cat([block.audio for block in state.latents], dim=1)
    saved = {}
    for branch in _BRANCHES if keys else ():
        cache = getattr(state, branch)
        if cache is not None:
            saved[branch] = cache.next_block
            tensors |= dict(_key_tensors(branch, cache))
    header = _Header(
        version=state.version,
        model_id=state.model_id,
        layout=(layout.video_first, layout.audio_first, layout.video_next, layout.audio_next),
        height=settings.height,
        width=settings.width,
        window=settings.window,
        seeds=settings.seeds,
        blocks=len(state.latents),
        keys=saved,
    )
    metadata = {"format": FORMAT, "header": header.model_dump_json()}
    write_tensors(Path(path), tensors, metadata, "the stream state")


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
        header = _Header.model_validate_json(metadata["header"])
        layout = BlockLayout(*header.layout)
    except ValueError as error:
        raise TensorFileError(f"the stream state {path} has a damaged header: {error}") from error
    if header.version != STATE_VERSION:
        raise TensorFileError(
            f"the stream state {path} has version {header.version}, expected {STATE_VERSION}: it "
            "was saved by another version of this pack; open it with that version, or make the "
            "stream again"
        )
    settings = StreamSettings(header.height, header.width, header.window, header.seeds)
    try:
        latents = tuple(_blocks(tensors, header, layout))
        caches = {
            branch: _cache(branch, tensors, header.window, header.keys[branch])
            for branch in _BRANCHES
            if branch in header.keys
        }
    except KeyError as error:
        raise TensorFileError(
            f"the stream state {path} lacks the tensor {error}; save the state again"
        ) from error
    return StreamState(settings, header.model_id, layout, latents, **caches)


def _key_tensors(branch: str, cache: RollingCache) -> Iterator[tuple[str, Tensor]]:
    for index, block in zip(cache.indices, cache.blocks, strict=True):
        for path, (k, v) in zip(PATHS, block, strict=True):
            yield f"{branch}.{index}.{path}.k", k.detach().cpu()
            yield f"{branch}.{index}.{path}.v", v.detach().cpu()


def _cache(branch: str, tensors: dict[str, Tensor], window: int, end: int) -> RollingCache:
    kept = tuple(index for index in range(end) if index == 0 or index >= end - window)

    def pair(index: int, path: str) -> tuple[Tensor, Tensor]:
        name = f"{branch}.{index}.{path}"
        return tensors[f"{name}.k"], tensors[f"{name}.v"]

    blocks = tuple(BlockKeys(*(pair(index, path) for path in PATHS)) for index in kept)
    return RollingCache(window, kept, blocks)


def _blocks(
    tensors: dict[str, Tensor], header: _Header, layout: BlockLayout
) -> Iterator[BlockLatents]:
    if not header.blocks:
        return
    video, audio = tensors["video"], tensors["audio"]
    batch = len(header.seeds)
    grid = (layout.video_latents(header.blocks), header.height, header.width)
    length = layout.audio_latents(header.blocks)
    whole = video.ndim == 5 and audio.ndim == 3
    if not whole or (*video.shape[:1], *video.shape[2:], *audio.shape[:2]) != (
        (batch, *grid, batch, length)
    ):
        raise TensorFileError(
            f"the stream state's latents are video {tuple(video.shape)} and audio "
            f"{tuple(audio.shape)}, expected ({batch}, c, {', '.join(map(str, grid))}) and "
            f"({batch}, {length}, c) for its {header.blocks} blocks; save it again"
        )
    for block in range(header.blocks):
        frames, samples = slice(*layout.video_span(block)), slice(*layout.audio_span(block))
        yield BlockLatents(video[:, :, frames].contiguous(), audio[:, samples].contiguous())
