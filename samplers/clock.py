"""Time as integers: frames and samples of a stream, counted from absolute block and latent indices.

Both codecs give their first latent stride 1: video latent 0 is one frame and every later one 8, audio latent 0
is one audio frame and every later one 4 (160 samples each at 16 kHz).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

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

    def frames(self, blocks: int) -> int:
        """Video frames in the first `blocks` blocks."""
        latents = self.layout.video_latents(blocks)
        return 1 + (latents - 1) * self.video_stride if latents else 0

    def samples(self, blocks: int) -> int:
        """Audio samples in the first `blocks` blocks."""
        latents = self.layout.audio_latents(blocks)
        frames = 1 + (latents - 1) * self.audio_stride if latents else 0
        return frames * self.samples_per_audio_frame

    def blocks_for(self, seconds: float | Fraction) -> int:
        """Fewest blocks (prefix included) whose frames last at least `seconds`.

        Raises:
            ValueError: not a positive length.
        """
        if not seconds > 0:
            raise ValueError(f"length is {seconds} seconds, expected more than 0")
        wanted = Fraction(seconds).limit_denominator(1000) * self.fps
        blocks = 1
        while self.frames(blocks) < wanted:
            blocks += 1
        # The prefix alone (1+24k frames) gives one frame more than whole seconds: 10 s needs 240 frames,
        # and 10 blocks after a one-frame prefix already hold 241.
        return blocks
