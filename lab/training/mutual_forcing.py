"""Mutual Forcing: both modes of one network in one training step.

b batch, k blocks. Source: docs/mutual_forcing.md, section 3.5 (arXiv 2604.25819).
Few-step mode makes the history (no gradient). Given it, multi-step mode learns the flow of the real
block (after a full rollout, from which that block would not follow, given the real history). On a
part of the clips few-step mode learns from multi-step mode: the displacement over an interval
(ShortCut) and, every few steps, the difference of two scores on its own samples (DMD). The teacher
is the network's own averaged weights in multi-step mode; there is no bidirectional model anywhere.
A network with few-step adapters (networks/few_step.py) learns few-step mode in them alone: its
teacher is itself with the adapters at rest, and its fake score has adapters of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...networks.full_sequence import Told
from .data import Asked, Batch
from .distillation import (
    draw_interval,
    few_step_sample,
    guided_teacher,
    matching_loss,
    shortcut_target,
)
from .draws import Draws
from .flow_matching import flow_target, sample_sigma
from .history import History, HistoryMix, few_step_history, real_memory
from .pair import Pair, block_count, block_error, clean_prediction, noised, velocity
from .system import Parts, without_some


@dataclass(frozen=True)
class MutualRecipe:
    """What one step is made of; a weight of 0 switches ShortCut or DMD off.

    Attributes:
        teacher: "self" is Mutual Forcing and everything that shares its step. "bidirectional" is
            the rival (lab.training.self_forcing), which has no shortcut, no history and no real
            data.
        flow, shortcut, matching: weights of flow matching, of ShortCut and of DMD.
        taught_every: few-step mode learns on every so many-th clip of a batch. Its targets hold no
            noise of their own as flow's do, so it needs fewer clips; with as many it outweighs
            multi-step mode, its teacher.
        matching_every: steps from one DMD update of the generator to the next.
        fake_updates: updates of the online fake score for each of them, on the sample that it was
            made with.
        fake_warmup: steps before the first of them; the fake score alone learns until then.
        weighting: ShortCut's error over an interval counts by the interval's length to this power.
            0: as an error of velocities, so that the many short steps at high noise count most;
            2: as one of displacements.
        steps: few-step grids that are trained, drawn at random.
        curriculum: share of the budget over which these join one after another, in their order.
        teacher_steps: Euler steps of the teacher over all noise levels, divided among the intervals
            of a grid.
        guidance: of video and audio, folded into few-step mode. A network with few-step adapters
            has one knob for both, which the adapters are told as video's.
        unguided: share of its clips on which ShortCut teaches guidance 1, where the adapters rest
            and the step size alone learns.
        backbone: whether, beside few-step adapters, all other weights learn meanwhile, from flow
            alone: ShortCut and DMD reach the adapters only.
        matching_range: noise levels at which the two scores are compared.
        modalities: weights of video's and audio's losses in the rival's stages, its lambdas.
    """

    teacher: Literal["self", "bidirectional"] = "self"
    flow: float = 1.0
    shortcut: float = 1.0
    matching: float = 0.5
    taught_every: int = 1
    matching_every: int = 4
    fake_updates: int = 4
    fake_warmup: int = 16
    weighting: float = 0.0
    steps: tuple[int, ...] = (4, 8)
    curriculum: float = 0.0
    teacher_steps: int = 16
    guidance: tuple[float, float] = (3.0, 3.0)
    unguided: float = 0.5
    backbone: bool = False
    matching_range: tuple[float, float] = (0.02, 0.98)
    history: HistoryMix = field(default_factory=HistoryMix)
    window: int = 3
    sigma_mean: float = 0.3
    sigma_spread: float = 1.2
    caption_dropout: float = 0.1
    track_dropout: float = 0.0
    modalities: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.teacher == "self":  # the rival has no histories
            self.history.check_levels(self.steps)

    def weighted(self, losses: Pair) -> Tensor:
        """The sum of both modalities' losses, each by its weight."""
        return sum(weight * loss for weight, loss in zip(self.modalities, losses, strict=True))

    def grids(self, progress: float) -> tuple[int, ...]:
        """The grids that are trained at this point of the budget, 0 to 1."""
        if not self.curriculum:
            return self.steps
        return self.steps[: 1 + int(progress / self.curriculum * len(self.steps))]

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> MutualRecipe:
        """Build from JSON; lists become tuples and `history` a mix.

        Raises:
            TypeError: an entry that the recipe does not know.
        """
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if isinstance(kept.get("history"), dict):
            mix = kept["history"].items()
            kept["history"] = HistoryMix(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in mix}
            )
        return cls(**kept)


class Shown(NamedTuple):
    """What multi-step mode learns from: real blocks, and the history that each follows."""

    clean: Pair
    history: Pair
    asked: Asked


class Taught(NamedTuple):
    """The clips of a batch on which few-step mode learns from multi-step mode.

    Attributes:
        clip: what its noisy states are made of: the real one, or after a full rollout that rollout
            itself.
        history: what it sees of the blocks before.
        steps: the grid.
        draws: for these clips alone.
    """

    clip: Pair
    history: Pair
    asked: Asked
    steps: int
    draws: Draws


def at_guidance(system: Parts, asked: Asked, recipe: MutualRecipe) -> Told:
    """What few-step mode is told of a batch, with the guidance that it is trained for."""
    return system.told(asked)._replace(guidance=recipe.guidance[0])


def fake_velocity(fake: Parts, history: Pair | None, x: Pair, level: Tensor, asked: Asked) -> Pair:
    """The fake score's velocity at noise levels (b, k); where it is adapters, with them in full."""
    step = level if fake.transformer.config.few_step_rank else None
    return velocity(fake.transformer, history, x, level, fake.told(asked), step)


@torch.no_grad()
def prepare(
    system: Parts, batch: Batch, recipe: MutualRecipe, progress: float, draws: Draws
) -> tuple[Shown, Taught]:
    """Draw a grid and a kind of history, and let few-step mode make it.

    After a full rollout another block would follow, in another place of its motion: for multi-step
    mode to learn the real one would be to learn not to look at the history. There its history is
    the real one.
    """
    asked = without_some(system, batch.asked, recipe.caption_dropout, draws, recipe.track_dropout)
    grids = recipe.grids(progress)
    steps = grids[draws.choice(len(grids))]
    clean = Pair(batch.video, batch.audio)
    start = recipe.history.start_step(steps, progress, draws)
    further = recipe.history.further_blocks(start, draws)
    rows, some = draws.every(recipe.taught_every)

    def history(clip: Pair, asked: Asked, draws: Draws) -> History:
        return few_step_history(
            system.transformer,
            at_guidance(system, asked, recipe),
            clip,
            steps=steps,
            start_step=start,
            window=recipe.window,
            draws=draws,
            further=further,
        )

    def chosen(pair: Pair) -> Pair:
        return pair.map(lambda value: value[rows])

    if start:
        made, memory = history(clean, asked, draws)
        asked = asked._replace(memory=memory)
        return Shown(clean, made, asked), Taught(
            chosen(clean), chosen(made), asked.rows(rows), steps, some
        )
    rolled, memory = history(chosen(clean), asked.rows(rows), some)
    shown = asked._replace(memory=real_memory(clean, system.transformer.config))
    asked = asked.rows(rows)._replace(memory=memory)
    return Shown(clean, clean, shown), Taught(rolled, rolled, asked, steps, some)


def flow_loss(system: Parts, shown: Shown, recipe: MutualRecipe, draws: Draws) -> Tensor:
    """Multi-step mode: the flow of the real block, d = 0; the sum over both modalities."""
    layout, clean = system.transformer.config.layout, shown.clean
    sigma = sample_sigma(block_count(clean, layout), recipe.sigma_mean, recipe.sigma_spread, draws)
    noise, told = clean.noise(draws), system.told(shown.asked)
    x = noised(clean, noise, sigma, layout)
    out = velocity(system.transformer, shown.history, x, sigma, told)
    return sum(block_error(out, flow_target(clean, noise), layout))


def shortcut_loss(system: Parts, teacher: Parts, taught: Taught, recipe: MutualRecipe) -> Tensor:
    """Few-step mode against multi-step mode's displacement; the sum over both modalities.

    Args:
        teacher: the averaged weights; never gets a gradient.
    """
    layout = system.transformer.config.layout
    clip, history, asked, steps, draws = taught
    start, end = draw_interval(block_count(clip, layout), steps, draws)
    x = noised(clip, clip.noise(draws), start, layout)

    told, guidance = at_guidance(system, asked, recipe), recipe.guidance
    if system.transformer.config.few_step_rank:
        strong = (draws.uniform() >= recipe.unguided).float()
        told = told._replace(guidance=1 + (guidance[0] - 1) * strong[:, None])
        video, audio = (1 + (w - 1) * strong for w in guidance)
        guidance = video.view(-1, 1, 1, 1, 1), audio.view(-1, 1, 1)

    def displacement() -> Pair:
        score = guided_teacher(teacher, asked, guidance)
        substeps = max(1, recipe.teacher_steps // steps)
        return shortcut_target(score, history, x, start, end, substeps, layout)

    target = teacher(displacement)
    out = velocity(system.transformer, history, x, start, told, start - end)
    weights = (start - end) ** recipe.weighting
    return sum(block_error(out, target, layout, Pair(weights, weights)))


def made_sample(system: Parts, taught: Taught, recipe: MutualRecipe, gradient_step: int) -> Pair:
    """Few-step mode's own blocks after the history, with gradient through one step."""
    told, noise = at_guidance(system, taught.asked, recipe), taught.clip.noise(taught.draws)
    model, history, steps = system.transformer, taught.history, taught.steps
    return few_step_sample(model, history, noise, told, steps, gradient_step)


class Matched(NamedTuple):
    """The DMD loss over both modalities, and its sample: the fake score learns from it."""

    loss: Tensor
    sample: Pair


def distribution_loss(
    system: Parts,
    teacher: Parts,
    fake: Parts,
    taught: Taught,
    recipe: MutualRecipe,
) -> Matched:
    """Few-step mode's own samples under two scores: multi-step mode's and the online fake score's.

    Args:
        teacher, fake: get no gradient here.
    """
    layout = system.transformer.config.layout
    clip, history, asked, steps, draws = taught
    sample = made_sample(system, taught, recipe, draws.choice(steps))
    level = draw_level(block_count(clip, layout), recipe, draws)
    made = sample.map(Tensor.detach)
    x = noised(made, clip.noise(draws), level, layout)
    real = teacher(
        lambda: guided_teacher(teacher, asked, recipe.guidance).velocity(history, x, level)
    )
    with torch.no_grad():
        false = fake(fake_velocity, fake, history, x, level, asked)
    loss = matching_loss(
        sample,
        clean_prediction(x, real, level, layout),
        clean_prediction(x, false, level, layout),
        layout,
    )
    return Matched(sum(loss), made)


def draw_level(blocks: int, recipe: MutualRecipe, draws: Draws) -> Tensor:
    """Noise levels at which two scores are compared, (b, k)."""
    low, high = recipe.matching_range
    return low + (high - low) * draws.uniform(blocks)


def fake_loss(
    fake: Parts,
    history: Pair | None,
    sample: Pair,
    asked: Asked,
    level: Tensor,
    draws: Draws,
) -> Tensor:
    """Flow matching of the fake score on few-step mode's own samples at noise levels (b, k).

    Args:
        history: what the sample was made from; None for a fake score that sees the whole clip.
    """
    layout = fake.transformer.config.layout
    noise = sample.noise(draws)
    out = fake_velocity(fake, history, noised(sample, noise, level, layout), level, asked)
    return sum(block_error(out, flow_target(sample, noise), layout))
