"""Noise level and mode as embeddings (AdaLN-single), to which each layer adds its tables.

b batch, g groups of tokens that share one sigma, k vectors of one embedder, c channels.
Six embedders feed the two modalities and the cross-modal attentions (docs/omniforcing.md,
section 1). Mutual Forcing's mode enters here: the step size d (0 = multi-step mode, > 0 =
few-step mode) has an embedding whose last layer starts at zero, added in every one of the six
(docs/mutual_forcing.md, section 3.2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import TransformerConfig
from .few_step import adapted, gate_of

SINUSOID_DIM = 256
GUIDANCE = 3.0
"""Of few-step mode, where nobody says another."""


def sinusoid(t: Tensor) -> Tensor:
    """Features [cos, sin] of times (...,), (..., 256) float32."""
    half = SINUSOID_DIM // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear."""

    def __init__(self, dim: int, operations: object, dtype: object, device: object) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(SINUSOID_DIM, dim, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(dim, dim, dtype=dtype, device=device)


class AdaLNSingle(nn.Module):
    """One embedder: a time gives `count` vectors of width `dim`."""

    def __init__(
        self,
        dim: int,
        count: int,
        step_size: bool,
        operations: object,
        dtype: object,
        device: object,
    ) -> None:
        super().__init__()
        self.emb = nn.Module()
        self.emb.timestep_embedder = TimestepEmbedder(dim, operations, dtype, device)
        if step_size:
            self.emb.step_size_embedder = TimestepEmbedder(dim, operations, dtype, device)
        self.linear = operations.Linear(dim, count * dim, dtype=dtype, device=device)


def adaln(
    module: nn.Module,
    time: Tensor,
    step: Tensor | None,
    count: int,
    dtype: torch.dtype,
    few_step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectors (b, g, count, c) of times (b, g) and step sizes (b, g) or None, and the embedding
    (b, g, c) behind them."""

    def embed(embedder: nn.Module, t: Tensor) -> Tensor:
        return embedder.linear_2(F.silu(embedder.linear_1(sinusoid(t).to(dtype))))

    embedded = embed(module.emb.timestep_embedder, time)
    if step is not None and hasattr(module.emb, "step_size_embedder"):
        told = embed(module.emb.step_size_embedder, step)
        if few_step is not None:
            # With adapters the modes share nothing that few-step mode's training moves.
            told = told * (step > 0)[..., None]
        embedded = embedded + told
    vectors = adapted(module.linear, F.silu(embedded), few_step)
    return rearrange(vectors, "b g (k c) -> b g k c", k=count), embedded


class ModalityEmbedding(NamedTuple):
    """One modality's noise level as every layer and the head get it."""

    # (b, g, 6 or 9, c): shift, scale, gate of attention, of the feed-forward, of the text's queries
    own: Tensor
    cross: Tensor  # (b, g, 4, c): scale, shift of A2V, then of V2A
    gate: Tensor  # (b, g, 1, c): gate of what the other modality adds to this one
    head: Tensor  # (b, g, c): for the output head
    factors: Tensor | None  # (b, g, 1 or 2): factors of the adapters; None where none act
    prompt: Tensor | None = None  # (b, 1, 2, c): shift, scale of the text; None: it has none


class TimestepEmbedding(NamedTuple):
    """Both modalities' noise levels; None for one that is not run."""

    video: ModalityEmbedding | None
    audio: ModalityEmbedding | None


def seeing(embedding: ModalityEmbedding, shown: Tensor | None = None) -> ModalityEmbedding:
    """A sound's embedding for pictures that are given: their adapters act as well, in all of its
    groups or in those that are `shown` (g) them."""
    ones = torch.ones_like(embedding.own[:, :, 0, :1])
    few_step = 0 * ones if embedding.factors is None else embedding.factors
    pictures = ones if shown is None else ones * shown[:, None]
    return embedding._replace(factors=torch.cat((few_step, pictures), dim=-1))


def timestep_embedding(
    model: nn.Module,
    video_sigma: Tensor | None,
    audio_sigma: Tensor | None,
    step_size: Tensor | None,
    dtype: torch.dtype,
    guidance: float | Tensor = GUIDANCE,
) -> TimestepEmbedding:
    """Embeddings of noise levels (b, g) per modality.

    Step sizes (b, g) are in units of sigma; None is d = 0, multi-step mode. Each gate of the
    cross-modal attentions is fed by the sigma of the modality that it adds to. Few-step mode's
    adapters, where there are any, are told its guidance, one for all or (b, 1).

    Raises:
        ValueError: several noise levels of one modality, for a network that modulates the text
            with it: a pass reads the text once.
    """
    config: TransformerConfig = model.config
    scale = config.timestep_scale_multiplier
    gate_scale = scale * config.av_ca_timestep_scale_multiplier / 1000.0
    rows = config.table_rows
    tells = config.cross_attention_adaln

    def embed(
        sigma: Tensor, own: nn.Module, cross: nn.Module, gate: nn.Module, prompt: nn.Module | None
    ) -> ModalityEmbedding:
        step = None
        # With adapters multi-step mode has no step size at all.
        if config.step_size_embedding and not (config.few_step_rank and step_size is None):
            step = torch.zeros_like(sigma) if step_size is None else step_size.expand_as(sigma)
            step = step * scale
        few_step = None
        if config.few_step_rank and step is not None:
            few_step = ((step > 0) * gate_of(guidance))[..., None].to(dtype)
        for_layers, for_head = adaln(own, sigma * scale, step, rows, dtype, few_step)
        for_cross, _ = adaln(cross, sigma * scale, step, 4, dtype, few_step)
        for_gate, _ = adaln(gate, sigma * gate_scale, step, 1, dtype, few_step)
        for_text = None
        if prompt is not None:
            if sigma.shape[1] != 1:
                raise ValueError(
                    f"found {sigma.shape[1]} noise levels in one pass, expected one for all "
                    "tokens: this network modulates the text's keys with it"
                )
            for_text, _ = adaln(prompt, sigma * scale, None, 2, dtype)
        return ModalityEmbedding(for_layers, for_cross, for_gate, for_head, few_step, for_text)

    return TimestepEmbedding(
        None
        if video_sigma is None
        else embed(
            video_sigma,
            model.adaln_single,
            model.av_ca_video_scale_shift_adaln_single,
            model.av_ca_a2v_gate_adaln_single,
            model.prompt_adaln_single if tells else None,
        ),
        None
        if audio_sigma is None
        else embed(
            audio_sigma,
            model.audio_adaln_single,
            model.av_ca_audio_scale_shift_adaln_single,
            model.av_ca_v2a_gate_adaln_single,
            model.audio_prompt_adaln_single if tells else None,
        ),
    )
