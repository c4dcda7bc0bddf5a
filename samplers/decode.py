"""Latents to pictures and sound, block by block and without seams.

b batch, c channels, f h w video latent grid, s audio latents, F H W pixel frames and size,
n samples.
Both codecs look back only (look-ahead 0), so a block can be shown as soon as it is made, and what a
decoder remembers is a value: decoding in any cut equals decoding the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.audio_codec import AudioCodec, AudioDecoderState
from ..networks.video_codec import VideoCodec, VideoDecoderState
from .state import BlockLatents, StreamState

LOOK_AHEAD_SECONDS = 0


class DecodedBlock(NamedTuple):
    """Pictures (b, F, H, W, 3) in 0..1 and sound (b, 1, n) in -1..1, both float32 on the CPU."""

    video: Tensor
    audio: Tensor


class DecodeState(NamedTuple):
    """What both decoders remember of the blocks before; never written into."""

    video: VideoDecoderState
    audio: AudioDecoderState


class StreamDecoder:
    """Decodes the blocks of a stream in order; it holds no state, so one serves many streams."""

    def __init__(self, video_codec: VideoCodec, audio_codec: AudioCodec) -> None:
        self.video_codec, self.audio_codec = video_codec, audio_codec

    @torch.no_grad()
    def decode(
        self, latents: BlockLatents, state: DecodeState | None = None
    ) -> tuple[DecodedBlock, DecodeState]:
        """Decode the next latents of a stream: one block, or several in one.

        Args:
            latents: video (b, c, f, h, w) and audio (b, s, c).
            state: what the call before returned; None at the start of the stream.
        """
        video, video_state = self.decode_video(
            latents.video, None if state is None else state.video
        )
        audio, audio_state = self.decode_audio(
            latents.audio, None if state is None else state.audio
        )
        return DecodedBlock(video, audio), DecodeState(video_state, audio_state)

    @torch.no_grad()
    def decode_video(
        self, latents: Tensor, state: VideoDecoderState | None = None
    ) -> tuple[Tensor, VideoDecoderState]:
        """Pictures (b, F, H, W, 3) of the next latents (b, c, f, h, w), and what to remember."""
        video, state = self.video_codec.decode(_placed(latents, self.video_codec), state)
        pictures = rearrange(video, "b rgb f h w -> b f h w rgb").float().cpu()
        return ((pictures + 1) / 2).clamp(0, 1).contiguous(), state

    @torch.no_grad()
    def decode_audio(
        self, latents: Tensor, state: AudioDecoderState | None = None
    ) -> tuple[Tensor, AudioDecoderState]:
        """Sound (b, 1, n) of the next latents (b, s, c), and what to remember."""
        audio, state = self.audio_codec.decode(_placed(latents, self.audio_codec), state)
        return rearrange(audio, "b n -> b 1 n").float().cpu().clamp(-1, 1), state

    @torch.no_grad()
    def remember(self, state: StreamState, block: int) -> DecodeState | None:
        """What the decoders would remember had all blocks before `block` just been decoded.

        The pictures need a few latents before the block; the sound's phase is a sum over all of
        them, which takes about 1/20 of real time. None for block 0.
        """
        if not 0 <= block <= state.next_block:
            raise ValueError(
                f"the stream has {state.next_block} blocks, expected to decode from one of them; "
                f"found {block}"
            )
        if block == 0:
            return None
        context: list[Tensor] = []
        while (
            len(context) < block
            and sum(v.shape[2] for v in context) < self.video_codec.context_latents
        ):
            context.append(state.latents[block - 1 - len(context)].video)
        video = torch.cat(context[::-1], dim=2)
        audio = torch.cat([latents.audio for latents in state.latents[:block]], dim=1)
        _, video_state = self.video_codec.decode(_placed(video, self.video_codec))
        _, audio_state = self.audio_codec.decode(_placed(audio, self.audio_codec))
        return DecodeState(video_state, audio_state)

    def decode_from(self, state: StreamState, first_block: int = 0) -> Iterator[DecodedBlock]:
        """Decode the blocks of a stream from `first_block` on, exactly as if all had been decoded.

        Raises:
            ValueError: the stream has no such block.
        """
        memory = self.remember(state, first_block)
        for latents in state.latents[first_block:]:
            decoded, memory = self.decode(latents, memory)
            yield decoded


def joined(blocks: Iterable[DecodedBlock]) -> DecodedBlock:
    """Blocks in a row as one."""
    blocks = list(blocks)
    return DecodedBlock(
        torch.cat([block.video for block in blocks], dim=1),
        torch.cat([block.audio for block in blocks], dim=2),
    )


def _placed(latents: Tensor, codec: nn.Module) -> Tensor:
    return latents.to(next(codec.parameters()))
