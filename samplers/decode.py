"""Latents to pictures and sound, block by block and without seams.

b batch, c channels, f h w video latent grid, s audio latents, F H W pixel frames and size,
n samples.
Both codecs look back only (look-ahead 0), so a block can be shown as soon as it is made, and what a
decoder remembers is a value: decoding in any cut equals decoding the whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..networks.audio_codec import AudioCodec, AudioDecoderState
from ..networks.video_codec import VideoCodec, VideoDecoderState
from .state import BlockLatents, DecodeState, Memory, StreamState

LOOK_AHEAD_SECONDS = 0
_LEFT = WeakTensorKeyDictionary()
"""What decoders were left with after a block, by its latents and for as long as those are held: a
chunk on a wire is decoded by itself, and the next one, which shares its past, begins there."""


class DecodedBlock(NamedTuple):
    """Pictures (b, F, H, W, 3) in 0..1 and sound (b, 1, n) in -1..1, both float32 on the CPU."""

    video: Tensor
    audio: Tensor


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
        return _numbers(((pictures + 1) / 2).clamp(0, 1).contiguous(), "pictures"), state

    @torch.no_grad()
    def decode_audio(
        self, latents: Tensor, state: AudioDecoderState | None = None
    ) -> tuple[Tensor, AudioDecoderState]:
        """Sound (b, 1, n) of the next latents (b, s, c), and what to remember."""
        audio, state = self.audio_codec.decode(_placed(latents, self.audio_codec), state)
        sound = rearrange(audio, "b n -> b 1 n").float().cpu().clamp(-1, 1)
        return _numbers(sound, "sounds"), state

    @torch.no_grad()
    def remember(self, state: StreamState, block: int) -> DecodeState | None:
        """What the decoders would remember had all blocks before `block` just been decoded.

        A stream that was decoded before brings it along (`StreamState.memory`), whatever its age.
        Without that the pictures need a few latents before the block, and the sound's phase is a
        sum over all of them, which takes about 1/20 of real time. None for block 0.

        Raises:
            ValueError: the stream has no such block, or its memory is of other decoders.
        """
        if not 0 <= block <= state.next_block:
            raise ValueError(
                f"the stream has {state.next_block} blocks, expected to decode from one of them; "
                f"found {block}"
            )
        if block == 0:
            return None
        memory = self._known(state, block)
        known = None if memory is None else self._checked(memory.decoders, state)
        if memory and memory.blocks == block:
            return known
        context: list[Tensor] = []
        while (
            len(context) < block
            and sum(v.shape[2] for v in context) < self.video_codec.context_latents
        ):
            context.append(state.block(block - 1 - len(context)).video)
        video = torch.cat(context[::-1], dim=2)
        first = memory.blocks if memory else 0
        audio = torch.cat([state.block(index).audio for index in range(first, block)], dim=1)
        _, video_state = self.video_codec.decode(_placed(video, self.video_codec))
        _, audio_state = self.audio_codec.decode(
            _placed(audio, self.audio_codec), known and known.audio
        )
        return DecodeState(video_state, audio_state)

    def _known(self, state: StreamState, block: int) -> Memory | None:
        """The latest memory that there is of a time up to `block`."""
        memory = state.memory if state.memory and state.memory.blocks <= block else None
        for end in range(block, max(memory.blocks if memory else 0, state.dropped), -1):
            codec, decoders = _LEFT.get(state.block(end - 1).audio, (None, None))
            if codec is not None and codec() is self.audio_codec:
                return Memory(end, decoders)
        return memory

    def caught_up(self, state: StreamState) -> StreamState:
        """The same state with what the decoders remember after all of its blocks."""
        if not state.next_block or (state.memory and state.memory.blocks == state.next_block):
            return state
        memory = self.remember(state, state.next_block)
        return replace(state, memory=Memory(state.next_block, memory))

    def _checked(self, memory: DecodeState, state: StreamState) -> DecodeState:
        """The memory on the decoders' device; refused if it has other shapes than theirs."""
        settings, batch = state.settings, len(state.settings.seeds)
        channels = self.video_codec.config.channels, self.audio_codec.config.latent_channels
        # What they remember after a latent of each has the shapes of what they always remember.
        video = torch.zeros(batch, channels[0], 1, settings.height, settings.width)
        _, made = self.decode(BlockLatents(video, torch.zeros(batch, 1, channels[1])))
        found, expected = (
            {name: tuple(x.shape) for name, x in each.tensors().items()} for each in (memory, made)
        )
        for name in (*expected, *found):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"the stream's decoder memory has {name} of {found.get(name)}, expected "
                    f"{expected.get(name)}: load the model that made it, or start a new stream"
                )
        return memory.to(next(self.video_codec.parameters()).device)

    def decode_from(self, state: StreamState, first_block: int = 0) -> Iterator[DecodedBlock]:
        """Decode the blocks of a stream from `first_block` on, exactly as if all had been decoded.

        Raises:
            ValueError: the stream has no such block.
        """
        memory = self.remember(state, first_block)
        for block in range(first_block, state.next_block):
            decoded, memory = self.decode(state.block(block), memory)
            yield decoded
        if memory is not None:
            left = weakref.ref(self.audio_codec), memory
            _LEFT[state.block(state.next_block - 1).audio] = left


class Collected:
    """A clip in memory, one block after the other in its place: it is never there twice.

    Args:
        frames: how many there will be; room for more is made when they come.
    """

    def __init__(self, frames: int) -> None:
        self._frames, self._seen = frames, 0
        self._video: Tensor | None = None
        self._audio: list[Tensor] = []

    def add(self, decoded: DecodedBlock) -> None:
        """Append a block."""
        batch, count, *size = decoded.video.shape
        if self._video is None:
            self._video = torch.empty(batch, self._frames, *size)
        if self._seen + count > self._video.shape[1]:
            self._video = torch.cat((self._video, torch.empty_like(self._video)), dim=1)
        self._video[:, self._seen : self._seen + count] = decoded.video
        self._seen += count
        self._audio.append(decoded.audio)

    def whole(self) -> DecodedBlock:
        """All that was added."""
        return DecodedBlock(self._video[:, : self._seen], torch.cat(self._audio, dim=2))


def joined(blocks: Iterable[DecodedBlock]) -> DecodedBlock:
    """Blocks in a row as one."""
    blocks = list(blocks)
    return DecodedBlock(
        torch.cat([block.video for block in blocks], dim=1),
        torch.cat([block.audio for block in blocks], dim=2),
    )


def _numbers(decoded: Tensor, what: str) -> Tensor:
    """What was decoded, if it can be shown: latents may be finite and too large for a decoder."""
    if decoded.isnan().any():
        raise ValueError(
            f"the stream's {what} decode to NaN, so its latents or the decoders' memory are "
            "damaged; go on from an older state, or start a new stream"
        )
    return decoded


def _placed(latents: Tensor, codec: nn.Module) -> Tensor:
    return latents.to(next(codec.parameters()))
