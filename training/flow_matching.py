"""The multi-step objective: flow matching of every block given the clean blocks before it.

b batch, r noisy copies, k blocks, c channels, f h w video latent grid, s audio latents.
x_sigma = (1 - sigma) x + sigma e, target e - x; one sigma per block, shared by both streams
(mutual_forcing.md, section 3.3 a).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.full_sequence import history_forward
from ..networks.layout import BlockLayout
from .system import System


class Batch(NamedTuple):
    """Latents of paired clips and their captions: video (b, c, f, h, w), audio (b, s, c), ids (b, m)."""

    video: Tensor
    audio: Tensor
    ids: Tensor

    def first(self, blocks: int, layout: BlockLayout) -> Batch:
        """The first blocks of every clip."""
        video = self.video[:, :, : layout.video_latents(blocks)]
        return self._replace(video=video, audio=self.audio[:, : layout.audio_latents(blocks)])


class Losses(NamedTuple):
    """Mean squared velocity errors."""

    video: Tensor
    audio: Tensor


def sample_sigma(
    shape: tuple[int, ...], mean: float, spread: float, generator: torch.Generator
) -> Tensor:
    """Logit-normal noise levels, float32."""
    return torch.sigmoid(mean + spread * torch.randn(shape, generator=generator))


def per_latent(levels: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Levels per block (b, k) spread over the latents of both streams: (b, f) and (b, s)."""
    blocks = levels.shape[1]
    index = torch.arange(blocks)

    def spread(first: int, following: int) -> Tensor:
        counts = torch.tensor([first] + [following] * (blocks - 1))
        return levels[:, index.repeat_interleave(counts)]

    return spread(layout.video_first, layout.video_next), spread(
        layout.audio_first, layout.audio_next
    )


def flow_matching(
    system: System,
    batch: Batch,
    generator: torch.Generator,
    *,
    coupled: bool,
    sigma_mean: float,
    sigma_spread: float,
    caption_dropout: float,
    history_noise: float,
) -> Losses:
    """Losses of both streams; `coupled=False` runs each alone (Mutual Forcing's first stage).

    Args:
        history_noise: the clean history gets noise of a level drawn from 0 to this, untold, so that small
            errors of the model's own history do not throw it off.
    """
    model = system.transformer
    layout = model.config.layout
    video, audio, ids = batch
    dtype = next(model.parameters()).dtype
    size = video.shape[0]
    blocks = layout.blocks(video.shape[2], audio.shape[1])

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    dropped = torch.rand(size, generator=generator) < caption_dropout
    text = system.text(torch.where(dropped[:, None], 0, ids))
    sigma = sample_sigma((size, blocks), sigma_mean, sigma_spread, generator)
    video_sigma, audio_sigma = per_latent(sigma, layout)
    video_sigma, audio_sigma = video_sigma[:, None, :, None, None], audio_sigma[:, :, None]
    video_noise, audio_noise = normal(video), normal(audio)
    noisy_video = ((1 - video_sigma) * video + video_sigma * video_noise)[:, None].to(dtype)
    noisy_audio = ((1 - audio_sigma) * audio + audio_sigma * audio_noise)[:, None].to(dtype)
    level = history_noise * torch.rand((size, 1, 1), generator=generator)
    past_video = (video + level[..., None, None] * normal(video)).to(dtype)
    past_audio = (audio + level * normal(audio)).to(dtype)
    levels = sigma[:, None]
    if coupled:
        video_out, audio_out = history_forward(
            model, (past_video, past_audio), (noisy_video, noisy_audio), levels, text
        )
    else:
        video_out, _ = history_forward(model, (past_video, None), (noisy_video, None), levels, text)
        _, audio_out = history_forward(model, (None, past_audio), (None, noisy_audio), levels, text)
    video_weight, audio_weight = block_weights(blocks, layout)
    video_error = (video_out[:, 0].float() - (video_noise - video)).square()
    audio_error = (audio_out[:, 0].float() - (audio_noise - audio)).square()
    return Losses(
        (video_error.mean(dim=(0, 1, 3, 4)) * video_weight).sum(),
        (audio_error.mean(dim=(0, 2)) * audio_weight).sum(),
    )


def block_weights(blocks: int, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Weights of the latents of both streams, (f,) and (s,), each with sum 1: every block counts the same.

    The prefix is a few per cent of a clip's latents, yet it alone decides what is seen, from the text alone;
    everything later can read that off the history. A mean over latents would hardly train the text.
    """

    def weights(span: Callable[[int], tuple[int, int]]) -> Tensor:
        sizes = torch.tensor([stop - start for start, stop in map(span, range(blocks))])
        return (1 / (sizes * blocks)).repeat_interleave(sizes)

    return weights(layout.video_span), weights(layout.audio_span)
