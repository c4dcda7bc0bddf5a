"""Measure a model on held-out prompts, beside true clips and the same after its codecs alone.

    python launch.py lab.metrics.evaluate --model FILE --prompts 64 --out docs/measured/multi

writes OUT.json (numbers, machine, commit, command) and OUT.png (the first clips, to look at), and
prints the table. The three rows of numbers are: truth (how well measuring itself works), codec
(what the codecs leave) and generated.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ... import shell
from ...model_loaders.bundle import Bundle
from ...samplers.rollout import SamplerSettings, Step
from .clips import Clip, HeldOut, generate, held_out, through_codecs, true_clip
from .command import (
    add_model_options,
    add_result_options,
    at_least_one,
    log_to_the_screen,
    open_model,
    write_json,
)
from .overview import Row, overview
from .record import record
from .reference import KINDS
from .score import Judged, Table, judge, summary, targets

log = logging.getLogger("mutualforcing")


def generate_all(
    bundle: Bundle,
    prompts: list[HeldOut],
    seeds: int,
    blocks: int,
    sampler: SamplerSettings,
    window: int | None,
    batch: int,
) -> list[Clip]:
    """Every prompt from `seeds` seeds, in batches, under a progress bar."""
    asked = [(prompt, 1000 * j + i) for j in range(seeds) for i, prompt in enumerate(prompts)]
    batches = [asked[i : i + batch] for i in range(0, len(asked), batch)]
    clips: list[Clip] = []
    with shell.progress(total=len(batches) * blocks * sampler.steps, unit="step") as bar:

        def progress(_: Step) -> None:
            bar.update()

        for part in batches:
            texts, numbers = [prompt for prompt, _ in part], [seed for _, seed in part]
            clips += generate(bundle, texts, numbers, blocks, sampler, window, progress)
    return clips


def overview_rows(judged: list[Judged], fps: float) -> list[Row]:
    """Rows to look at: what was asked, what is wrong, and where hits are seen."""
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
        rows.append(Row(title, one.clip.video, one.clip.audio, tuple(t / length for t in seen)))
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


def table(columns: dict[str, Table]) -> str:
    """Markdown: one line per number, one column per set of clips."""

    def flat(values: Table, prefix: str = "") -> dict[str, object]:
        lines: dict[str, object] = {}
        for key, value in values.items():
            deep = isinstance(value, dict)
            lines |= flat(value, f"{prefix}{key}: ") if deep else {prefix + key: value}
        return lines

    def text(value: object) -> str:
        return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"

    flats = {name: flat(column) for name, column in columns.items()}
    keys = list(dict.fromkeys(key for column in flats.values() for key in column))
    lines = ["| | " + " | ".join(flats) + " |", "|---" * (len(flats) + 1) + "|"]
    for key in keys:
        cells = (text(column.get(key)) for column in flats.values())
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="launch.py lab.metrics.evaluate",
        description="Measure a model on held-out prompts; write OUT.json and OUT.png.",
    )
    add_model_options(p)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--seeds", type=int, default=1, help="clips per prompt")
    p.add_argument("--seconds", type=int, default=5)
    p.add_argument("--batch", type=int, default=16, help="clips generated together")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--free", action="store_true", help="free wording, some attributes left out")
    p.add_argument("--show", type=int, default=8, help="clips on the picture")
    add_result_options(p)
    return p


def main() -> int:
    """Generate, measure, print and write. Returns the exit status."""
    args = parser().parse_args()
    log_to_the_screen()
    if not at_least_one(args, "prompts", "seeds", "seconds", "batch"):
        return 2
    opened = open_model(args)
    if opened is None:
        return 2
    bundle, sampler = opened
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
        "record": record(),
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
    path = Path(f"{args.out}.json")
    write_json(path, results)
    sheet = Path(f"{args.out}.png")
    fps = float(bundle.clock.fps)
    overview(sheet, overview_rows(judged["generated"][: max(1, args.show)], fps))

    log.info("%s\n", table(columns))
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        found = "-" if goal.found is None else f"{goal.found:.3f}"
        met = "met   " if goal.met else "MISSED"
        log.info("%s %s: %s %s %.3f", met, goal.name, found, sign, goal.wanted)
    log.info("%d clips in %.0f s; wrote %s and %s", len(made), took, path, sheet)
    return int(args.check and not all(goal.met for goal in goals))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
