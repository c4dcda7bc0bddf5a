"""The attributes that a caption names, measured from pixels and samples alone: no network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pixels import (
    DRUM,
    HAIR,
    SHIRT,
    background_of,
    kind_of,
    on_grid,
    place_colour,
    skin_colour,
    thing_colour,
)
from .reference import (
    COLOURS,
    HITS_PER_SECOND,
    KINDS,
    NONE,
    PITCH_HZ,
    SYLLABLES_PER_SECOND,
    nearest_colour,
    nearest_ratio,
)
from .samples import hit_rate, pitch, syllable_rate


def measure(
    video: NDArray[np.uint8], audio: NDArray[np.floating], sample_rate: int, fps: float, kind: str
) -> dict[str, str]:
    """Read the attributes of one clip.

    Args:
        video: (f, h, w, 3) uint8 RGB, at least 64 x 64.
        audio: (n) samples, -1..1.
        sample_rate: samples per second.
        fps: frames per second; not needed by what is measured so far.
        kind: what the clip should show; decides which attributes there are and where they are seen.

    Returns:
        The attributes of `kind` (`MEASURED`), and `kind` as it looks. A value is "none" where
        there is nothing to measure: no sound, nothing that repeats, no thing.

    Raises:
        ValueError: an unknown kind, or arrays of another shape.
    """
    if kind not in KINDS:
        raise ValueError(f"found kind {kind!r}, expected one of {KINDS}")
    if audio.ndim != 1:
        raise ValueError(f"found audio of shape {audio.shape}, expected (samples,): mix to mono")
    picture = on_grid(video)
    background = background_of(picture)
    found = {"kind": kind_of(picture), "background": nearest_colour(background, COLOURS)}
    if kind == "speech":
        found["hair"] = place_colour(picture, HAIR)
        found["skin"] = skin_colour(picture)
        found["shirt"] = place_colour(picture, SHIRT)
    elif kind == "drum":
        found["drum"] = place_colour(picture, DRUM)
    else:
        found[kind] = thing_colour(picture, background)
    found["voice" if kind == "speech" else "pitch"] = nearest_ratio(
        pitch(audio, sample_rate), PITCH_HZ[kind]
    )
    if kind == "speech":
        rate, classes = syllable_rate(audio, sample_rate), SYLLABLES_PER_SECOND
    else:
        rate, classes = hit_rate(audio, sample_rate), HITS_PER_SECOND
    found["tempo"] = nearest_ratio(rate, classes) if np.isfinite(rate) else NONE
    return found
