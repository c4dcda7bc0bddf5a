"""How good streams are as they go on: a picture a metric, a curve a row, with its 95 % limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .candidates import TRUTH
from .claims import METRICS, Estimates

COLUMNS = 3


def plot(
    path: Path,
    curves: Mapping[str, Sequence[Estimates]],
    seconds: int,
    borders: Sequence[int],
) -> None:
    """Write a PNG.

    Args:
        curves: by the row's label, the metrics of each piece of the streams.
        seconds: length of a piece.
        borders: seconds at which a new window begins.

    Raises:
        OSError: it cannot be written.
    """
    # The object interface, not pyplot: no global figure, no window system.
    from matplotlib.figure import Figure

    lines = -(-len(METRICS) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * lines + 0.5), dpi=110, layout="constrained")
    places = figure.subplots(lines, COLUMNS, squeeze=False).flat
    for axes, metric in zip(places, METRICS, strict=False):
        for label, pieces in curves.items():
            at = [(i + 0.5) * seconds for i, piece in enumerate(pieces) if metric.key in piece]
            ones = [piece[metric.key] for piece in pieces if metric.key in piece]
            means = np.array([one.mean for one in ones])
            limits = np.array([one.limit or 0.0 for one in ones])
            plain = label == TRUTH
            (line,) = axes.plot(
                at,
                means,
                label=label,
                color="0.5" if plain else None,
                linestyle="--" if plain else "-",
                marker="." if len(at) < 30 else None,
                linewidth=1.4,
            )
            axes.fill_between(
                at,
                means - limits,
                means + limits,
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        for border in borders:
            axes.axvline(border, color="0.85", linewidth=0.8, zorder=0)
        axes.set_title(
            f"{metric.title} ({'more' if metric.higher else 'less'} is better)", fontsize=9
        )
        axes.set_xlabel("seconds into the stream", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlim(left=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
