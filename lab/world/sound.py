"""Sound: harmonics of one constant pitch, plus noise, under envelopes read from the scene's clocks.

Every sample is a function of its absolute number, so any window equals the same cut of the whole.
Phases run on through silence and hits only reshape the envelopes; there is never a second pitch at
a time. Letters: n samples, h harmonics, k spectra.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .scene import Scene
from .timing import OPENING, Array, since_hit, smooth, speech_at

SAMPLE_RATE = 16_000
CONTROL = 160  # samples per control frame (100 Hz)
PEAK = 0.5
SILENCE = 10 ** (-50 / 20)
NOISE_LENGTH = 1 << 16
TABLE = 4096  # entries of one period of a voice spectrum

FORMANTS: dict[str, tuple[float, float, float]] = {
    "a": (800.0, 1250.0, 2550.0),
    "e": (480.0, 1900.0, 2600.0),
    "i": (290.0, 2350.0, 3100.0),
    "o": (480.0, 850.0, 2500.0),
    "u": (310.0, 700.0, 2250.0),
    "m": (240.0, 1050.0, 2100.0),
    "l": (360.0, 1100.0, 2800.0),
    "b": (200.0, 800.0, 2200.0),
    "d": (200.0, 1700.0, 2600.0),
}
# Loudness of the voiced part of a consonant, against an open vowel's 1.
VOICED = {"b": 0.05, "m": 0.22, "d": 0.05, "l": 0.28, "s": 0.0, "t": 0.0, "-": 0.0}


@dataclass(frozen=True)
class Strike:
    """How a struck thing sounds: per harmonic its amplitude and decay (s), and a burst of noise."""

    harmonics: tuple[int, ...]
    amplitudes: tuple[float, ...]
    decays: tuple[float, ...]
    attack: float
    noise: tuple[float, float]
    noise_amplitude: float
    noise_decay: float


STRIKES = {
    "ball": Strike(
        (1, 2, 3), (1.0, 0.4, 0.2), (0.11, 0.07, 0.05),
        0.002, (2500, 7000), 0.10, 0.004,
    ),
    "bell": Strike(
        (1, 2, 3, 4, 6), (1.0, 0.6, 0.4, 0.25, 0.2), (0.6, 0.45, 0.34, 0.27, 0.18),
        0.0015, (3000, 7500), 0.04, 0.005,
    ),
    "drum": Strike(
        (1, 2, 3, 4, 5), (1.0, 0.6, 0.4, 0.25, 0.15), (0.13, 0.09, 0.07, 0.05, 0.04),
        0.002, (300, 5000), 0.35, 0.030,
    ),
}  # fmt: skip


@lru_cache(maxsize=16)
def noise_table(low: float, high: float) -> NDArray[np.float32]:
    """A fixed period of noise between two frequencies in Hz, of RMS 1: (NOISE_LENGTH)."""
    rng = np.random.default_rng(int(low) * 100_003 + int(high))
    frequency = np.fft.rfftfreq(NOISE_LENGTH, 1 / SAMPLE_RATE)
    octaves_inside = np.minimum(
        np.log2(np.maximum(frequency, 1.0) / low), np.log2(high / np.maximum(frequency, 1.0))
    )
    gain = np.clip(1.0 + 3.0 * octaves_inside, 0.0, 1.0)  # a third of an octave of slope
    wave = np.fft.irfft(gain * np.exp(2j * np.pi * rng.random(len(frequency))), NOISE_LENGTH)
    table = (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)
    table.setflags(write=False)
    return table


def synthesise(
    scene: Scene, begin: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Make `count` samples from absolute sample `begin` on; `count` is a multiple of 160.

    Returns the wave (n) float32, peaks about 0.5, and the true pitch (n / 160) float32 in Hz, taken
    at the centre of each control frame and 0 where the harmonics are 50 dB below their peak.
    """
    sample = np.arange(begin, begin + count)
    t = sample / SAMPLE_RATE
    centre = (sample[::CONTROL] + CONTROL / 2) / SAMPLE_RATE
    make = _speak if scene.kind == "speech" else _strike
    wave, level = make(scene, sample, t, centre)
    return wave.astype(np.float32), np.where(level >= SILENCE, scene.f0, 0.0).astype(np.float32)


def _noise(
    scene: Scene, sample: NDArray[np.int64], band: tuple[float, float]
) -> NDArray[np.float32]:
    return noise_table(*band)[np.mod(sample + scene.noise_at, NOISE_LENGTH)]


# ----------------------------------------------------------------------------------- struck things


def _ring(tau: Array, period: float, attack: float, decay: float) -> Array:
    """Envelope of a sound struck every `period` s for ever, `tau` s after the last stroke.

    One stroke is exp(-t/decay) (1 - exp(-t/attack)); the sum over all past strokes is closed, and
    continuous where the next stroke sets in.
    """
    fall = 1.0 / decay
    quick = fall + 1.0 / attack
    held = np.exp(-fall * tau) / (1.0 - np.exp(-fall * period))
    return held - np.exp(-quick * tau) / (1.0 - np.exp(-quick * period))


def _harmonic_levels(scene: Scene, tau: Array) -> list[tuple[int, Array]]:
    strike = STRIKES[scene.kind]
    return [
        (h, amplitude * _ring(tau, 1 / scene.rate, strike.attack, decay))
        for h, amplitude, decay in zip(
            strike.harmonics, strike.amplitudes, strike.decays, strict=True
        )
        if h * scene.f0 < 0.475 * SAMPLE_RATE
    ]


def _strike(
    scene: Scene, sample: NDArray[np.int64], t: Array, centre: Array
) -> tuple[Array, Array]:
    """Wave (n) and harmonic level relative to its peak (n / 160) of a ball, bell or drum."""
    strike = STRIKES[scene.kind]
    early = np.linspace(0.0, 0.03, 91)
    turn = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    start = _harmonic_levels(scene, early)
    peak = np.abs(sum(level[:, None] * np.sin(h * turn) for h, level in start)).max()
    # Noise of RMS 1 peaks near 2.5 in so short a burst.
    gain = PEAK / (peak + 2.5 * strike.noise_amplitude)

    tau = since_hit(scene, t)
    phase = 2 * np.pi * np.mod(scene.f0 * t, 1.0)
    wave = sum(level * np.sin(h * phase) for h, level in _harmonic_levels(scene, tau))
    burst = strike.noise_amplitude * _ring(tau, 1 / scene.rate, 0.0005, strike.noise_decay)
    wave = gain * (wave + burst * _noise(scene, sample, strike.noise))

    def loudness(times: Array) -> Array:
        return np.sqrt(sum(level**2 for _, level in _harmonic_levels(scene, times)))

    return wave, loudness(since_hit(scene, centre)) / loudness(early).max()


# ------------------------------------------------------------------------------------------- voice


@lru_cache(maxsize=512)
def _voice_table(sound: str, f0: float) -> NDArray[np.float32]:
    """One period of the voice with a sound's formants, of RMS 1, with its first entry repeated."""
    h = np.arange(1, int(7600 / f0) + 1)
    frequency = h * f0
    gain = 1.0 / (1.0 + (frequency / 700.0) ** 2) ** 0.25  # source and radiation
    first, second, third = FORMANTS[sound]
    for formant, band in ((first, 80.0), (second, 100.0), (third, 140.0), (3700.0, 220.0)):
        gain = gain * formant**2 / np.abs(formant**2 - frequency**2 + 1j * frequency * band)
    spectrum = np.zeros(TABLE // 2 + 1, dtype=complex)
    spectrum[h] = -1j * gain
    table = np.fft.irfft(spectrum, TABLE)
    table = (table / np.sqrt(np.mean(table**2))).astype(np.float32)
    return np.append(table, table[:1])


def _speak(scene: Scene, sample: NDArray[np.int64], t: Array, centre: Array) -> tuple[Array, Array]:
    """Wave (n) and voiced level relative to its peak (n / 160) of the speaking voice."""
    said = scene.syllables
    consonants = sorted({s[0] for s in said if VOICED[s[0]] > 0})
    vowels = sorted({s[1] for s in said} - {"-"})
    crest = max(OPENING[v] * np.abs(_voice_table(v, scene.f0)).max() for v in vowels)
    gain = PEAK / crest

    voiced, slot, within, onset = _voice_levels(scene, t)
    position = np.mod(scene.f0 * t, 1.0) * TABLE
    index = position.astype(np.int64)
    fraction = (position - index).astype(np.float32)
    wave = np.zeros(len(t))
    for sound in (*consonants, *vowels):
        table = _voice_table(sound, scene.f0)
        low = table[index]
        wave += voiced[sound] * (low + fraction * (table[index + 1] - low))
    for consonant in sorted({s[0] for s in said}):
        mine = np.array([s[0] == consonant for s in said])[slot]
        for band, level in _bursts(consonant, within, onset):
            wave += np.where(mine, level, 0.0) * _noise(scene, sample, band)

    at_centre, *_ = _voice_levels(scene, centre)
    total = np.sqrt(sum(level**2 for level in at_centre.values()))
    return gain * wave, total / max(OPENING[v] for v in vowels)


def _voice_levels(
    scene: Scene, t: Array
) -> tuple[dict[str, Array], NDArray[np.int64], Array, float]:
    """Loudness of each voiced sound of the scene (n), with the slot and time inside it."""
    said = scene.syllables
    speech = speech_at(scene, t)
    away = smooth((speech.within - speech.onset + 0.01) / 0.04)
    murmur = smooth(speech.within / 0.02) * (1 - away)
    levels: dict[str, Array] = {}
    for name in {s[0] for s in said if VOICED[s[0]] > 0}:
        share = np.array([VOICED[name] * (s[0] == name) for s in said])
        levels[name] = share[speech.slot] * murmur
    for name in {s[1] for s in said}:
        share = np.array([OPENING[name] * (s[1] == name) for s in said])
        levels[name] = share[speech.slot] * speech.vowel
    return levels, speech.slot, speech.within, speech.onset


def _bursts(consonant: str, within: Array, onset: float) -> list[tuple[tuple[float, float], Array]]:
    """The noises of a consonant: (band in Hz, level (n) against an open vowel's RMS of 1)."""
    release = within - (onset - 0.012)
    pop = smooth(release / 0.003) * np.exp(-np.maximum(release, 0.0) / 0.008)
    if consonant == "s":
        hiss = smooth(within / 0.015) * (1 - smooth((within - onset + 0.01) / 0.025))
        return [((4200.0, 7500.0), 0.25 * hiss)]
    if consonant == "t":
        breath = smooth(release / 0.003) * np.exp(-np.maximum(release, 0.0) / 0.018)
        return [((2800.0, 7500.0), 0.45 * breath)]
    if consonant == "d":
        return [((2200.0, 5500.0), 0.30 * pop)]
    if consonant == "b":
        return [((300.0, 1500.0), 0.30 * pop)]
    return []
