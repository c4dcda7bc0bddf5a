"""A cache of rendered sounds with their true pitch, and random crops of it.

Rendering costs more than a training step, so a few thousand clips are rendered once into `.npy`
files beside each other (sound int16, f0 float32, kind) and read through a memory map.

Letters: b batch, n samples at 16 kHz, f audio frames of 160 samples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("mutualforcing")

HOP = 160
_PARTS = ("sound", "f0", "kind")


@dataclass(frozen=True)
class AudioPool:
    """sound int16 (clips, n); f0 float32 (clips, f) in Hz, 0 where unvoiced; kind (clips,)
    names.
    """

    sound: np.ndarray
    f0: np.ndarray
    kind: np.ndarray

    def crops(
        self, rng: np.random.Generator, batch: int, frames: int, speech: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Random crops: sound (b, n) float32 in [-1, 1] and f0 (b, f).

        `speech` is the part of the batch that is drawn from speech alone, where the pool has any.
        Raises ValueError when the clips are shorter than the crop.
        """
        total = self.f0.shape[1]
        if frames > total:
            raise ValueError(
                f"audio pool: found clips of {total} frames, expected at least {frames}; delete "
                "the pool files so that they are rendered anew."
            )
        clips = rng.integers(0, len(self.sound), batch)
        spoken = np.flatnonzero(self.kind == "speech")
        if len(spoken):
            chosen = int(speech * batch)
            clips[:chosen] = rng.choice(spoken, chosen)
        starts = rng.integers(0, total - frames + 1, batch)
        sound = np.stack(
            [
                self.sound[c, s * HOP : (s + frames) * HOP]
                for c, s in zip(clips, starts, strict=True)
            ]
        )
        f0 = np.stack([self.f0[c, s : s + frames] for c, s in zip(clips, starts, strict=True)])
        return torch.from_numpy(sound.astype(np.float32) / 32767), torch.from_numpy(
            f0.astype(np.float32)
        )


def _path(base: Path, part: str) -> Path:
    return base.with_name(f"{base.name}.{part}.npy")


def load_pool(base: Path, clips: int, seconds: int, seed: int) -> AudioPool:
    """Open the pool at `base`, rendering it first when it is not there or holds other than `clips`
    clips.
    """
    if all(_path(base, part).exists() for part in _PARTS):
        pool = AudioPool(*(np.load(_path(base, part), mmap_mode="r") for part in _PARTS))
        if len(pool.sound) == clips:
            return pool
    _render(base, clips, seconds, seed)
    return AudioPool(*(np.load(_path(base, part), mmap_mode="r") for part in _PARTS))


def _render(base: Path, clips: int, seconds: int, seed: int) -> None:
    from ..world.scene import sample_scene
    from ..world.sound import SAMPLE_RATE, synthesise

    log.info("rendering %d clips of %d s into %s", clips, seconds, base)
    base.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    frames = 1 + 100 * seconds
    sound = np.zeros((clips, frames * HOP), np.int16)
    f0 = np.zeros((clips, frames), np.float32)
    kind = np.zeros(clips, "U16")
    for i in range(clips):
        scene = sample_scene(rng)
        wave, f0[i] = synthesise(scene, SAMPLE_RATE * int(rng.integers(0, 8)), frames * HOP)
        sound[i], kind[i] = np.round(np.clip(wave, -1, 1) * 32767), scene.kind
        if i % 500 == 499:
            log.info("rendered %d of %d", i + 1, clips)
    for part, values in zip(_PARTS, (sound, f0, kind), strict=True):
        temporary = _path(base, part).with_suffix(".tmp.npy")
        np.save(temporary, values)
        temporary.replace(_path(base, part))
