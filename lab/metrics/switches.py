"""Does a stream follow a new prompt? `python launch.py lab.metrics.switches --seed 0 --pairs 16`

Half of the pairs change one or two attributes while the motion goes on, half cut to another scene.
The prompt changes after 4 s and names everything. Attributes are measured in pieces of a second:
those that the new prompt changes (after a cut all, and the kind) and those that it leaves. The text
of speech is measured by `lab.metrics.syllables --change`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...model_loaders.bundle import Bundle
from ...samplers.rollout import SamplerSettings
from .. import command
from ..world.scene import KINDS
from ..world.switch import Switch, sample_switch
from .attributes import measure
from .clips import HELD_OUT, HeldOut, PromptedClip, as_arrays, decoded_turns, joined
from .overview import Strip, overview
from .score import THINGS

log = logging.getLogger("mutualforcing")

BEFORE, AFTER = 4, 4
FRAMES, SAMPLES = 24, 16_000
SLOW = frozenset({"tempo"})
"""Attributes that one second is too short for: they are measured over all that follows."""


def held_out_switches(seed: int, count: int) -> list[Switch]:
    """Switches that training never draws: changes and cuts in turn, of all kinds."""
    switches: list[Switch] = []
    index = 0
    while len(switches) < count:
        rng = np.random.default_rng([HELD_OUT, seed, index, 3])
        cut, kind = len(switches) % 2 == 1, KINDS[len(switches) // 2 % len(KINDS)]
        switch = sample_switch(rng, BEFORE + 1, kind, cut)
        index += 1
        if set(switch.changed) != {"syllables"}:
            switches.append(switch)
    return switches


def generated(
    bundle: Bundle,
    switches: Sequence[Switch],
    sampler: SamplerSettings,
    window: int | None,
) -> list[PromptedClip]:
    """A stream of each switch."""
    old, new = zip(*(switch.captions(None) for switch in switches), strict=True)
    first = bundle.clock.blocks_for(BEFORE)
    turns = [(old, first), (new, AFTER)]
    seeds = range(len(switches))
    made = joined(decoded_turns(bundle, turns, seeds, sampler, window))
    return [
        PromptedClip(
            HeldOut(switch.after, text, dict(switch.after.attributes)), seed, *as_arrays(made, seed)
        )
        for switch, text, seed in zip(switches, new, seeds, strict=True)
    ]


def answers(switch: Switch, clip: PromptedClip) -> dict[int, dict[str, bool]]:
    """Which attributes of the new prompt are right, by the second after the switch."""
    kind, wanted = switch.after.kind, switch.after.attributes
    # A stream of the new scene alone begins with one frame, so every piece has one more.
    frame, sample = FRAMES * BEFORE + 1, SAMPLES * BEFORE + SAMPLES // 100

    def read(begin: int, end: int) -> dict[str, str]:
        video = clip.video[frame + FRAMES * begin - 1 : frame + FRAMES * end]
        audio = clip.audio[sample + SAMPLES * begin : sample + SAMPLES * end]
        return measure(video, audio, SAMPLES, FRAMES, kind)

    lasting = read(1, AFTER)
    found: dict[int, dict[str, bool]] = {}
    for second in range(AFTER):
        seen = read(second, second + 1) | {key: lasting[key] for key in SLOW}
        as_asked = seen["kind"] == kind
        found[second] = {
            key: value == seen[key] and (as_asked or key not in THINGS)
            for key, value in wanted.items()
            if key in seen
        }
        found[second]["kind"] = as_asked
    return found


def sheet(path: Path, switches: Sequence[Switch], clips: Sequence[PromptedClip]) -> None:
    """The streams to look at, what was asked above each."""
    rows = [
        Strip(f"{switch.captions(None)[0]} -> {clip.prompt.text}", clip.video, clip.audio, ())
        for switch, clip in zip(switches, clips, strict=True)
    ]
    overview(path, rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.switches", __doc__)
    command.add_model_options(p)
    p.add_argument("--seed", type=int, default=0, help="of the pairs")
    p.add_argument("--pairs", type=int, default=16)
    p.add_argument("--sheet", type=Path, help="write a picture of the streams here")
    return p


def work(args: argparse.Namespace) -> None:
    """Generate, measure and print."""
    bundle, sampler = command.open_model(args)
    switches = held_out_switches(args.seed, args.pairs)
    clips = generated(bundle, switches, sampler, args.window)
    right: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for switch, clip in zip(switches, clips, strict=True):
        kind = "cut" if switch.is_cut else "change"
        for second, found in answers(switch, clip).items():
            for key, answer in found.items():
                which = "switched" if key in switch.changed else "kept"
                right[f"{kind}: {which}", second].append(answer)
                right[which, second].append(answer)
                right[f"{switch.after.kind}: {which}", second].append(answer)
    log.info("share right in each second after the switch (tempo: in all but the first)")
    for name in sorted({name for name, _ in right}):
        shares = [np.mean(right[name, second]) for second in range(AFTER)]
        log.info("%-18s %s", name, " ".join(f"{share:.2f}" for share in shares))
    if args.sheet:
        sheet(args.sheet, switches, clips)
    log.info(
        "switched %.3f kept %.3f within 2 s",
        np.mean(right["switched", 2]),
        np.mean(right["kept", 2]),
    )


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
