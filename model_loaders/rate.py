"""Other frame rates than the trained one: positions are seconds, so any rate has some.

What binds both modalities together is the block: its video latents must last as long as a whole
number of audio latents. LTX-2 has 25 audio latents a second and 8 frames in a video latent, so a
block of 3 video latents goes with 25 audio latents at 24 frames a second, with 24 at 25, with 20 at
30.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from ..networks.config import TransformerConfig
from ..networks.layout import BlockLayout

_RATES = range(1, 121)


def audio_latents_a_second(config: TransformerConfig) -> Fraction:
    """25 for LTX-2."""
    return Fraction(config.audio_sampling_rate, config.audio_hop_length * config.audio_time_stride)


def at_rate(config: TransformerConfig, fps: float | Fraction) -> TransformerConfig:
    """The same network for another frame rate: other positions, other audio latents a block.

    Raises:
        ValueError: a block would not hold a whole number of audio latents; names rates that work.
    """
    fps = Fraction(fps).limit_denominator(1001)
    if fps == Fraction(config.fps).limit_denominator(1001):
        return config
    following = _audio_latents(config, fps)
    if following is None:
        fitting = ", ".join(
            str(rate) for rate in _RATES if _audio_latents(config, rate) is not None
        )
        raise ValueError(
            f"the frame rate is {float(fps):g}, at which a block of {config.video_next_block} "
            "video latents "
            f"does not last as long as a whole number of audio latents; use one of {fitting}"
        )
    frames = 1 + (config.video_first_block - 1) * config.video_time_stride
    first = round(frames / fps * audio_latents_a_second(config))
    return replace(
        config, fps=float(fps), audio_first_block=max(1, first), audio_next_block=following
    )


def rate_of(config: TransformerConfig, layout: BlockLayout) -> Fraction:
    """The frame rate at which this network's streams have this layout."""
    frames = layout.video_next * config.video_time_stride
    return frames * audio_latents_a_second(config) / layout.audio_next


def _audio_latents(config: TransformerConfig, fps: float | Fraction) -> int | None:
    frames = config.video_next_block * config.video_time_stride
    latents = frames * audio_latents_a_second(config) / Fraction(fps) if fps > 0 else Fraction(1, 2)
    return latents.numerator if latents.denominator == 1 else None
