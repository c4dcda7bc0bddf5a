"""What scales, shifts and gates a layer's tokens: its tables plus the noise level's values.

b batch, n tokens of one stream, g groups of tokens with one sigma, k rows of a table, c channels.
In training they are made per layer and spread over tokens. While a block is denoised all tokens
share one sigma and a schedule has few of them, so they are made once per sigma for all layers
(`packed_rows`), in one flat tensor that a captured graph can take as its input.
Order of the tables' rows: docs/omniforcing.md, section 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modulation import Modulation, StreamModulation


class StreamRows(NamedTuple):
    """One stream in one layer; each (b, n or 1, c). A factor is 1 + scale.

    The stream has its own attention and feed-forward; towards the other stream it is the query once
    (and gates what comes in) and the key once. The cross-modal ones are None where a stream runs
    alone.
    """

    own_factor: Tensor
    own_shift: Tensor
    own_gate: Tensor
    ff_factor: Tensor
    ff_shift: Tensor
    ff_gate: Tensor
    query_factor: Tensor | None = None
    query_shift: Tensor | None = None
    key_factor: Tensor | None = None
    key_shift: Tensor | None = None
    cross_gate: Tensor | None = None


class LayerRows(NamedTuple):
    """Both streams in one layer; None where a stream is not run."""

    video: StreamRows | None
    audio: StreamRows | None


class HeadRows(NamedTuple):
    """(factor, shift) of each stream's head; None where a stream is not run."""

    video: tuple[Tensor, Tensor] | None
    audio: tuple[Tensor, Tensor] | None


def _spread(table: Tensor, values: Tensor, groups: Tensor | None) -> tuple[Tensor, ...]:
    """Table rows (k, c) plus values (b, g, k, c), spread over tokens: k tensors (b, n or 1, c)."""
    rows = table.to(values) + values
    if groups is not None:
        # A product with a one-hot matrix: the same rows, but its backward is one product as well,
        # where that of an index is a slow scatter.
        chosen = F.one_hot(groups, rows.shape[1]).to(rows)
        rows = torch.einsum("ng,bgkc->kbnc", chosen, rows)
        return rows.unbind(dim=0)
    return rows.unbind(dim=2)


def _stream_rows(
    own: Tensor, cross: Tensor | None, stream: StreamModulation, groups: Tensor | None, video: bool
) -> StreamRows:
    """From the modality's own table (6, c) and, where both run, its cross-modal one (5, c)."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = _spread(own, stream.own, groups)
    rows = StreamRows(1 + scale, shift, gate, 1 + ff_scale, ff_shift, ff_gate)
    if cross is None:
        return rows
    a2v_scale, a2v_shift, v2a_scale, v2a_shift = _spread(cross[:4], stream.cross, groups)
    (cross_gate,) = _spread(cross[4:], stream.gate, groups)
    to_video, to_audio = (1 + a2v_scale, a2v_shift), (1 + v2a_scale, v2a_shift)
    query, key = (to_video, to_audio) if video else (to_audio, to_video)
    return StreamRows(*rows[:6], *query, *key, cross_gate)


def layer_rows(
    block: nn.Module,
    modulation: Modulation,
    video_groups: Tensor | None = None,
    audio_groups: Tensor | None = None,
) -> LayerRows:
    """Rows of one layer. Groups (n,) name each token's row; None = all share row 0."""
    video, audio = modulation.video, modulation.audio
    both = video is not None and audio is not None
    video_cross = block.scale_shift_table_a2v_ca_video if both else None
    audio_cross = block.scale_shift_table_a2v_ca_audio if both else None
    return LayerRows(
        None
        if video is None
        else _stream_rows(block.scale_shift_table, video_cross, video, video_groups, True),
        None
        if audio is None
        else _stream_rows(block.audio_scale_shift_table, audio_cross, audio, audio_groups, False),
    )


def head_rows(
    model: nn.Module,
    modulation: Modulation,
    video_groups: Tensor | None = None,
    audio_groups: Tensor | None = None,
) -> HeadRows:
    """Rows of both heads."""

    def rows(
        table: Tensor, stream: StreamModulation | None, groups: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        if stream is None:
            return None
        shift, scale = _spread(table, stream.embedded[:, :, None], groups)
        return 1 + scale, shift

    return HeadRows(
        rows(model.scale_shift_table, modulation.video, video_groups),
        rows(model.audio_scale_shift_table, modulation.audio, audio_groups),
    )


class PackedRows(NamedTuple):
    """Rows of every layer and of the heads for one noise level, both streams.

    Attributes:
        flat: (b, all of them) one after the other; the rest are views of it.
    """

    flat: Tensor
    layers: tuple[LayerRows, ...]
    head: HeadRows

    def at(self, flat: Tensor) -> PackedRows:
        """The same with the numbers of another flat tensor."""
        if flat is self.flat:
            return self
        layers, cuts = [], _cuts(flat, self.layers, self.head)
        for _ in self.layers:
            streams = [
                StreamRows(*(next(cuts) for _ in StreamRows._fields)) for _ in LayerRows._fields
            ]
            layers.append(LayerRows(*streams))
        head = HeadRows(*((next(cuts), next(cuts)) for _ in HeadRows._fields))
        return PackedRows(flat, tuple(layers), head)


def _every(layers: tuple[LayerRows, ...], head: HeadRows) -> Iterator[Tensor]:
    for layer in layers:
        for stream in layer:
            yield from stream
    for pair in head:
        yield from pair


def _cuts(flat: Tensor, layers: tuple[LayerRows, ...], head: HeadRows) -> Iterator[Tensor]:
    start = 0
    for row in _every(layers, head):
        stop = start + row.shape[-1]
        yield flat[:, None, start:stop]
        start = stop


def packed_rows(model: nn.Module, modulation: Modulation) -> PackedRows:
    """Rows of every layer for a noise level that all tokens share; both streams must be run."""
    layers = tuple(layer_rows(block, modulation) for block in model.transformer_blocks)
    head = head_rows(model, modulation)
    flat = torch.cat([row[:, 0] for row in _every(layers, head)], dim=1)
    return PackedRows(flat, layers, head).at(flat)
