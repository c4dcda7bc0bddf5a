"""Is what is seen heard at that instant? Measured from pixels and samples alone.

For things that hit: instants at which the picture shows a hit against instants at which the sound
sets in. For speech: how far the mouth is open against how loud the voice is, frame by frame.
Letters: f frames, k events. Times are seconds from the first frame, which is also the first sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pixels import hit_course, mouth_opening, on_grid
from .samples import loudness, onsets, peaks

Curve = NDArray[np.float64]
Video = NDArray[np.uint8]
Wave = NDArray[np.floating]

NEAR = 0.2  # seconds within which a seen and a heard event can be one; half the fastest period
EDGE = 0.35  # seconds at either end in which an event need not have its partner
LEAST_MOTION = {"ball": 4.0, "drum": 0.8, "bell": 2.0}  # of a hit course, in its own unit
LAGS = 6  # frames to either side over which mouth and loudness are shifted


@dataclass(frozen=True)
class HitSync:
    """Seen against heard events of one clip.

    Attributes:
        seen, heard: their times in seconds.
        offsets: heard minus seen for each pair, in ms: positive when the sound is late.
        seen_alone, heard_alone: events away from the ends of the clip that have no partner.
    """

    seen: Curve
    heard: Curve
    offsets: Curve
    seen_alone: int
    heard_alone: int

    @property
    def median_offset(self) -> float:
        """Median of |offset| in ms, events without a partner counting as infinitely far.

        NaN when nothing was seen and nothing heard.
        """
        alone = np.full(self.seen_alone + self.heard_alone, np.inf)
        everything = np.concatenate([np.abs(self.offsets), alone])
        return float(np.median(everything)) if len(everything) else float("nan")


@dataclass(frozen=True)
class MouthSync:
    """Mouth opening against loudness of one clip.

    Attributes:
        at_zero: Pearson's correlation as the clip stands; 0 where mouth or voice never changes.
        best: the highest correlation within LAGS frames of shift.
        lag: the shift it is reached at, in ms: positive when the sound is late.
    """

    at_zero: float
    best: float
    lag: float


def seen_hits(video: Video, fps: float, kind: str) -> Curve:
    """When a ball, bell or drum stick is seen to hit: (k) seconds, finer than a frame.

    A hit is a peak of `hit_course`; its instant is the axis about which the course is most
    symmetric, since things leave a hit as they came. That takes up to seven frames to either
    side, so hits nearer to the ends of the clip are not seen.
    """
    course = hit_course(on_grid(video), kind)
    if len(course) < 8 or np.isnan(course).mean() > 0.5:
        return np.zeros(0)
    steps = np.arange(len(course))
    known = ~np.isnan(course)
    course = np.interp(steps, steps[known], course[known])
    low, high = np.percentile(course, (5, 97))
    if high - low < LEAST_MOTION[kind]:
        return np.zeros(0)
    found = peaks(course, low + 0.6 * (high - low), round(0.25 * fps))
    apart = float(np.median(np.diff(found))) if len(found) > 1 else fps
    reach = int(np.clip(0.4 * apart, 2, 6))
    inner = found[(found > reach) & (found < len(course) - 1 - reach)]
    times = [_axis(course, int(i), reach) / fps for i in inner]
    return np.array(times)


def _axis(course: Curve, peak: int, reach: int) -> float:
    """The place, within a frame of `peak`, about which the course is most symmetric."""
    steps = np.arange(len(course))
    places = peak + np.linspace(-1, 1, 81)
    away = np.arange(1, reach + 1)
    after = np.interp(places[:, None] + away, steps, course)
    before = np.interp(places[:, None] - away, steps, course)
    return float(places[np.square(after - before).sum(1).argmin()])


def hit_sync(video: Video, audio: Wave, sample_rate: int, fps: float, kind: str) -> HitSync:
    """Compare seen and heard hits of a ball, bell or drum clip.

    Raises:
        ValueError: kind is speech, or unknown.
    """
    seen, heard = seen_hits(video, fps, kind), onsets(audio, sample_rate)
    pairs = match(seen, heard)
    end = min(len(video) / fps, len(audio) / sample_rate) - EDGE

    def alone(times: Curve, taken: set[int]) -> int:
        return sum(EDGE <= t <= end and i not in taken for i, t in enumerate(times))

    return HitSync(
        seen=seen,
        heard=heard,
        offsets=np.array([1000 * (heard[j] - seen[i]) for i, j in pairs]),
        seen_alone=alone(seen, {i for i, _ in pairs}),
        heard_alone=alone(heard, {j for _, j in pairs}),
    )


def match(seen: Curve, heard: Curve, near: float = NEAR) -> list[tuple[int, int]]:
    """Pair events at most `near` seconds apart, the nearest pairs first, each event once."""
    gaps = sorted(
        (abs(h - s), i, j)
        for i, s in enumerate(seen)
        for j, h in enumerate(heard)
        if abs(h - s) <= near
    )
    pairs: dict[int, int] = {}
    for _, i, j in gaps:
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return sorted(pairs.items())


def mouth_sync(video: Video, audio: Wave, sample_rate: int, fps: float) -> MouthSync:
    """Compare mouth opening and loudness of a speech clip, frame by frame."""
    opening = mouth_opening(on_grid(video))
    loud = loudness(audio, sample_rate, np.arange(len(opening)) / fps)
    by_lag = {}
    for lag in range(-LAGS, LAGS + 1):
        mouth = opening[max(0, -lag) : len(opening) - max(0, lag)]
        voice = loud[max(0, lag) : len(loud) - max(0, -lag)]
        by_lag[lag] = _pearson(mouth, voice)
    best = max(by_lag, key=lambda lag: by_lag[lag])
    return MouthSync(by_lag[0], by_lag[best], 1000 * best / fps)


def _pearson(a: Curve, b: Curve) -> float:
    if len(a) < 4 or a.std() < 0.1 or b.std() < 1e-4:  # a tenth of a pixel; -80 dB
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
