"""Is a minute as good at its end as at its beginning? Every metric in windows of long streams.

    python launch.py lab.metrics.horizon --models mf=models/mutual_forcing_small.safetensors \
        other=FILE --rows mf:few:4 other:few:4 --seconds 60 --prompts 16 --seeds 3 --out DIR

writes DIR/horizon.json, DIR/horizon.md, DIR/horizon.png and DIR/rows/ (a row that is done is not
made again). A median, and a Fréchet distance above all, depends on how much it is taken from. So
streams are cut into pieces of PIECE seconds, each is measured on its own against true clips of that
length, and a window is the average of its pieces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from .claims import KEPT, METRICS, Estimate, Estimates, estimates
from .command import at_least_one, log, log_to_the_screen, write_report
from .compare import cell, described, made_of
from .horizon_plot import plot
from .record import record
from .row_runner import Made, Plan, Scores, add_row_options, plan_of, run
from .rows import TRUTH, Protocol
from .score import Table

PIECE = 5  # seconds
WINDOWS = ((0, 5), (5, 15), (15, 25), (25, 60))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="launch.py lab.metrics.horizon",
        description="Measure long streams in windows; write OUT/horizon.json, .md and .png.",
    )
    add_row_options(p)
    p.add_argument("--seconds", type=int, default=WINDOWS[-1][1])
    return p


def windows_of(seconds: int) -> list[tuple[int, int]]:
    """The windows of streams of `seconds`: what goes on after the last belongs to it.

    Raises:
        ValueError: not a multiple of PIECE, or too short for two windows.
    """
    if seconds % PIECE or seconds <= WINDOWS[0][1]:
        raise ValueError(
            f"found {seconds} seconds, expected a multiple of {PIECE} above {WINDOWS[0][1]}"
        )
    begun = [window for window in WINDOWS if window[0] < seconds]
    return [*begun[:-1], (begun[-1][0], seconds)]


def in_window(scores: Scores, window: tuple[int, int]) -> dict[str, Estimate]:
    """Each metric in a window: the average over its pieces, seed by seed."""
    pieces = range(window[0] // PIECE, window[1] // PIECE)
    parts = [estimates([seed[piece] for seed in scores]) for piece in pieces]
    return {
        key: Estimate(tuple(np.mean([part[key].seeds for part in parts], axis=0).tolist()))
        for key in parts[0]
        if all(key in part for part in parts)
    }


def kept(windows: Sequence[Estimates]) -> dict[str, float | None]:
    """Of each metric, how much of the first window is left in the last (`claims.Metric.kept`)."""
    first, last = windows[0], windows[-1]
    both = (metric for metric in METRICS if metric.key in first and metric.key in last)
    return {
        metric.key: metric.kept(first[metric.key].mean, last[metric.key].mean) for metric in both
    }


def named(window: tuple[int, int]) -> str:
    """A window in words."""
    return f"{window[0]}-{window[1]} s"


def table(
    spans: Sequence[tuple[int, int]], found: Mapping[str, Sequence[Estimates]]
) -> tuple[list[str], bool]:
    """Markdown, a line per row and metric, and whether every model keeps enough of everything."""
    heads = ["", "", *(named(span) for span in spans), "kept", ""]
    lines, all_met = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], True
    for label, windows in found.items():
        left = kept(windows)
        for metric in METRICS:
            if metric.key not in left:
                continue
            share = left[metric.key]
            met = share is not None and share >= KEPT
            all_met &= met or label == TRUTH
            cells = [cell(window.get(metric.key), metric.digits) for window in windows]
            verdict = "" if label == TRUTH else "met" if met else "**missed**"
            cells += ["-" if share is None else f"{share:.2f}", verdict]
            title = metric.title + ("" if metric.higher else " ↓")
            lines.append("| " + " | ".join([label, title, *cells]) + " |")
    return lines, all_met


def report(
    plan: Plan, rows: Mapping[str, Made], spans: Sequence[tuple[int, int]]
) -> tuple[Table, list[str], bool]:
    """Results for the JSON file, lines for the reader, and whether every row keeps enough."""
    order = [row.label for row in plan.rows if row.label in rows]
    found = {label: [in_window(rows[label].scores, span) for span in spans] for label in order}
    protocol = plan.protocol
    lines, met = table(spans, found)
    results: Table = {
        "record": record(),
        "protocol": asdict(protocol),
        "codecs": plan.codecs.model_id,
        "rows": {
            label: {
                "windows": {
                    named(span): {key: described(one) for key, one in window.items()}
                    for span, window in zip(spans, found[label], strict=True)
                },
                "kept": kept(found[label]),
                "pieces": [
                    {key: described(one) for key, one in piece.items()}
                    for piece in by_piece(rows[label].scores)
                ],
            }
            for label in order
        },
        "made": {label: made_of(rows[label]) for label in order},
    }
    lines = [
        f"{protocol.prompts} prompts, {protocol.seeds} sampling seeds, {spans[-1][1]} s, measured "
        "in "
        f"pieces of {protocol.seconds} s; mean ± standard deviation over the seeds. ↓: less is "
        f"better. kept: last window over first, upside down where less is better; goal {KEPT}.",
        "",
        *lines,
    ]
    return results, lines, met


def by_piece(scores: Scores) -> list[dict[str, Estimate]]:
    """Each metric piece by piece."""
    return [estimates([seed[piece] for seed in scores]) for piece in range(len(scores[0]))]


def main() -> int:
    """Make the rows that are missing, measure, print, draw and write. Returns the exit status."""
    args = parser().parse_args()
    log_to_the_screen()
    if not at_least_one(args, "prompts", "seeds", "jobs"):
        return 2
    try:
        spans = windows_of(args.seconds)
        protocol = Protocol(args.prompts, args.seeds, PIECE, args.seconds // PIECE)
        plan = plan_of(args, protocol, (TRUTH,))
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 2
    rows = run(plan, args, "lab.metrics.horizon")
    if args.only:
        return int(args.only not in rows)
    results, lines, met = report(plan, rows, spans)
    write_report(args.out, "horizon", results, lines)
    order = [row.label for row in plan.rows if row.label in rows]
    curves = {label: by_piece(rows[label].scores) for label in order}
    plot(args.out / "horizon.png", curves, PIECE, [start for start, _ in spans[1:]])
    if len(rows) < len(plan.rows):
        return 1
    return int(args.check and not met)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
