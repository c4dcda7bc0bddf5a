"""Many clips on one picture: a row of frames each with its waveform under them, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...samplers.contact_sheet import Look, outline, stacked, strip

_LOOK = Look(columns=16, cell=96, wave=48)


@dataclass(frozen=True)
class Strip:
    """One clip on the sheet.

    Attributes:
        title: printed above it.
        video: (f, h, w, 3) uint8.
        audio: (n) float, -1..1.
        marks: instants to mark under the wave, as shares of the clip's length, 0..1.
    """

    title: str
    video: NDArray[np.uint8]
    audio: NDArray[np.floating]
    marks: tuple[float, ...] = ()


def overview(path: Path, rows: Sequence[Strip]) -> None:
    """Write a PNG with one strip per clip.

    Raises:
        ValueError: no clips.
        OSError: it cannot be written.
    """
    if not rows:
        raise ValueError("found no clip for the overview, expected at least one")
    path.parent.mkdir(parents=True, exist_ok=True)
    stacked([_strip(row) for row in rows]).save(path)


def _strip(row: Strip) -> Image.Image:
    # The frame shown is the one at the middle of the wave below it.
    places = [int((i + 0.5) * len(row.video) / _LOOK.columns) for i in range(_LOOK.columns)]
    frames = [row.video[place] for place in places]
    sound = outline(row.audio, _LOOK.columns * _LOOK.cell)
    return strip(frames, *sound, _LOOK, title=row.title, marks=row.marks)
