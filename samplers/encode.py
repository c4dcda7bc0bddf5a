"""A clip that somebody else made, as a stream: to go on from, or as what is given for what comes.

b batch, c channels, f h w video latent grid, s audio latents, F H W pixel frames and size,
n samples.
A stream's pictures and sound begin together, its blocks are whole, and going on begins where they
end. So a clip is cut at its beginning.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor

from .clock import Clock
from .decode import StreamDecoder
from .state import BlockLatents, Memory, StreamState

_PHASES = 32  # places in a wave that are tried
_TAIL = 4  # audio latents in which they are compared: a sixth of a second


def cut_to_blocks(
    clock: Clock, pictures: Tensor, sound: Tensor, sample_rate: int, most: int
) -> tuple[Tensor, Tensor, int]:
    """The last whole blocks of a clip, and how many they are.

    Args:
        pictures: (b, F, H, W, 3), at the clock's frame rate.
        sound: (b, channels, n) from the first frame on; what it lacks at its end is silence.
        most: blocks.

    Raises:
        ValueError: less than the first block.
    """
    count, blocks = pictures.shape[1], 0
    while blocks < most and clock.frames(blocks + 1) <= count:
        blocks += 1
    if not blocks:
        raise ValueError(
            f"the clip has {count} frames, expected at least {clock.frames(1)} at "
            f"{float(clock.fps):g} frames a second: give a longer one"
        )
    first = count - clock.frames(blocks)
    begin = round(first / clock.fps * sample_rate)
    length = -(-clock.samples(blocks) * sample_rate // clock.sample_rate)
    sound = torch.nn.functional.pad(sound[..., begin : begin + length], (0, length))[..., :length]
    return pictures[:, first:], sound, blocks


def encoded(state: StreamState, blocks: int, video: Tensor, audio: Tensor) -> StreamState:
    """A new stream that begins with a clip.

    Args:
        state: before its first block.
        blocks: of the clip.
        video, audio: latents (1, c, f, h, w) and (1, s, c), for every clip of the stream.
    """
    layout, clips = state.layout, len(state.settings.seeds)
    audio = as_long(audio, layout.audio_latents(blocks))
    video, audio = (x.float().cpu().expand(clips, *x.shape[1:]) for x in (video, audio))
    latents = (
        BlockLatents(
            video[:, :, slice(*layout.video_span(block))].contiguous(),
            audio[:, slice(*layout.audio_span(block))].contiguous(),
        )
        for block in range(blocks)
    )
    return replace(state, latents=tuple(latents), cache=None)


def as_long(audio: Tensor, count: int) -> Tensor:
    """Latents (b, s, c) cut to a number, or with the last one held: codecs leave a rest out."""
    missing = count - audio.shape[1]
    return torch.cat((audio[:, :count], audio[:, -1:].expand(-1, max(0, missing), -1)), dim=1)


@torch.no_grad()
def in_phase(decoder: StreamDecoder, state: StreamState, sound: Tensor) -> StreamState:
    """The same stream with the decoders' memory, in which a tone goes on as the clip's does.

    Latents say how high a tone is and not where its wave stands. Of all places that is taken which
    sounds most like the end of the clip.

    Args:
        sound: (b or 1, 1, n), which ends with the last block's.
    """
    memory = decoder.remember(state, state.next_block)
    audio = torch.cat([block.audio for block in state.latents[-2:]], dim=1)[:, -2 * _TAIL :]
    if audio.shape[1] == 2 * _TAIL:
        waves = sound.expand(len(audio), -1, -1)[:, 0]
        ends = [_phase(decoder, one, wave) for one, wave in zip(audio, waves, strict=True)]
        vocoder = memory.audio.vocoder._replace(phase=torch.stack(ends))
        memory = memory._replace(audio=memory.audio._replace(vocoder=vocoder))
    return replace(state, memory=Memory(state.next_block, memory))


def _phase(decoder: StreamDecoder, latents: Tensor, wave: Tensor) -> Tensor:
    """Where a tone's wave stands after latents (s, c), so that they sound like the end of `wave`.

    The first half of the latents only gives the decoder its past.
    """
    tried = repeat(latents, "s c -> p s c", p=_PHASES)
    _, state = decoder.decode_audio(tried[:, :_TAIL])
    vocoder = state.vocoder
    turned = (vocoder.phase + torch.arange(_PHASES) / _PHASES) % 1
    state = state._replace(vocoder=vocoder._replace(phase=turned))
    made, after = decoder.decode_audio(tried[:, _TAIL:], state)
    likeness = made[:, 0] @ wave[-made.shape[2] :]
    return after.vocoder.phase[likeness.argmax()]
