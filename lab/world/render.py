"""Render any window of a scene: picture, sound, caption and the truth about what happens when.

Time: frame i shows the instant start + i / 24 s and sample n the instant start + n / 16000 s, so a
hit's time reads the same in both. A clip of K seconds has its prefix (one frame, 160 samples) more.
Letters: f frames, h rows, w columns, n samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draw import draw
from .scene import Scene, caption
from .sound import CONTROL, SAMPLE_RATE, synthesise
from .timing import hits_between, speech_at

FPS = 24
SIZE = 64


@dataclass(frozen=True)
class Clip:
    """One rendered window of K seconds.

    Attributes:
        video: (1 + 24 K, size, size, 3) uint8 RGB.
        audio: (160 + 16000 K) float32, peaks about 0.5.
        caption: the canonical caption.
        attributes: the scene's attributes.
        f0: (1 + 100 K) float32, Hz per control frame of 160 samples; 0 = unvoiced or silent.
        hits: (k) float64, seconds from the window's first sample; empty for speech.
        mouth: (1 + 24 K) float32, opening of the mouth 0..1; zeros unless speech.
    """

    video: NDArray[np.uint8]
    audio: NDArray[np.float32]
    caption: str
    attributes: Mapping[str, str]
    f0: NDArray[np.float32]
    hits: NDArray[np.float64]
    mouth: NDArray[np.float32]


def render(scene: Scene, seconds: int, start: int = 0, size: int = SIZE) -> Clip:
    """Render the window of `seconds` whole seconds that begins at the absolute second `start`.

    Args:
        size: width and height in pixels, at least 64.

    Raises:
        ValueError: for a negative `seconds` or `start`, or a `size` below 64.
    """
    if seconds < 0 or start < 0:
        raise ValueError(f"found seconds={seconds}, start={start}, expected both >= 0")
    if size < SIZE:
        raise ValueError(f"found size={size}, expected at least {SIZE}; scale the result down")
    frames, samples = 1 + FPS * seconds, CONTROL + SAMPLE_RATE * seconds
    t = np.arange(FPS * start, FPS * start + frames) / FPS
    audio, f0 = synthesise(scene, SAMPLE_RATE * start, samples)
    mouth = speech_at(scene, t).mouth if scene.kind == "speech" else np.zeros(frames)
    return Clip(
        video=draw(scene, t, size),
        audio=audio,
        caption=caption(scene),
        attributes=dict(scene.attributes),
        f0=f0,
        hits=hits_between(scene, start, start + samples / SAMPLE_RATE) - start,
        mouth=mouth.astype(np.float32),
    )
