"""One chunk of a stream as two plain tensors, and back: what travels on ComfyUI's LATENT wires.

b batch, c channels, f h w video latent grid, s audio latents, q frequency bins of an audio latent.
ComfyUI's audio latents have four dimensions (b, c, s, q): LTX-2's 128 channels are 8 x 16. A chunk
can only be decoded without a seam if what came before it is known, so a `ChunkOrigin` travels
along; its tensors are those of the state, not copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from .clock import Clock
from .state import BlockLatents, StreamState


@dataclass(frozen=True)
class ChunkOrigin:
    """Where a chunk belongs.

    Attributes:
        state: the stream up to the chunk's end, without keys and values.
        first_block: of the chunk.
        clock: of the stream.
        audio_bins: q.
    """

    state: StreamState
    first_block: int
    clock: Clock
    audio_bins: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.first_block < self.state.next_block:
            raise ValueError(
                f"chunk starts at block {self.first_block}, expected one of the stream's "
                f"{self.state.next_block} blocks"
            )


def chunk_origin(
    state: StreamState, first_block: int, clock: Clock, audio_bins: int = 1
) -> ChunkOrigin:
    """The origin of the chunk that ends with `state`; keys and values are left behind."""
    return ChunkOrigin(state.without_keys(), first_block, clock, audio_bins)


def chunk_tensors(origin: ChunkOrigin) -> tuple[Tensor, Tensor]:
    """Video (b, c, f, h, w) and audio (b, c, s, q) of a chunk, new tensors."""
    state = origin.state
    blocks = [state.block(index) for index in range(origin.first_block, state.next_block)]
    video = torch.cat([block.video for block in blocks], dim=2)
    audio = torch.cat([block.audio for block in blocks], dim=1)
    return video, rearrange(audio, "b s (c q) -> b c s q", q=origin.audio_bins).contiguous()


def chunk_state(origin: ChunkOrigin, video: Tensor, audio: Tensor) -> StreamState:
    """The stream with this chunk's latents as they are now; other nodes may have worked on them.

    Raises:
        ValueError: another number of latents, another size or another batch than the chunk was made
            with.
    """
    layout, first, last = origin.state.layout, origin.first_block, origin.state.next_block
    made_video, made_audio = chunk_tensors(origin)
    for name, found, made in (("video", video, made_video), ("audio", audio, made_audio)):
        if found.shape != made.shape:
            raise ValueError(
                f"{name} latent has shape {tuple(found.shape)}, expected {tuple(made.shape)} as it "
                "was sampled; decode it without cutting or resizing it, and resize the frames "
                "instead (latents of LTX-2 that were cut or enlarged: with ComfyUI's VAE Decode "
                "and LTXV Audio VAE Decode)"
            )
    if torch.equal(video.float().cpu(), made_video) and torch.equal(
        audio.float().cpu(), made_audio
    ):
        return origin.state  # what was decoded of it before goes by its tensors
    video_cuts = [layout.video_span(block)[0] for block in range(first, last + 1)]
    audio_cuts = [layout.audio_span(block)[0] for block in range(first, last + 1)]
    sound = rearrange(audio, "b c s q -> b s (c q)")
    blocks = [
        BlockLatents(
            video[:, :, v0 - video_cuts[0] : v1 - video_cuts[0]].float().cpu(),
            sound[:, a0 - audio_cuts[0] : a1 - audio_cuts[0]].float().cpu(),
        )
        for (v0, v1), (a0, a1) in zip(pairwise(video_cuts), pairwise(audio_cuts), strict=True)
    ]
    kept = origin.state.latents[: first - origin.state.dropped]
    memory = origin.state.memory
    if memory is not None and memory.blocks > first:  # of latents that may be others now
        memory = None
    return replace(origin.state, latents=(*kept, *blocks), memory=memory)
