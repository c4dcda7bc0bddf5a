"""Causal ODE regression: a network under block-causal masks learns the flow of one without any.

Source: OmniForcing (arXiv 2603.11647), section 3.3, equation 6; docs/omniforcing.md, section 6.

b batch, k blocks.
Stage II. The teacher is the bidirectional few-step student of stage I; its own path from noise over
the few-step grid is the ODE's trajectory. The causal network has the same velocity to find at a
state of it, from that block and the past alone. What the past looks like the paper leaves open
(the released code draws every block's state apart): here it is the trajectory's end, noise-free as
the cache of a stream holds it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...samplers.sigmas import few_step_sigmas
from ...samplers.steps import euler
from .data import Asked
from .draws import Draws
from .mutual_forcing import MutualRecipe
from .pair import Pair, block_count, block_error, blockwise, velocity
from .system import Parts


@torch.no_grad()
def trajectory(
    teacher: Parts, noise: Pair, asked: Asked, sigmas: tuple[float, ...]
) -> tuple[list[Pair], list[Pair], Pair]:
    """The states at every level of a grid but the last, the velocities there, and the end."""
    layout, told = teacher.transformer.config.layout, teacher.told(asked)
    shape = len(noise.video), block_count(noise, layout)
    x, states, slopes = noise, [], []
    for now, then in pairwise(sigmas):
        sigma = torch.full(shape, now, device=noise.video.device)
        v = velocity(teacher.transformer, None, x, sigma, told, torch.full_like(sigma, now - then))
        states.append(x)
        slopes.append(v)
        x = Pair(*(euler(a, b, now, then) for a, b in zip(x, v, strict=True)))
    return states, slopes, x


def ode_loss(
    system: Parts,
    teacher: Parts,
    like_clip: Pair,
    asked: Asked,
    recipe: MutualRecipe,
    draws: Draws,
) -> Tensor:
    """Equation 6 over clips like `like_clip`: every block at a level of the grid of its own."""
    layout = system.transformer.config.layout
    steps = recipe.steps[draws.choice(len(recipe.steps))]
    sigmas = few_step_sigmas(steps)
    index = draws.integers(steps, block_count(like_clip, layout))
    noise = like_clip.noise(draws)
    states, slopes, end = teacher(trajectory, teacher, noise, asked, sigmas)

    places = [blockwise((index == step).float(), layout) for step in range(steps)]

    def chosen(steps: list[Pair]) -> Pair:
        return Pair(
            *(
                sum(value * here for value, here in zip(*stream, strict=True))
                for stream in zip(zip(*steps, strict=True), zip(*places, strict=True), strict=True)
            )
        )

    grid = torch.tensor(sigmas, device=index.device)
    start, following = grid[index], grid[index + 1]
    told = system.told(asked)
    out = velocity(system.transformer, end, chosen(states), start, told, start - following)
    return recipe.weighted(block_error(out, chosen(slopes), layout))
