"""Where training clips come from: the procedural world, a folder of videos, or webdataset shards.

Every source yields `CaptionedClip`s of one length, in an order that the seed fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..world.render import Clip, render
from ..world.scene import Scene, caption, sample_scene, sample_transcript
from ..world.sound import SAMPLE_RATE
from ..world.switch import render_switch, sample_switch
from ..world.timing import spoken
from .captioned_clip import CaptionedClip

# Speech has the most to learn (attributes, syllables); the rest is shared by all kinds, speech
# included.
SPEECH_SHARE = 0.25


def clips_from(source: str, seconds: int, seed: int, captions: int) -> Iterator[CaptionedClip]:
    """Endless clips of `seconds` seconds (1 + 24 s frames, 160 + 16000 s samples) of a source.

    Args:
        source: "world" (one prompt, what is spoken loops), "transcripts" (speech that does not
            loop) or "switches" (the prompt changes at a random block); or a path of real video
            files (see `lab.training.media`).
        captions: variants per clip; sources with one caption repeat it.
    """
    if source in _WORLD:
        return _world(_WORLD[source], seconds, seed, captions)
    from .media import clips_from_files  # only real files need PyAV

    return clips_from_files(source, seconds, seed, captions)


def _world(
    make: Callable[[np.random.Generator, int, int], CaptionedClip],
    seconds: int,
    seed: int,
    captions: int,
) -> Iterator[CaptionedClip]:
    index = 0
    while True:
        yield make(np.random.default_rng([seed, index]), seconds, captions)
        index += 1


def _scene(rng: np.random.Generator, seconds: int, captions: int) -> CaptionedClip:
    kind = "speech" if rng.random() < SPEECH_SHARE else None
    return _shown(sample_scene(rng, kind), rng, seconds, captions)


def _transcript(rng: np.random.Generator, seconds: int, captions: int) -> CaptionedClip:
    return _shown(sample_transcript(rng), rng, seconds, captions)


def _shown(scene: Scene, rng: np.random.Generator, seconds: int, captions: int) -> CaptionedClip:
    # The first variant names everything; the others leave words out and vary the order.
    texts = (caption(scene), *(caption(scene, rng) for _ in range(captions - 1)))
    clip = render(scene, seconds)
    return CaptionedClip(clip.video, clip.audio, texts, spoken(scene, 0, _end(clip)))


def _switch(rng: np.random.Generator, seconds: int, captions: int) -> CaptionedClip:
    switch = sample_switch(rng, 1 + int(rng.integers(seconds)))
    texts = [switch.captions(rng if variant else None) for variant in range(captions)]
    clip = render_switch(switch, seconds)
    return CaptionedClip(
        clip.video,
        clip.audio,
        tuple(before for before, _ in texts),
        spoken(switch.before, 0, _end(clip)),
        tuple(after for _, after in texts),
        spoken(switch.after, 0, _end(clip)),
        switch.block,
    )


def _end(clip: Clip) -> float:
    return len(clip.audio) / SAMPLE_RATE


_WORLD = {"world": _scene, "transcripts": _transcript, "switches": _switch}
