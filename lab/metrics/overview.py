"""Many clips on one picture: a row of frames each with its waveform under them, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

INK = (40, 60, 90)
MARK = (214, 38, 42)
PAPER = (255, 255, 255)
FRAMES = 16
CELL = 96
WAVE = 48
TEXT = 16


@dataclass(frozen=True)
class Row:
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


def overview(path: Path, rows: Sequence[Row]) -> None:
    """Write a PNG with one strip per clip.

    Raises:
        ValueError: no clips.
        OSError: it cannot be written.
    """
    if not rows:
        raise ValueError("found no clip for the overview, expected at least one")
    strips = [_strip(row) for row in rows]
    sheet = Image.new("RGB", (FRAMES * CELL, sum(s.height for s in strips)), PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _strip(row: Row) -> Image.Image:
    strip = Image.new("RGB", (FRAMES * CELL, TEXT + CELL + WAVE), PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((3, 2), row.title, fill=INK)
    for column in range(FRAMES):
        # The frame shown is the one at the middle of the wave below it.
        frame = row.video[int((column + 0.5) * len(row.video) / FRAMES)]
        picture = Image.fromarray(frame).resize((CELL, CELL), Image.Resampling.NEAREST)
        strip.paste(picture, (column * CELL, TEXT))
    middle = TEXT + CELL + WAVE // 2
    for x, part in enumerate(np.array_split(row.audio, strip.width)):
        if len(part):
            ends = np.clip([part.max(), part.min()], -1, 1) * (WAVE / 2 - 2)
            pen.line([(x, round(middle - float(end))) for end in ends], fill=INK)
    for mark in row.marks:
        x, y = round(mark * strip.width), strip.height - 1
        pen.polygon([(x - 3, y), (x + 3, y), (x, y - 6)], fill=MARK)
    return strip
