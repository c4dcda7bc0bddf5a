"""The rival: DMD on whole rollouts with a bidirectional teacher.

Source: Self-Forcing, arXiv 2506.08009; docs/omniforcing.md, section 6.

b batch, k blocks.
The network rolls out from noise, block after block through its own cache, and every block carries
the gradient of one and the same random step, at which the rollout leaves the denoising. Two
networks without masks judge the whole clip: the frozen teacher (real score) and an online copy of
it (fake score).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.kv_cache import OpenBlock, RollingCache
from ...samplers.rollout import SigmaConstants
from ...samplers.sigmas import few_step_sigmas
from ...samplers.steps import predicted_clean, renoise
from .data import Asked
from .distillation import guided_teacher, matching_loss
from .draws import Draws
from .mutual_forcing import MutualRecipe, draw_level
from .pair import Pair, block_count, by_block, clean_prediction, joined, noised, velocity
from .system import Parts


def exit_rollout(
    system: Parts, like_clip: Pair, asked: Asked, recipe: MutualRecipe, draws: Draws
) -> Pair:
    """A clip like `like_clip`, rolled out to a random exit step that all blocks share.

    Between steps the clean block is predicted and noised afresh (the `renoise` sampler). Gradient,
    where it is on, goes through the exit step of each block and not into its history.
    """
    model = system.transformer
    steps = recipe.steps[draws.choice(len(recipe.steps))]
    last = draws.choice(steps)
    sigmas = few_step_sigmas(steps)
    like = next(model.parameters()).new_empty(0)
    told = system.told(asked)
    # Modulations with a gradient must not be mixed up with those without.
    leaving = SigmaConstants(model, like).at(sigmas[last], sigmas[last] - sigmas[last + 1])
    constants = SigmaConstants(model, like)
    cache, made = RollingCache(recipe.window), []
    blocks = by_block(like_clip, model.config.layout)
    for index, block in enumerate(blocks):
        opened = OpenBlock(model, cache, *block.video.shape[3:], like)
        keys, track = told.block(index), told.block_track(index, model.config.layout)
        x = block.noise(draws)
        with torch.no_grad():
            for step in range(last):
                sigma, following = sigmas[step], sigmas[step + 1]
                now = constants.at(sigma, sigma - following)
                v = opened.velocity(x.video.to(like), x.audio.to(like), keys, now, track=track)
                fresh = block.noise(draws)
                x = Pair(
                    *(
                        renoise(a, b.float(), sigma, following, e)
                        for a, b, e in zip(x, v, fresh, strict=True)
                    )
                )
        v = opened.velocity(x.video.to(like), x.audio.to(like), keys, leaving, track=track)
        clean = Pair(
            *(predicted_clean(a, b.float(), sigmas[last]) for a, b in zip(x, v, strict=True))
        )
        made.append(clean)
        if index + 1 < len(blocks):
            with torch.no_grad():
                done = clean.map(lambda value: value.detach().to(like))
                cache = opened.commit(*done, told.block(index + 1), constants.at(0.0), track)
    return joined(made)


def rollout_matching(
    system: Parts,
    teacher: Parts,
    fake: Parts,
    like_clip: Pair,
    asked: Asked,
    recipe: MutualRecipe,
    draws: Draws,
) -> Tensor:
    """DMD loss of a rollout: one noise level for the whole clip, both scores without masks."""
    layout = system.transformer.config.layout
    sample = exit_rollout(system, like_clip, asked, recipe, draws)
    level = draw_level(1, recipe, draws).expand(-1, block_count(sample, layout))
    x = noised(sample.map(Tensor.detach), sample.noise(draws), level, layout)
    real = teacher(lambda: guided_teacher(teacher, asked, recipe.guidance).velocity(None, x, level))
    with torch.no_grad():
        false = fake(lambda: velocity(fake.transformer, None, x, level, fake.told(asked)))
    return sum(
        matching_loss(
            sample,
            clean_prediction(x, real, level, layout),
            clean_prediction(x, false, level, layout),
            None,
        )
    )
