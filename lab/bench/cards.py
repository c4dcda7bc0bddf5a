"""Which card runs what: a table from the bytes that the loaders and the nodes go by.

    python launch.py lab.bench.cards

Computed, nothing is measured. A card holds the network's weights (the prompt's connectors, 1.4 GB
for LTX-2, come on top where they are loaded with it), a stream with a memory of `--window`
seconds, and what ComfyUI keeps free. *graphs*: so much room that passes can be recorded, which
takes two more copies of the past. *whole*: everything on the card. *offloaded*: weights come from
the computer's memory in every pass. *no*: the stream alone is too large.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ...model_loaders.memory import stream_bytes
from .. import command
from ..report import publish, table
from .setups import Setup, setup

MODULE = "lab.bench.cards"
CARDS = (12, 16, 24, 32, 48, 80)
SIZES = ((512, 320), (640, 384), (768, 512), (1024, 576), (1280, 704))
MODELS = {"19b": "OmniForcing (LTX-2 19B)", "taomate": "TaoMate (LTX-2.3)"}
# ComfyUI 0.33's least memory for a model's work, and what it leaves to others: 0.8 + 0.4 GiB.
SPARE = 1.2 * 2**30


def weights(made: Setup, eight_bits: bool) -> int:
    """Bytes of the network in 16 bits, or with the matrices of its layers in 8."""
    config = made.config
    whole, fewer = made.weights(), setup(made.name, layers=config.num_layers - 1).weights()
    layers = config.num_layers * (whole - fewer)
    return 2 * (whole - layers) + (1 if eight_bits else 2) * layers


def runs(card: int, held: int, stream: int, laid_out: int) -> str:
    """How a card of so many GiB runs a network of `held` bytes with a stream."""
    room = card * 2**30 - SPARE
    if held + laid_out <= room:
        return "graphs"
    if held + stream <= room:
        return "whole"
    return "offloaded" if stream <= room else "no"


def rows_of(window: int | None) -> list[str]:
    """The table."""
    heads = ["network", "weights", "size", "stream, GB", *(f"{card} GB" for card in CARDS)]
    rows = []
    for name, title in MODELS.items():
        made = setup(name, window=window)
        for eight_bits in (False, True):
            held = weights(made, eight_bits)
            said = f"{'fp8' if eight_bits else 'bf16'}, {held / 1e9:.1f} GB"
            for width, height in SIZES:
                stream, laid_out = (
                    stream_bytes(
                        made.config,
                        made.window,
                        height // 32,
                        width // 32,
                        element_size=2,
                        guided=False,
                        text_tokens=made.text_tokens,
                        laid_out=still,
                    )
                    for still in (False, True)
                )
                cells = [runs(card, held, stream, laid_out) for card in CARDS]
                rows.append([title, said, f"{width} x {height}", f"{stream / 1e9:.1f}", *cells])
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
