"""Train the video codec on the procedural world: a KL autoencoder, in a budget of minutes.

    python launch.py lab.training.video_codec --minutes 20 --out video_codec.safetensors

Letters: b batch, f frames, h height, w width, c channels. `lab.training.codec` has what a codec's
training has in common with that of the other.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...networks.video_codec import VideoCodec
from .. import command
from ..world.render import render
from ..world.scene import sample_scene
from .audio_losses import kl_loss
from .codec import Run, add_options
from .latents import load_codec
from .pool import crops, rendered

POOL_SECONDS = 2


def to_video(frames: np.ndarray) -> Tensor:
    """(b f h w 3) uint8 -> (b 3 f h w) float32 in [-1, 1]."""
    return rearrange(
        torch.tensor(frames).float() / 127.5 - 1.0, "b f h w c -> b c f h w"
    ).contiguous()


def moving(video: Tensor) -> Tensor:
    """Which pixels (b 1 1 h w) ever change."""
    return (video.amax(2, keepdim=True) - video.amin(2, keepdim=True)).amax(1, keepdim=True) > 0.1


def motion_weight(video: Tensor) -> Tensor:
    """Return pixel weights (b 1 f h w), mean 1: high where a clip moves, higher where it does now.

    The moving parts are a few percent of the pixels, and without a weight they are learned last.
    """
    moves = moving(video)
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
def quality(codec: VideoCodec, frames: np.ndarray) -> dict[str, float]:
    """PSNR in dB of reconstructed clips (b f h w 3), of all pixels and of those that ever move."""
    squared, changed, count, n = 0.0, 0.0, 0.0, 0
    for part in np.array_split(frames, max(1, len(frames) // 8)):
        video = to_video(part)
        output, _ = codec.decode(codec.encode(video))
        error = (output.clamp(-1, 1) - video).square() / 4
        squared, n = squared + error.sum().item(), n + error.numel()
        mask = moving(video).expand_as(error)
        changed, count = changed + error[mask].sum().item(), count + mask.sum().item()
    return {
        "psnr": -10 * math.log10(max(squared / n, 1e-12)),
        "psnr_moving": -10 * math.log10(max(changed / max(count, 1), 1e-12)),
    }


class VideoRecipe:
    """What is the video codec's own in its training; a part of the clips is held out.

    Args:
        clips: (n f h w 3) uint8.
        fixed_encoder: latents made before stay valid while the decoder gets better.
    """

    kind, warmup_steps = "video_codec", 40

    def __init__(
        self, clips: np.ndarray, kl_weight: float, *, bf16: bool, fixed_encoder: bool
    ) -> None:
        held_out = max(1, len(clips) // 40)
        self.held_out, self.clips = clips[:held_out], clips[held_out:]
        self.kl_weight, self.bf16, self.fixed_encoder = kl_weight, bf16, fixed_encoder

    def matrix(self, name: str, parameter: Tensor) -> bool:
        """All weights: Muon needs a fraction of Adam's updates here."""
        return parameter.ndim > 1

    def loss(
        self, codec: VideoCodec, progress: float, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a random batch: short clips first, for more updates, then long ones."""
        batch, frames = (3, 25) if progress < 0.6 else (2, 49)
        clips = rng.integers(0, len(self.clips), batch)
        (pixels,) = crops([self.clips], [1], clips, frames, rng)
        video = to_video(pixels)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            mean, logvar = codec.encode_moments(video)
            mean, logvar = mean.float(), logvar.float()
            raw = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
            output, _ = codec.decode_raw(raw)
        parts = {
            "rec": reconstruction_loss(output.float(), video, motion_weight(video)),
            "kl": kl_loss(mean, 0.5 * logvar),
        }
        return parts["rec"] + self.kl_weight * parts["kl"], parts

    def raw_latents(self, codec: VideoCodec) -> Tensor | None:
        """Of random clips."""
        if self.fixed_encoder:
            return None
        rng = np.random.default_rng(1)
        picks = np.sort(rng.choice(len(self.clips), min(96, len(self.clips)), replace=False))
        parts = np.array_split(picks, max(1, len(picks) // 8))
        means = [codec.encode_moments(to_video(self.clips[part]))[0] for part in parts]
        return rearrange(torch.cat(means), "b c f h w -> (b f h w) c")

    def quality(self, codec: VideoCodec) -> dict[str, float]:
        """PSNR on the clips that are held out."""
        return quality(codec, self.held_out)


def work(args: argparse.Namespace) -> None:
    """Run the recipe until the budget is spent."""
    if args.decoder_only and args.init is None:
        raise ValueError("--decoder-only keeps the encoder of a checkpoint; name it with --init")
    rng = np.random.default_rng(1000 + args.seed)

    def clip() -> tuple[np.ndarray]:
        start = int(rng.integers(0, 8))
        return (render(sample_scene(rng), POOL_SECONDS, start).video,)

    pool = args.pool or args.out.with_name("video_codec_pool")
    (clips,) = rendered(pool, ["video"], args.clips, clip)
    torch.manual_seed(args.seed)
    codec = load_codec(args.init, "video_codec").train() if args.init else VideoCodec()
    codec.encoder.requires_grad_(not args.decoder_only)
    recipe = VideoRecipe(clips, args.kl, bf16=args.bf16, fixed_encoder=args.decoder_only)
    Run(codec, recipe, args).train()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.video_codec", __doc__)
    add_options(p, minutes=20.0, lr=4e-3, kl=5e-4, clips=1600)
    p.add_argument("--init", type=Path, help="checkpoint to start from")
    p.add_argument("--decoder-only", action="store_true", help="keep the encoder of --init")
    p.add_argument("--no-bf16", dest="bf16", action="store_false", help="full precision")
    return p


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
