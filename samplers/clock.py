"""Time as integers: frames and samples of a stream, counted from absolute block and latent indices.

Both codecs give their first latent stride 1: video latent 0 is one frame and every later one 8,
audio latent 0 is one audio frame and every later one 4 (160 samples each at 16 kHz).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ..networks.config import TransformerConfig
from ..networks.layout import BlockLayout


@dataclass(frozen=True)
class Clock:
    """Converts between blocks, latents, frames and samples.

    Attributes:
        fps: video frames a second.
        sample_rate: audio samples a second.
        video_stride: frames per video latent after the first.
        audio_stride: audio frames per audio latent after the first.
        samples_per_audio_frame: audio samples in one audio frame.
    """

    layout: BlockLayout
    fps: Fraction = Fraction(24)
    sample_rate: int = 16000
    video_stride: int = 8
    audio_stride: int = 4
    samples_per_audio_frame: int = 160

    @classmethod
    def of(cls, config: TransformerConfig) -> Clock:
        """That of a network's streams; samples as its audio latents count them."""
        return cls(
            config.layout,
            Fraction(config.fps).limit_denominator(1001),
            config.audio_sampling_rate,
            config.video_time_stride,
            config.audio_time_stride,
            config.audio_hop_length,
        )

    def frames(self, blocks: int) -> int:
        """Video frames in the first `blocks` blocks."""
        latents = self.layout.video_latents(blocks)
        return 1 + (latents - 1) * self.video_stride if latents else 0

    def samples(self, blocks: int) -> int:
        """Audio samples in the first `blocks` blocks."""
        latents = self.layout.audio_latents(blocks)
        frames = 1 + (latents - 1) * self.audio_stride if latents else 0
        return frames * self.samples_per_audio_frame

    def frame_span(self, block: int) -> tuple[int, int]:
        """First and one-past-last video frame of a block."""
        return self.frames(block), self.frames(block + 1)

    def sample_span(self, block: int) -> tuple[int, int]:
        """First and one-past-last audio sample of a block."""
        return self.samples(block), self.samples(block + 1)

    def seconds(self, blocks: int) -> Fraction:
        """How long the frames of the first `blocks` blocks last."""
        return self.frames(blocks) / Fraction(self.fps)

    def block_at(self, seconds: float | Fraction) -> int:
        """First block whose frames begin at or after `seconds`."""
        return self.blocks_for(seconds) if seconds > 0 else 0

    def time_of(self, block: int) -> float:
        """The roundest number of seconds, as a decimal, that a block is the first one after."""
        exact, digits = self.seconds(block), 1
        while self.block_at(rounded := math.floor(exact * digits) / digits) != block:
            digits *= 10
        return rounded

    def blocks_for(self, seconds: float | Fraction, start: int = 0) -> int:
        """Fewest blocks after the first `start` whose frames last at least `seconds`.

        From the start of a stream the prefix is one of them: 10 s are 240 frames, and with a prefix
        of one frame that takes 11 blocks (241 frames).

        Raises:
            ValueError: not a positive, finite length.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"length is {seconds} seconds, expected a number above 0")
        # A float such as 241 / 24 may lie a hair above what was meant: that must not cost a block.
        wanted = math.ceil(Fraction(seconds) * self.fps - Fraction(1, 1_000_000))
        last_frame = self.frames(start) + max(wanted, 1)
        latents = 1 + _divided_up(last_frame - 1, self.video_stride)
        further = max(0, latents - self.layout.video_first)
        blocks = 1 + _divided_up(further, self.layout.video_next)
        return max(blocks - start, 1)


def _divided_up(a: int, b: int) -> int:
    return -(-a // b)
