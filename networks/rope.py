"""Rotary positions in physical units: seconds and pixels, one clock for both modalities.

b batch, a heads, n tokens, d head dim, r rotation pairs per head (d/2), f video latents, s audio
latents.
LTX-2 measures a token at the middle of the time (and pixel) span that it stands for
(docs/omniforcing.md, section 1, RoPE). Everything inside this pack uses the split ("rotate half")
layout; interleaved checkpoints are permuted once at load (`interleaved_to_split`), which is the
same rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .config import TransformerConfig
from .layout import BlockLayout

Placed = Callable[[Tensor], Tensor]


class RopeTable(NamedTuple):
    """Cosines and sines of every token's rotation, each (a, n, r)."""

    cos: Tensor
    sin: Tensor

    def tokens(self, start: int, stop: int | None = None) -> RopeTable:
        """The table of a run of tokens."""
        return RopeTable(self.cos[:, start:stop], self.sin[:, start:stop])

    def index(self, order: Tensor) -> RopeTable:
        """The table with its tokens in another order, or repeated."""
        return RopeTable(self.cos[:, order], self.sin[:, order])

    def to(self, like: Tensor) -> RopeTable:
        """The table in the dtype and on the device of `like`."""
        return RopeTable(
            self.cos.to(device=like.device, dtype=like.dtype),
            self.sin.to(device=like.device, dtype=like.dtype),
        )


class ModalityTables(NamedTuple):
    """A run of blocks' four tables: self-attention per modality, the shared time axis across."""

    video: RopeTable
    audio: RopeTable
    cross_video: RopeTable
    cross_audio: RopeTable


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate queries or keys (b, a, n, d) by their tokens' angles, in the split layout."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = table
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def video_seconds(config: TransformerConfig, start: int, stop: int) -> Tensor:
    """Time of video latents [start, stop) in seconds, (f,): the middle of the frames each covers.

    In float32 and in this order of operations, as LTX-2 computes them: the highest frequency
    multiplies a position's rounding error by 15,000.
    """
    return _middle(config, start, stop, config.video_time_stride) / config.fps


def audio_seconds(config: TransformerConfig, start: int, stop: int) -> Tensor:
    """Time of audio latents [start, stop) in seconds, (s,)."""
    middle = _middle(config, start, stop, config.audio_time_stride)
    return middle * config.audio_hop_length / config.audio_sampling_rate


def _middle(config: TransformerConfig, start: int, stop: int, stride: int) -> Tensor:
    """Middle (or begin) of the codec frames that latents stand for; the first has stride 1."""
    index = torch.arange(start, stop, dtype=torch.float32)
    begin, end = (stride * index - (stride - 1)).clamp(min=0), stride * index + 1
    return (begin + end) / 2 if config.use_middle_indices_grid else begin


def _frequencies(config: TransformerConfig, count: int) -> Tensor:
    """(count,) angular frequencies (pi/2) theta^(k/(count-1)), in the checkpoint's precision."""
    theta = config.positional_embedding_theta
    if config.frequencies_precision == "float64":
        grid = np.power(theta, np.linspace(0.0, 1.0, count, dtype=np.float64)) * (math.pi / 2)
        return torch.from_numpy(grid).to(torch.float32)
    return torch.pow(theta, torch.linspace(0.0, 1.0, count, dtype=torch.float32)) * (math.pi / 2)


def _table(
    config: TransformerConfig,
    axes: Sequence[tuple[Tensor, str]],
    heads: int,
    head_dim: int,
    placed: Placed,
    **lengths: int,
) -> RopeTable:
    """A table of tokens whose places along each axis are fractions (m,) of the trained range.

    Angles run frequency-major, axis-minor over the whole inner width; channels left over are an
    identity rotation at the front. An angle belongs to one axis, so cosines and sines are made of a
    few places, here, and laid over the tokens where they are needed.

    Args:
        axes: with each, how its places lie over the tokens, as an einops pattern of (m, k).
        lengths: of the pattern's axes.
    """
    pairs = heads * head_dim // 2
    frequencies = _frequencies(config, pairs // len(axes))
    pad = pairs - len(axes) * len(frequencies)
    angles = [
        ((2 * fractions - 1).to(torch.float32)[:, None] * frequencies, pattern)
        for fractions, pattern in axes
    ]

    def laid(turned: Callable[[Tensor], Tensor], left_over: float) -> Tensor:
        parts = [repeat(placed(turned(angle)), pattern, **lengths) for angle, pattern in angles]
        table = F.pad(rearrange(parts, "x n k -> n (k x)"), (pad, 0), value=left_over)
        return rearrange(table, "n (a r) -> a n r", a=heads).contiguous()

    return RopeTable(laid(torch.cos, 1.0), laid(torch.sin, 0.0))


def _with_sinks(table: RopeTable, sinks: int) -> RopeTable:
    """Prepend sink tokens, not rotated (OmniForcing, arXiv 2603.11647, equation 8)."""
    return RopeTable(
        F.pad(table.cos, (0, 0, sinks, 0), value=1.0), F.pad(table.sin, (0, 0, sinks, 0))
    )


@lru_cache(maxsize=64)
def modality_tables(
    config: TransformerConfig, blocks: int, height: int, width: int
) -> ModalityTables:
    """Tables of blocks 0..blocks-1 in token order (sinks first in audio), float32 on the CPU.

    Args:
        blocks: how many blocks from the start; a rolled window uses the same tables, because its
            blocks are re-based to follow the prefix directly.
        height, width: latent grid of the video.
    """
    return block_tables(config, range(blocks), height, width)


def block_tables(
    config: TransformerConfig,
    blocks: range,
    height: int,
    width: int,
    placed: Placed = lambda table: table,
) -> ModalityTables:
    """The same of any blocks in a row, at their own seconds.

    Args:
        placed: takes a small table of float32 on the CPU to the device and dtype of the whole ones.
    """
    layout: BlockLayout = config.layout
    max_time, max_row, max_column = config.positional_embedding_max_pos
    (max_audio,) = config.audio_positional_embedding_max_pos
    cross_max = max(max_time, max_audio)
    middle = 0.5 if config.use_middle_indices_grid else 0.0
    space = config.video_space_stride
    first, last = blocks[0], blocks[-1]
    times = video_seconds(config, layout.video_span(first)[0], layout.video_span(last)[1])
    rows = (torch.arange(height, dtype=torch.float32) + middle) * space
    columns = (torch.arange(width, dtype=torch.float32) + middle) * space
    sinks = 0 if first else config.num_audio_sink_tokens
    start, stop = layout.audio_span(first)[0], layout.audio_span(last)[1]
    if config.rotated_sinks:
        # The sound's places are those of all sinks later.
        start, stop = (
            start + config.num_audio_sink_tokens - sinks,
            stop + config.num_audio_sink_tokens,
        )
        sinks = 0
    heard = audio_seconds(config, start, stop)
    video = config.num_attention_heads, config.attention_head_dim, placed
    audio = config.audio_num_attention_heads, config.audio_attention_head_dim, placed
    per_frame, per_latent = "f k -> (f h w) k", "s k -> s k"
    grid = [
        (times / max_time, per_frame),
        (rows / max_row, "h k -> (f h w) k"),
        (columns / max_column, "w k -> (f h w) k"),
    ]
    sizes = {"f": len(times), "h": height, "w": width}
    return ModalityTables(
        video=_table(config, grid, *video, **sizes),
        audio=_with_sinks(_table(config, [(heard / max_audio, per_latent)], *audio), sinks),
        cross_video=_table(config, [(times / cross_max, per_frame)], *audio, **sizes),
        cross_audio=_with_sinks(_table(config, [(heard / cross_max, per_latent)], *audio), sinks),
    )


def interleaved_to_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the output channels of a q/k projection or its norm from interleaved to split.

    Inside each head, pair (2i, 2i+1) moves to (i, d/2 + i): the same rotation (docs/omniforcing.md,
    section 0, point 3).

    Args:
        weight: (heads * d, ...); a bias or a norm's weight as well.
    """
    return rearrange(weight, "(a r two) ... -> (a two r) ...", a=heads, two=2).contiguous()


def split_to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved_to_split`."""
    return rearrange(weight, "(a two r) ... -> (a r two) ...", a=heads, two=2).contiguous()
