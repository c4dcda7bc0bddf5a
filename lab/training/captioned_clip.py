"""What every source of training clips yields, whether it is drawn or filmed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Spoken = list[tuple[float, str]]
"""Onset in seconds of the clip, and syllable."""


@dataclass(frozen=True)
class CaptionedClip:
    """One clip: video uint8 (f, h, w, 3), mono sound float32 (n,), and captions that all fit it.

    Attributes:
        spoken: what is said when; empty where nobody knows.
        later: where the prompt changes, as many captions of the new prompt.
        later_spoken: what is said when under it.
        switch: the block that it begins with; 0 where there is none.
    """

    video: NDArray[np.uint8]
    audio: NDArray[np.float32]
    captions: tuple[str, ...]
    spoken: Spoken = field(default_factory=list)
    later: tuple[str, ...] = ()
    later_spoken: Spoken = field(default_factory=list)
    switch: int = 0
