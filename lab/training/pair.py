"""Both modalities of a batch of clips, block by block, and the network's velocity of them.

b batch, k blocks, c channels, f h w video latent grid, s audio latents.
x_sigma = (1 - sigma) x + sigma e; the velocity is e - x; one sigma per block, shared by both
streams (docs/mutual_forcing.md, section 3.3 a).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...networks.full_sequence import Told, causal_forward, history_forward
from ...networks.layout import BlockLayout
from ...samplers.steps import add_noise, predicted_clean
from .draws import Draws


class Pair(NamedTuple):
    """Both modalities: video (b, c, f, h, w) and audio (b, s, c); None for one that is not run."""

    video: Tensor | None
    audio: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """The same function on both."""
        return Pair(*(None if value is None else function(value) for value in self))

    def noise(self, draws: Draws) -> Pair:
        """Standard normal noise shaped like both modalities."""
        return self.map(lambda value: draws.normal(*value.shape[1:]))


def block_count(clip: Pair, layout: BlockLayout) -> int:
    """How many blocks both modalities have."""
    return layout.blocks(clip.video.shape[2], clip.audio.shape[1])


def by_block(clip: Pair, layout: BlockLayout) -> list[Pair]:
    """The blocks of a clip in order."""
    blocks = range(block_count(clip, layout))

    def sizes(span: Callable[[int], tuple[int, int]]) -> list[int]:
        return [stop - start for start, stop in map(span, blocks)]

    video = clip.video.split(sizes(layout.video_span), dim=2)
    audio = clip.audio.split(sizes(layout.audio_span), dim=1)
    return [Pair(*block) for block in zip(video, audio, strict=True)]


def joined(blocks: list[Pair]) -> Pair:
    """Blocks in a row as one clip."""
    return Pair(
        torch.cat([block.video for block in blocks], dim=2),
        torch.cat([block.audio for block in blocks], dim=1),
    )


def per_latent(levels: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Levels per block (b, k) spread over the latents of both modalities: (b, f) and (b, s)."""
    following = levels.shape[1] - 1

    def spread(first: int, then: int) -> Tensor:
        later = levels[:, 1:, None].expand(-1, following, then).flatten(1)
        return torch.cat((levels[:, :1].expand(-1, first), later), dim=1)

    return (
        spread(layout.video_first, layout.video_next),
        spread(layout.audio_first, layout.audio_next),
    )


def blockwise(levels: Tensor | Pair, layout: BlockLayout) -> Pair:
    """Values per block (b, k), or those of each stream, in shapes that multiply the latents."""
    video, audio = levels if isinstance(levels, Pair) else (levels, levels)
    video, audio = per_latent(video, layout)[0], per_latent(audio, layout)[1]
    return Pair(video[:, None, :, None, None], audio[:, :, None])


def noised(clean: Pair, noise: Pair, sigma: Tensor | Pair, layout: BlockLayout) -> Pair:
    """(1 - sigma) x + sigma e with one sigma per block, (b, k), or one for each stream."""
    levels = blockwise(sigma, layout)
    return Pair(*map(add_noise, clean, noise, levels))


def clean_prediction(x: Pair, v: Pair, sigma: Tensor, layout: BlockLayout) -> Pair:
    """x0 = x - sigma v."""
    levels = blockwise(sigma, layout)
    return Pair(*map(predicted_clean, x, v, levels))


def velocity(
    model: nn.Module,
    history: Pair | None,
    x: Pair,
    sigma: Tensor | Pair,
    told: Told,
    step_size: Tensor | None = None,
) -> Pair:
    """Velocity of every block, float32.

    Args:
        history: what each block sees of the blocks before it; None takes all masks off, and every
            block sees every other as it is in `x` (a bidirectional network, with one sigma and one
            step size for the whole clip).
        sigma: (b, k), or those of each stream; step_size: (b, k).
    """
    dtype = next(model.parameters()).dtype
    low = x.map(lambda value: value.to(dtype))
    if history is None:
        level, d = sigma[:, :1], None if step_size is None else step_size[:, :1]
        out = causal_forward(model, *low, level, level, told, step_size=d, causal=False)
        return Pair(*out).map(Tensor.float)

    def copy(levels: Tensor) -> Tensor:
        return levels[:, None]

    out = history_forward(
        model,
        history.map(lambda value: value.to(dtype)),
        low.map(lambda value: value[:, None]),
        sigma.map(copy) if isinstance(sigma, Pair) else copy(sigma),
        told,
        step_size=None if step_size is None else step_size[:, None],
    )
    return Pair(*out).map(lambda value: value[:, 0].float())


def block_error(
    found: Pair, target: Pair, layout: BlockLayout, weights: Pair | None = None
) -> Pair:
    """Mean squared error of each modality, every block counting the same, or by `weights` (b, k).

    The prefix is a few per cent of a clip's latents, yet it alone decides what is seen, from the
    text alone; everything later can read that off the history. A mean over latents would hardly
    train the text.
    """
    difference = Pair(*(a - b for a, b in zip(found, target, strict=True)))
    blocks = by_block(difference, layout)
    errors = [block.map(lambda d: d.square().flatten(1).mean(dim=1)) for block in blocks]
    both = Pair(*(torch.stack(modality, dim=1) for modality in zip(*errors, strict=True)))
    if weights is None:
        return both.map(Tensor.mean)
    return Pair(
        *((w * e).sum() / w.sum().clamp(min=1e-6) for w, e in zip(weights, both, strict=True))
    )
