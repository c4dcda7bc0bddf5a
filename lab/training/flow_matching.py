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


def some_given(
    sigma: Tensor, share: float, mean: float, spread: float, draws: Draws
) -> tuple[Pair, Pair]:
    """Noise levels of each stream and weights of their losses, (b, k), drawn apart.

    In a `share` of the clips one stream, each as often, is given: clean, and nothing to be learned
    of it. In half as many more the levels are merely two. So a network learns to make either stream
    from the other.
    """
    kind, other = draws.uniform()[:, None], sample_sigma(sigma.shape[1], mean, spread, draws)
    video, audio = kind < share / 2, (kind >= share / 2) & (kind < share)
    apart = (kind >= share) & (kind < 1.5 * share)
    levels = Pair(
        torch.where(video, torch.zeros_like(sigma), sigma),
        torch.where(audio, torch.zeros_like(sigma), torch.where(apart, other, sigma)),
    )
    return levels, Pair(*((~one).float().expand_as(sigma) for one in (video, audio)))


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
    track_dropout: float = 0.0,
    given: float = 0.0,
) -> Pair:
    """Losses of both modalities; `coupled=False` runs each alone (Mutual Forcing's first stage).

    Args:
        given: share of the clips of which one stream is given (`some_given`).
        history_noise: the clean history gets noise of a level drawn from 0 to this, untold, so that
            small errors of the model's own history do not throw it off.
    """
    model = system.transformer
    layout = model.config.layout
    clean = Pair(batch.video, batch.audio)
    told = system.told(without_some(system, batch.asked, caption_dropout, draws, track_dropout))
    sigma, weights = sample_sigma(block_count(clean, layout), sigma_mean, sigma_spread, draws), None
    if given:
        sigma, weights = some_given(sigma, given, sigma_mean, sigma_spread, draws)
    noise, untold = clean.noise(draws), clean.noise(draws)
    level = history_noise * draws.uniform(1, 1)
    past = Pair(
        clean.video + level[..., None, None] * untold.video, clean.audio + level * untold.audio
    )
    x = noised(clean, noise, sigma, layout)
    if coupled:
        out = velocity(model, past, x, sigma, told)
    else:
        video = velocity(model, past._replace(audio=None), x._replace(audio=None), sigma, told)
        audio = velocity(model, past._replace(video=None), x._replace(video=None), sigma, told)
        out = Pair(video.video, audio.audio)
    return block_error(out, flow_target(clean, noise), layout, weights)


def whole_clip_matching(
    system: Parts,
    batch: Batch,
    draws: Draws,
    *,
    sigma_mean: float,
    sigma_spread: float,
    caption_dropout: float,
    track_dropout: float = 0.0,
) -> Pair:
    """Losses with the masks off: one noise level for the clip, every block sees all."""
    model = system.transformer
    layout = model.config.layout
    clean = Pair(batch.video, batch.audio)
    told = system.told(without_some(system, batch.asked, caption_dropout, draws, track_dropout))
    blocks = block_count(clean, layout)
    sigma = sample_sigma(1, sigma_mean, sigma_spread, draws).expand(-1, blocks)
    noise = clean.noise(draws)
    out = velocity(model, None, noised(clean, noise, sigma, layout), sigma, told)
    return block_error(out, flow_target(clean, noise), layout)
