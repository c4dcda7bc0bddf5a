"""Somebody else's clip, through whatever VAEs are wired in, as a stream to go on from.

b batch, F H W pixel frames and size, n samples.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import comfy.utils
import torch
import torchaudio
from einops import rearrange
from torch import Tensor

from ..samplers.encode import cut_to_blocks, encoded
from ..samplers.state import StreamState
from ..samplers.stream_memory import remembered
from .decoding import clip_decoder
from .stream_model import StreamModel

Sound = dict[str, object]
"""What is on an AUDIO wire: `waveform` (b, channels, n) and `sample_rate`."""


class Clip(NamedTuple):
    """Pictures (F, H, W, 3), sound from the first of them on (None: silence), and frame rate."""

    pictures: Tensor
    sound: Sound | None
    fps: Fraction


def end_of_video(video: object, seconds: float) -> Clip:
    """The last seconds of a VIDEO."""
    start = max(0.0, float(video.get_duration()) - seconds)
    part = video.as_trimmed(start, seconds, strict_duration=False) if start else None
    found = (part or video).get_components()
    return Clip(found.images, found.audio, Fraction(found.frame_rate))


def audio_latents(audio_vae: object, wave: Tensor) -> Tensor:
    """Sound (b, channels, n) at the VAE's rate to latents (b, s, c)."""
    latents = audio_vae.encode(rearrange(wave, "b c n -> b n c"))
    return rearrange(latents, "b c s q -> b s (c q)")


def stream_of_clip(
    wire: object,
    model: StreamModel,
    state: StreamState,
    vaes: tuple[object, object],
    clip: Clip,
    seconds: int,
) -> StreamState:
    """A stream that begins with the last seconds of a clip, at the stream's size and rate.

    Args:
        wire: the MODEL, whose own VAEs are used where no other is connected.
        state: before the first block.
        clip: what stands beyond the stream's shape on either side is cut off.
        seconds: as many, or as many whole blocks as the clip has.

    Raises:
        ValueError: a VAE is missing or another model's, or the clip is too short.
    """
    config, clock, settings = model.transformer.config, model.clock, state.settings
    channels = config.in_channels, config.audio_in_channels
    decoder = clip_decoder(*vaes, clock, channels=channels, model=wire)
    size = settings.pixels
    pictures, sound, fps = clip
    # A frame stands until the next one.
    count = int(len(pictures) / fps * clock.fps)
    shown = (torch.arange(count) * fps.numerator * clock.fps.denominator) // (
        fps.denominator * clock.fps.numerator
    )
    pictures = pictures[shown.clamp(max=len(pictures) - 1)][None, ..., :3]
    rate = decoder.audio_vae.audio_sample_rate
    wave = torch.zeros(1, 1, 0)
    if sound is not None:
        wave = sound["waveform"][:1].float()
        wave = torchaudio.functional.resample(wave, sound["sample_rate"], rate)

    def encode_video(frames: Tensor) -> Tensor:
        scaled = rearrange(frames[0], "f h w rgb -> f rgb h w")
        scaled = comfy.utils.common_upscale(scaled, size[1], size[0], "lanczos", "center")
        return decoder.vae.encode(rearrange(scaled, "f rgb h w -> f h w rgb"))

    most = clock.blocks_for(seconds)
    pictures, wave, blocks = cut_to_blocks(clock, pictures, wave, rate, most)
    state = encoded(state, blocks, encode_video(pictures), audio_latents(decoder.audio_vae, wave))
    if config.keeps_memory:
        *_, past = remembered(state.latents)
        state = replace(state, past=past)
    return decoder.in_phase(state, wave.mean(dim=1, keepdim=True))
