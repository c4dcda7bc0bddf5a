"""From measured clips to the numbers of a table: attributes right, sound in time, no seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ...measures.seams import Steps, seam_steps, seams
from ...samplers.clock import Clock
from .attributes import measure
from .clips import PromptedClip
from .sync import HitSync, MouthSync, hit_sync, mouth_sync

# These belong to a thing; where another kind of thing is seen they are wrong whatever the colour.
THINGS = frozenset({"hair", "skin", "shirt", "ball", "bell", "drum"})

Number = float | int | None
Table = dict[str, "Number | Table"]


@dataclass(frozen=True)
class Judged:
    """One clip, measured.

    Attributes:
        measured: its attributes as measured, with `kind` as it looks.
        right: of the attributes that its caption names and that can be measured, which are right.
        hits, mouth: in time or not; the one that its kind has.
        steps: at block borders and elsewhere.
    """

    clip: PromptedClip
    measured: dict[str, str]
    right: dict[str, bool]
    hits: HitSync | None
    mouth: MouthSync | None
    steps: dict[str, Steps]

    def without_media(self) -> Judged:
        """The same without pictures and sound: thousands of these can be kept."""
        clip = self.clip
        return replace(
            self, clip=replace(clip, video=clip.video[:0].copy(), audio=clip.audio[:0].copy())
        )


def judge(clip: PromptedClip, clock: Clock) -> Judged:
    """Measure one clip that begins at the start of a stream."""
    kind, rate, fps = clip.prompt.scene.kind, clock.sample_rate, float(clock.fps)
    measured = measure(clip.video, clip.audio, rate, fps, kind)
    as_asked = measured["kind"] == kind
    right = {
        key: value == measured[key] and (as_asked or key not in THINGS)
        for key, value in clip.prompt.named.items()
        if key in measured and key != "kind"
    }
    count = 1
    while clock.frames(count) < len(clip.video):
        count += 1
    borders = [(clock.frames(block), clock.samples(block)) for block in range(1, count)]
    speech = kind == "speech"
    return Judged(
        clip=clip,
        measured=measured,
        right=right,
        hits=None if speech else hit_sync(clip.video, clip.audio, rate, fps, kind),
        mouth=mouth_sync(clip.video, clip.audio, rate, fps) if speech else None,
        steps=seam_steps(
            clip.video, clip.audio, rate, [f for f, _ in borders], [n for _, n in borders]
        ),
    )


def summary(judged: Sequence[Judged]) -> Table:
    """The numbers of a set of clips; None where there was nothing to count."""
    answers = [answer for one in judged for answer in one.right.items()]
    by_name = {
        name: _mean([right for key, right in answers if key == name])
        for name in sorted({key for key, _ in answers})
    }
    return {
        "clips": len(judged),
        "attributes": _mean([right for _, right in answers]),
        "kind": _mean([one.measured["kind"] == one.clip.prompt.scene.kind for one in judged]),
        "by attribute": by_name,
        "hits": _hits([one.hits for one in judged if one.hits is not None]),
        "mouth": _mouth([one.mouth for one in judged if one.mouth is not None]),
        "seams": {
            name: {key: _finite(value) for key, value in asdict(seam).items()}
            for name, seam in seams(one.steps for one in judged).items()
        },
    }


def _hits(clips: Sequence[HitSync]) -> Table:
    offsets = np.concatenate([clip.offsets for clip in clips]) if clips else np.zeros(0)
    seen_alone = sum(clip.seen_alone for clip in clips)
    heard_alone = sum(clip.heard_alone for clip in clips)
    # A clip in which nothing is seen or heard to hit at all is one more miss.
    dead = sum(not len(clip.seen) and not len(clip.heard) for clip in clips)
    everything = np.append(np.abs(offsets), np.full(seen_alone + heard_alone + dead, np.inf))
    pairs = len(offsets)
    return {
        "clips": len(clips),
        "pairs": pairs,
        "median |offset| ms": _finite(np.median(everything)) if len(everything) else None,
        "median offset ms": _finite(np.median(offsets)) if pairs else None,
        "95 % of |offset| ms": _finite(np.quantile(np.abs(offsets), 0.95)) if pairs else None,
        "seen but not heard": _share(seen_alone, pairs),
        "heard but not seen": _share(heard_alone, pairs),
        "clips without any": dead,
    }


def _mouth(clips: Sequence[MouthSync]) -> Table:
    return {
        "clips": len(clips),
        "correlation": _mean([clip.at_zero for clip in clips]),
        "correlation at best shift": _mean([clip.best for clip in clips]),
        "median shift ms": _finite(np.median([clip.lag for clip in clips])) if clips else None,
    }


@dataclass(frozen=True)
class Target:
    """A goal for one number, and what was found.

    Attributes:
        found: None where it could not be measured, which misses the target.
    """

    name: str
    found: float | None
    wanted: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        if self.found is None:
            return False
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


def targets(generated: Table, codec: Table, frame_ms: float) -> list[Target]:
    """Generated clips held against the targets; kinds that were not generated have none."""
    hits, mouth, floor = generated["hits"], generated["mouth"], codec["mouth"]
    found = [Target("attributes right", generated["attributes"], 0.95, True)]
    if hits["clips"]:
        found.append(Target("median |offset| ms", hits["median |offset| ms"], frame_ms, False))
    if mouth["clips"]:
        share = mouth["correlation"] / floor["correlation"] if floor["correlation"] else None
        found.append(Target("mouth correlation over codecs' own", share, 0.8, True))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _share(alone: int, pairs: int) -> float | None:
    return alone / (alone + pairs) if alone + pairs else None


def _finite(value: float) -> Number:
    if isinstance(value, int):
        return value
    return float(value) if np.isfinite(value) else None
