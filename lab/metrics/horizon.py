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

import numpy as np
import torch

from .. import command
from ..report import publish, said, table
from .candidates import TRUTH, Protocol
from .claims import KEPT, METRICS, Estimate, Estimates, estimates
from .compare import cell, described, explained
from .horizon_plot import plot
from .runner import Comparison, Made, Scores, add_row_options, comparison_of, run
from .score import Table

MODULE = "lab.metrics.horizon"
PIECE = 5  # seconds
WINDOWS = ((0, 5), (5, 15), (15, 25), (25, 60))
MINUTE = 60


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(MODULE, __doc__)
    add_row_options(p)
    p.add_argument("--seconds", type=int, default=WINDOWS[-1][1])
    return p


def windows_of(seconds: int) -> list[tuple[int, int]]:
    """The windows of streams of `seconds`: what goes on after the last belongs to it, but for the
    last minute of two or more.

    Raises:
        ValueError: not a multiple of PIECE, or too short for two windows.
    """
    if seconds % PIECE or seconds <= WINDOWS[0][1]:
        raise ValueError(
            f"found {seconds} seconds, expected a multiple of {PIECE} above {WINDOWS[0][1]}"
        )
    begun = [window for window in WINDOWS if window[0] < seconds]
    last = (begun[-1][0], seconds)
    if seconds < 2 * MINUTE:
        return [*begun[:-1], last]
    return [*begun[:-1], (last[0], seconds - MINUTE), (seconds - MINUTE, seconds)]


def by_piece(scores: Scores) -> list[dict[str, Estimate]]:
    """Each metric piece by piece."""
    return [
        estimates([[seed[piece] for seed in seeds] for seeds in scores])
        for piece in range(len(scores[0][0]))
    ]


def in_window(scores: Scores, window: tuple[int, int]) -> dict[str, Estimate]:
    """Each metric in a window: the average over its pieces, seed by seed."""
    parts = by_piece(scores)[window[0] // PIECE : window[1] // PIECE]
    return {
        key: Estimate(
            tuple(np.mean([part[key].values for part in parts], axis=0).tolist()), one.trainings
        )
        for key, one in parts[0].items()
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


def rows_of(
    spans: Sequence[tuple[int, int]], found: Mapping[str, Sequence[Estimates]]
) -> tuple[list[str], bool]:
    """A table of a line per row and metric, and whether every model keeps enough of everything."""
    lines, all_met = [], True
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
            title = metric.title + ("" if metric.higher else " ↓")
            lines.append([label, title, *cells, said(share, 2), verdict])
    return table(["", "", *(named(span) for span in spans), "kept", ""], lines), all_met


def report(
    comparison: Comparison, rows: Mapping[str, Made], spans: Sequence[tuple[int, int]]
) -> tuple[Table, list[str], bool]:
    """Results for the JSON file, lines for the reader, and whether all models keep enough."""
    order = [one.label for one in comparison.candidates if one.label in rows]
    found = {label: [in_window(rows[label].scores, span) for span in spans] for label in order}
    protocol = comparison.protocol
    lines, met = rows_of(spans, found)
    results: Table = {
        "protocol": protocol.described(),
        "codecs": comparison.codecs.model_id,
        "rows": {
            label: {
                "windows": {
                    named(span): described(window)
                    for span, window in zip(spans, found[label], strict=True)
                },
                "kept": kept(found[label]),
                "pieces": [described(piece) for piece in by_piece(rows[label].scores)],
            }
            for label in order
        },
        "made": {label: rows[label].records for label in order},
    }
    lines = [
        f"{explained(protocol, found, spans[-1][1])} Measured in pieces of {protocol.seconds} s. "
        f"kept: last window over first, upside down where less is better; goal {KEPT}.",
        "",
        *lines,
    ]
    return results, lines, met


def comparison_from(args: argparse.Namespace) -> Comparison:
    """What the command line asks for."""
    size = args.prompts, args.seeds, PIECE, args.seconds // PIECE
    return comparison_of(args, Protocol(*size, tuple(args.combinations)), (TRUTH,))


def work(args: argparse.Namespace) -> int:
    """Make the rows that are missing, measure, print, draw and write. Returns the exit status."""
    spans = windows_of(args.seconds)
    asked = comparison_from(args)
    rows = run(asked, args, MODULE)
    results, lines, met = report(asked, rows, spans)
    publish(args.out / "horizon", results, lines)
    curves = {label: by_piece(rows[label].scores) for label in results["rows"]}
    plot(args.out / "horizon.png", curves, PIECE, [start for start, _ in spans[1:]])
    if len(rows) < len(asked.candidates):
        return 1
    return int(args.check and not met)


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
