"""Measure a model on held-out prompts, beside true clips and the same after its codecs alone.

    python launch.py lab.metrics.evaluate --model FILE --prompts 64 --out docs/measured/multi

writes OUT.json (numbers, machine, commit, command) and OUT.png (the first clips, to look at), and
prints the table. The three rows of numbers are: truth (how well measuring itself works), codec
(what the codecs leave) and generated.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ... import shell
from ...model_loaders.bundle import Bundle
from ...samplers.rollout import SamplerSettings, Step
from .. import command
from ..report import publish, said, table
from .clips import HeldOut, PromptedClip, generate, held_out, through_codecs, true_clip
from .overview import Strip, overview
from .reference import KINDS
from .score import Judged, Number, Table, judge, summary, targets


def generate_all(
    bundle: Bundle,
    prompts: list[HeldOut],
    seeds: int,
    blocks: int,
    sampler: SamplerSettings,
    window: int | None,
    batch: int,
) -> list[PromptedClip]:
    """Every prompt from `seeds` seeds, in batches, under a progress bar."""
    asked = [(prompt, 1000 * j + i) for j in range(seeds) for i, prompt in enumerate(prompts)]
    batches = [asked[i : i + batch] for i in range(0, len(asked), batch)]
    clips: list[PromptedClip] = []
    with shell.progress(total=len(batches) * blocks * sampler.steps, unit="step") as bar:

        def progress(_: Step) -> None:
            bar.update()

        for part in batches:
            texts, numbers = [prompt for prompt, _ in part], [seed for _, seed in part]
            clips += generate(bundle, texts, numbers, blocks, sampler, window, progress)
    return clips


def strips_of(judged: list[Judged], fps: float) -> list[Strip]:
    """Strips to look at: what was asked, what is wrong, and where hits are seen."""
    rows = []
    for one in judged:
        named = one.clip.prompt.named
        wrong = [f"{key}: {one.measured[key]}" for key, right in one.right.items() if not right]
        if one.measured["kind"] != named.get("kind"):
            wrong.append(f"looks like {one.measured['kind']}")
        if one.hits is not None:
            sync = f"{one.hits.median_offset:.0f} ms"
        else:
            sync = f"r {one.mouth.at_zero:.2f}"
        seen = one.hits.seen if one.hits is not None else ()
        length = len(one.clip.video) / fps
        title = f"{one.clip.prompt.text}   [{sync}]"
        if wrong:
            title += f"   WRONG {', '.join(wrong)}"
        rows.append(Strip(title, one.clip.video, one.clip.audio, tuple(t / length for t in seen)))
    return rows


def clip_facts(one: Judged) -> Table:
    """One clip's line in the JSON file."""
    facts: Table = {
        "caption": one.clip.prompt.text,
        "seed": one.clip.seed,
        "kind": one.clip.prompt.scene.kind,
        "measured": one.measured,
        "wrong": [key for key, right in one.right.items() if not right],
    }
    if one.hits is not None:
        offset = one.hits.median_offset
        facts["median |offset| ms"] = offset if offset < float("inf") else None
        facts["seen"] = one.hits.seen.round(4).tolist()
        facts["heard"] = one.hits.heard.round(4).tolist()
    if one.mouth is not None:
        facts["mouth"] = asdict(one.mouth)
    return facts


def flat(values: Table, prefix: str = "") -> dict[str, Number]:
    """Numbers of a table within tables by one name each."""
    lines: dict[str, Number] = {}
    for key, value in values.items():
        deep = isinstance(value, dict)
        lines |= flat(value, f"{prefix}{key}: ") if deep else {prefix + key: value}
    return lines


def rows_of(columns: dict[str, Table]) -> list[str]:
    """A table of a line per number and a column per set of clips."""
    flats = [flat(column) for column in columns.values()]
    keys = dict.fromkeys(key for column in flats for key in column)
    rows = ([key, *(said(column.get(key), 3) for column in flats)] for key in keys)
    return table(["", *columns], rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.evaluate", __doc__)
    command.add_model_options(p)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--seeds", type=int, default=1, help="clips per prompt")
    p.add_argument("--seconds", type=int, default=5)
    p.add_argument("--batch", type=int, default=16, help="clips generated together")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--free", action="store_true", help="free wording, some attributes left out")
    p.add_argument("--show", type=int, default=8, help="clips on the picture")
    command.add_result_options(p)
    return p


def work(args: argparse.Namespace) -> int:
    """Generate, measure, print and write. Returns the exit status."""
    bundle, sampler = command.open_model(args)
    prompts = held_out(args.prompts, args.kinds, args.free)
    blocks = bundle.clock.blocks_for(args.seconds)

    began = time.perf_counter()
    made = generate_all(bundle, prompts, args.seeds, blocks, sampler, args.window, args.batch)
    took = time.perf_counter() - began
    truth = [true_clip(prompt, args.seconds) for prompt in prompts]
    judged = {
        "truth": [judge(clip, bundle.clock) for clip in truth],
        "codec": [judge(through_codecs(bundle, clip), bundle.clock) for clip in truth],
        "generated": [judge(clip, bundle.clock) for clip in made],
    }
    columns = {name: summary(ones) for name, ones in judged.items()}
    goals = targets(columns["generated"], columns["codec"], 1000 / float(bundle.clock.fps))
    results = {
        "model": {"file": args.model.name, "id": bundle.model_id},
        "settings": {
            "mode": sampler.mode,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "window": args.window or bundle.stream.window,
            "seconds": args.seconds,
            "prompts": args.prompts,
            "seeds": args.seeds,
        },
        "generation seconds": took,
        "targets": [asdict(goal) | {"met": goal.met} for goal in goals],
        "summary": columns,
        "clips": [clip_facts(one) for one in judged["generated"]],
    }
    fps, shown = float(bundle.clock.fps), judged["generated"][: args.show]
    overview(Path(f"{args.out}.png"), strips_of(shown, fps))
    lines = [
        f"{'met   ' if goal.met else 'MISSED'} {goal.name}: {said(goal.found, 3)} "
        f"{'>=' if goal.at_least else '<='} {goal.wanted:.3f}"
        for goal in goals
    ]
    publish(args.out, results, [*rows_of(columns), "", *(f"- {line}" for line in lines)])
    return int(args.check and not all(goal.met for goal in goals))


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
