"""Does a stream follow a new prompt? `python launch.py lab.metrics.switches --seed 0 --pairs 16`

Half of the switches change one or two attributes while the motion goes on, half cut to another
scene. The prompt changes after 4 s and names everything. Attributes are measured in pieces of a
second: those that the new prompt changes (after a cut all, and the kind) and those that it leaves.
The text of speech is measured by `lab.metrics.syllables --change`.

What becomes of the past is a choice: --past keep "reread 1" "reread 3" "blend 2" measures each
(`samplers/schedule.py`). Six prompts in a minute: --prompts 6 --every 10.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ...model_loaders.bundle import Bundle
from ...samplers.rollout import SamplerSettings
from ...samplers.schedule import USUAL, Transition, parse_schedule
from .. import command
from ..world.scene import KINDS
from ..world.switch import Switch, sample_switch
from .attributes import measure
from .clips import HELD_OUT, HeldOut, PromptedClip, as_arrays, decoded_turns, joined
from .overview import Strip, overview
from .score import THINGS

log = logging.getLogger("mutualforcing")

BEFORE, AFTER, AT_ONCE = 4, 4, 8
FRAMES, SAMPLES = 24, 16_000
SLOW = frozenset({"tempo"})
"""Attributes that one second is too short for: they are measured over all that follows."""


def held_out_switches(
    seed: int, count: int, prompts: int = 2, every: int = BEFORE
) -> list[list[Switch]]:
    """Streams that training never draws, of so many prompts, a new one every so many seconds.

    Changes and cuts in turn, beginning with all kinds.
    """
    streams: list[list[Switch]] = []
    index = 0
    while len(streams) < count:
        rng = np.random.default_rng([HELD_OUT, seed, index, 3])
        cut, kind = len(streams) % 2 == 1, KINDS[len(streams) // 2 % len(KINDS)]
        switch = sample_switch(rng, every + 1, kind, cut)
        index += 1
        if _is_measured(switch):
            streams.append([switch])
    for number, switches in enumerate(streams):
        while len(switches) < prompts - 1:
            rng = np.random.default_rng([HELD_OUT, seed, number, len(switches), index, 3])
            cut, block = (number + len(switches)) % 2 == 1, every * (1 + len(switches)) + 1
            switch = sample_switch(rng, block, None, cut, switches[-1].after)
            index += 1
            if _is_measured(switch):
                switches.append(switch)
    return streams


def _is_measured(switch: Switch) -> bool:
    return set(switch.changed) != {"syllables"}


def generated(
    bundle: Bundle,
    streams: Sequence[Sequence[Switch]],
    sampler: SamplerSettings,
    window: int | None,
    past: Transition = USUAL,
) -> list[PromptedClip]:
    """A clip of each stream; its prompt is the last one."""
    clips: list[PromptedClip] = []
    for first in range(0, len(streams), AT_ONCE):
        some = streams[first : first + AT_ONCE]
        begun = [0, *(switch.block for switch in some[0])]
        begun.append(begun[-1] + max(AFTER, begun[1] - 1))
        texts = [
            [switches[0].captions(None)[0], *(switch.captions(None)[1] for switch in switches)]
            for switches in some
        ]
        turns = [
            (row, end - start)
            for row, (start, end) in zip(zip(*texts, strict=True), pairwise(begun), strict=True)
        ]
        seeds = range(first, first + len(some))
        made = joined(decoded_turns(bundle, turns, seeds, sampler, window, past=past))
        for i, (switches, said) in enumerate(zip(some, texts, strict=True)):
            scene = switches[-1].after
            asked = HeldOut(scene, said[-1], dict(scene.attributes))
            clips.append(PromptedClip(asked, first + i, *as_arrays(made, i)))
    return clips


def answers(switch: Switch, clip: PromptedClip) -> dict[int, dict[str, bool]]:
    """Which attributes of the new prompt are right, by the second after the switch."""
    kind, wanted = switch.after.kind, switch.after.attributes
    # A stream of the new scene alone begins with one frame, so every piece has one more.
    before = switch.block - 1
    frame, sample = FRAMES * before + 1, SAMPLES * before + SAMPLES // 100

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


def sheet(path: Path, streams: Sequence[Sequence[Switch]], clips: Sequence[PromptedClip]) -> None:
    """The streams to look at, what was asked first and last above each."""
    rows = [
        Strip(f"{switches[0].captions(None)[0]} -> {clip.prompt.text}", clip.video, clip.audio, ())
        for switches, clip in zip(streams, clips, strict=True)
    ]
    overview(path, rows)


def choice(text: str) -> Transition:
    """What becomes of the past, as a schedule says it."""
    (line,) = parse_schedule(f"0 {text}: x")
    return line.transition


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.switches", __doc__)
    command.add_model_options(p)
    p.add_argument("--seed", type=int, default=0, help="of the pairs")
    p.add_argument("--pairs", type=int, default=16, help="streams")
    p.add_argument("--prompts", type=int, default=2, help="of each stream, at least 2")
    p.add_argument("--every", type=int, default=BEFORE, help="seconds between them, at least 4")
    p.add_argument(
        "--past",
        type=choice,
        nargs="+",
        default=[USUAL],
        help="what becomes of it: keep, 'reread N' or 'blend N', one or several",
    )
    p.add_argument("--sheet", type=Path, help="write a picture of the streams here")
    return p


def work(args: argparse.Namespace) -> None:
    """Generate, measure and print."""
    if args.prompts < 2 or args.every < AFTER:
        raise ValueError(
            f"found {args.prompts} prompts every {args.every} s, expected at least 2 every {AFTER}"
        )
    bundle, sampler = command.open_model(args)
    streams = held_out_switches(args.seed, args.pairs, args.prompts, args.every)
    for past in args.past:
        clips = generated(bundle, streams, sampler, args.window, past)
        log.info("past: %s", past)
        tell(streams, clips)
        if args.sheet:
            name = f"{args.sheet.stem}-{past}".replace(" ", "") if len(args.past) > 1 else None
            sheet(args.sheet.with_stem(name or args.sheet.stem), streams, clips)


def shares_right(
    streams: Sequence[Sequence[Switch]], clips: Sequence[PromptedClip]
) -> dict[tuple[str, int], float]:
    """Share of attributes right, by group ("switched", "kept", ...) and second after the switch."""
    right: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for switches, clip in zip(streams, clips, strict=True):
        for number, switch in enumerate(switches, start=2):
            kind = "cut" if switch.is_cut else "change"
            for second, found in answers(switch, clip).items():
                for key, answer in found.items():
                    which = "switched" if key in switch.changed else "kept"
                    groups = [which, f"{kind}: {which}", f"{switch.after.kind}: {which}"]
                    if len(switches) > 1:
                        groups.append(f"prompt {number}: {which}")
                    for group in groups:
                        right[group, second].append(answer)
    return {group: float(np.mean(found)) for group, found in right.items()}


def tell(streams: Sequence[Sequence[Switch]], clips: Sequence[PromptedClip]) -> None:
    """Print what is right how long after each switch."""
    right = shares_right(streams, clips)
    log.info("share right in each second after the switch (tempo: in all but the first)")
    for name in sorted({name for name, _ in right}):
        shares = [right.get((name, second), float("nan")) for second in range(AFTER)]
        log.info("%-18s %s", name, " ".join(f"{share:.2f}" for share in shares))
    log.info("switched %.3f kept %.3f within 2 s", right["switched", 2], right["kept", 2])


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
