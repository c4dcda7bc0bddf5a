"""The least time a machine could take: FLOPs over its matmul rate, bytes over its copy rate.

n tokens of a modality, m keys, c channels.
FLOPs are counted from the config alone (two per multiplication and addition), not from what our
code happens to do; a test holds the two against each other. Only what no exact implementation can
do without is counted: products of the tokens of one block, attention over the past, one reading of
weights, past and text keys. What lies between (norms, rotations, softmax) is taken to be free, so a
ratio of 1 cannot be reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...networks.execution import attention_order
from ...networks.kv_cache import kept_blocks
from ...samplers.stream_memory import AUDIO_TOKENS, picture_tokens
from .setups import Setup
from .stopwatch import Span, best


class Work(NamedTuple):
    """What a pass cannot do without."""

    linear: float
    """FLOPs of products with weights."""
    attention: float
    """FLOPs of products of queries, keys and values."""
    bytes: float
    """Read at least once: weights, and keys and values that were there before."""

    @property
    def flops(self) -> float:
        """All of them."""
        return self.linear + self.attention

    def plus(self, other: Work) -> Work:
        """Both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> Work:
        """So many of it."""
        return Work(*(a * count for a in self))


NOTHING = Work(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class _Stream:
    """One modality of a block, as a pass sees it; `remembered` tokens sum up the stream."""

    width: int
    heads: int
    channels: int
    text_width: int
    tokens: int
    past: int
    memory_width: int
    remembered: int


def pass_work(setup: Setup, block: int, element_size: int, *, refresh: bool = False) -> Work:
    """One pass over a block: a denoising step, or the refresh, which ends with the last keys."""
    config, layout = setup.config, setup.config.layout
    kept = len(kept_blocks(block, setup.window, config.opening_blocks))
    grid, sinks = setup.height * setup.width, config.num_audio_sink_tokens
    (v0, v1), (a0, a1) = layout.video_span(kept), layout.audio_span(kept)
    past = a0 + sinks if kept else 0
    told = bool(config.memory_interval and block)
    video = _Stream(
        config.video_dim,
        config.num_attention_heads,
        config.in_channels,
        config.cross_attention_dim,
        (v1 - v0) * grid,
        v0 * grid,
        config.memory_video_dim,
        told * 2 * picture_tokens(setup.height, setup.width),
    )
    audio = _Stream(
        config.audio_dim,
        config.audio_num_attention_heads,
        config.audio_in_channels,
        config.audio_cross_attention_dim,
        a1 + sinks - past,
        past,
        config.memory_audio_dim,
        told * AUDIO_TOKENS,
    )
    inner, gated = config.audio_dim, config.apply_gated_attention
    first = ends = memory = NOTHING
    for own, other in ((video, audio), (audio, video)):
        # Own attention: q, k, v, out. Text: q, out. What the other modality sees: k, v.
        weights = 6 * own.width**2 + 2 * own.width * inner + gated * 2 * own.width * own.heads
        keys = own.past + own.tokens
        attention = 4 * own.tokens * own.width * (keys + setup.text_tokens)
        # Read from before: its own past, what the other modality sees of it, and the text.
        known = 2 * own.past * (own.width + inner)
        text = 0
        if config.cross_attention_adaln:  # its keys and values are those of a noise level
            text = 2 * own.text_width * own.width
            known += setup.text_tokens * own.text_width
        else:
            known += 2 * setup.text_tokens * own.width
        linear = 2 * (own.tokens * weights + setup.text_tokens * text)
        first = first.plus(Work(linear, attention, (weights + text + known) * element_size))
        # The other modality's attention: q, out. Feed-forward: four times as wide and back.
        heads = config.audio_num_attention_heads
        weights = 8 * own.width**2 + 2 * own.width * inner + gated * own.width * heads
        attention = 4 * own.tokens * inner * (other.past + other.tokens)
        ends = ends.plus(Work(2 * own.tokens * weights, attention, weights * element_size))
        if own.remembered:  # q, out; k, v
            wide, narrow = 2 * own.width * own.memory_width, 2 * own.memory_width**2
            linear = 2 * (own.tokens * wide + own.remembered * narrow)
            attention = 4 * own.tokens * own.memory_width * own.remembered
            memory = memory.plus(Work(linear, attention, (wide + narrow) * element_size))
    layers = config.num_layers
    whole = first.times(layers).plus(ends.times(layers - 1 if refresh else layers))
    if told:
        film = config.memory_film_hidden * (4 * config.in_channels + 2 * config.video_dim)
        memory = memory.plus(Work(2.0 * film, 0.0, film * element_size))
        whole = whole.plus(memory.times(sum(map(config.remembers, range(layers)))))
    for own in (video, audio):
        # Into the network, and out of it; sink tokens do not come from latents.
        outer = own.tokens - (sinks if own is audio and not kept else 0)
        count = outer + (0 if refresh else own.tokens)
        linear = 2 * own.channels * own.width * count
        read = own.channels * own.width * (1 if refresh else 2) * element_size
        encoder = own.channels * own.memory_width * bool(own.remembered)
        linear += 2 * own.remembered * encoder
        whole = whole.plus(Work(linear, 0.0, read + encoder * element_size))
    return whole


def block_work(setup: Setup, block: int, steps: int, element_size: int) -> list[tuple[Work, int]]:
    """Passes until a block is out, and how many: the refresh of the last one, then its steps."""
    passes = [(pass_work(setup, block, element_size), steps)]
    if block:
        passes.append((pass_work(setup, block - 1, element_size, refresh=True), 1))
    return passes


class Rates(NamedTuple):
    """What a machine can do, as spans for a known amount of work.

    The times are those of `flops` and `bytes`; the attention's is of `attention_flops`.
    """

    flops: float
    matmul: Span
    bytes: float
    copy: Span
    attention_flops: float
    attention: Span

    def floor(
        self, work: list[tuple[Work, int]], clock: Callable[[Span], float], *, apart: bool = False
    ) -> float:
        """Seconds for these passes by one of a span's clocks: arithmetic and memory in parallel.

        `apart` takes attention at the rate of torch's own attention instead of that of products:
        less than that cannot be had without another attention.
        """
        flop, byte = clock(self.matmul) / self.flops, clock(self.copy) / self.bytes
        attention = clock(self.attention) / self.attention_flops if apart else flop
        return sum(
            n * max(one.linear * flop + one.attention * attention, one.bytes * byte)
            for one, n in work
        )


def measure_rates(
    setup: Setup, dtype: torch.dtype, device: torch.device, seconds: float = 0.3
) -> Rates:
    """Time products of the network's shapes, a large copy, and attention over a full window."""
    config, layout = setup.config, setup.config.layout
    tokens, width = block_tokens(setup), config.video_dim
    new = {"dtype": dtype, "device": device}
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    keys = layout.video_latents(2 + setup.window) * setup.height * setup.width
    heads, dim = config.num_attention_heads, config.attention_head_dim
    q = torch.randn(1, heads, tokens, dim, **new)
    k, v = torch.randn(1, heads, keys, dim, **new), torch.randn(1, heads, keys, dim, **new)

    def attend() -> None:
        with attention_order(device)():
            F.scaled_dot_product_attention(q, k, v)

    return Rates(
        28.0 * tokens * width**2,
        best(_products(setup, tokens, new), device, seconds),
        2.0 * block.numel(),
        best(lambda: target.copy_(block), device, seconds / 3),
        4.0 * tokens * keys * width,
        best(attend, device, seconds / 3),
    )


def block_tokens(setup: Setup) -> int:
    """Video tokens of a block after the first."""
    return setup.config.layout.video_next * setup.height * setup.width


def rates_of_rows(
    setup: Setup, dtype: torch.dtype, device: torch.device, seconds: float = 0.1
) -> dict[int, float]:
    """FLOPs a second of a layer's products over so many tokens: of a block, of two, of eight.

    The last is as good as many tokens get; what a few reach of it is the efficiency of the tiles
    that they are cut into.
    """
    new = {"dtype": dtype, "device": device}
    counts = [block_tokens(setup) * blocks for blocks in (1, 2, 8)]
    flops = 28.0 * setup.config.video_dim**2
    return {
        rows: flops * rows / best(_products(setup, rows, new), device, seconds).wall
        for rows in counts
    }


def _products(setup: Setup, tokens: int, new: dict[str, object]) -> Callable[[], None]:
    """In the proportion that a layer has: six square ones, one up, one down."""
    width = setup.config.video_dim
    x, wide = torch.randn(tokens, width, **new), torch.randn(tokens, 4 * width, **new)
    square = torch.randn(width, width, **new)
    up, down = torch.randn(4 * width, width, **new), torch.randn(width, 4 * width, **new)

    def products() -> None:
        for _ in range(6):
            F.linear(x, square)
        F.linear(x, up)
        F.linear(wide, down)

    return products
