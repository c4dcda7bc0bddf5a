"""Does a clip show or sound where its blocks were joined? Steps at the borders against elsewhere.

Four steps are taken at every instant: of the picture, of the wave (a click), of the level and of
the spectrum. A border's step is looked up among those of all other instants of the same clip. True
clips have borders of rank 0.5 on average, and a ratio of 1. A codec whose latents hold several
frames steps a little more where latents meet, and every block border is such a place: generated
clips are to be compared with what the codec alone leaves.
Letters: f frames, n samples, p instants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]
Places = NDArray[np.int64]

QUIET = 1e-4  # amplitude added before levels are compared, -80 dB
DECIBEL = 20 / np.log(10)


@dataclass(frozen=True)
class Steps:
    """One kind of step of one clip.

    Attributes:
        border: at the block borders.
        elsewhere: at other instants.
    """

    border: Curve
    elsewhere: Curve


@dataclass(frozen=True)
class Seam:
    """One kind of step over all clips.

    Attributes:
        ratio: median step at a border over median step elsewhere; 1 when there is no seam.
        rank: share of the steps elsewhere that a border's step exceeds, on average; 0.5 likewise.
        borders: how many borders were looked at.
    """

    ratio: float
    rank: float
    borders: int


def seam_steps(
    video: NDArray[np.uint8],
    audio: NDArray[np.floating],
    sample_rate: int,
    frame_borders: Sequence[int],
    sample_borders: Sequence[int],
) -> dict[str, Steps]:
    """Steps of one clip: picture, click, level (dB) and spectrum (dB).

    Args:
        video: (f, h, w, 3).
        audio: (n).
        frame_borders, sample_borders: the first frame and the first sample of each block; those
            too near to the ends to have neighbours are left out.
    """
    moved = np.abs(np.diff(video.astype(np.int16), axis=0)).mean((1, 2, 3))
    picture = picture_steps(np.concatenate([[0.0], moved]), frame_borders)
    return {"picture": picture, **sound_steps(audio, sample_rate, sample_borders)}


def picture_steps(moved: Curve, borders: Sequence[int]) -> Steps:
    """Steps of the picture.

    Args:
        moved: (f) how far each frame is from the one before it; the first is from nothing.
        borders: the first frame of each block.
    """
    frames = np.arange(3, len(moved) - 2)
    at = _inside(borders, 3, len(moved) - 2)
    return Steps(_picture(moved, at), _picture(moved, np.setdiff1d(frames, at)))


def sound_steps(
    audio: NDArray[np.floating], sample_rate: int, borders: Sequence[int]
) -> dict[str, Steps]:
    """Steps of the sound (n): click, level (dB) and spectrum (dB).

    Args:
        borders: the first sample of each block.
    """
    reach = round(0.032 * sample_rate)
    # Elsewhere is sampled every 7.3 ms, so as to meet every phase of pitches, frames and latents.
    samples = np.arange(reach, len(audio) - reach, max(1, round(0.0073 * sample_rate)))
    at = _inside(borders, reach, len(audio) - reach)
    far = [np.abs(samples - border) > reach for border in at]
    others = samples[np.logical_and.reduce(far)] if far else samples
    wave = audio.astype(np.float64)
    measures = {"click": _click, "level": _level, "spectrum": _spectrum}
    return {
        name: Steps(measure(wave, sample_rate, at), measure(wave, sample_rate, others))
        for name, measure in measures.items()
    }


def seams(clips: Iterable[Mapping[str, Steps]]) -> dict[str, Seam]:
    """Put the steps of many clips together."""
    clips = list(clips)
    result = {}
    for name in clips[0] if clips else ():
        border = np.concatenate([clip[name].border for clip in clips])
        elsewhere = np.concatenate([clip[name].elsewhere for clip in clips])
        ranked = np.concatenate([ranks(clip[name]) for clip in clips])
        if not len(ranked):
            continue
        usual = float(np.median(elsewhere))
        ratio = float(np.median(border)) / usual if usual > 0 else float("nan")
        result[name] = Seam(ratio, float(ranked.mean()), len(ranked))
    return result


def ranks(steps: Steps) -> Curve:
    """Of each border, the share of steps elsewhere that it exceeds; none without any elsewhere."""
    usual = np.sort(steps.elsewhere)
    if not len(usual):
        return np.zeros(0)
    lower, upper = (np.searchsorted(usual, steps.border, side) for side in ("left", "right"))
    return (lower + upper) / (2 * len(usual))


def _inside(borders: Sequence[int], least: int, end: int) -> Places:
    return np.array([b for b in borders if least <= b < end], dtype=np.int64)


def _picture(moved: Curve, at: Places) -> Curve:
    """Change of the picture into frame `at`, against the two changes before and after it."""
    around = (moved[at - 2] + moved[at - 1] + moved[at + 1] + moved[at + 2]) / 4
    return moved[at] / (around + 0.05)


def _click(wave: Curve, rate: int, at: Places) -> Curve:
    """Largest bend of the wave at the joint, against the bends of 5 ms to either side."""
    bend = np.abs(np.diff(wave, 2, prepend=[0.0, 0.0]))  # bend[i]: of samples i - 2, i - 1, i
    joint = np.maximum(bend[at], bend[at + 1])
    total = np.concatenate([[0.0], np.cumsum(bend**2)])
    half = round(0.005 * rate)
    around = np.sqrt(np.maximum(total[at + 2 + half] - total[at - half], 0) / (2 * half + 2))
    return joint / (around + QUIET)


def _level(wave: Curve, rate: int, at: Places) -> Curve:
    """Change of the level from the 10 ms before to the 10 ms after, in dB."""
    total = np.concatenate([[0.0], np.cumsum(wave**2)])
    span = round(0.010 * rate)
    after = np.sqrt(np.maximum(total[at + span] - total[at], 0) / span)
    before = np.sqrt(np.maximum(total[at] - total[at - span], 0) / span)
    return np.abs(DECIBEL * np.log((after + QUIET) / (before + QUIET)))


def _spectrum(wave: Curve, rate: int, at: Places) -> Curve:
    """Change of the spectrum from the 32 ms before to the 32 ms after, in dB over 24 bands."""
    span = round(0.032 * rate)
    window = np.hanning(span)
    edges = np.geomspace(100.0, rate / 2, 25)
    band = np.digitize(np.fft.rfftfreq(span, 1 / rate), edges)
    share = (band[:, None] == np.arange(25)[None, :]).astype(np.float64)

    def levels(start: Places) -> Curve:
        pieces = wave[start[:, None] + np.arange(span)] * window
        power = (np.abs(np.fft.rfft(pieces, axis=1)) ** 2) @ share / span
        return 0.5 * DECIBEL * np.log(power + QUIET**2)

    return np.abs(levels(at) - levels(at - span)).mean(1)
