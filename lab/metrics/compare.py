"""Models and numbers of steps side by side, on the same prompts and seeds, and the claims.

    python launch.py lab.metrics.compare --models mf=models/mutual_forcing_small.safetensors \
        other=FILE --rows mf:few:4 mf:few:8 mf:multi:50 other:few:4 --prompts 64 --seeds 3 \
        --seconds 5 --out DIR

writes DIR/compare.json, DIR/compare.md and DIR/rows/ (a row that is done is not made again). Three
rows come of themselves: truth (other true clips of the same captions), codec (the same after both
codecs) and unsynced (their pictures with the sound of yet others).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from .. import command
from ..report import publish, said, table
from .candidates import CODEC, TRUTH, WITHOUT_MODEL, Protocol
from .claims import METRICS, Claim, Estimate, Estimates, Question, estimates, questions
from .runner import Comparison, Made, Scores, add_row_options, comparison_of, run
from .score import Table

MODULE = "lab.metrics.compare"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(MODULE, __doc__)
    add_row_options(p)
    p.add_argument("--seconds", type=int, default=5)
    p.add_argument("--claims", metavar="NAME", help="whose claims; default: the first model")
    p.add_argument(
        "--baselines", nargs="*", metavar="NAME", help="which it is to beat; default: all others"
    )
    return p


def described(estimates: Estimates) -> Table:
    """Estimates for the JSON file."""
    return {
        key: {
            "mean": one.mean,
            "95 % limit": one.limit,
            "over": "trainings" if one.trainings else "sampling seeds",
            "values": list(one.values),
        }
        for key, one in estimates.items()
    }


def cell(estimate: Estimate | None, digits: int) -> str:
    """An estimate for a table: the mean and how far off it may be."""
    if estimate is None:
        return "-"
    limit = "" if estimate.limit is None else f" ± {estimate.limit:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{limit}"


def explained(protocol: Protocol, found: Mapping[str, Sequence[Estimates]], seconds: int) -> str:
    """What the numbers of a table are, in words; of each row the estimates."""
    ones = [one for rows in found.values() for row in rows for one in row.values()]
    chance = ["sampling seeds of one training"] * any(not one.trainings for one in ones)
    chance += ["trainings of a method"] * any(one.trainings for one in ones)
    words = " or ".join(" ".join(one) for one in protocol.combinations)
    return (
        f"{protocol.prompts} prompts{words and f' with {words}'}, {protocol.seeds} sampling seeds, "
        f"{seconds} s. Mean ± 95 % "
        f"limits (Student's t) over the {' or the '.join(chance)}. ↓: less is better. A Fréchet "
        f"distance of {protocol.prompts} clips is too large by about what other true clips of the "
        "same prompts have, the row truth."
    )


def share_of(found: Estimates, own: Estimates) -> float | None:
    """Mouth correlation over what the codecs leave of the true one."""
    if "mouth" not in found or "mouth" not in own or own["mouth"].mean <= 0:
        return None
    return found["mouth"].mean / own["mouth"].mean


def variety_of(scores: Scores) -> dict[str, float] | None:
    """How far clips of one prompt are apart, pictures and sound; None with one sampling seed."""
    names = "video variety", "audio variety"
    tables = [seed[0] for seeds in scores for seed in seeds]
    if any(name not in table for table in tables for name in names):
        return None
    return {name: float(np.mean([table[name] for table in tables])) for name in names}


def varied(made: Made, truth: Made | None) -> str:
    """The variety of a row for a table: pictures and sound, over that of true clips."""
    own, full = (None if row is None else variety_of(row.scores) for row in (made, truth))
    if own is None or full is None:
        return "-"
    return ", ".join(f"{own[name] / full[name]:.2f}" for name in own)


def too_few(found: Mapping[str, Estimates], clips: int) -> list[str]:
    """A line for each distance by which a row is nearer to the truth than other true clips are."""
    lines = []
    for metric in (metric for metric in METRICS if metric.floored):
        least = found.get(TRUTH, {}).get(metric.key)
        below = [
            label
            for label, row in found.items()
            if label not in WITHOUT_MODEL
            and least is not None
            and metric.key in row
            and row[metric.key].mean < least.mean
        ]
        if below:
            lines.append(
                f"- {metric.title} says nothing here: {', '.join(below)} are below the truth's "
                f"{least.mean:.2f}, which is the bias of {clips} clips; take more --prompts"
            )
    return lines


def by_attribute(scores: Scores) -> dict[str, float]:
    """Share that is right of each attribute, over the seeds."""
    parts = [seed[0]["by attribute"] for seeds in scores for seed in seeds]
    names = sorted({name for part in parts for name in part})
    return {name: float(np.mean([part[name] for part in parts if name in part])) for name in names}


def rows_of(
    comparison: Comparison, found: Mapping[str, Estimates], made: Mapping[str, Made]
) -> list[str]:
    """A table of a line per row."""
    heads = [metric.title + ("" if metric.higher else " ↓") for metric in METRICS]
    lines = []
    for one in comparison.candidates:
        if one.label in found:
            row = found[one.label]
            cells = [cell(row.get(metric.key), metric.digits) for metric in METRICS]
            share = said(share_of(row, found.get(CODEC, {})), 2)
            variety = varied(made[one.label], made.get(TRUTH))
            lines.append([one.label, one.evaluations or None, *cells, share, variety])
    last = "mouth, of codec's own", "variety, of truth's: video, audio"
    return table(["", "passes a block", *heads, *last], lines)


def told(claim: Claim) -> str:
    """A claim in a line."""
    metric = next(metric for metric in METRICS if metric.key == claim.metric)
    digits = metric.digits + 1
    line = (
        f"{'met   ' if claim.met else 'MISSED'} {claim.name}: {metric.title}, {claim.row} "
        f"{claim.found:.{digits}f}, {claim.against} allows {claim.limit:.{digits}f}"
    )
    line += f"; {'better' if claim.gain >= 0 else 'worse'} by {abs(claim.gain):.{digits}f}"
    if claim.chance is not None:
        line += f" ± {claim.chance:.{digits}f}"
    if claim.excess is not None:
        line += f"; excess over the floor {claim.excess:.2f} of the other's"
    return line


def report(
    comparison: Comparison, rows: Mapping[str, Made], asked: Sequence[Question]
) -> tuple[Table, list[str], bool]:
    """Results for the JSON file, lines for the reader, and whether every claim is met."""
    protocol, own = comparison.protocol, comparison.candidates
    found = {
        label: estimates([[seed[0] for seed in seeds] for seeds in made.scores])
        for label, made in rows.items()
    }
    claims = [claim for one in asked for claim in one.answers(found, found.get(TRUTH, {}))]
    unasked = [one.name for one in asked if not (one.candidates and one.others)]
    results: Table = {
        "protocol": protocol.described(),
        "codecs": comparison.codecs.model_id,
        "rows": {
            one.label: {
                "evaluations per block": one.evaluations,
                **described(found[one.label]),
                "mouth over codec's own": share_of(found[one.label], found.get(CODEC, {})),
                "by attribute": by_attribute(rows[one.label].scores),
                "variety": variety_of(rows[one.label].scores),
            }
            for one in own
            if one.label in found
        },
        "claims": [asdict(claim) for claim in claims],
        "made": {label: made.records for label, made in rows.items()},
    }
    lines = [
        explained(protocol, {label: [one] for label, one in found.items()}, protocol.seconds),
        "",
        *rows_of(comparison, found, rows),
        "",
        *too_few(found, protocol.prompts),
        *(f"- {told(claim)}" for claim in claims),
        *(f"- not measured, a row is missing: {name}" for name in unasked),
    ]
    return results, lines, all(claim.met for claim in claims) and not unasked


def comparison_from(args: argparse.Namespace) -> Comparison:
    """What the command line asks for."""
    protocol = Protocol(args.prompts, args.seeds, args.seconds, 1, tuple(args.combinations))
    return comparison_of(args, protocol, WITHOUT_MODEL)


def work(args: argparse.Namespace) -> int:
    """Make the rows that are missing, compare, print and write. Returns the exit status."""
    asked = comparison_from(args)
    names = asked.names
    model = names[0] if args.claims is None else args.claims
    others = [name for name in names if name != model]
    baselines = others if args.baselines is None else args.baselines
    strangers = [name for name in (model, *baselines) if name not in names]
    if strangers:
        raise ValueError(
            f"found {strangers} in --claims or --baselines, expected names of --models"
        )
    rows = run(asked, args, MODULE)
    measured = [one for one in asked.candidates if one.label in rows]
    results, lines, met = report(asked, rows, questions(measured, model, baselines))
    publish(args.out / "compare", results, lines)
    if len(measured) < len(asked.candidates):
        return 1
    return int(args.check and not met)


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
