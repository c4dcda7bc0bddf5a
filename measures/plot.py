"""A film's measures as one picture: frames, sound and curves over one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .film import Film
from .novelty import HOP
from .seams import ranks

Colour = tuple[int, int, int]
Curve = NDArray[np.float64]

WIDTH, LEFT, RIGHT = 1200, 64, 12
ROW, GAP, TEXT = 84, 6, 16
FRAMES, HIGHEST = 9, 140  # frames in a row, unless they would be higher than that
PAPER, INK, FAINT = (255, 255, 255), (45, 55, 72), (222, 226, 232)
RED, GREEN, BLUE, ORANGE = (208, 50, 50), (40, 140, 70), (45, 95, 200), (222, 140, 30)
KINDS = {"picture": BLUE, "click": RED, "level": GREEN, "spectrum": ORANGE}


@dataclass(frozen=True)
class _Row:
    """A strip of the picture with a time axis and one of values."""

    pen: ImageDraw.ImageDraw
    font: ImageFont.ImageFont
    top: int
    seconds: float
    low: float
    high: float

    def x(self, seconds: Curve | float) -> Curve:
        """Pixels from the left."""
        return LEFT + np.asarray(seconds) / self.seconds * (WIDTH - LEFT - RIGHT)

    def y(self, values: Curve | float) -> Curve:
        """Pixels from the top; what is out of reach lies at the edge."""
        share = (np.clip(values, self.low, self.high) - self.low) / (self.high - self.low)
        return self.top + TEXT + (1 - share) * (ROW - TEXT)

    def frame(self, title: Sequence[tuple[str, Colour]], marks: Sequence[float]) -> None:
        """The box, its title in coloured pieces, and values marked on its axis."""
        edge = LEFT
        for text, colour in title:
            self.pen.text((edge, self.top), text, fill=colour, font=self.font)
            edge += self.pen.textlength(text, font=self.font) + 14
        for mark in marks:
            y = float(self.y(mark))
            self.pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=FAINT)
            self.pen.text((LEFT - 5, y), f"{mark:g}", fill=INK, font=self.font, anchor="rm")

    def line(self, seconds: Curve, values: Curve, colour: Colour) -> None:
        """A curve; of many points in a pixel the least and the largest."""
        if len(values) < 2:
            return self.dots(seconds, values, colour)
        if len(values) > 3 * WIDTH:
            pieces = np.array_split(np.arange(len(values)), WIDTH)
            ends = [(p[0], values[p].min(), values[p].max()) for p in pieces]
            points = [(seconds[i], v) for i, *both in ends for v in both]
            seconds, values = np.array(points).T
        points = np.stack([self.x(seconds), self.y(values)], axis=1)
        self.pen.line([tuple(point) for point in points.tolist()], fill=colour, width=1)

    def dots(self, seconds: Curve, values: Curve, colour: Colour, size: float = 3) -> None:
        """A dot for each value."""
        for x, y in zip(self.x(seconds), self.y(values), strict=True):
            self.pen.ellipse([x - size, y - size, x + size, y + size], fill=colour)

    def ticks(self, seconds: Sequence[float], colour: Colour) -> None:
        """A line from top to bottom at each instant."""
        for x in self.x(np.asarray(seconds)):
            self.pen.line([(x, self.top + TEXT), (x, self.top + ROW)], fill=colour)


def plot(film: Film, title: str = "") -> Image.Image:
    """Draw a film's measures: frames, sound, motion, offset, seams, loudness, colours."""
    pictures, sound = film.pictures, film.sound
    seconds = max(pictures.length, sound.lead + sound.length if sound else 0.0, 1e-3)
    font = _font()
    shown = _frames(film, seconds)
    tops = TEXT + shown.height + GAP + (ROW + GAP) * np.arange(6)
    canvas = Image.new("RGB", (WIDTH, int(tops[-1]) + ROW + GAP + TEXT), PAPER)
    canvas.paste(shown, (LEFT, TEXT))
    pen = ImageDraw.Draw(canvas)
    width, height = pictures.size
    facts = f"{width} x {height}, {pictures.rate:.3g} frames a second, "
    facts += f"picture {pictures.length:.2f} s"
    if sound is not None:
        facts += f", sound {sound.length:.2f} s from {sound.lead:.2f} s on"
    # The fonts that every Pillow has know Latin letters only.
    told = "   ".join(filter(None, (title, facts))).encode("latin-1", "replace").decode("latin-1")
    pen.text((4, 1), told, fill=INK, font=font)

    def row(index: int, low: float, high: float) -> _Row:
        return _Row(pen, font, int(tops[index]), seconds, low, high)

    _draw_sound(film, row(0, -1, 1))
    _draw_motion(film, row(1, -1, 1))
    _draw_offset(film, row(2, -500, 500))
    _draw_seams(film, row(3, 0, 1))
    _draw_loudness(film, row(4, -60, 0))
    _draw_colours(film, row(5, 0, 255))
    step = next(n for n in (1, 2, 5, 10, 30, 60, 300, 600, 3600, 36000) if seconds <= 20 * n)
    axis = row(5, 0, 1)
    for second in range(0, int(seconds) + 1, step):
        place = float(axis.x(float(second))), axis.top + ROW + 3
        pen.text(place, f"{second} s", fill=INK, font=font)
    return canvas


def _font() -> ImageFont.ImageFont:
    try:
        return ImageFont.load_default(12)
    except TypeError:  # a Pillow before 10.1, or without FreeType
        return ImageFont.load_default()


def _frames(film: Film, seconds: float) -> Image.Image:
    """Pictures side by side, each the last one that is shown at its left edge."""
    sheet = film.pictures.sheet
    wide, high = sheet[0][1].shape[1::-1]
    room = WIDTH - LEFT - RIGHT
    cell = min(room // FRAMES, max(16, round(HIGHEST * wide / high)))
    height = max(1, round(cell * high / wide))
    canvas = Image.new("RGB", (room, height), FAINT)
    times = np.array([time for time, _ in sheet])
    for left in range(0, room, cell):
        at = left / room * seconds
        if at >= film.pictures.length:
            break
        picture = Image.fromarray(sheet[int(np.searchsorted(times, at, "right")) - 1][1])
        canvas.paste(picture.resize((cell, height), Image.Resampling.BILINEAR), (left, 0))
    return canvas


def _draw_sound(film: Film, row: _Row) -> None:
    sound = film.sound
    if sound is None:
        return row.frame([("no sound", INK)], ())
    clipped = f"clipped {sound.clipped:.2%}", RED if sound.clipped else INK
    torn = f"{len(sound.clicks)} clicks", RED if len(sound.clicks) else INK
    title = [("sound", INK), (f"silent {sound.silent:.0%}", INK), clipped, torn]
    row.frame(title, (-1, 0, 1))
    at = sound.lead + 0.01 * np.repeat(np.arange(len(sound.lows)), 2)
    row.line(at, np.stack([sound.lows, sound.highs], axis=1).ravel(), INK)
    row.ticks(sound.lead + sound.clicks, RED)


def _draw_motion(film: Film, row: _Row) -> None:
    pictures, sound = film.pictures, film.sound
    change = ("change of motion", BLUE)
    frozen = f"frozen {pictures.frozen:.0%}", RED if pictures.frozen else INK
    again = int(pictures.repeated.sum())
    repeated = f"{again} seconds repeat", RED if again else INK
    onsets = ("onsets of sound, downwards", GREEN)
    row.frame([change, onsets, frozen, repeated, (f"{len(pictures.cuts)} cuts", INK)], (0,))
    times, abrupt = pictures.abrupt
    row.line(times, abrupt / max(float(abrupt.max()), 1e-6), BLUE)
    row.ticks(np.flatnonzero(pictures.repeated) + 0.5, RED)
    if sound is not None:
        rise = -sound.rise / max(float(sound.rise.max()), 1e-6)
        row.line(sound.lead + HOP * np.arange(len(rise)), rise, GREEN)


def _draw_offset(film: Film, row: _Row) -> None:
    found = film.offset
    told = "no offset: picture and sound do not agree better than by chance"
    if found.ms is not None:
        told = f"sound {abs(found.ms):.0f} ms {'late' if found.ms > 0 else 'early'}"
        told += "" if found.drift is None else f", {found.drift:+.0f} ms from beginning to end"
    row.frame([(told, INK), (f"agreement {found.agreement:.2f}", INK)], (-500, 0, 500))
    if found.ms is not None:
        row.line(np.array([0.0, film.pictures.length]), np.full(2, found.ms), ORANGE)
    for at, ms in found.parts:
        row.dots(np.array([at]), np.array([ms]), ORANGE)


def _draw_seams(film: Film, row: _Row) -> None:
    rate = film.seam_rate
    told = "no borders" if rate is None else f"{rate:.2f} seams a second"
    title = [(f"borders every {film.period:g} s", INK), (told, RED if rate else INK)]
    row.frame([*title, *((name, colour) for name, colour in KINDS.items())], (0, 0.5, 1))
    out = film.standing_out()
    for name, step in film.steps.items():
        if not len(step.elsewhere):
            continue
        at = film.borders[name]
        row.dots(at, ranks(step), KINDS[name], 2)
        if name in out and out[name].any():
            row.dots(at[out[name]], np.ones(int(out[name].sum())), KINDS[name], 5)


def _draw_loudness(film: Film, row: _Row) -> None:
    sound = film.sound
    if sound is None or sound.loudness is None:
        return row.frame([("loudness: next to silent", INK)], (-60, -23, 0))
    peak = f"true peak {sound.peak:.1f} dB", RED if sound.peak > 0 else INK
    span = "" if sound.span is None else f", range {sound.span:.1f} LU"
    row.frame([(f"loudness {sound.loudness:.1f} LUFS{span}", INK), peak], (-60, -23, 0))
    at = sound.lead + 0.4 + 0.1 * np.arange(len(sound.momentary))
    row.line(at, sound.momentary, INK)


def _draw_colours(film: Film, row: _Row) -> None:
    pictures = film.pictures
    at = np.minimum(np.arange(len(pictures.colours)) + 0.5, pictures.length)
    kept = f"the first second's colours kept {pictures.overlap[-1]:.0%} at the end", INK
    alike = f"its layout {pictures.layout[-1]:.2f}", ORANGE
    row.frame([("mean red, green, blue", INK), kept, alike], (0, 255))
    for values, colour in zip(pictures.colours.T, (RED, GREEN, BLUE), strict=True):
        row.line(at, values, colour)
    row.line(at, 255 * pictures.overlap, INK)
    row.line(at, 255 * np.maximum(pictures.layout, 0), ORANGE)
