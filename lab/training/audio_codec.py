"""Train the audio codec on the procedural world's sounds within a time budget.

    python launch.py lab.training.audio_codec --minutes 24 --out audio_codec.safetensors

The synthesiser is trained with the true pitch (where there is one) and the pitch head with its own
loss, so the spectral losses always compare harmonics with harmonics. What is saved is a moving
average of the weights, with the latent statistics measured under it; `<out>.resume` beside it lets
the same command go on after a kill.

Letters: b batch, n samples, f audio frames, s audio latents, c latent channels.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...networks.audio_codec import AudioCodec, AudioCodecConfig
from ...networks.vocoder import Controls
from ...samplers.atomic_file import replacing
from .audio_losses import (
    band_loudness_loss,
    frame_loudness,
    kl_loss,
    loudness_loss,
    pitch_loss,
    spectral_loss,
)
from .audio_pool import HOP, AudioPool, load_pool

log = logging.getLogger("mutualforcing")

CHECKPOINT_SECONDS = 120.0
CROP_FRAMES = 201
SLICE_FRAMES = 80
WARM_UP_STEPS = 100
# Speech has the most to say: it fills half of a batch, on top of its share of the rest.
SPEECH = 0.5
# A channel that carries nothing stays small after normalising, in place of becoming loud noise to
# be learned.
LEAST_STD = 0.1


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
) -> tuple[Tensor, dict[str, float]]:
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
    return total, {name: float(value.detach()) for name, value in parts.items()}


@torch.no_grad()
def set_latent_statistics(codec: AudioCodec, pool: AudioPool, clips: int = 256) -> None:
    """Measure the raw latents' mean and standard deviation per channel over random crops of the
    pool.
    """
    sound, _ = pool.crops(np.random.default_rng(1), clips, CROP_FRAMES)
    mean = torch.cat([codec.encode_moments(part)[0] for part in sound.split(16)])
    codec.latent_mean.copy_(mean.mean(dim=(0, 1)))
    codec.latent_std.copy_(mean.std(dim=(0, 1)).clamp(min=LEAST_STD))


def save_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors beside `path` and rename, so that a reader never sees half a file."""
    with replacing(path) as part:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, metadata)


def load_codec(path: Path) -> AudioCodec:
    """Read a checkpoint that this recipe wrote; raises FileNotFoundError or ValueError when it is
    not one.
    """
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        if "audio_codec" not in metadata.get("config", ""):
            raise ValueError(
                f"{path}: found no audio codec config in the metadata, expected one; this is "
                "another kind of file: give the one written by lab.training.audio_codec."
            )
        codec = AudioCodec(
            AudioCodecConfig.from_dict(json.loads(metadata["config"])["audio_codec"])
        )
        codec.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
    return codec.eval()


class Trainer:
    """The run's state: weights, their moving average, Adam's moments, steps and seconds spent."""

    def __init__(
        self, config: AudioCodecConfig, lr: float, budget: float, kl_weight: float
    ) -> None:
        self.codec, self.average = AudioCodec(config), AudioCodec(config)
        self.average.load_state_dict(self.codec.state_dict())
        self.average.requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.codec.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-3
        )
        self.lr, self.budget, self.kl_weight = lr, budget, kl_weight
        self.steps, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """Part of the time budget spent, 0..1."""
        return min(1.0, self.seconds / self.budget)

    def step(self, sound: Tensor, f0: Tensor, rng: np.random.Generator) -> dict[str, float]:
        """One update on a batch; returns the parts of the loss."""
        rate = self.lr * min(1.0, (self.steps + 1) / WARM_UP_STEPS)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        total, parts = losses(self.codec, sound, f0, rng, self.kl_weight)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        decay = min(0.998, (1 + self.steps) / (20 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.codec.parameters()), 1 - decay
            )
        return parts

    def save(self, out: Path, pool: AudioPool) -> None:
        """Write the moving average with its latent statistics to `out`, and the run to
        `<out>.resume`.
        """
        set_latent_statistics(self.average, pool)
        config = json.dumps({"audio_codec": self.average.config.to_dict()})
        progress = json.dumps({"steps": self.steps, "seconds": self.seconds})
        save_atomically(out, self.average.state_dict(), {"config": config, "progress": progress})
        tensors = {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"codec.{k}": v for k, v in self.codec.state_dict().items()}
        for name, parameter in self.codec.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        save_atomically(_resume_path(out), tensors, {"config": config, "progress": progress})

    def resume(self, out: Path) -> None:
        """Go on from `<out>.resume`; raises ValueError when that run had another config."""
        with safe_open(str(_resume_path(out)), "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = AudioCodecConfig.from_dict(json.loads(metadata["config"])["audio_codec"])
        if config != self.codec.config:
            raise ValueError(
                f"{_resume_path(out)}: found a run of {config}, expected {self.codec.config}; "
                "delete that file to start anew, or give another --out."
            )
        for prefix, module in (("codec.", self.codec), ("average.", self.average)):
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            module.load_state_dict(state)
        for name, parameter in self.codec.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimiser.state[parameter] = {key: tensors[f"{key}/{name}"] for key in keys}
        progress = json.loads(metadata["progress"])
        self.steps, self.seconds = int(progress["steps"]), float(progress["seconds"])


def _resume_path(out: Path) -> Path:
    return out.with_name(out.name + ".resume")


def train(args: argparse.Namespace) -> Path:
    """Run until the time budget is spent; returns the checkpoint's path."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pool = load_pool(args.pool or args.out.with_name("audio_pool"), args.clips, 3, args.seed)
    trainer = Trainer(AudioCodecConfig(), args.lr, 60 * args.minutes, args.kl)
    if _resume_path(args.out).exists():
        trainer.resume(args.out)
        log.info("going on at step %d, %.0f s", trainer.steps, trainer.seconds)
    rng = np.random.default_rng((args.seed, trainer.steps))
    saved = time.monotonic()
    sums: dict[str, float] = {}
    while trainer.progress < 1 and (not args.steps or trainer.steps < args.steps):
        began = time.monotonic()
        parts = trainer.step(*pool.crops(rng, args.batch, CROP_FRAMES, SPEECH), rng)
        trainer.seconds += time.monotonic() - began
        sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
        if trainer.steps % 100 == 0:
            text = " ".join(f"{name} {value / 100:.4f}" for name, value in sums.items())
            log.info("step %d %.0f s: %s", trainer.steps, trainer.seconds, text)
            sums = {}
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            trainer.save(args.out, pool)
            saved = time.monotonic()
    trainer.save(args.out, pool)
    log.info("done: %d steps, %.0f s, %s", trainer.steps, trainer.seconds, args.out)
    return args.out


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the audio codec on the procedural world.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint (.safetensors)")
    parser.add_argument("--minutes", type=float, default=24.0, help="time budget")
    parser.add_argument(
        "--steps", type=int, default=0, help="stop after so many steps (0: time only)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=5e-3, help="weight of the KL term")
    parser.add_argument("--clips", type=int, default=3000, help="clips of 3 s to render")
    parser.add_argument("--pool", type=Path, default=None, help="where the rendered sounds lie")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(args)


if __name__ == "__main__":
    main()
