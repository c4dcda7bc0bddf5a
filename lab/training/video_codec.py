"""Train the video codec on the procedural world: a KL autoencoder, in a budget of minutes.

    python launch.py lab.training.video_codec --minutes 20 --out video_codec.safetensors

Letters: b batch, f frames, h height, w width, c channels. The learning rate falls to zero over the
time budget, whatever the speed of the machine; what is saved is a moving average of the weights,
with the latent statistics measured under it. A file `<out>.resume` beside the checkpoint lets the
same command go on after a kill.
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
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...networks.video_codec import VideoCodec, VideoCodecConfig
from ...samplers.atomic_file import replacing

log = logging.getLogger("mutualforcing")

POOL_SECONDS = 2
CHECKPOINT_SECONDS = 120.0
# A channel that carries nothing stays small after normalising, in place of becoming loud noise to
# be learned.
LEAST_STD = 0.1


def build_pool(path: Path, clips: int, seed: int) -> np.ndarray:
    """Return rendered clips (n f h w 3) uint8, from the cache file, which is made when missing."""
    if path.exists():
        return np.load(path)
    from ..world.render import render
    from ..world.scene import sample_scene

    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(clips):
        start = int(rng.integers(0, 8))
        frames.append(render(sample_scene(rng), POOL_SECONDS, start).video)
    pool = np.stack(frames)
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, pool)
    return pool


def to_video(frames: np.ndarray) -> Tensor:
    """(b f h w 3) uint8 -> (b 3 f h w) float32 in [-1, 1]."""
    return rearrange(
        torch.from_numpy(frames).float() / 127.5 - 1.0, "b f h w c -> b c f h w"
    ).contiguous()


def sample_batch(pool: np.ndarray, batch: int, frames: int, rng: np.random.Generator) -> Tensor:
    """Return random crops in time of random clips, (b 3 f h w) in [-1, 1]."""
    clips = rng.integers(0, len(pool), batch)
    starts = rng.integers(0, pool.shape[1] - frames + 1, batch)
    return to_video(np.stack([pool[c, s : s + frames] for c, s in zip(clips, starts, strict=True)]))


def motion_weight(video: Tensor) -> Tensor:
    """Return pixel weights (b 1 f h w), mean 1: high where a clip moves, higher where it does now.

    The moving parts are a few percent of the pixels, and without a weight they are learned last.
    """
    moves = (video.amax(2, keepdim=True) - video.amin(2, keepdim=True)).amax(1, keepdim=True) > 0.1
    step = F.pad(
        (video[:, :, 1:] - video[:, :, :-1]).abs().amax(1, keepdim=True), (0, 0, 0, 0, 1, 0)
    )
    now = F.max_pool3d((step > 0.1).float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    weight = 1.0 + 3.0 * moves.float() + 4.0 * now
    return weight / weight.mean()


def reconstruction_loss(output: Tensor, video: Tensor, weight: Tensor) -> Tensor:
    """L1 and squared error of pixels, and L1 of their differences in x, y, time (sharp edges)."""
    error = output - video
    loss = (weight * (error.abs() + 0.5 * error.square())).mean()
    for axis in (2, 3, 4):
        length = error.shape[axis] - 1
        difference = error.narrow(axis, 1, length) - error.narrow(axis, 0, length)
        narrow = weight.narrow(min(axis, 4), 1, length)
        loss = loss + 0.3 * (narrow * difference.abs()).mean()
    return loss


@torch.no_grad()
def set_latent_statistics(
    codec: VideoCodec, pool: np.ndarray, rng: np.random.Generator, clips: int = 96
) -> None:
    """Measure the raw latents' mean and standard deviation per channel over random clips."""
    picks = rng.choice(len(pool), min(clips, len(pool)), replace=False)
    means = []
    for part in np.array_split(picks, max(1, len(picks) // 8)):
        mean, _ = codec.encode_moments(to_video(pool[part]))
        means.append(rearrange(mean, "b c f h w -> c (b f h w)"))
    values = torch.cat(means, dim=1)
    codec.latent_mean.copy_(reduce(values, "c n -> c", "mean"))
    codec.latent_std.copy_(values.std(dim=1).clamp_min(LEAST_STD))


@torch.no_grad()
def quality(codec: VideoCodec, frames: np.ndarray) -> dict[str, float]:
    """PSNR in dB of reconstructed clips (b f h w 3), of all pixels and of those that ever move."""
    squared, moving, count, n = 0.0, 0.0, 0.0, 0
    for part in np.array_split(frames, max(1, len(frames) // 8)):
        video = to_video(part)
        output, _ = codec.decode(codec.encode(video))
        error = (output.clamp(-1, 1) - video).square() / 4
        mask = (video.amax(2, keepdim=True) - video.amin(2, keepdim=True)).amax(
            1, keepdim=True
        ) > 0.1
        squared, n = squared + error.sum().item(), n + error.numel()
        mask = mask.expand_as(error)
        moving, count = moving + error[mask].sum().item(), count + mask.sum().item()
    return {
        "psnr": -10 * math.log10(max(squared / n, 1e-12)),
        "psnr_moving": -10 * math.log10(max(moving / max(count, 1), 1e-12)),
    }


def save_atomically(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write safetensors so that a reader sees the old file or the new one, never a part."""
    with replacing(path) as part:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, metadata)


def load_codec(path: Path) -> VideoCodec:
    """Read a checkpoint that this recipe wrote."""
    with safe_open(str(path), "pt") as file:
        config = json.loads(file.metadata()["config"])["video_codec"]
        codec = VideoCodec(VideoCodecConfig.from_dict(config))
        codec.load_state_dict({k: file.get_tensor(k).float() for k in file.keys()})
    return codec.eval()


class Muon:
    """Momentum, orthogonalised per weight matrix, so that every direction learns alike.

    Needs a fraction of Adam's updates here; biases, which are no matrices, get the sign of their
    momentum.
    """

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95) -> None:
        self.parameters, self.momentum = parameters, momentum
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; a matrix entry changes by about 0.2 `rate`."""
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buffer, self.momentum)
            if p.ndim < 2:
                p.add_(update.sign(), alpha=-0.3 * rate)
                continue
            matrix = orthogonalise(update.flatten(1))
            p.mul_(1 - 0.01 * rate)
            p.add_(matrix.view_as(p), alpha=-0.2 * rate * math.sqrt(max(matrix.shape)))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return about U V^T of the matrix U S V^T (its SVD), by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-12)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Trainer:
    """The state of a run: codec, moving average, optimiser, seconds and steps spent."""

    def __init__(self, config: VideoCodecConfig, args: argparse.Namespace) -> None:
        self.args, self.config = args, config
        self.codec, self.average = VideoCodec(config), VideoCodec(config).requires_grad_(False)
        if args.init:
            self.codec.load_state_dict(load_codec(args.init).state_dict())
        # With the encoder kept, latents made before stay valid while the decoder gets better.
        self.trained = self.codec.decoder if args.decoder_only else self.codec
        self.codec.requires_grad_(False)
        self.trained.requires_grad_(True)
        self.average.load_state_dict(self.codec.state_dict())
        self.optimiser = Muon(list(self.trained.parameters()))
        self.seconds, self.steps = 0.0, 0

    @property
    def progress(self) -> float:
        """Part of the budget spent, 0..1."""
        part = self.seconds / (60.0 * self.args.minutes)
        return min(1.0, max(part, self.steps / self.args.max_steps if self.args.max_steps else 0.0))

    def step(self, video: Tensor) -> dict[str, float]:
        """One update on videos (b 3 f h w); returns the loss terms."""
        warmup = min(1.0, (self.steps + 1) / 40)
        rate = self.args.lr * warmup * 0.5 * (1 + math.cos(math.pi * self.progress))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            mean, logvar = self.codec.encode_moments(video)
            mean, logvar = mean.float(), logvar.float()
            raw = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
            output, _ = self.codec.decode_raw(raw)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        rec = reconstruction_loss(output.float(), video, motion_weight(video))
        self.trained.zero_grad(set_to_none=True)
        (rec + self.args.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimiser.step(rate)
        self.steps += 1
        decay = min(0.998, (1 + self.steps) / (20 + self.steps))
        with torch.no_grad():
            averages = list(self.average.parameters())
            torch._foreach_lerp_(averages, list(self.codec.parameters()), 1 - decay)
        return {"rec": rec.item(), "kl": kl.item(), "lr": rate}

    def save(self, pool: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """Write the averaged checkpoint and, beside it, what resuming needs; return its quality."""
        if not self.args.decoder_only:
            set_latent_statistics(self.average, pool, np.random.default_rng(1))
        result = quality(self.average, held_out)
        config = json.dumps({"video_codec": self.config.to_dict()})
        training = json.dumps({"steps": self.steps, "seconds": self.seconds, "quality": result})
        save_atomically(
            self.average.state_dict(), {"config": config, "training": training}, self.args.out
        )
        tensors = {f"average.{k}": v.clone() for k, v in self.average.state_dict().items()}
        tensors |= {f"codec.{k}": v.clone() for k, v in self.codec.state_dict().items()}
        tensors |= {f"momentum.{i}": v for i, v in enumerate(self.optimiser.buffers)}
        save_atomically(tensors, {"config": config, "training": training}, self.resume_path)
        return result

    @property
    def resume_path(self) -> Path:
        """Where the state for going on after a kill lies."""
        return self.args.out.with_name(self.args.out.name + ".resume")

    def resume(self) -> None:
        """Go on from the resume file; raises ValueError when it is of another config."""
        with safe_open(str(self.resume_path), "pt") as file:
            meta = file.metadata()
            if json.loads(meta["config"])["video_codec"] != self.config.to_dict():
                raise ValueError(
                    f"{self.resume_path} is of another config; delete it or choose another --out"
                )
            training = json.loads(meta["training"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        self.steps, self.seconds = training["steps"], training["seconds"]
        for part in ("codec", "average"):
            prefix = f"{part}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            getattr(self, part).load_state_dict(state)
        self.optimiser.buffers = [
            tensors[f"momentum.{i}"] for i in range(len(self.optimiser.buffers))
        ]


def train(args: argparse.Namespace) -> dict[str, float]:
    """Run the recipe; returns the quality of the final checkpoint on held-out clips."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pool = build_pool(args.pool, args.clips, seed=1000 + args.seed)
    held_out, pool = pool[: max(1, len(pool) // 40)], pool[max(1, len(pool) // 40) :]
    log.info("pool: %d clips for training, %d held out", len(pool), len(held_out))
    config = load_codec(args.init).config if args.init else VideoCodecConfig()
    trainer = Trainer(config, args)
    if trainer.resume_path.exists():
        trainer.resume()
        # Other crops than those of the run that was cut off.
        rng = np.random.default_rng([args.seed, trainer.steps])
        log.info("going on at step %d, %.0f s", trainer.steps, trainer.seconds)
    saved = clock = time.monotonic()
    while trainer.progress < 1.0:
        # Short clips first, for more updates; then long ones: a stream's past is over a second.
        batch, frames = (3, 25) if trainer.progress < 0.6 else (2, 49)
        terms = trainer.step(sample_batch(pool, batch, frames, rng))
        now = time.monotonic()
        trainer.seconds, clock = trainer.seconds + now - clock, now
        if trainer.steps % 50 == 0:
            text = " ".join(f"{k} {v:.5f}" for k, v in terms.items())
            log.info("step %d, %.0f s: %s", trainer.steps, trainer.seconds, text)
        if now - saved > CHECKPOINT_SECONDS:
            log.info("checkpoint: %s", trainer.save(pool, held_out))
            saved = time.monotonic()
    result = trainer.save(pool, held_out)
    log.info("done, %d steps: %s -> %s", trainer.steps, result, args.out)
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("video_codec.safetensors"))
    parser.add_argument("--pool", type=Path, default=None, help="cache of rendered clips (.npy)")
    parser.add_argument("--clips", type=int, default=1600, help="clips to render for the pool")
    parser.add_argument("--minutes", type=float, default=20.0, help="time budget of the updates")
    parser.add_argument(
        "--max-steps", type=int, default=0, help="step budget; 0: the time budget alone"
    )
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--init", type=Path, default=None, help="checkpoint to start from")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder of --init")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-bf16", dest="bf16", action="store_false", help="full precision convolutions"
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes}, expected a positive number")
    if args.decoder_only and args.init is None:
        parser.error("--decoder-only keeps the encoder of a checkpoint; name it with --init")
    if args.pool is None:
        args.pool = args.out.with_name("video_codec_pool.npy")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parse())
