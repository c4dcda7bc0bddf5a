"""When things happen: the clocks that picture and sound both read, functions of absolute time.

Letters: n times (seconds). Nothing here knows of frames or samples, so both see the same instant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .scene import Scene

Array = NDArray[np.float64]

# How far the mouth opens for each vowel, and how wide it is drawn (in 1/64 of the picture's width).
# Loudness uses the opening too: open vowels are louder, so one envelope drives mouth and voice.
# "-" is a rest.
OPENING = {"a": 1.0, "e": 0.75, "i": 0.5, "o": 0.9, "u": 0.6, "-": 0.0}
WIDTH = {"a": 14.0, "e": 16.0, "i": 16.0, "o": 10.5, "u": 7.0, "-": 12.0}
CONSONANT_OPENING = {"b": 0.0, "m": 0.0, "d": 0.08, "l": 0.12, "s": 0.10, "t": 0.08, "-": 0.0}

BLINK_SECONDS = 0.16


def smooth(x: Array) -> Array:
    """Smoothstep of x clipped to 0..1."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def since_hit(scene: Scene, t: Array) -> Array:
    """Seconds since the last hit at each time, in [0, 1/rate): (n) -> (n)."""
    cycles = (t - scene.offset) * scene.rate
    return (cycles - np.floor(cycles)) / scene.rate


def hits_between(scene: Scene, begin: float, end: float) -> Array:
    """Absolute times of the hits in [begin, end); none for speech."""
    if scene.kind == "speech":
        return np.zeros(0)
    first = int(np.ceil((begin - scene.offset) * scene.rate - 1e-9))
    last = int(np.ceil((end - scene.offset) * scene.rate - 1e-9))
    return scene.offset + np.arange(first, last) / scene.rate


def spoken(scene: Scene, begin: float, end: float) -> list[tuple[float, str]]:
    """Onset in absolute seconds, and syllable, of all that sounds in [begin, end), and of the next.

    None for a scene without syllables.
    """
    said = scene.syllables
    if not said:
        return []
    first = int(np.floor((begin - scene.offset) * scene.rate + 1e-9))
    last = int(np.ceil((end - scene.offset) * scene.rate - 1e-9))
    return [(scene.offset + i / scene.rate, said[i % len(said)]) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Speech:
    """What the mouth and the voice do at n times.

    Attributes:
        slot: which of the scene's syllables sounds, (n) int.
        within: seconds since that syllable began, (n).
        onset: seconds from a syllable's begin to its vowel.
        vowel: the vowel's envelope before its own loudness, 0..1, (n).
        mouth: opening of the mouth, 0..1, (n).
        width: width of the mouth in 1/64 of the picture's width, (n).
    """

    slot: NDArray[np.int64]
    within: Array
    onset: float
    vowel: Array
    mouth: Array
    width: Array


def speech_at(scene: Scene, t: Array) -> Speech:
    """Evaluate the speech clock at times `t` (n)."""
    said = scene.syllables
    if not said:
        raise ValueError(f"found a {scene.kind} scene without syllables, expected a speech scene")
    cycles = (t - scene.offset) * scene.rate
    whole = np.floor(cycles)
    slot = np.mod(whole, len(said)).astype(np.int64)
    length = 1.0 / scene.rate
    within = (cycles - whole) * length
    onset = float(np.clip(0.28 * length, 0.06, 0.10))
    rise = smooth((within - onset) / 0.05)
    vowel = rise * (1.0 - smooth((within - (length - 0.075)) / 0.07))
    opening = np.array([OPENING[s[1]] for s in said])
    parted = np.array([CONSONANT_OPENING[s[0]] for s in said])
    width = np.array([WIDTH[s[1]] for s in said])
    consonant = smooth(within / (0.6 * onset)) * (1.0 - rise)
    blend = smooth(within / onset)  # the lips take the next vowel's shape while nearly closed
    return Speech(
        slot=slot,
        within=within,
        onset=onset,
        vowel=vowel,
        mouth=vowel * opening[slot] + consonant * parted[slot],
        width=width[slot] * blend + width[slot - 1] * (1.0 - blend),
    )


def eye_opening(scene: Scene, t: Array) -> Array:
    """How open the eyes are, 0 in the middle of a blink: (n) -> (n)."""
    period, at = scene.blink
    away = np.abs(np.mod(t - at + period / 2, period) - period / 2)
    return smooth(away / (BLINK_SECONDS / 2) - 0.25)


def head_bob(scene: Scene, t: Array) -> tuple[Array, Array]:
    """Displacement (right, down) of the head in 1/64 of the picture's width: (n) -> (n), (n)."""
    amplitude, frequency, phase = scene.bob
    angle = 2 * np.pi * np.mod(frequency * t + phase, 1.0)
    return 0.6 * amplitude * np.sin(angle), amplitude * np.cos(2 * angle) * 0.7
