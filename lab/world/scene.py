"""A scene: everything that decides a cartoon and its sound, for all time, in a few named numbers.

Attributes are what a caption may say; the other fields are the freedom it leaves open (exact pitch,
exact tempo, where in its cycle the scene begins, when the eyes blink).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .captions import parse, words, write
from .vocabulary import (
    ATTRIBUTES,
    COLOURS,
    KINDS,
    MAX_SYLLABLES,
    PITCHES,
    REST,
    SKINS,
    SYLLABLES,
    TEMPI,
    VOCABULARY,
)

__all__ = [
    "ATTRIBUTES",
    "KINDS",
    "VOCABULARY",
    "Scene",
    "caption",
    "parse",
    "sample_scene",
    "words",
]

PITCH_HZ: dict[str, dict[str, float]] = {
    "speech": {"low": 110.0, "middle": 165.0, "high": 250.0},
    "ball": {"low": 160.0, "middle": 260.0, "high": 420.0},
    "bell": {"low": 260.0, "middle": 440.0, "high": 740.0},
    "drum": {"low": 70.0, "middle": 115.0, "high": 190.0},
}
HITS_PER_SECOND = {"slow": 1.0, "steady": 1.6, "fast": 2.5}
SYLLABLES_PER_SECOND = {"slow": 2.0, "steady": 3.0, "fast": 4.5}
SPREAD = 0.03  # relative jitter of pitch and tempo
TRANSCRIPT = 64  # syllables of one that does not loop: more than are spoken in any clip
RESTS = 0.08  # of them


@dataclass(frozen=True)
class Scene:
    """One cartoon. Times are absolute seconds; the scene extends over all of them.

    Attributes:
        kind: one of `KINDS`.
        attributes: value of each of `ATTRIBUTES[kind]`.
        f0: pitch in Hz, constant.
        rate: hits (or syllables) per second.
        offset: time in seconds of one hit (or of the start of the first syllable), in [0, cycle).
        place: horizontal displacement of the thing, in 1/64 of the width.
        mirrored: draw the moving part (drum stick, first swing) on the other side.
        long_hair: draw long hair ("girl"), else short ("boy").
        bob: (amplitude in 1/64 of the width, frequency in Hz, phase in cycles) of the head.
        blink: (period, time) of the blinks in seconds.
        noise_at: sample offset into the fixed noise.
        transcript: syllables and rests that are spoken instead of those that the caption names, in
            a loop of their own.
    """

    kind: str
    attributes: Mapping[str, str]
    f0: float
    rate: float
    offset: float
    place: float = 0.0
    mirrored: bool = False
    long_hair: bool = True
    bob: tuple[float, float, float] = (0.8, 0.5, 0.0)
    blink: tuple[float, float] = (3.0, 1.0)
    noise_at: int = 0
    transcript: tuple[str, ...] = ()

    @property
    def syllables(self) -> tuple[str, ...]:
        """The looping syllables and rests; empty unless the kind is speech."""
        return self.transcript or tuple(self.attributes.get("syllables", "").split())

    @property
    def person(self) -> str:
        """The word for the face as drawn."""
        return "girl" if self.long_hair else "boy"


def sample_scene(
    rng: np.random.Generator,
    kind: str | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Scene:
    """Draw a scene.

    Args:
        rng: the only source of randomness.
        kind: fixes the kind; drawn evenly when None.
        attributes: fixes some attributes (as `parse` returns them; a `kind` entry is honoured),
            the rest are drawn. Fixed colours are kept as they are, even when two are the same.

    Raises:
        ValueError: for an unknown kind, attribute or value.
    """
    fixed = dict(attributes or {})
    kind = fixed.pop("kind", None) if kind is None else kind
    fixed.pop("kind", None)
    if kind is None:
        kind = KINDS[int(rng.integers(len(KINDS)))]
    if kind not in KINDS:
        raise ValueError(f"found scene kind {kind!r}, expected one of {KINDS}; fix `kind`")
    chosen = _sample_attributes(rng, kind, fixed)
    pitch = chosen["voice" if kind == "speech" else "pitch"]
    rates = SYLLABLES_PER_SECOND if kind == "speech" else HITS_PER_SECOND
    rate = rates[chosen["tempo"]] * (1 + SPREAD * rng.uniform(-1, 1))
    cycle = (len(chosen["syllables"].split()) if kind == "speech" else 1) / rate
    period = rng.uniform(2.2, 4.5)
    return Scene(
        kind=kind,
        attributes=chosen,
        f0=PITCH_HZ[kind][pitch] * (1 + SPREAD * rng.uniform(-1, 1)),
        rate=rate,
        offset=rng.uniform(0, cycle),
        place=rng.uniform(-8, 8) if kind == "ball" else rng.uniform(-1.5, 1.5),
        mirrored=bool(rng.integers(2)),
        long_hair=bool(rng.integers(2)),
        bob=(rng.uniform(0.4, 1.0), rng.uniform(0.3, 0.7), rng.uniform(0, 1)),
        blink=(period, rng.uniform(0, period)),
        noise_at=int(rng.integers(1 << 16)),
    )


def sample_transcript(
    rng: np.random.Generator, attributes: Mapping[str, str] | None = None
) -> Scene:
    """Draw a speech scene that says more than its caption: syllables without a loop, and rests.

    Its caption says only that someone speaks.
    """
    scene = sample_scene(rng, "speech", attributes)
    spoken = [SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=TRANSCRIPT)]
    said = tuple(
        REST if rest else s for s, rest in zip(spoken, rng.random(TRANSCRIPT) < RESTS, strict=True)
    )
    named = {key: value for key, value in scene.attributes.items() if key != "syllables"}
    return replace(scene, attributes=named, transcript=said)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describe a scene: complete and canonical when `rng` is None, else freely worded (`write`)."""
    return write(scene.kind, scene.attributes, scene.person, rng)


def _sample_attributes(
    rng: np.random.Generator, kind: str, fixed: Mapping[str, str]
) -> dict[str, str]:
    """Draw what is not fixed; colours drawn differ from each other and from the fixed ones."""
    keys = ATTRIBUTES[kind]
    allowed = {"skin": SKINS, "voice": PITCHES, "pitch": PITCHES, "tempo": TEMPI}
    for key, value in fixed.items():
        if key not in keys:
            raise ValueError(f"found attribute {key!r} for a {kind} scene, expected one of {keys}")
        parts = value.split() if key == "syllables" else [value]
        legal = SYLLABLES if key == "syllables" else allowed.get(key, COLOURS)
        if not parts or any(part not in legal for part in parts):
            raise ValueError(f"found {key} {value!r}, expected one of {legal}; use a listed value")
    palette = [c for c in COLOURS if c not in set(fixed.values())]
    palette = [palette[i] for i in rng.permutation(len(palette))]
    chosen: dict[str, str] = {}
    for key in keys:
        options = allowed.get(key)
        if key in fixed:
            chosen[key] = fixed[key]
        elif key == "syllables":
            drawn = rng.integers(len(SYLLABLES), size=rng.integers(1, MAX_SYLLABLES + 1))
            chosen[key] = " ".join(SYLLABLES[i] for i in drawn)
        elif options is not None:
            chosen[key] = options[int(rng.integers(len(options)))]
        else:
            chosen[key] = palette.pop()
    return chosen
