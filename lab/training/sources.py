"""Where training clips come from: the procedural world, a folder of videos, or webdataset shards.

Every source yields `CaptionedClip`s of one length, in an order that the seed fixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..world.render import render
from ..world.scene import caption, sample_scene

# Speech has the most to learn (attributes, syllables); the rest is shared by all kinds, speech
# included.
SPEECH_SHARE = 0.25


@dataclass(frozen=True)
class CaptionedClip:
    """One clip: video uint8 (f, h, w, 3), mono sound float32 (n,), and captions that all fit it."""

    video: NDArray[np.uint8]
    audio: NDArray[np.float32]
    captions: tuple[str, ...]


def clips_from(source: str, seconds: int, seed: int, captions: int) -> Iterator[CaptionedClip]:
    """Endless clips of `seconds` seconds (1 + 24 s frames, 160 + 16000 s samples) of a source.

    Args:
        source: "world", or a path of real video files (see `lab.training.media`).
        captions: variants per clip; sources with one caption repeat it.
    """
    if source == "world":
        return _world(seconds, seed, captions)
    from .media import clips_from_files  # only real files need PyAV

    return clips_from_files(source, seconds, seed, captions)


def _world(seconds: int, seed: int, captions: int) -> Iterator[CaptionedClip]:
    index = 0
    while True:
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, "speech" if rng.random() < SPEECH_SHARE else None)
        # The first variant names everything; the others leave words out and vary the order.
        texts = (caption(scene), *(caption(scene, rng) for _ in range(captions - 1)))
        clip = render(scene, seconds)
        yield CaptionedClip(clip.video, clip.audio, texts)
        index += 1
