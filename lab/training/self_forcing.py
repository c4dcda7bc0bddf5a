"""DMD on clips that few-step mode samples as it will: OmniForcing's stages I and III.

Source: OmniForcing (arXiv 2603.11647), section 3.3 and equation 9; Self-Forcing (arXiv 2506.08009);
docs/omniforcing.md, section 6.

b batch, k blocks.
In stage III the network rolls out from noise, block after block through its own cache, and every
block carries the gradient of one and the same random step, at which the rollout leaves the
denoising. In stage I it has no masks and denoises the whole clip at once, up to such a step
(backward simulation). In both, two networks without masks judge the clip: the frozen teacher (real
score) and an online copy of it (fake score).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...networks.kv_cache import OpenBlock, RollingCache
from ...networks.layer import Text
from ...samplers.rollout import SigmaConstants
from ...samplers.sigmas import few_step_sigmas
from ...samplers.steps import predicted_clean, renoise
from .data import Asked
from .distillation import guided_teacher, matching_loss
from .draws import Draws
from .history import rolled_places
from .mutual_forcing import Matched, MutualRecipe, draw_level
from .pair import Pair, block_count, by_block, clean_prediction, joined, noised, velocity
from .system import Parts

Rollout = Callable[[Parts, Pair, Asked, MutualRecipe, Draws], Pair]


def draw_exit(recipe: MutualRecipe, draws: Draws) -> tuple[Sequence[float], int]:
    """A few-step grid of the recipe, and the step of it at which a rollout leaves."""
    steps = recipe.steps[draws.choice(len(recipe.steps))]
    return few_step_sigmas(steps), draws.choice(steps)


def left(
    velocity: Callable[[Pair, int], Pair],
    x: Pair,
    sigmas: Sequence[float],
    last: int,
    draws: Draws,
) -> Pair:
    """What is predicted clean at step `last`, where alone there may be a gradient.

    Between steps the clean sample is predicted and noised afresh (the `renoise` sampler).

    Args:
        velocity: of a state at a step of the grid, float32.
    """
    with torch.no_grad():
        for step in range(last):
            sigma, following = sigmas[step], sigmas[step + 1]
            v = velocity(x, step)
            x = Pair(
                *(
                    renoise(a, b, sigma, following, e)
                    for a, b, e in zip(x, v, x.noise(draws), strict=True)
                )
            )
    v = velocity(x, last)
    return Pair(*(predicted_clean(a, b, sigmas[last]) for a, b in zip(x, v, strict=True)))


def whole_rollout(
    system: Parts, like_clip: Pair, asked: Asked, recipe: MutualRecipe, draws: Draws
) -> Pair:
    """A clip like `like_clip`, denoised as one without masks to a random exit step."""
    sigmas, last = draw_exit(recipe, draws)
    told = system.told(asked)
    noise = like_clip.noise(draws)
    shape = len(noise.video), block_count(noise, system.transformer.config.layout)

    def at(x: Pair, step: int) -> Pair:
        sigma = torch.full(shape, sigmas[step], device=noise.video.device)
        d = torch.full_like(sigma, sigmas[step] - sigmas[step + 1])
        return velocity(system.transformer, None, x, sigma, told, d)

    return left(at, noise, sigmas, last, draws)


def exit_rollout(
    system: Parts, like_clip: Pair, asked: Asked, recipe: MutualRecipe, draws: Draws
) -> Pair:
    """A clip like `like_clip`, rolled out to a random exit step that all blocks share.

    Gradient, where it is on, goes through the exit step of each block and not into its history.
    Where the recipe rolls out further (`HistoryMix.further`), the blocks after the prefix fall out,
    as they do from the cache of a long stream, and carry none.
    """
    model = system.transformer
    sigmas, last = draw_exit(recipe, draws)
    further = recipe.history.further
    further = draws.choice(further + 1) if further else 0
    like = next(model.parameters()).new_empty(0)
    told = system.told(asked)
    # Modulations with a gradient must not be mixed up with those without.
    leaving = SigmaConstants(model, like).at(sigmas[last], sigmas[last] - sigmas[last + 1])
    constants = SigmaConstants(model, like)
    cache, made = RollingCache(recipe.window), []
    blocks = by_block(like_clip, model.config.layout)
    places = rolled_places(len(blocks), further)
    dropped = len(places) - len(blocks)

    def at(opened: OpenBlock, keys: Text, track: Tensor | None, x: Pair, step: int) -> Pair:
        sigma, following = sigmas[step : step + 2]
        now = leaving if step == last else constants.at(sigma, sigma - following)
        v = opened.velocity(x.video.to(like), x.audio.to(like), keys, now, track=track)
        return Pair(*v).map(Tensor.float)

    for index, place in enumerate(places):
        block = blocks[place]
        opened = OpenBlock(model, cache, *block.video.shape[3:], like)
        keys, track = told.block(place), told.block_track(place, model.config.layout)
        seen = not 0 < index <= dropped
        with torch.set_grad_enabled(seen and torch.is_grad_enabled()):
            here = partial(at, opened, keys, track)
            clean = left(here, block.noise(draws), sigmas, last, draws)
        if seen:
            made.append(clean)
        if index + 1 < len(places):
            with torch.no_grad():
                done = clean.map(lambda value: value.detach().to(like))
                following = told.block(places[index + 1])
                cache = opened.commit(*done, following, constants.at(0.0), track)
    return joined(made)


def rollout_matching(
    system: Parts,
    teacher: Parts,
    fake: Parts,
    like_clip: Pair,
    asked: Asked,
    recipe: MutualRecipe,
    draws: Draws,
    rollout: Rollout = exit_rollout,
) -> Matched:
    """DMD loss of a rollout: one noise level for the whole clip, both scores without masks."""
    layout = system.transformer.config.layout
    sample = rollout(system, like_clip, asked, recipe, draws)
    level = draw_level(1, recipe, draws).expand(-1, block_count(sample, layout))
    made = sample.map(Tensor.detach)
    x = noised(made, sample.noise(draws), level, layout)
    real = teacher(lambda: guided_teacher(teacher, asked, recipe.guidance).velocity(None, x, level))
    with torch.no_grad():
        false = fake(lambda: velocity(fake.transformer, None, x, level, fake.told(asked)))
    loss = matching_loss(
        sample,
        clean_prediction(x, real, level, layout),
        clean_prediction(x, false, level, layout),
        None,
    )
    return Matched(recipe.weighted(loss), made)
