"""The plainest correct rollout: the whole sequence under masks at every step, nothing remembered.

b batch, c channels, f h w video latent grid, s audio latents.
Text keys, modulation, tables and the past are all made again in every step, and every token of the
past runs through every layer. It is what the cached rollout must equal, and what it is compared
with.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ...networks.full_sequence import causal_forward
from ...samplers.noise import noise_of
from ...samplers.rollout import SamplerSettings
from ...samplers.state import BlockLatents
from ...samplers.steps import euler
from .setups import Setup


def check(setup: Setup, blocks: int) -> None:
    """Refuse what the plain rollout would compute differently.

    Raises:
        ValueError: a block would leave the window, which a whole sequence has not, or a network
            with a memory.
    """
    if setup.config.memory_interval:
        raise ValueError(
            f"{setup.name} is told of the stream, which a whole sequence is not: leave --plain out"
        )
    if blocks > setup.window + 2:
        raise ValueError(
            f"{blocks} blocks with a window of {setup.window}: the plain rollout sees all of the "
            f"past, so it is compared while that fits; ask for --window {blocks - 2} or more"
        )


@torch.no_grad()
def plain_block(
    setup: Setup,
    model: nn.Module,
    like: Tensor,
    past: tuple[BlockLatents, ...],
    sampler: SamplerSettings,
    seed: int = 0,
) -> BlockLatents:
    """The block after `past`, in multi-step mode without guidance, by Euler steps."""
    layout, index = setup.config.layout, len(past)
    (v0, v1), (a0, a1) = layout.video_span(index), layout.audio_span(index)
    noise = noise_of((seed,))
    shape = 1, setup.config.in_channels, v1 - v0, setup.height, setup.width
    video = noise(index, 0, "video", shape).to(like.device)
    audio = noise(index, 0, "audio", (1, a1 - a0, setup.config.audio_in_channels)).to(like.device)
    for sigma, following in pairwise(sampler.sigmas):
        whole = [
            torch.cat((*(block[modality].to(like.device) for block in past), current), dim=dim)
            for modality, current, dim in ((0, video, 2), (1, audio, 1))
        ]
        levels = [torch.zeros(1, n, device=like.device) for n in (v1, a1)]
        levels[0][:, v0:], levels[1][:, a0:] = sigma, sigma
        velocities = causal_forward(
            model,
            *(x.to(like.dtype) for x in whole),
            *levels,
            setup.text(model, like),
        )
        video = euler(video, velocities[0][:, :, v0:].float(), sigma, following)
        audio = euler(audio, velocities[1][:, a0:].float(), sigma, following)
    return BlockLatents(video.cpu(), audio.cpu())
