"""By how much sound is late against the picture, and whether that changes as a film goes on.

How abruptly motion changes is laid over how abruptly sound gets louder, shifted until both agree
best. Three things follow. What moves has its own habit of beginning before or after it sounds, so a
constant offset is one of content as well; a change of it is not. Where everything comes again at
one pace, a shift by that pace agrees as well: the nearest to none is taken. And where nothing moves
to the sound, an offset means nothing: none is given unless the two agree better than chance.
Letters: t steps in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

RATE = 200  # steps a second of both curves
BLUR = 0.03  # seconds, a standard deviation: finer than that frames tell nothing
REACH = 0.5  # seconds to either side that are looked at
NEAR = 0.25  # seconds about the offset of the part before in which a part's is looked for
INDEPENDENT = 0.1  # seconds after which blurred curves no longer know of themselves
AS_GOOD = 0.8  # of the best agreement: as good, if it is nearer to none
PART = (4.0, 20.0)  # seconds of a part, least and most; otherwise a third of the film


@dataclass(frozen=True)
class Offset:
    """How late the sound is.

    Attributes:
        ms: positive when the sound is late; None where picture and sound do not agree.
        agreement: Pearson's correlation at that shift.
        parts: (seconds into the film, ms) of parts that agree by themselves.
        drift: ms by which it gets later from beginning to end; None under three parts.
    """

    ms: float | None = None
    agreement: float = 0.0
    parts: list[tuple[float, float]] = field(default_factory=list)
    drift: float | None = None


def offset(
    times: Curve, abrupt: Curve, step: float, rise: Curve, hop: float, lead: float
) -> Offset:
    """Compare motion and sound of a film.

    Args:
        times: (f) seconds from the first frame on.
        abrupt: (f) how abruptly motion changes then.
        step: seconds from frame to frame.
        rise: (t) how much louder the sound gets at each of its steps (`novelty`).
        hop: seconds between them.
        lead: when the first of them is.
    """
    length = min(times[-1] if len(times) else 0.0, lead + hop * len(rise))
    if len(times) < 4 or length < 2 * REACH:
        return Offset()
    at = np.arange(0, length, 1 / RATE)
    # Speed changes between two differences, each of which is seen only when it is over.
    between = times - 0.5 * step
    seen = _blurred(np.interp(at, between, abrupt, left=0.0, right=0.0))
    heard = _blurred(np.interp(at, lead + hop * np.arange(len(rise)), rise, left=0.0, right=0.0))
    whole, agreement = _best(seen, heard, 0.0, REACH)
    clear = agreement > _chance(length, 3)
    size = float(np.clip(length / 3, *PART))
    parts: list[tuple[float, float]] = []
    about, reach = (whole, NEAR) if clear else (0.0, REACH)
    for begin in np.arange(0, length - size + 1e-6, size / 2):
        inside = slice(round(begin * RATE), round((begin + size) * RATE))
        lag, good = _best(seen[inside], heard[inside], about, reach)
        if good > _chance(size, 2 if clear else 3):
            parts.append((float(begin + size / 2), 1000 * lag))
            about, reach = lag, NEAR  # what drifts is followed
    enough = len(parts) >= 3
    if not clear and not enough:
        return Offset(agreement=agreement)
    ms = 1000 * whole if clear else float(np.median([lag for _, lag in parts]))
    drift = length * _slope(np.array(parts)) if enough else None
    return Offset(ms, agreement, parts, drift)


def _chance(seconds: float, deviations: float) -> float:
    """A correlation that curves which know nothing of each other hardly reach."""
    return deviations / np.sqrt(seconds / INDEPENDENT)


def _blurred(curve: Curve) -> Curve:
    reach = np.arange(-round(4 * BLUR * RATE), round(4 * BLUR * RATE) + 1) / RATE
    weights = np.exp(-0.5 * (reach / BLUR) ** 2)
    return np.convolve(curve, weights / weights.sum(), "same")


def _best(seen: Curve, heard: Curve, about: float, reach: float) -> tuple[float, float]:
    """The shift in seconds, at most `reach` from `about`, at which both agree best, and how well.

    Among peaks that are nearly as high, the nearest to `about`.
    """
    seen, heard = seen - seen.mean(), heard - heard.mean()
    size = np.sqrt(np.square(seen).sum() * np.square(heard).sum())
    if not size > 0:
        return 0.0, 0.0
    room = 1 << (2 * len(seen) - 1).bit_length()
    alike = np.fft.irfft(np.conj(np.fft.rfft(seen, room)) * np.fft.rfft(heard, room), room) / size
    lags = np.arange(round((about - reach) * RATE), round((about + reach) * RATE) + 1)
    curve = alike[lags % room]
    peaks = np.flatnonzero((curve[1:-1] >= curve[:-2]) & (curve[1:-1] >= curve[2:])) + 1
    if not len(peaks):
        return about, float(alike[round(about * RATE) % room])
    high = peaks[curve[peaks] >= AS_GOOD * curve[peaks].max()]
    best = high[np.argmin(np.abs(lags[high] - about * RATE))]
    before, top, after = curve[best - 1 : best + 2]
    bend = before - 2 * top + after
    finer = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return float((lags[best] + finer) / RATE), float(top)


def _slope(points: NDArray[np.float64]) -> float:
    """The median slope of all pairs of points: a few wrong ones do not move it."""
    x, y = points.T
    one, other = np.triu_indices(len(points), 1)
    return float(np.median((y[other] - y[one]) / (x[other] - x[one])))
