"""Look at a trained audio codec: pitch, onset and spectrum errors per kind of scene, and pictures
of both sounds.

    python launch.py lab.training.audio_report --codec audio_codec.safetensors --out audio_report

Letters: n samples at 16 kHz, f audio frames (100 Hz), t steps of 1 ms.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...networks.audio_codec import AudioCodec
from .. import command
from ..world.scene import KINDS, Scene, sample_scene
from ..world.sound import SAMPLE_RATE, synthesise
from ..world.timing import hits_between, speech_at
from .audio_losses import frame_loudness, magnitudes
from .latents import load_codec

log = logging.getLogger("mutualforcing")

SECONDS = 4
HOP = 160
DECIBEL = 20 / np.log(10)


def rise_time(wave: NDArray[np.float32], begin: float, end: float) -> float:
    """Second between `begin` and `end` at which loudness is half way from its foot to its top.

    Loudness is the RMS of 9 ms (a period of the lowest voice) every 1 ms, so that it does not
    follow the single periods of the wave.
    """
    step = SAMPLE_RATE // 1000
    first = max(0, int(begin * SAMPLE_RATE))
    part = wave[first : int(end * SAMPLE_RATE)].astype(np.float64)
    level = np.sqrt(np.convolve(part**2, np.hanning(18 * step) / (9 * step), mode="same")[::step])
    top = int(np.argmax(level))
    foot = int(np.argmin(level[: top + 1]))
    half = (level[top] + level[foot]) / 2
    above = foot + int(np.argmax(level[foot : top + 1] >= half))
    below = max(above - 1, 0)
    rise = level[above] - level[below]
    part_way = (half - level[below]) / rise if rise > 0 else 0.0
    return first / SAMPLE_RATE + (below + part_way) / 1000


def onset_errors(scene: Scene, true: Tensor, made: Tensor) -> list[float]:
    """Milliseconds by which each hit (or vowel) sounds later in `made` than in `true`."""
    length = len(true) / SAMPLE_RATE
    if scene.kind == "speech":
        step = 1 / scene.rate
        begin = (
            scene.offset + np.arange(int(np.ceil(-scene.offset / step)), int(length / step)) * step
        )
        times = begin + speech_at(scene, np.zeros(1)).onset + 0.02
    else:
        times = hits_between(scene, 0, length)
    times = times[(times > 0.08) & (times < length - 0.12)]
    pair = (true.numpy(), made.numpy())
    found = [[rise_time(wave, at - 0.04, at + 0.06) for wave in pair] for at in times]
    return [1000 * (b - a) for a, b in found]


def spectral_distance(true: Tensor, made: Tensor) -> float:
    """RMS over frequency of the level difference in dB (floor -70 dB), averaged over time."""
    a, b = (DECIBEL * torch.log(magnitudes(w[None], 1024)[0] + 3e-4) for w in (true, made))
    return float((a - b).square().mean(0).sqrt().mean())


@torch.inference_mode()
def measure(codec: AudioCodec, clips: int, seed: int) -> dict[str, dict[str, float]]:
    """Errors on scenes never trained on, per kind; pitch counts where the frame is within 40 dB of
    full.
    """
    results = {}
    for kind in KINDS:
        rng = np.random.default_rng((seed, len(kind)))
        cents, onsets, distances, levels = [], [], [], []
        for _ in range(clips):
            scene = sample_scene(rng, kind)
            wave, f0 = synthesise(scene, 0, HOP + SAMPLE_RATE * SECONDS)
            true = torch.from_numpy(wave)
            latent = codec.encode(true[None])
            made = codec.decode(latent)[0][0]
            controls, _, _ = codec.decode_controls(latent * codec.latent_std + codec.latent_mean)
            heard = (frame_loudness(true[None])[0] > 0.005) & torch.from_numpy(f0 > 0)
            cents += (1200 * torch.log2(controls.f0[0] / scene.f0))[heard].tolist()
            onsets += onset_errors(scene, true, made)
            distances.append(spectral_distance(true, made))
            loud = frame_loudness(torch.stack([true, made])) + 1e-3
            levels.append(float(DECIBEL * (loud[1] / loud[0]).log().abs().mean()))
        error, late = np.abs(cents), np.array(onsets)
        results[kind] = {
            "cents_median": float(np.median(error)),
            "cents_95": float(np.percentile(error, 95)),
            "onset_ms_mean": float(late.mean()),
            "onset_ms_abs": float(np.abs(late).mean()),
            "onset_ms_95": float(np.percentile(np.abs(late), 95)),
            "lsd_db": float(np.mean(distances)),
            "level_db": float(np.mean(levels)),
        }
    return results


@torch.inference_mode()
def draw(codec: AudioCodec, out: Path, seed: int) -> list[Path]:
    """Write one picture per kind: spectrogram of the true and of the decoded sound, pitch, and an
    onset.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in KINDS:
        scene = sample_scene(np.random.default_rng((seed, 7, len(kind))), kind)
        wave, f0 = synthesise(scene, 0, HOP + SAMPLE_RATE * 2)
        true = torch.from_numpy(wave)
        latent = codec.encode(true[None])
        made = codec.decode(latent)[0][0]
        controls, _, _ = codec.decode_controls(latent * codec.latent_std + codec.latent_mean)
        figure, axes = plt.subplots(5, 1, figsize=(11, 15))
        for axis, sound, name in ((axes[0], true, "true"), (axes[1], made, "decoded")):
            image = DECIBEL * torch.log(magnitudes(sound[None], 512)[0] + 1e-4)
            axis.imshow(
                image, origin="lower", aspect="auto", extent=(0, 2, 0, 8), vmin=-80, vmax=-5
            )
            axis.set_title(f"{kind} {dict(scene.attributes)} {name}", fontsize=8)
        at = np.arange(len(f0)) / 100
        axes[2].semilogy(at, np.where(f0 > 0, f0, np.nan), "k", lw=3, label="true f0")
        axes[2].semilogy(at, controls.f0[0], "r", lw=1, label="decoded f0")
        axes[2].legend()
        axes[3].plot(true[8000:16000], "k", lw=0.6)
        axes[3].plot(made[8000:16000] - 1, "r", lw=0.6)
        axes[4].imshow(latent[0].T, aspect="auto", vmin=-3, vmax=3, cmap="coolwarm")
        axes[4].set_title("latents", fontsize=8)
        figure.tight_layout()
        paths.append(out / f"{kind}.png")
        figure.savefig(paths[-1], dpi=70)
        plt.close(figure)
    return paths


def seconds_per_second(codec: AudioCodec) -> float:
    """Seconds of computing per second of decoded sound, in blocks of one second."""
    block = torch.zeros(1, 25, codec.config.latent_channels)
    with torch.inference_mode():
        _, state = codec.decode(block)
        began = time.perf_counter()
        for _ in range(5):
            _, state = codec.decode(block, state)
        return (time.perf_counter() - began) / 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.audio_report", __doc__)
    p.add_argument("--codec", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    p.add_argument("--clips", type=int, default=12, help="scenes per kind")
    p.add_argument("--seed", type=int, default=99)
    return p


def work(args: argparse.Namespace) -> None:
    """Measure and draw."""
    torch.set_num_threads(1)
    codec = load_codec(args.codec, "audio_codec")
    parameters = sum(p.numel() for p in codec.parameters())
    log.info("%d parameters, %.4f s per second decoded", parameters, seconds_per_second(codec))
    for kind, row in measure(codec, args.clips, args.seed).items():
        log.info("%s: %s", kind, " ".join(f"{name} {value:.2f}" for name, value in row.items()))
    for path in draw(codec, args.out, args.seed):
        log.info("%s", path)


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
