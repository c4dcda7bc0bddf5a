"""Reading sound: loudness, onsets, pitch and rate, from samples alone.

Letters: n samples, t steps in time, k onsets. Times are in seconds from the first sample.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ...measures.novelty import HOP, WINDOW, novelty

Curve = NDArray[np.float64]
Wave = NDArray[np.floating]

SILENT = 1e-3  # RMS below which there is no sound to speak of
EARLY = 0.002  # by which the centre of the rise, as found here, precedes the instant of the hit


def loudness(audio: Wave, sample_rate: int, times: Curve, window: float = 0.04) -> Curve:
    """RMS of `window` seconds about each of the times (t) -> (t)."""
    total = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    half = window * sample_rate / 2
    begin = np.clip(np.rint(times * sample_rate - half), 0, len(audio)).astype(int)
    end = np.clip(np.rint(times * sample_rate + half), 0, len(audio)).astype(int)
    return np.sqrt(np.maximum(total[end] - total[begin], 0.0) / np.maximum(end - begin, 1))


def peaks(curve: Curve, least: float, apart: int) -> NDArray[np.int64]:
    """Indices of local maxima of at least `least`, the highest first to claim `apart` steps."""
    inner = np.flatnonzero((curve[1:-1] >= curve[:-2]) & (curve[1:-1] > curve[2:])) + 1
    taken: list[int] = []
    for i in inner[np.argsort(-curve[inner], kind="stable")]:
        if curve[i] >= least and all(abs(i - j) >= apart for j in taken):
            taken.append(int(i))
    return np.array(sorted(taken), dtype=np.int64)


def onsets(audio: Wave, sample_rate: int, apart: float = 0.22) -> Curve:
    """When something struck sounds anew: (k) seconds. None in the first and last 30 ms."""
    if len(audio) < WINDOW * sample_rate * 4 or np.sqrt(np.mean(np.square(audio))) < SILENT:
        return np.zeros(0)
    rise = novelty(audio, sample_rate)
    margin = round(0.03 / HOP)
    rise[:margin] = rise[-margin:] = 0.0
    found = peaks(rise, max(0.35 * rise.max(), 0.15), round(apart / HOP))
    times = []
    for i in found:
        near = slice(max(0, i - 3), i + 4)  # the centre of the rise is steadier than its top
        weight = rise[near] ** 2
        steps = np.arange(near.start, near.start + len(weight))
        times.append(float(np.average(steps, weights=weight)))
    return np.array(times) * HOP + EARLY


def pitch(audio: Wave, sample_rate: int, low: float = 55.0, high: float = 900.0) -> float:
    """The pitch of the loud parts in Hz, or NaN when nothing periodic is heard.

    Per piece of 64 ms: the first lag at which the normalised difference function nearly reaches its
    best; over pieces: the median, each counted by its energy.
    """
    size, hop = round(0.064 * sample_rate), round(0.02 * sample_rate)
    if len(audio) < size:
        return float("nan")
    pieces = sliding_window_view(audio.astype(np.float64), size)[::hop]
    level = np.sqrt(np.square(pieces).mean(1))
    loud = (level >= 0.3 * level.max()) & (level > SILENT)
    if not loud.any():
        return float("nan")
    pieces, level = pieces[loud], level[loud]
    lags = np.arange(int(sample_rate / low) + 2)
    spectrum = np.abs(np.fft.rfft(pieces, 2 * size, axis=1)) ** 2
    product = np.fft.irfft(spectrum, axis=1)[:, : len(lags)]
    energy = np.concatenate([np.zeros((len(pieces), 1)), np.cumsum(pieces**2, axis=1)], axis=1)
    both = energy[:, size - lags] + energy[:, -1:] - energy[:, lags]
    likeness = 2 * product / np.maximum(both, 1e-12)
    found, weights = [], []
    for curve, weight in zip(likeness, level, strict=True):
        lag, clarity = first_peak(curve, sample_rate / high)
        if clarity > 0.4:
            found.append(sample_rate / lag)
            weights.append(weight**2 * clarity)
    return weighted_median(np.array(found), np.array(weights)) if found else float("nan")


def first_peak(curve: Curve, least: float, share: float = 0.85) -> tuple[float, float]:
    """(lag, height) of the first maximum within `share` of the highest, beyond the central lobe.

    Lags under `least` are not looked at. The lag is a fraction, by a parabola. (nan, 0) if none.
    """
    below = np.flatnonzero(curve < 0.0) if (curve < 0).any() else np.array([np.argmin(curve)])
    start = max(int(below[0]), int(least), 1)
    inner = np.arange(start, len(curve) - 1)
    top = inner[(curve[inner] >= curve[inner - 1]) & (curve[inner] > curve[inner + 1])]
    if not len(top) or curve[top].max() <= 0:
        return float("nan"), 0.0
    i = int(top[curve[top] >= share * curve[top].max()][0])
    bend = curve[i - 1] - 2 * curve[i] + curve[i + 1]
    shift = 0.5 * (curve[i - 1] - curve[i + 1]) / bend if bend < 0 else 0.0
    return i + float(np.clip(shift, -0.5, 0.5)), float(curve[i])


def weighted_median(values: Curve, weights: Curve) -> float:
    """The value at which half the weight lies on either side."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def hit_rate(audio: Wave, sample_rate: int) -> float:
    """Hits per second: one over the median time between onsets. NaN under two onsets."""
    found = onsets(audio, sample_rate)
    return float(1 / np.median(np.diff(found))) if len(found) > 1 else float("nan")


def syllable_rate(audio: Wave, sample_rate: int) -> float:
    """Syllables per second: the strongest frequency of the loudness. NaN if it hardly varies.

    A loop of syllables of different loudness also repeats at the loop's own, lower rate; but there
    all syllables add up in step only at their own rate, so that one is strongest.
    """
    step = 0.005
    times = np.arange(0, len(audio) / sample_rate, step)
    level = np.sqrt(loudness(audio, sample_rate, times, 0.03))
    if len(level) < 1.0 / step or level.max() < SILENT**0.5:
        return float("nan")
    window = np.hanning(len(level))
    size = 1 << 14
    frequency = np.fft.rfftfreq(size, step)
    strength = np.abs(np.fft.rfft((level - np.average(level, weights=window)) * window, size))
    strength[(frequency < 1.7) | (frequency > 5.4)] = 0.0
    depth = 2 * strength.max() / np.dot(level, window)
    return float(frequency[strength.argmax()]) if depth > 0.1 else float("nan")
