"""One chunk of a stream as two plain tensors, and back: what travels on ComfyUI's LATENT wires.

b batch, c channels, f h w video latent grid, s audio latents.
ComfyUI's audio latents have four dimensions (b, c, s, 1). A chunk can only be decoded without a seam if what
came before it is known, so a `ChunkOrigin` travels along; its tensors are those of the state, not copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from .state import BlockLatents, StreamState


@dataclass(frozen=True)
class ChunkOrigin:
    """Where a chunk belongs: the stream up to its end (without keys and values), and its first block."""

    state: StreamState
    first_block: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_block < self.state.next_block:
            raise ValueError(
                f"chunk starts at block {self.first_block}, expected one of the stream's "
                f"{self.state.next_block} blocks"
            )


def chunk_origin(state: StreamState, first_block: int) -> ChunkOrigin:
    """The origin of the chunk that ends with `state`; keys and values are left behind."""
    return ChunkOrigin(replace(state, cache=None, unguided=None), first_block)


def chunk_tensors(origin: ChunkOrigin) -> tuple[Tensor, Tensor]:
    """Video (b, c, f, h, w) and audio (b, c, s, 1) of a chunk, new tensors."""
    blocks = origin.state.latents[origin.first_block :]
    video = torch.cat([block.video for block in blocks], dim=2)
    audio = torch.cat([block.audio for block in blocks], dim=1)
    return video, rearrange(audio, "b s c -> b c s 1").contiguous()


def chunk_state(origin: ChunkOrigin, video: Tensor, audio: Tensor) -> StreamState:
    """The stream with this chunk's latents as they are now; other nodes may have worked on them.

    Raises:
        ValueError: another number of latents, another size or another batch than the chunk was made with.
    """
    layout, first, last = origin.state.layout, origin.first_block, origin.state.next_block
    made_video, made_audio = chunk_tensors(origin)
    for name, found, made in (("video", video, made_video), ("audio", audio, made_audio)):
        if found.shape != made.shape:
            raise ValueError(
                f"{name} latent has shape {tuple(found.shape)}, expected {tuple(made.shape)} as it was "
                "sampled; decode it without cutting or resizing it, and resize the frames instead"
            )
    video_cuts = [layout.video_span(block)[0] for block in range(first, last + 1)]
    audio_cuts = [layout.audio_span(block)[0] for block in range(first, last + 1)]
    sound = rearrange(audio, "b c s 1 -> b s c")
    blocks = [
        BlockLatents(
            video[:, :, v0 - video_cuts[0] : v1 - video_cuts[0]].float().cpu(),
            sound[:, a0 - audio_cuts[0] : a1 - audio_cuts[0]].float().cpu(),
        )
        for (v0, v1), (a0, a1) in zip(pairwise(video_cuts), pairwise(audio_cuts), strict=True)
    ]
    return replace(origin.state, latents=(*origin.state.latents[:first], *blocks))
