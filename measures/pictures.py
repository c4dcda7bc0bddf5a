"""The pictures of a film, frame by frame as they come; what is kept does not grow with their size.

f frames, h w pixels of the small pictures that all is measured on, t seconds of the film.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from einops import reduce
from numpy.typing import NDArray

Curve = NDArray[np.float64]
Picture = NDArray[np.uint8]

SIDE = 128  # the longer side of the small pictures; smaller ones stay as they are
SIGNATURE = 16  # sides of what frames are compared by over time
STILL = 0.1  # mean change, of 255, under which a frame repeats the one before it
STUCK = 0.5  # seconds for which one picture stands that count
SPAN = 60  # seconds back that are searched for the same
SAME = 0.25  # of a second's own motion: as near as that, frame by frame, is the same
MOVES = 2.0  # a second's own motion, of 255, under which it is held to be still
SHEET = 64  # pictures that are kept to be shown, at most


@dataclass(frozen=True)
class Pictures:
    """What was seen.

    Attributes:
        times: (f) seconds from the first frame on.
        moved: (f) mean change into each frame, of 255; 0 for the first.
        colours: (t, 3) mean red, green and blue of each second.
        overlap: (t) share of its colours (a histogram, 8 x 8 x 8) that the first second has, too.
        layout: (t) correlation of its mean picture, 16 x 16 in grey, with the first second's.
        repeated: (t) whether it shows again what was shown in the minute before it.
        size: width and height.
        sheet: (seconds, picture (h, w, 3)), evenly apart.
        first: time of the first frame on the film's clock.
    """

    times: Curve
    moved: Curve
    colours: Curve
    overlap: Curve
    layout: Curve
    repeated: NDArray[np.bool_]
    size: tuple[int, int]
    sheet: list[tuple[float, Picture]]
    first: float

    @property
    def step(self) -> float:
        """Seconds from frame to frame, as a rule."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0

    @property
    def length(self) -> float:
        """Seconds, with the last frame's own."""
        return float(self.times[-1]) + self.step

    @property
    def rate(self) -> float:
        """Frames a second, on average; 0 of one frame."""
        return (len(self.times) - 1) / float(self.times[-1]) if len(self.times) > 1 else 0.0

    @property
    def uneven(self) -> float:
        """Most ms that a frame is away from where a steady rate would have it."""
        even = np.arange(len(self.times)) / self.rate if self.rate else self.times
        return float(1000 * np.abs(self.times - even).max())

    @property
    def abrupt(self) -> tuple[Curve, Curve]:
        """How abruptly motion changes, the change of `moved`: seconds and values.

        The first frames change from nothing. Where a picture stands for long, nothing does.
        """
        changes = np.abs(np.diff(self.moved, prepend=0.0))
        changes[:2] = 0.0
        stands = np.flatnonzero(np.diff(self.times) > 2 * self.step)
        ends = np.stack([self.times[stands] + self.step, self.times[stands + 1] - self.step], 1)
        places = np.repeat(stands + 1, 2)
        return np.insert(self.times, places, ends.ravel()), np.insert(changes, places, 0.0)

    @property
    def frozen(self) -> float:
        """Share of the film in which one picture stands for STUCK seconds or longer."""
        changes = self.times[(self.moved >= STILL) | (self.times == 0)]
        stood = np.diff(np.append(changes, self.length))
        return float(stood[stood >= STUCK].sum() / max(self.length, 1e-6))

    @property
    def cuts(self) -> NDArray[np.int64]:
        """Frames that change a picture at once and altogether: (k)."""
        moved = np.pad(self.moved, 2, mode="edge")
        around = (moved[:-4] + moved[1:-3] + moved[3:-1] + moved[4:]) / 4
        return np.flatnonzero((self.moved > 12) & (self.moved > 4 * around))


@dataclass
class _Second:
    """Sums over the frames of a second."""

    colour: NDArray[np.float64]
    histogram: NDArray[np.int64]
    signatures: list[NDArray[np.float32]] = field(default_factory=list)


class PictureCourse:
    """Takes in frames in their order; `result` is what was seen."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._moved: list[float] = []
        self._last: NDArray[np.int16] | None = None
        self._second = _fresh()
        self._seconds: list[tuple[Curve, float, float, bool]] = []
        self._start: tuple[Curve, Curve] | None = None
        self._past: deque[NDArray[np.float32]] = deque(maxlen=SPAN)
        self._sheet: list[tuple[float, Picture]] = []
        self._apart = 0.1
        self._first = 0.0
        self._size = (0, 0)
        self._small, self._tiny = VideoReformatter(), VideoReformatter()

    def add(self, frame: VideoFrame, time: float) -> None:
        """Take in a frame that is shown at a time of the film's clock, in seconds."""
        if not self._times:
            self._first, self._size = time, (frame.width, frame.height)
        time -= self._first
        if self._times and time <= self._times[-1]:
            return
        if int(time) > len(self._seconds):
            self._close(int(time))
        scale = min(1.0, SIDE / max(frame.width, frame.height))
        sides = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        area = Interpolation.AREA
        small = self._small.reformat(frame, *sides, "rgb24", interpolation=area)
        tiny = self._tiny.reformat(small, SIGNATURE, SIGNATURE, "rgb24", interpolation=area)
        picture = small.to_ndarray()
        if self._last is not None and self._last.shape != picture.shape:
            self._last = None  # films change their size
        wide = picture.astype(np.int16)
        same = self._last is None
        self._moved.append(0.0 if same else float(np.abs(wide - self._last).mean()))
        self._times.append(time)
        self._last = wide
        bins = (wide[..., 0] >> 5) * 64 + (wide[..., 1] >> 5) * 8 + (wide[..., 2] >> 5)
        self._second.histogram += np.bincount(bins.ravel(), minlength=512)
        self._second.colour += wide.mean((0, 1))
        self._second.signatures.append(tiny.to_ndarray().astype(np.float32))
        if time >= len(self._sheet) * self._apart:
            self._sheet.append((time, picture))
            if len(self._sheet) > SHEET:
                self._sheet, self._apart = self._sheet[::2], 2 * self._apart

    def _close(self, upto: int) -> None:
        """Sum up the second that is over; those in which no frame came are like it."""
        frames = np.stack(self._second.signatures)
        histogram = self._second.histogram / self._second.histogram.sum()
        grey = frames.mean((0, 3)).ravel()
        if self._start is None:
            self._start = histogram, grey
        colours, layout = self._start
        coarse = reduce(frames, "f (h 2) (w 2) c -> f (h w c)", "mean")
        again = self._seen_before(coarse)
        row = (
            self._second.colour / len(frames),
            float(np.minimum(histogram, colours).sum()),
            _correlation(grey, layout),
            again,
        )
        self._seconds += [row] * (upto - len(self._seconds))
        self._past.append(coarse)
        self._second = _fresh()

    def _seen_before(self, frames: NDArray[np.float32]) -> bool:
        """Whether frames (f, d) were seen in a row before; still ones are not asked."""
        own = np.sqrt(np.square(frames - frames.mean(0)).mean())
        past = np.concatenate(self._past) if self._past else frames[:0]
        count = len(frames)
        if own < MOVES or count < 4 or len(past) < count:
            return False
        squares = np.square(past).sum(1) + np.square(frames).sum(1)[:, None]
        away = np.maximum(squares - 2 * frames @ past.T, 0) / frames.shape[1]
        starts = np.arange(len(past) - count + 1)
        rows = np.arange(count)[:, None]
        return bool(np.sqrt(away[rows, starts + rows].mean(0)).min() < SAME * own)

    def result(self) -> Pictures | None:
        """What was seen; None if there was no frame."""
        if not self._times:
            return None
        if self._second.signatures:
            self._close(len(self._seconds) + 1)
        colours, overlap, layout, repeated = map(np.array, zip(*self._seconds, strict=True))
        return Pictures(
            np.array(self._times),
            np.array(self._moved),
            colours,
            overlap,
            layout,
            repeated,
            self._size,
            self._sheet,
            self._first,
        )


def _fresh() -> _Second:
    return _Second(np.zeros(3), np.zeros(512, np.int64))


def _correlation(one: Curve, other: Curve) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt(np.square(one).sum() * np.square(other).sum())
    return float((one * other).sum() / size) if size > 1e-6 else 1.0
