"""The sound of a film, piece by piece as it comes; of an hour no more is kept than its curves.

c channels, n samples, t steps in time. Loudness is FFmpeg's filter ebur128 (EBU R128, ITU-R
BS.1770); all else is measured on one channel at 16 kHz.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.filter import Graph
from numpy.typing import NDArray

from .novelty import HOP, novelty
from .seams import Steps, sound_steps

Curve = NDArray[np.float64]
Wave = NDArray[np.float32]

RATE = 16_000
PIECE = 20 * RATE  # samples that are looked at together
MARGIN = 1600  # samples around them that are looked at with them
LATE = 0.01  # seconds by which a block of sound begins after its second (samplers/clock.py)
ENVELOPE = RATE // 100
LEVEL = RATE // 20
SILENT = 1e-3  # root mean square of a twentieth of a second, -60 dB
FULL = 1 - 2**-10  # amplitude from which on a sample counts as clipped, two in a row
GAP = 0.02  # seconds without samples that are a gap and not rounding
TAIL = 0.1  # seconds before the end in which a codec may end the sound and fill up
CLICK = 0.5  # share of all bending in 10 ms that a jump has
FILLED = 3  # values of the momentary loudness that come before it has its 400 ms
SPANNED = 100  # values that a range of loudness, which is taken over 3 s, needs
JUMP = 0.02  # and how far it goes at least


@dataclass(frozen=True)
class Sound:
    """What was heard.

    Attributes:
        lead: seconds from the first frame to the first sample.
        length: seconds from there to the end of the last sample, by their number and the gaps.
        gaps: seconds of them in which there are no samples.
        slip: ms by which the timestamps of the end are later than the number of samples has it.
        rate, channels: of the file.
        rise: (t) how much louder it gets every HOP seconds (`novelty`).
        lows, highs: (t) least and largest sample of each 10 ms.
        borders: (k) seconds of the film at which blocks meet.
        steps: there and elsewhere.
        clicks: (k) seconds from the first sample at which the wave is torn.
        silent: share of it.
        clipped: share of its samples.
        momentary: (t) loudness of the 400 ms before, in LUFS, every 100 ms from 0.4 s on.
        loudness, span: of the whole, in LUFS, and its range in LU; None where next to nothing is
            heard or it is too short.
        peak: true peak in dB of full scale; None of silence.
    """

    lead: float
    length: float
    gaps: float
    slip: float
    rate: int
    channels: int
    rise: Curve
    lows: Curve
    highs: Curve
    borders: Curve
    steps: dict[str, Steps]
    clicks: Curve
    silent: float
    clipped: float
    momentary: Curve
    loudness: float | None
    span: float | None
    peak: float | None


class SoundCourse:
    """Takes in sound in its order; `result` is what was heard.

    Args:
        first: time of the first picture on the film's clock.
        period: seconds of a block, at whose borders seams are looked for.
        last: second of the film after which there is none: codecs fill up their frames at the end.
    """

    def __init__(self, first: float, period: float, last: float) -> None:
        self._first, self._period, self._last = first, period, last
        self._lead: float | None = None
        self._planar: AudioResampler | None = None
        self._to_rate: AudioResampler | None = None
        self._meter: _Meter | None = None
        self._rate, self._channels, self._played, self._gaps = 0, 0, 0, 0.0
        self._end = 0.0
        self._clipped = self._samples = 0
        self._full: NDArray[np.bool_] | None = None
        self._held, self._base = np.zeros(0, np.float32), 0
        self._parts: list[Wave] = []
        self._waiting = 0
        self._rise: list[Curve] = []
        self._clicks: list[Curve] = []
        self._steps: list[dict[str, Steps]] = []
        self._borders: list[Curve] = []
        self._levels: list[Curve] = []
        self._lows: list[Curve] = []
        self._highs: list[Curve] = []

    def add(self, frame: AudioFrame, time: float) -> None:
        """Take in a frame that is heard from a time of the film's clock on, in seconds."""
        if self._lead is None:
            self._lead = time - self._first
            self._rate, self._channels = frame.sample_rate, frame.layout.nb_channels
            self._planar = AudioResampler("fltp", frame.layout, frame.sample_rate)
            self._to_rate = AudioResampler("fltp", "mono", RATE)
            self._meter = _Meter(frame)
        missing = time - self._first - self._lead - self._played / self._rate - self._gaps
        if missing > GAP:
            self._gaps += missing
            self._take(np.zeros(round(missing * RATE), np.float32))
        frame.pts = None
        for part in self._planar.resample(frame):
            wave = part.to_ndarray()
            self._played += wave.shape[1]
            self._meter.add(part)
            self._count_clipped(wave)
            mono = np.ascontiguousarray(wave.mean(0, keepdims=True))
            for made in self._to_rate.resample(_frame(mono, "mono", self._rate)):
                self._take(made.to_ndarray()[0])
        self._end = time + frame.samples / frame.sample_rate

    def _count_clipped(self, wave: Wave) -> None:
        full = np.abs(wave) >= FULL
        before = full[:, :1] & False if self._full is None else self._full
        joined = np.concatenate([before, full], axis=1)
        pairs = joined[:, 1:] & joined[:, :-1]
        self._clipped += int(pairs.sum())
        self._samples += wave.size
        self._full = full[:, -1:]

    def _take(self, wave: Wave) -> None:
        self._parts.append(wave)
        self._waiting += len(wave)
        if len(self._held) + self._waiting < PIECE + 2 * MARGIN:
            return
        self._join()
        while len(self._held) >= PIECE + 2 * MARGIN:
            self._look(MARGIN + PIECE)
            self._held, self._base = self._held[PIECE:], self._base + PIECE

    def _join(self) -> None:
        self._held = np.concatenate([self._held, *self._parts])
        self._parts, self._waiting = [], 0

    def _look(self, stop: int) -> None:
        """Measure what is held up to `stop`; of what was before, only the margin is held."""
        start = MARGIN if self._base else 0
        held = self._held[: stop + MARGIN]
        hop = round(HOP * RATE)
        self._rise.append(novelty(held, RATE)[start // hop : -(-stop // hop)])
        inner = held[start:stop]
        self._levels.append(_each(np.square(inner, dtype=np.float64), LEVEL, np.mean))
        self._lows.append(_each(inner, ENVELOPE, np.min))
        self._highs.append(_each(inner, ENVELOPE, np.max))
        self._clicks.append((self._base + start + _torn(held, start, stop)) / RATE)
        shift = (self._first_border() - self._base / RATE) * RATE
        step = self._period * RATE
        end = min(stop, shift + (self._last - self._period) * RATE)
        first, last = (math.ceil((edge - shift) / step) for edge in (start, end))
        numbers = np.arange(max(0, first), last)
        borders = np.rint(shift + step * numbers).astype(int)
        near = borders >= MARGIN // 2
        self._borders.append(self._period * (1 + numbers[near]))
        self._steps.append(sound_steps(held, RATE, borders[near].tolist()))

    def _first_border(self) -> float:
        return self._period + LATE - self._lead

    def result(self) -> Sound | None:
        """What was heard; None if there were no samples."""
        if self._lead is None or not self._played:
            return None
        for made in self._to_rate.resample(None):
            self._parts.append(made.to_ndarray()[0])
        self._join()
        self._held = np.pad(self._held, (0, max(0, 2 * MARGIN - len(self._held))))
        self._look(len(self._held))
        length = self._played / self._rate + self._gaps
        momentary, loudness, span, peak = self._meter.result()
        clicks = np.concatenate(self._clicks)
        return Sound(
            lead=self._lead,
            length=length,
            gaps=self._gaps,
            slip=1000 * (self._end - self._first - self._lead - length),
            rate=self._rate,
            channels=self._channels,
            rise=np.concatenate(self._rise),
            lows=np.concatenate(self._lows),
            highs=np.concatenate(self._highs),
            borders=np.concatenate(self._borders),
            steps={
                name: Steps(
                    np.concatenate([one[name].border for one in self._steps]),
                    np.concatenate([one[name].elsewhere for one in self._steps]),
                )
                for name in self._steps[0]
            },
            clicks=clicks[clicks < length - TAIL],
            silent=float(np.mean(np.sqrt(np.concatenate(self._levels)) < SILENT)),
            clipped=self._clipped / self._samples,
            momentary=momentary,
            loudness=loudness,
            span=span,
            peak=peak,
        )


class _Meter:
    """FFmpeg's loudness meter."""

    def __init__(self, like: AudioFrame) -> None:
        self._graph = Graph()
        layout = like.layout.name
        ends = self._graph.add_abuffer(sample_rate=like.sample_rate, format="fltp", layout=layout)
        meter = self._graph.add("ebur128", "metadata=1:peak=true")
        ends.link_to(meter)
        meter.link_to(self._graph.add("abuffersink"))
        self._graph.configure()
        self._pts = 0
        self._momentary: list[float] = []
        self._last: dict[str, str] = {}

    def add(self, frame: AudioFrame) -> None:
        """Take in planar float samples."""
        frame.pts, frame.time_base = self._pts, Fraction(1, frame.sample_rate)
        self._pts += frame.samples
        self._graph.push(frame)
        self._read()

    def _read(self) -> None:
        for frame in self._pulled():
            if "lavfi.r128.M" in frame.metadata:  # not on what is left of 100 ms at the end
                self._last = frame.metadata
                self._momentary.append(float(self._last["lavfi.r128.M"]))

    def _pulled(self) -> Iterator[AudioFrame]:
        while True:
            try:
                yield self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    def result(self) -> tuple[Curve, float | None, float | None, float | None]:
        """Momentary loudness (t) from 0.4 s on, and of the whole: loudness, range, true peak."""
        self._graph.push(None)
        self._read()
        whole = float(self._last.get("lavfi.r128.I", -70))
        span = float(self._last.get("lavfi.r128.LRA", 0))
        peak = float(self._last.get("lavfi.r128.true_peak", 0))
        heard = whole > -70 + 1e-3  # what the filter says until anything was heard
        return (
            np.nan_to_num(np.array(self._momentary[FILLED:]), nan=-70.0, neginf=-70.0),
            whole if heard else None,
            span if heard and len(self._momentary) >= SPANNED else None,
            20 * math.log10(peak) if peak > 0 else None,
        )


def _frame(wave: Wave, layout: str, rate: int) -> AudioFrame:
    frame = AudioFrame.from_ndarray(wave, "fltp", layout)
    frame.sample_rate = rate
    return frame


def _each(values: NDArray, size: int, how: object) -> Curve:
    """Of `size` values each, and of what is left over: (t)."""
    starts = range(0, len(values), size)
    return np.array([how(values[start : start + size]) for start in starts], dtype=np.float64)


def _torn(held: Wave, start: int, stop: int) -> NDArray[np.int64]:
    """Places from `start` on at which a jump of the wave outweighs all bends near it.

    A jump bends it twice, there and back again; a sound that sets in does so once.
    """
    bend = np.diff(held.astype(np.float64), 2, prepend=[held[0]] * 2, append=held[-1])
    near = round(0.005 * RATE)
    total = np.concatenate([[0.0], np.cumsum(np.square(bend))])
    at = np.arange(len(held))
    low, high = np.maximum(at - near, 0), np.minimum(at + near + 1, len(held))
    here, after = bend[:-1], bend[1:]
    jump = np.square(here) + np.square(after) > CLICK * (total[high] - total[low])
    torn = jump & (-here * after > JUMP**2)
    places = np.flatnonzero(torn[start:stop])
    return places[np.diff(places, prepend=-near - 1) > near]
