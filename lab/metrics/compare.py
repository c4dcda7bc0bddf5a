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

from .claims import METRICS, Claim, Estimate, Estimates, Question, estimates, questions
from .command import at_least_one, log, log_to_the_screen, write_report
from .record import record
from .row_runner import Made, Plan, Scores, add_row_options, plan_of, run
from .rows import CODEC, TRUTH, WITHOUT_MODEL, Protocol, Row
from .score import Table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="launch.py lab.metrics.compare",
        description="Compare models and numbers of steps; write OUT/compare.json and compare.md.",
    )
    add_row_options(p)
    p.add_argument("--seconds", type=int, default=5)
    p.add_argument("--claims", metavar="NAME", help="whose claims; default: the first model")
    p.add_argument(
        "--baselines", nargs="*", metavar="NAME", help="which it is to beat; default: all others"
    )
    return p


def described(estimate: Estimate) -> Table:
    """An estimate for the JSON file."""
    return {"mean": estimate.mean, "spread": estimate.spread, "seeds": list(estimate.seeds)}


def cell(estimate: Estimate | None, digits: int) -> str:
    """An estimate for a table: mean and spread."""
    if estimate is None:
        return "-"
    spread = "" if estimate.spread is None else f" ± {estimate.spread:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{spread}"


def made_of(made: Made) -> Table:
    """When and with what a row was made, and the time that it took."""
    return {"CPU seconds": made.cpu_seconds, "record": made.record}


def share_of(found: Estimates, own: Estimates) -> float | None:
    """Mouth correlation over what the codecs leave of the true one."""
    if "mouth" not in found or "mouth" not in own or own["mouth"].mean <= 0:
        return None
    return found["mouth"].mean / own["mouth"].mean


def by_attribute(scores: Scores) -> dict[str, float]:
    """Share that is right of each attribute, over the seeds."""
    parts = [seed[0]["by attribute"] for seed in scores]
    names = sorted({name for part in parts for name in part})
    return {name: float(np.mean([part[name] for part in parts if name in part])) for name in names}


def table(rows: Sequence[Row], found: Mapping[str, Estimates]) -> list[str]:
    """Markdown: a line per row, mean ± spread over the seeds."""
    heads = [metric.title + ("" if metric.higher else " ↓") for metric in METRICS]
    heads = ["", "passes a block", *heads, "mouth, of codec's own"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if row.label not in found:
            continue
        ones = found[row.label]
        cells = [cell(ones.get(metric.key), metric.digits) for metric in METRICS]
        share = share_of(ones, found.get(CODEC, {}))
        cells.append("-" if share is None else f"{share:.2f}")
        passes = str(row.evaluations) if row.sampler is not None else "-"
        lines.append("| " + " | ".join([row.label, passes, *cells]) + " |")
    return lines


def told(claim: Claim) -> str:
    """A claim in a line."""
    metric = next(metric for metric in METRICS if metric.key == claim.metric)
    digits = metric.digits + 1
    line = (
        f"{'met   ' if claim.met else 'MISSED'} {claim.name}: {metric.title}, {claim.row} "
        f"{claim.found:.{digits}f}, {claim.against} allows {claim.limit:.{digits}f}"
    )
    if claim.errors is not None:
        side = "better" if claim.errors >= 0 else "worse"
        line += f"; {side} by {abs(claim.errors):.1f} standard errors"
    if claim.excess is not None:
        line += f"; excess over the floor {claim.excess:.2f} of the other's"
    return line


def report(
    plan: Plan, rows: Mapping[str, Made], asked: Sequence[Question]
) -> tuple[Table, list[str], bool]:
    """Results for the JSON file, lines for the reader, and whether every claim is met."""
    found = {label: estimates([seed[0] for seed in made.scores]) for label, made in rows.items()}
    claims = [claim for one in asked for claim in one.answers(found, found.get(TRUTH, {}))]
    unasked = [one.name for one in asked if not (one.rows and one.others)]
    results: Table = {
        "record": record(),
        "protocol": asdict(plan.protocol),
        "codecs": plan.codecs.model_id,
        "rows": {
            row.label: {
                "evaluations per block": row.evaluations,
                **{key: described(one) for key, one in found[row.label].items()},
                "mouth over codec's own": share_of(found[row.label], found.get(CODEC, {})),
                "by attribute": by_attribute(rows[row.label].scores),
            }
            for row in plan.rows
            if row.label in found
        },
        "claims": [asdict(claim) for claim in claims],
        "made": {label: made_of(made) for label, made in rows.items()},
    }
    protocol = plan.protocol
    lines = [
        f"{protocol.prompts} prompts, {protocol.seeds} sampling seeds, {protocol.seconds} s; mean "
        "± "
        "standard deviation over the seeds. ↓: less is better.",
        "",
        *table(plan.rows, found),
        "",
        *(f"- {told(claim)}" for claim in claims),
        *(f"- not measured, a row is missing: {name}" for name in unasked),
    ]
    return results, lines, all(claim.met for claim in claims) and not unasked


def main() -> int:
    """Make the rows that are missing, compare, print and write. Returns the exit status."""
    args = parser().parse_args()
    log_to_the_screen()
    if not at_least_one(args, "prompts", "seeds", "seconds", "jobs"):
        return 2
    protocol = Protocol(args.prompts, args.seeds, args.seconds)
    try:
        plan = plan_of(args, protocol, WITHOUT_MODEL)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 2
    names = list(plan.files)
    model = names[0] if args.claims is None else args.claims
    others = [name for name in names if name != model]
    baselines = others if args.baselines is None else args.baselines
    strangers = [name for name in (model, *baselines) if name not in names]
    if strangers:
        log.error("found %s in --claims or --baselines, expected names of --models", strangers)
        return 2
    rows = run(plan, args, "lab.metrics.compare")
    if args.only:
        return int(args.only not in rows)
    measured = [row for row in plan.rows if row.label in rows]
    results, lines, met = report(plan, rows, questions(measured, model, baselines))
    write_report(args.out, "compare", results, lines)
    if len(measured) < len(plan.rows):
        return 1
    return int(args.check and not met)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
