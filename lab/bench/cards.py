"""Which card runs what: a table from the bytes that the loaders and the nodes go by.

    python launch.py lab.bench.cards

Computed, nothing is measured. A card holds the network's weights (the prompt's connectors, 1.4 GB
for LTX-2, come on top where they are loaded with it), a stream with a memory of `--window`
seconds, and what ComfyUI keeps free. The stream's sizes are those with keys and values as computed,
in 8 bits, and in the computer's memory; where one of the latter two gets further, the cell says so.
*graphs*: so much room that passes can be recorded, which
takes two more copies of the past. *whole*: everything on the card. *offloaded*: weights come from
the computer's memory in every pass. *no*: the stream alone is too large.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial

from ...model_loaders.memory import stream_bytes
from ...networks.kept_keys import EIGHT_BITS, KEPT, ON_HOST, Kept
from .. import command
from ..report import publish, table
from .setups import Setup, setup

MODULE = "lab.bench.cards"
CARDS = (12, 16, 24, 32, 48, 80)
SIZES = ((512, 320), (640, 384), (768, 512), (1024, 576), (1280, 704))
MODELS = {"19b": "OmniForcing (LTX-2 19B)", "taomate": "TaoMate (LTX-2.3)"}
# ComfyUI 0.33's least memory for a model's work, and what it leaves to others: 0.8 + 0.4 GiB.
SPARE = 1.2 * 2**30
_WAYS = "no", "offloaded", "whole", "graphs"
_KEPT = {EIGHT_BITS: "8 bit", ON_HOST: "keys outside"}


def weights(made: Setup, eight_bits: bool) -> int:
    """Bytes of the network in 16 bits, or with the matrices of its layers in 8."""
    config = made.config
    whole, fewer = made.weights(), setup(made.name, layers=config.num_layers - 1).weights()
    layers = config.num_layers * (whole - fewer)
    return 2 * (whole - layers) + (1 if eight_bits else 2) * layers


def runs(card: int, held: int, stream: int, laid_out: float = math.inf) -> str:
    """How a card of so many GiB runs a network of `held` bytes with a stream."""
    room = card * 2**30 - SPARE
    if held + laid_out <= room:
        return "graphs"
    if held + stream <= room:
        return "whole"
    return "offloaded" if stream <= room else "no"


def cell(card: int, held: int, streams: dict[Kept, int], laid_out: int) -> str:
    """The same for the ways to keep keys and values: the usual one, and what gets further."""
    usual, *others = KEPT
    best = runs(card, held, streams[usual], laid_out)
    said = [best]
    for kept in others:
        way = runs(card, held, streams[kept])
        if _WAYS.index(way) > _WAYS.index(best):
            best = way
            said.append(f"{_KEPT[kept]}: {way}")
    return "; ".join(said)


def rows_of(window: int | None) -> list[str]:
    """The table."""
    heads = ["network", "weights", "size", "stream, GB", *(f"{card} GB" for card in CARDS)]
    rows = []
    for name, title in MODELS.items():
        made = setup(name, window=window)
        for eight_bits in (False, True):
            held = weights(made, eight_bits)
            said = f"{'int8 or fp8' if eight_bits else 'bf16'}, {held / 1e9:.1f} GB"
            for width, height in SIZES:
                of = partial(
                    stream_bytes,
                    made.config,
                    made.window,
                    height // 32,
                    width // 32,
                    element_size=2,
                    guided=False,
                    text_tokens=made.text_tokens,
                )
                streams = {kept: of(kept=kept) for kept in KEPT}
                sizes = ", ".join(f"{size / 1e9:.1f}" for size in streams.values())
                cells = [cell(card, held, streams, of(laid_out=True)) for card in CARDS]
                rows.append([title, said, f"{width} x {height}", sizes, *cells])
    return table(heads, rows)


def work(arguments: argparse.Namespace) -> None:
    """Print it."""
    publish(None, {}, rows_of(arguments.window))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = command.parser(MODULE, __doc__)
    made.add_argument("--window", type=int, help="seconds of memory (each model's own)")
    return command.run(made, work, argv)


if __name__ == "__main__":
    sys.exit(main())
