"""What the words of a caption mean in pixels and in hertz, and where on the picture things stand.

Nothing here is taken from the code that draws the world: the two are written down apart and a test
compares them, so that a mistake in one shows. Places are in 1/64 of the picture's side.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]

NONE = "none"  # measured where there is nothing to measure: no sound, no thing

COLOURS: Mapping[str, Colour] = {
    "red": (214, 38, 42),
    "orange": (244, 132, 26),
    "yellow": (246, 216, 48),
    "green": (44, 160, 68),
    "blue": (44, 96, 216),
    "purple": (142, 60, 182),
    "white": (243, 243, 243),
    "black": (26, 26, 32),
}
SKINS: Mapping[str, Colour] = {
    "pale": (252, 222, 200),
    "tan": (222, 170, 122),
    "brown": (132, 84, 54),
}
WOOD: Colour = (134, 90, 48)  # the yoke of the bell
IVORY: Colour = (250, 232, 196)  # the drum's skin

KINDS = ("speech", "ball", "bell", "drum")
MEASURED: Mapping[str, tuple[str, ...]] = {
    "speech": ("hair", "skin", "shirt", "background", "voice", "tempo"),
    "ball": ("ball", "background", "pitch", "tempo"),
    "bell": ("bell", "background", "pitch", "tempo"),
    "drum": ("drum", "background", "pitch", "tempo"),
}
PITCH_HZ: Mapping[str, Mapping[str, float]] = {
    "speech": {"low": 110.0, "middle": 165.0, "high": 250.0},
    "ball": {"low": 160.0, "middle": 260.0, "high": 420.0},
    "bell": {"low": 260.0, "middle": 440.0, "high": 740.0},
    "drum": {"low": 70.0, "middle": 115.0, "high": 190.0},
}
HITS_PER_SECOND: Mapping[str, float] = {"slow": 1.0, "steady": 1.6, "fast": 2.5}
SYLLABLES_PER_SECOND: Mapping[str, float] = {"slow": 2.0, "steady": 3.0, "fast": 4.5}


def nearest_colour(rgb: NDArray[np.floating], table: Mapping[str, Colour]) -> str:
    """The name in `table` whose colour is nearest to `rgb` (3)."""
    return min(table, key=lambda name: float(np.square(rgb - np.array(table[name])).sum()))


def nearest_ratio(value: float, table: Mapping[str, float]) -> str:
    """The name in `table` whose number has the smallest ratio to `value`; NONE if it is not > 0."""
    if not value > 0:  # NaN too
        return NONE
    return min(table, key=lambda name: abs(float(np.log(value / table[name]))))
