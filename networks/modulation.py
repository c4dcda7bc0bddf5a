"""Adaptive layer norm: what every layer scales, shifts and gates its tokens with.

b batch, n tokens of one modality, g groups of tokens with one sigma, k vectors of a table,
c channels.
A layer's modulation is its own tables plus the noise level's embedding. In training it is made
layer by layer and spread over tokens (`TokenModulation`). While a block is denoised all tokens
share one sigma and a schedule has few of them, so it is made once per sigma for all layers
(`SharedModulation`), in one flat tensor that a captured graph can take as its input.
Order of the tables' vectors: docs/omniforcing.md, section 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .timestep import ModalityEmbedding, TimestepEmbedding


class ModalityModulation(NamedTuple):
    """One modality in one layer; each (b, n or 1, c). Scales have their 1 added already.

    Self-attention and feed-forward are the modality's own; towards the other one it is the query
    once (and gates what comes in) and the key once. The cross-modal ones are None where a modality
    runs alone. `factors` (b, n or 1, 1 or 2) are the adapters' factors (`few_step.adapted`); None
    where none act.
    `text_*` are for the text's queries and what they bring, `prompt_*` (b, 1, c) for the text
    itself; None before LTX-2.3.
    """

    attn_scale: Tensor
    attn_shift: Tensor
    attn_gate: Tensor
    ff_scale: Tensor
    ff_shift: Tensor
    ff_gate: Tensor
    query_scale: Tensor | None = None
    query_shift: Tensor | None = None
    key_scale: Tensor | None = None
    key_shift: Tensor | None = None
    cross_gate: Tensor | None = None
    factors: Tensor | None = None
    text_scale: Tensor | None = None
    text_shift: Tensor | None = None
    text_gate: Tensor | None = None
    prompt_scale: Tensor | None = None
    prompt_shift: Tensor | None = None


class LayerModulation(NamedTuple):
    """Both modalities in one layer; None for one that is not run."""

    video: ModalityModulation | None
    audio: ModalityModulation | None


class HeadModulation(NamedTuple):
    """(scale, shift, factors) of each modality's head; None for one that is not run."""

    video: tuple[Tensor, Tensor, Tensor | None] | None
    audio: tuple[Tensor, Tensor, Tensor | None] | None

    def latter(self) -> HeadModulation:
        """Of the second half of the batch."""
        return HeadModulation(
            *(tuple(x if x is None else x[len(x) // 2 :] for x in one) for one in self)
        )


class Modulation(Protocol):
    """The modulation of a whole pass."""

    def layer(self, index: int) -> LayerModulation:
        """Of one layer."""
        ...

    @property
    def head(self) -> HeadModulation:
        """Of both heads."""
        ...


@dataclass(frozen=True)
class TokenModulation:
    """Tokens of several noise levels: made for a layer when it is its turn, and not kept.

    `video_groups` / `audio_groups` (n,) name each token's group in the embedding; None = all are of
    group 0.
    """

    model: nn.Module
    embedding: TimestepEmbedding
    video_groups: Tensor | None = None
    audio_groups: Tensor | None = None

    def layer(self, index: int) -> LayerModulation:
        """Of one layer."""
        video, audio = self.embedding
        block = self.model.transformer_blocks[index]
        both = video is not None and audio is not None
        video_cross = block.scale_shift_table_a2v_ca_video if both else None
        audio_cross = block.scale_shift_table_a2v_ca_audio if both else None
        tables = block.scale_shift_table, block.audio_scale_shift_table
        prompts = None, None
        if self.model.config.cross_attention_adaln:
            prompts = block.prompt_scale_shift_table, block.audio_prompt_scale_shift_table
        return LayerModulation(
            None
            if video is None
            else _modality(tables[0], video_cross, prompts[0], video, self.video_groups, True),
            None
            if audio is None
            else _modality(tables[1], audio_cross, prompts[1], audio, self.audio_groups, False),
        )

    @property
    def head(self) -> HeadModulation:
        """Of both heads."""

        def one(
            table: Tensor, embedding: ModalityEmbedding | None, groups: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None] | None:
            if embedding is None:
                return None
            shift, scale = _spread(table, embedding.head[:, :, None], groups)
            return 1 + scale, shift, _factors(embedding, groups)

        return HeadModulation(
            one(self.model.scale_shift_table, self.embedding.video, self.video_groups),
            one(self.model.audio_scale_shift_table, self.embedding.audio, self.audio_groups),
        )


def _spread(table: Tensor, values: Tensor, groups: Tensor | None) -> tuple[Tensor, ...]:
    """A table (k, c) plus values (b, g, k, c), spread over tokens: k tensors (b, n or 1, c)."""
    vectors = table.to(values) + values
    if groups is not None:
        # A product with a one-hot matrix: the same vectors, but its backward is one product as
        # well, where that of an index is a slow scatter.
        chosen = F.one_hot(groups, vectors.shape[1]).to(vectors)
        return torch.einsum("ng,bgkc->kbnc", chosen, vectors).unbind(dim=0)
    return vectors.unbind(dim=2)


def _modality(
    own: Tensor,
    cross: Tensor | None,
    prompt: Tensor | None,
    embedding: ModalityEmbedding,
    groups: Tensor | None,
    is_video: bool,
) -> ModalityModulation:
    """From a modality's own table (6 or 9, c) and those that it may have: the cross-modal one
    (5, c), where both are run, and the text's (2, c)."""
    rows = _spread(own, embedding.own, groups)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = rows[:6]
    factors = _factors(embedding, groups)
    alone = ModalityModulation(
        1 + scale, shift, gate, 1 + ff_scale, ff_shift, ff_gate, factors=factors
    )
    if prompt is not None:
        text_shift, text_scale, text_gate = rows[6:]
        prompt_shift, prompt_scale = _spread(prompt, embedding.prompt, None)
        alone = alone._replace(
            text_scale=1 + text_scale,
            text_shift=text_shift,
            text_gate=text_gate,
            prompt_scale=1 + prompt_scale,
            prompt_shift=prompt_shift,
        )
    if cross is None:
        return alone
    a2v_scale, a2v_shift, v2a_scale, v2a_shift = _spread(cross[:4], embedding.cross, groups)
    (cross_gate,) = _spread(cross[4:], embedding.gate, groups)
    to_video, to_audio = (1 + a2v_scale, a2v_shift), (1 + v2a_scale, v2a_shift)
    query, key = (to_video, to_audio) if is_video else (to_audio, to_video)
    return ModalityModulation(*alone[:6], *query, *key, cross_gate, *alone[11:])


def _factors(embedding: ModalityEmbedding, groups: Tensor | None) -> Tensor | None:
    """The adapters' factors for each token (b, n or 1, 1 or 2)."""
    factors = embedding.factors
    return factors if factors is None or groups is None else factors[:, groups]


class SharedModulation(NamedTuple):
    """One noise level that all tokens of both modalities share.

    Attributes:
        flat: (b, all of it) one after the other; the rest are views of it.
        network: what it was made for, if that is not the stream's (`few_step.folded`).
    """

    flat: Tensor
    layers: tuple[LayerModulation, ...]
    head: HeadModulation
    network: nn.Module | None = None

    def layer(self, index: int) -> LayerModulation:
        """Of one layer."""
        return self.layers[index]

    def at(self, flat: Tensor) -> SharedModulation:
        """The same with the numbers of another flat tensor."""
        views = self if flat is self.flat else _views(flat, self.layers, self.head)
        return views._replace(network=self.network)


def shared_modulation(model: nn.Module, embedding: TimestepEmbedding) -> SharedModulation:
    """Every layer's modulation at an embedding of one group; both modalities must be in it."""
    apart = TokenModulation(model, embedding)
    layers = tuple(apart.layer(index) for index in range(len(model.transformer_blocks)))
    flat = torch.cat([vector[:, 0] for vector in _vectors(layers, apart.head)], dim=1)
    return _views(flat, layers, apart.head)


def beside(one: TimestepEmbedding, other: TimestepEmbedding) -> TimestepEmbedding:
    """The noise levels of one batch and of another, as those of a batch of both."""
    modalities = (
        ModalityEmbedding(
            *(a if a is None else torch.cat((a, b)) for a, b in zip(*pair, strict=True))
        )
        for pair in zip(one, other, strict=True)
    )
    return TimestepEmbedding(*modalities)


def _vectors(layers: tuple[LayerModulation, ...], head: HeadModulation) -> Iterator[Tensor]:
    for modalities in (*layers, head):
        for modality in modalities:
            yield from (vector for vector in modality if vector is not None)


def _views(
    flat: Tensor, layers: tuple[LayerModulation, ...], head: HeadModulation
) -> SharedModulation:
    """Vectors of the widths of these, cut from a flat tensor."""
    widths = [vector.shape[-1] for vector in _vectors(layers, head)]
    cuts = iter(flat[:, None].split(widths, dim=-1))

    def cut(vectors: tuple[Tensor | None, ...]) -> Iterator[Tensor | None]:
        return (None if vector is None else next(cuts) for vector in vectors)

    cut_layers = tuple(
        LayerModulation(*(ModalityModulation(*cut(modality)) for modality in layer))
        for layer in layers
    )
    cut_head = HeadModulation(*(tuple(cut(modality)) for modality in head))
    return SharedModulation(flat, cut_layers, cut_head)
