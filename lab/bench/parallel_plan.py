"""One stream over several cards: computed time of a block, bytes exchanged, where it stops paying.

    python launch.py lab.bench.parallel_plan --out OUT

Nothing is measured here. A block has four steps (TaoMate: three), a full window, and in its first
pass the block before it. Products and attention take what they took on one H200 (docs/measured.md,
"On a graphics card"), by how many waves of tiles the multiprocessors need for a rank's columns and
heads. What lies between them every rank does whole, for as many tokens as there are. Two lanes
overlap on one card, which are not to be had on several. A message takes `--latency` besides its
bytes, of which 2 (n - 1) / n go through each of n cards (a ring). Cards that share a network record
no graphs, so their kernels are started one by one, `--launch` each: a pass takes the longer of
both.

GB a card: weights and a full window's keys and values in 16 bits. The last column has all of the
sound's own heads on one card; the others split them as they split the pictures'.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ...model_loaders.blank import BlankWeights
from ...networks.config import TransformerConfig
from ...networks.kv_cache import key_bytes, most_blocks
from ...networks.tensor_parallel import Part, Shares
from ...networks.transformer import CausalAVTransformer
from .. import command
from ..report import publish, table
from .floor import pass_work
from .setups import Setup, setup

MODULE = "lab.bench.parallel_plan"
SIZES = ((768, 512), (1280, 704))
CARDS = (1, 2, 4, 8)
RECIPE = 16
"""Messages a layer where each sum is one (docs/ltx23.md, section 6)."""
_PROCESSORS = 132
_TILES = ((192, 192), (256, 128), (128, 256), (192, 128), (128, 192), (128, 128))
_QUERIES = 128  # of a head, at once


class Measured(NamedTuple):
    """Seconds of a block of 512 x 768 pixels on one H200: by kind, and with both lanes."""

    products: float
    attention: float
    rest: float
    whole: float


ON_ONE = {
    "19b": Measured(0.239, 0.122, 0.057, 0.366),
    "taomate": Measured(0.229, 0.064, 0.058, 0.307),
}
TITLES = {"19b": "OmniForcing (LTX-2 19B)", "taomate": "TaoMate (LTX-2.3)"}
KERNELS = 3900
"""That a pass starts without graphs (docs/measured.md, "The first chunk")."""


class Link(NamedTuple):
    """What a message takes: seconds by itself, and bytes a second through a card each way."""

    name: str
    latency: float
    bandwidth: float


class Exchange(NamedTuple):
    """What one pass has to sum over the ranks."""

    messages: int
    bytes: int


def exchange(
    setup: Setup, block: int, element_size: int, *, reads_before: bool = False
) -> Exchange:
    """Of one pass over a block of one clip.

    Args:
        reads_before: it reads the block before it too, as the first pass of a block does.
    """
    config = setup.config
    video, audio = _tokens(setup, block)
    tokens = video + audio
    outputs = (video * config.video_dim + audio * config.audio_dim) * element_size
    # Of queries and keys of the own attentions and the crossing ones, of the text's queries.
    squares = 5 * tokens * 4
    if config.cross_attention_adaln:  # the text's keys are made in every pass
        squares += 2 * setup.text_tokens * 4
    layer = squares + 4 * outputs
    whole = config.num_layers * layer * (2 if reads_before else 1)
    # The last layer goes on with one half where the modalities have met.
    return Exchange(7 * config.num_layers, whole - (2 * outputs if reads_before else 0))


def _tokens(setup: Setup, block: int) -> tuple[int, int]:
    layout, grid = setup.config.layout, setup.height * setup.width
    spans = layout.video_span(block), layout.audio_span(block)
    (v0, v1), (a0, a1) = spans
    return (v1 - v0) * grid, a1 - a0 + (0 if block else setup.config.num_audio_sink_tokens)


class Plan(NamedTuple):
    """A block on so many cards.

    Attributes:
        seconds: that it takes.
        talking: of these, how many for messages.
        messages, sent: of all its passes, and their bytes.
        held: bytes of weights, keys and values on the first card.
    """

    seconds: float
    talking: float
    messages: int
    sent: int
    held: int


def planned(
    name: str, size: tuple[int, int], cards: int, link: Link, launch: float, *, sound_on_one: bool
) -> Plan:
    """A block of a model at a size, on cards that are alike."""
    made = setup(name, grid=(size[1] // 32, size[0] // 32))
    usual, config = setup(name), made.config
    alike = (1.0,) * cards
    apart = (1.0, *(0.0,) * (cards - 1)) if sound_on_one else None
    shares = Shares.of(config, alike, apart)
    whole = Shares.of(config, (1.0,))
    steps, block = len(made.entries) - 1, _full(made)
    took = ON_ONE[name]
    products = took.products * _products(made, shares) / _products(usual, whole)
    work = [pass_work(one, _full(one), 2).attention for one in (made, usual)]
    attention = took.attention * work[0] / work[1]
    attention *= _heads_waves(made, shares) / _heads_waves(made, whole)
    rest = took.rest * sum(_tokens(made, block)) / sum(_tokens(usual, block))
    first = exchange(made, block, 2, reads_before=True)
    later = exchange(made, block, 2)
    messages = steps * first.messages
    sent = first.bytes + (steps - 1) * later.bytes
    held = _held(made, shares)
    card = products + attention + rest
    if cards == 1:
        return Plan(card * took.whole / sum(took[:3]), 0.0, 0, 0, held)
    talking = messages * link.latency + 2 * (cards - 1) / cards * sent / link.bandwidth
    seconds = max(card + talking, steps * KERNELS * launch)
    return Plan(seconds, talking, messages, sent, held)


def _held(made: Setup, shares: Shares) -> int:
    """Bytes of the first rank's weights in 16 bits, and of its part of the past."""
    part = Part(made.config, shares, 0)
    with BlankWeights():
        weights = CausalAVTransformer(made.config).state_dict()
    cut = sum(part.cut(name, value).numel() for name, value in weights.items())
    blocks = most_blocks(made.config, made.window)
    keys = key_bytes(made.config, blocks, made.height, made.width, 2)
    return 2 * cut + keys * shares.video[0] // sum(shares.video)


def _full(made: Setup) -> int:
    """A block whose window is full."""
    return max(made.config.opening_blocks, made.window + 1) + 1


def _waves(tokens: int, columns: int) -> float:
    """Numbers that a card makes at once, times the waves that it needs: the fewest of any tile."""
    if not columns:
        return 0.0
    return min(
        math.ceil(math.ceil(tokens / rows) * math.ceil(columns / wide) / _PROCESSORS) * rows * wide
        for rows, wide in _TILES
    )


def _products(made: Setup, shares: Shares) -> float:
    """What the products of a layer take, of the rank that has most to do, in units of `_waves`
    times the channels that are summed over."""
    config, block = made.config, _full(made)
    steps = len(made.entries) - 1
    return max(
        sum(
            count * _rank_products(config, shares, rank, tokens, made.text_tokens)
            for count, tokens in ((1, (2 * v, 2 * a)), (steps - 1, (v, a)))
        )
        for v, a in [_tokens(made, block)]
        for rank in range(len(shares.video))
    )


def _rank_products(
    config: TransformerConfig, shares: Shares, rank: int, tokens: tuple[int, int], text: int
) -> float:
    total = 0.0
    inner = config.audio_attention_head_dim * shares.crossing[rank]
    for kind, n, width, head in (
        ("video", tokens[0], config.video_dim, config.attention_head_dim),
        ("audio", tokens[1], config.audio_dim, config.audio_attention_head_dim),
    ):
        own = getattr(shares, kind)[rank] * head
        # q, k, v; the text's q; the crossing's q, k, v; the feed-forward's first half.
        rows = 4 * _waves(n, own) + 3 * _waves(n, inner) + _waves(n, 4 * own)
        # What comes after them makes all columns of fewer channels.
        columns = _waves(n, width) * (2 * own + inner + 4 * own)
        total += rows * width + columns
        if config.cross_attention_adaln:
            total += 2 * _waves(text, own) * width
    return total


def _heads_waves(made: Setup, shares: Shares) -> int:
    """Waves of the video's attention to itself, of the rank with most heads."""
    video, _ = _tokens(made, _full(made))
    return math.ceil(max(shares.video) * math.ceil(video / _QUERIES) / _PROCESSORS)


def rows_of(links: Sequence[Link], launch: float) -> tuple[list[str], dict[str, object]]:
    """The table, and its numbers."""
    heads = ["network", "size", "link", "cards", "seconds a block", "times one card"]
    heads += ["of them messages", "GB sent a block", "messages a block", "GB a card"]
    heads += ["sound on one card, seconds"]
    rows, numbers = [], {}
    for name, size, link in product(ON_ONE, SIZES, links):
        one = None
        for cards in CARDS:
            made, whole = (
                planned(name, size, cards, link, launch, sound_on_one=on_one)
                for on_one in (False, True)
            )
            one = one or made
            where = f"{size[0]} x {size[1]}"
            numbers[f"{name}, {where}, {link.name}, {cards}"] = made._asdict() | {
                "seconds, sound on one card": whole.seconds
            }
            rows.append(
                [
                    TITLES[name],
                    where,
                    link.name,
                    cards,
                    made.seconds,
                    one.seconds / made.seconds,
                    made.talking,
                    made.sent / 1e9,
                    made.messages,
                    made.held / 1e9,
                    whole.seconds,
                ]
            )
    return table(heads, rows), numbers


def work(arguments: argparse.Namespace) -> None:
    """Print it, and write it where that is asked for."""
    fast, slow = (latency * 1e-6 for latency in arguments.latency)
    links = [Link("NVLink", fast, 400e9), Link("PCIe 5", slow, 50e9)]
    lines, numbers = rows_of(links, arguments.launch * 1e-6)
    publish(arguments.out, {"plans": numbers}, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = command.parser(MODULE, __doc__)
    made.add_argument("--out", type=Path, help="also write OUT.json and OUT.md")
    made.add_argument("--launch", type=float, default=10.0, help="us to start a kernel (10)")
    made.add_argument(
        "--latency",
        type=float,
        nargs=2,
        default=(15.0, 30.0),
        metavar="US",
        help="us that a message takes by itself, over NVLink and over PCIe (15 30)",
    )
    return command.run(made, work, argv)


if __name__ == "__main__":
    sys.exit(main())
