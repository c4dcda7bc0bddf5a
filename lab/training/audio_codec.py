"""Train the audio codec on the procedural world's sounds within a time budget.

    python launch.py lab.training.audio_codec --minutes 24 --out audio_codec.safetensors

The synthesiser is trained with the true pitch (where there is one) and the pitch head with its own
loss, so the spectral losses always compare harmonics with harmonics. `lab.training.codec` has what
a codec's training has in common with that of the other.

Letters: b batch, n samples at 16 kHz, f audio frames of 160 samples, s audio latents, c latent
channels.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ...networks.audio_codec import AudioCodec
from ...networks.vocoder import Controls
from .. import command
from ..world.scene import sample_scene
from ..world.sound import SAMPLE_RATE, synthesise
from .audio_losses import (
    band_loudness_loss,
    frame_loudness,
    kl_loss,
    loudness_loss,
    pitch_loss,
    spectral_loss,
)
from .codec import Run, add_options
from .pool import crops, rendered

HOP = 160
CROP_FRAMES = 201
SLICE_FRAMES = 80
# Speech has the most to say: it fills half of a batch, on top of its share of the rest.
SPEECH = 0.5


@dataclass(frozen=True)
class AudioPool:
    """Sound int16 (clips, n); true f0 float32 (clips, f) in Hz, 0 where unvoiced; kind (clips,)."""

    sound: np.ndarray
    f0: np.ndarray
    kind: np.ndarray

    def crops(
        self, rng: np.random.Generator, batch: int, frames: int, speech: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Random crops: sound (b, n) float32 in [-1, 1] and f0 (b, f).

        Args:
            speech: the part of the batch that is drawn from speech alone, where the pool has any.

        Raises:
            ValueError: the clips are shorter than the crop.
        """
        clips = rng.integers(0, len(self.sound), batch)
        spoken = np.flatnonzero(self.kind == "speech")
        if len(spoken):
            chosen = int(speech * batch)
            clips[:chosen] = rng.choice(spoken, chosen)
        sound, f0 = crops([self.sound, self.f0], [HOP, 1], clips, frames, rng)
        return torch.from_numpy(sound.astype(np.float32) / 32767), torch.from_numpy(f0)


def load_pool(base: Path, clips: int, seconds: int, seed: int) -> AudioPool:
    """The pool at `base`, rendered first where it is not there or holds another number of clips."""
    rng, frames = np.random.default_rng(seed), 1 + 100 * seconds

    def clip() -> tuple[np.ndarray, ...]:
        scene = sample_scene(rng)
        wave, f0 = synthesise(scene, SAMPLE_RATE * int(rng.integers(0, 8)), frames * HOP)
        sound = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
        return sound, f0.astype(np.float32), np.array(scene.kind, "U16")

    return AudioPool(*rendered(base, ("sound", "f0", "kind"), clips, clip))


def slice_starts(sound: Tensor, rng: np.random.Generator, frames: int) -> list[int]:
    """Where to cut the part that is synthesised, one start per clip: anywhere, but rather where
    sound is.
    """
    level = frame_loudness(sound).numpy()
    starts = []
    for row in level:
        options = rng.integers(0, len(row) - frames + 1, 2)
        energies = [row[o : o + frames].sum() for o in options]
        starts.append(int(options[int(np.argmax(energies))] if rng.random() < 0.7 else options[0]))
    return starts


def _cut(values: Tensor, starts: list[int], frames: int, unit: int = 1) -> Tensor:
    return torch.stack(
        [v[s * unit : (s + frames) * unit] for v, s in zip(values, starts, strict=True)]
    )


def losses(
    codec: AudioCodec, sound: Tensor, f0: Tensor, rng: np.random.Generator, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of sounds (b, n) with true f0 (b, f), and its parts by name."""
    mean, log_std = codec.encode_moments(sound)
    raw = mean + log_std.exp() * torch.randn_like(mean)
    controls, logits, _ = codec.decode_controls(raw)
    level = frame_loudness(sound)
    pitch = pitch_loss(logits, controls.f0.log(), f0, level, codec.f0_grid)
    # One frame more in front: the synthesiser ramps from the frame before.
    frames = min(SLICE_FRAMES, f0.shape[1] - 1)
    starts = slice_starts(sound, rng, frames + 1)
    driven = Controls(
        torch.where(f0 > 0, f0, controls.f0.detach()), controls.harmonics, controls.noise
    )
    driven = Controls(*(_cut(value, starts, frames + 1) for value in driven))
    made, _ = codec.vocoder(driven)
    made = made[:, HOP:]
    true = _cut(sound, starts, frames + 1, HOP)[:, HOP:]
    spectral, attack = spectral_loss(made, true), loudness_loss(made, true)
    bands, kl = band_loudness_loss(made, true), kl_loss(mean, log_std)
    total = spectral + 0.3 * attack + 0.3 * bands + pitch + kl_weight * kl
    parts = {"spectral": spectral, "attack": attack, "bands": bands, "pitch": pitch, "kl": kl}
    return total, parts


class AudioRecipe:
    """What is the audio codec's own in its training."""

    kind, warmup_steps = "audio_codec", 100

    def __init__(self, pool: AudioPool, kl_weight: float, batch: int) -> None:
        self.pool, self.kl_weight, self.batch = pool, kl_weight, batch

    def matrix(self, name: str, parameter: Tensor) -> bool:
        """None: all are stepped by AdamW."""
        return False

    def loss(
        self, codec: AudioCodec, progress: float, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a random batch."""
        sound, f0 = self.pool.crops(rng, self.batch, CROP_FRAMES, SPEECH)
        return losses(codec, sound, f0, rng, self.kl_weight)

    def raw_latents(self, codec: AudioCodec) -> Tensor:
        """Of random crops."""
        sound, _ = self.pool.crops(np.random.default_rng(1), 256, CROP_FRAMES)
        means = torch.cat([codec.encode_moments(part)[0] for part in sound.split(16)])
        return rearrange(means, "b s c -> (b s) c")

    def quality(self, codec: AudioCodec) -> dict[str, float]:
        """Nothing: lab.training.audio_report takes longer than a log can wait."""
        return {}


def work(args: argparse.Namespace) -> None:
    """Run the recipe until the budget is spent."""
    pool = load_pool(args.pool or args.out.with_name("audio_pool"), args.clips, 3, args.seed)
    torch.manual_seed(args.seed)
    Run(AudioCodec(), AudioRecipe(pool, args.kl, args.batch), args).train()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.audio_codec", __doc__)
    add_options(p, minutes=24.0, lr=2e-3, kl=5e-3, clips=3000)
    p.add_argument("--batch", type=int, default=16)
    return p


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
