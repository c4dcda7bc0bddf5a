"""A clip at a glance: a row of its frames with the waveform under them on one time axis.

b batch, F H W pixel frames and size, n samples. Blocks are taken in as they are made and only what
will be drawn is kept, so a sheet of an hour costs as little as one of ten seconds.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from .clock import Clock
from .tensor_file import writing_failed

FRAMES = 11
_ENVELOPE_SECONDS = 0.01
_LINE = 16
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How a strip is drawn; sizes in pixels.

    Attributes:
        columns: frames in a row; more of them go into further rows.
        cell: a frame's longer side.
        wave: height of the waveform.
        loudest: what fills that height; None for the loudest there is.
    """

    columns: int = FRAMES
    cell: int = 128
    wave: int = 96
    loudest: float | None = 1.0
    paper: Colour = (255, 255, 255)
    ink: Colour = (40, 60, 90)
    mark: Colour = (214, 38, 42)


def strip(
    pictures: Sequence[NDArray[np.uint8]],
    lows: NDArray[np.floating],
    highs: NDArray[np.floating],
    look: Look,
    *,
    title: str = "",
    seconds: float = 0.0,
    marks: Iterable[float] = (),
) -> Image.Image:
    """One clip: frames, and under them the outline of its sound.

    Args:
        pictures: (H, W, 3) each.
        lows, highs: (t,) the least and the largest sample of equal parts of the clip, -1..1.
        title: printed above.
        seconds: the clip's length, for a scale below; 0 for none.
        marks: instants to mark under the wave, as shares of the clip's length, 0..1.
    """
    height, width = pictures[0].shape[:2]
    share = look.cell / max(height, width)
    cell = max(1, round(width * share)), max(1, round(height * share))
    rows = -(-len(pictures) // look.columns)
    top, scale = _LINE * bool(title), _LINE * bool(seconds)
    size = look.columns * cell[0], top + rows * cell[1] + look.wave + scale
    canvas = Image.new("RGB", size, look.paper)
    pen = ImageDraw.Draw(canvas)
    # The font that every Pillow has knows Latin letters only.
    pen.text((3, 2), title.encode("latin-1", "replace").decode("latin-1"), fill=look.ink)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, look.columns)
        frame = Image.fromarray(picture).resize(cell, Image.Resampling.NEAREST)
        canvas.paste(frame, (column * cell[0], top + row * cell[1]))
    wave = top + rows * cell[1]
    middle = wave + look.wave / 2
    reach = max(float(np.abs(lows).max()), float(np.abs(highs).max()), 1e-3)
    stretch = (look.wave / 2 - 2) / (look.loudest or reach)
    edges = np.linspace(0, len(lows), size[0] + 1)
    for x, (start, stop) in enumerate(pairwise(edges)):
        part = slice(int(start), max(int(start) + 1, int(stop)))
        ends = np.clip([highs[part].max(), lows[part].min()], -reach, reach) * stretch
        pen.line([(x, round(middle - float(end))) for end in ends], fill=look.ink)
    for mark in marks:
        x, y = round(mark * size[0]), wave + look.wave - 1
        pen.polygon([(x - 3, y), (x + 3, y), (x, y - 6)], fill=look.mark)
    if seconds:
        step = next(n for n in (1, 2, 5, 10, 30, 60, 300, 600, 3600, 36000) if seconds <= 20 * n)
        for second in range(0, int(seconds) + 1, step):
            x = second / seconds * size[0]
            pen.line([(x, wave + look.wave), (x, wave + look.wave + 3)], fill=look.ink)
            pen.text((x + 2, wave + look.wave + 2), f"{second} s", fill=look.ink)
    return canvas


def outline(sound: NDArray[np.floating], parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest sample of each of `parts` equal parts (fewer, if it is shorter) of (n)."""
    pieces = np.array_split(sound, max(1, min(parts, len(sound))))
    return tuple(np.array([f(p) if len(p) else 0.0 for p in pieces]) for f in (np.min, np.max))


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Strips of one width below each other."""
    canvas = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
    top = 0
    for part in strips:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


class ContactSheet:
    """Collects frames and the outline of the sound, then draws them.

    Args:
        clock: frame rate and sample rate.
        total_frames: how long the clip is meant to be; the frames shown are spread evenly over it.
        columns: how many frames are shown.
    """

    def __init__(self, clock: Clock, total_frames: int, columns: int = FRAMES) -> None:
        self.clock = clock
        columns = max(1, min(columns, total_frames))
        self.wanted = {round(i) for i in np.linspace(0, total_frames - 1, columns)}
        self.pictures: list[tuple[int, np.ndarray]] = []
        self.lows: list[np.ndarray] = []
        self.highs: list[np.ndarray] = []
        self.frames = 0
        self._step = max(1, round(clock.sample_rate * _ENVELOPE_SECONDS))
        self._rest = np.zeros(0, np.float32)

    def add(self, video: Tensor, audio: Tensor) -> None:
        """Take in the next block: pictures (b, F, H, W, 3) in 0..1 and sound (b, 1, n).

        Of a batch the first clip is shown.
        """
        for picture in video[0]:
            if self.frames in self.wanted:
                self.pictures.append((self.frames, (picture * 255).round().byte().numpy()))
            self.frames += 1
        sound = np.concatenate([self._rest, audio[0, 0].float().numpy()])
        whole = len(sound) // self._step * self._step
        steps, self._rest = sound[:whole].reshape(-1, self._step), sound[whole:]
        self.lows.append(steps.min(axis=1))
        self.highs.append(steps.max(axis=1))

    def save(self, path: Path | str, title: str = "") -> None:
        """Draw what was collected into a PNG; an older one is replaced only by a whole one.

        Raises:
            ValueError: nothing was collected.
            OSError: the file cannot be written.
        """
        if not self.pictures:
            raise ValueError("the contact sheet has no frame to show; add a block before saving it")
        pictures = [picture for _, picture in self.pictures]
        sheet = strip(
            pictures,
            np.concatenate(self.lows),
            np.concatenate(self.highs),
            Look(columns=len(pictures)),
            title=title,
            seconds=float(self.frames / self.clock.fps),
        )
        content = io.BytesIO()
        sheet.save(content, format="PNG")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.getvalue())
        except OSError as error:
            message = writing_failed(error, "the contact sheet")
            raise OSError(error.errno, message, str(path)) from error
