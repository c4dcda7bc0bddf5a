"""Clips whose prompt changes while they run: the same thing goes on, changed, or the scene is cut.

Frames, samples and seconds are counted as in `render`: block 0 is the prefix (one frame, 160
samples), every block after it one second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .captions import parse
from .render import FPS, Clip, render
from .scene import TRANSCRIPT, Scene, caption, sample_scene
from .sound import CONTROL, SAMPLE_RATE
from .vocabulary import ATTRIBUTES, COLOURS, MAX_SYLLABLES, PITCHES, SKINS, TEMPI

CUT_SHARE = 0.35
TWO_CHANGES = 0.2


@dataclass(frozen=True)
class Switch:
    """A stream that gets a new prompt.

    Attributes:
        before, after: what is shown until then and from then on, with their own clocks. Where the
            text changes, `after` knows all syllables: the one that sounds is spoken to its end.
        block: the first block of the new prompt, at least 1.
        changed: attributes that the new prompt changes; everything, and "kind", after a cut.
    """

    before: Scene
    after: Scene
    block: int
    changed: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """When the sound of the new prompt begins; its first frame comes 1/24 - 1/100 s later."""
        return self.block - 1 + CONTROL / SAMPLE_RATE

    @property
    def is_cut(self) -> bool:
        """Whether another thing is shown, not the same one changed."""
        return "kind" in self.changed

    def captions(self, rng: np.random.Generator | None) -> tuple[str, str]:
        """Both prompts; the new one names whatever it changes."""
        new = caption(self.after, rng)
        wanted = {key: self.after.attributes[key] for key in self.changed if key != "kind"}
        if not self.is_cut and not wanted.items() <= parse(new).items():
            new = caption(self.after)
        return caption(self.before, rng), new


def sample_switch(
    rng: np.random.Generator,
    block: int,
    kind: str | None = None,
    cut: bool | None = None,
    before: Scene | None = None,
) -> Switch:
    """Draw a stream whose prompt changes at `block`.

    Args:
        kind: of the scene before; drawn evenly when None.
        cut: whether to another thing; drawn when None.
        before: the scene before; drawn when None.
    """
    before = before or sample_scene(rng, kind)
    if rng.random() < CUT_SHARE if cut is None else cut:
        after = sample_scene(rng)
        return Switch(before, after, block, ("kind", *ATTRIBUTES[after.kind]))
    count = 2 if rng.random() < TWO_CHANGES else 1
    keys = ATTRIBUTES[before.kind]
    # Tempo first: what is spoken is changed on the new clock.
    changed = sorted((keys[i] for i in rng.permutation(len(keys))[:count]), key="tempo".__ne__)
    after = before
    for key in changed:
        after = _changed(after, key, block - 1 + CONTROL / SAMPLE_RATE, rng)
    return Switch(before, after, block, tuple(changed))


def _changed(scene: Scene, key: str, at: float, rng: np.random.Generator) -> Scene:
    """The same scene with another value of an attribute from second `at` on, its motion whole."""
    drawn = sample_scene(rng, scene.kind)
    if key == "syllables":
        first = int(np.ceil((at - scene.offset) * scene.rate - 1e-9))
        old, new = scene.syllables, drawn.syllables
        said = [
            new[(i - first) % len(new)] if i >= first else old[i % len(old)]
            for i in range(TRANSCRIPT)
        ]
        # Places before 0, which a loop reaches before its offset, come last.
        said[-MAX_SYLLABLES:] = [old[i % len(old)] for i in range(-MAX_SYLLABLES, 0)]
        attributes = scene.attributes | {key: " ".join(new)}
        return replace(scene, attributes=attributes, transcript=tuple(said))
    options = {"skin": SKINS, "voice": PITCHES, "pitch": PITCHES, "tempo": TEMPI}.get(key, COLOURS)
    free = [value for value in options if value not in scene.attributes.values()]
    value = free[int(rng.integers(len(free)))]
    attributes = scene.attributes | {key: value}
    alike = sample_scene(rng, scene.kind, {key: value})
    if key in ("voice", "pitch"):
        return replace(scene, attributes=attributes, f0=alike.f0)
    if key == "tempo":
        # Both clocks have come equally far when they change over.
        offset = at - (at - scene.offset) * scene.rate / alike.rate
        return replace(scene, attributes=attributes, rate=alike.rate, offset=offset)
    return replace(scene, attributes=attributes)


def render_switch(switch: Switch, seconds: int) -> Clip:
    """The stream of `seconds` seconds; 10 ms of its sound, from the switch on, are faded over.

    Raises:
        ValueError: it ends before the switch.
    """
    if not 1 <= switch.block <= seconds:
        raise ValueError(
            f"found a switch at block {switch.block}, expected 1 to {seconds}, the last of the clip"
        )
    old, new = render(switch.before, seconds), render(switch.after, seconds)
    frame, sample = 1 + FPS * (switch.block - 1), CONTROL + SAMPLE_RATE * (switch.block - 1)
    share = np.clip((np.arange(len(old.audio)) - sample) / CONTROL, 0, 1).astype(np.float32)
    control = sample // CONTROL
    return replace(
        new,
        video=np.concatenate((old.video[:frame], new.video[frame:])),
        audio=old.audio * (1 - share) + new.audio * share,
        f0=np.concatenate((old.f0[:control], new.f0[control:])),
        hits=np.concatenate(
            (old.hits[old.hits < switch.seconds], new.hits[new.hits >= switch.seconds])
        ),
        mouth=np.concatenate((old.mouth[:frame], new.mouth[frame:])),
    )
