"""Where sound sets in: how much louder its bands get, from samples alone.

Letters: n samples, t steps in time.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Curve = NDArray[np.float64]
Wave = NDArray[np.floating]

HOP = 0.002  # seconds between steps of the curve
WINDOW = 0.016
LAG = 0.010  # over which a rise is counted
BANDS = 20


def novelty(audio: Wave, sample_rate: int) -> Curve:
    """How much louder the bands get at each step of HOP seconds: (t), in nepers per band.

    Step i speaks of the time i HOP. Bands are as wide as their place is high, so a click and a low
    thump both count; 50 dB under the loudest band is silence.
    """
    window, hop = round(WINDOW * sample_rate), round(HOP * sample_rate)
    lag = round(LAG / HOP)
    # Mirrored ends: a clip that begins in mid-sound has no onset there.
    before = window // 2 + hop * (lag - lag // 2)
    padded = np.pad(audio.astype(np.float64), (before, before + hop), mode="reflect")
    pieces = sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(pieces * np.hanning(window), axis=1)) ** 2
    frequency = np.fft.rfftfreq(window, 1 / sample_rate)
    edges = np.geomspace(90.0, sample_rate / 2, BANDS + 1)
    band = np.digitize(frequency, edges)
    bands = np.stack([power[:, band == i].sum(1) for i in np.unique(band)], axis=1)
    level = 0.5 * np.log(bands + 1e-5 * bands.max() + 1e-12)
    rise = np.maximum(level[lag:] - level[:-lag], 0.0).mean(1)
    return rise[: int(len(audio) / hop) + 1]
