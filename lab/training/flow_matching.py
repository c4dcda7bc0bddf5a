"""The multi-step objective: flow matching of every block given the clean blocks before it.

b batch, k blocks.
Mutual Forcing's two first stages (docs/mutual_forcing.md, section 2): each modality alone, then
both together, on real histories. With the masks off the same loss makes the bidirectional teacher
of the rival method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .data import Batch
from .draws import Draws
from .pair import Pair, block_count, block_error, noised, velocity
from .system import Parts, without_some


def sample_sigma(blocks: int, mean: float, spread: float, draws: Draws) -> Tensor:
    """Logit-normal noise levels of every block, (b, k)."""
    return torch.sigmoid(mean + spread * draws.normal(blocks))


def flow_target(clean: Pair, noise: Pair) -> Pair:
    """The velocity e - x."""
    return Pair(*(e - x for e, x in zip(noise, clean, strict=True)))


def flow_matching(
    system: Parts,
    batch: Batch,
    draws: Draws,
    *,
    coupled: bool,
    sigma_mean: float,
    sigma_spread: float,
    caption_dropout: float,
    history_noise: float,
) -> Pair:
    """Losses of both modalities; `coupled=False` runs each alone (Mutual Forcing's first stage).

    Args:
        history_noise: the clean history gets noise of a level drawn from 0 to this, untold, so that
            small errors of the model's own history do not throw it off.
    """
    model = system.transformer
    layout = model.config.layout
    clean = Pair(batch.video, batch.audio)
    text = system.text(without_some(system, batch.ids, caption_dropout, draws))
    sigma = sample_sigma(block_count(clean, layout), sigma_mean, sigma_spread, draws)
    noise, untold = clean.noise(draws), clean.noise(draws)
    level = history_noise * draws.uniform(1, 1)
    past = Pair(
        clean.video + level[..., None, None] * untold.video, clean.audio + level * untold.audio
    )
    x = noised(clean, noise, sigma, layout)
    if coupled:
        out = velocity(model, past, x, sigma, text)
    else:
        video = velocity(model, past._replace(audio=None), x._replace(audio=None), sigma, text)
        audio = velocity(model, past._replace(video=None), x._replace(video=None), sigma, text)
        out = Pair(video.video, audio.audio)
    return block_error(out, flow_target(clean, noise), layout)


def whole_clip_matching(
    system: Parts,
    batch: Batch,
    draws: Draws,
    *,
    sigma_mean: float,
    sigma_spread: float,
    caption_dropout: float,
) -> Pair:
    """Losses with the masks off: one noise level for the clip, every block sees all."""
    model = system.transformer
    layout = model.config.layout
    clean = Pair(batch.video, batch.audio)
    text = system.text(without_some(system, batch.ids, caption_dropout, draws))
    blocks = block_count(clean, layout)
    sigma = sample_sigma(1, sigma_mean, sigma_spread, draws).expand(-1, blocks)
    noise = clean.noise(draws)
    out = velocity(model, None, noised(clean, noise, sigma, layout), sigma, text)
    return block_error(out, flow_target(clean, noise), layout)
