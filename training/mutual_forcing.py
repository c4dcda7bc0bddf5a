"""Mutual Forcing: both modes of one network in one training step (mutual_forcing.md, section 3.5).

b batch, k blocks, m text tokens.
Few-step mode makes the history (no gradient). Given it, multi-step mode learns the flow of the real block; and
few-step mode learns from multi-step mode: the displacement over an interval (ShortCut) and, every few steps, the
difference of two scores on its own samples (DMD). The teacher is the network's own averaged weights in
multi-step mode; there is no bidirectional model anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distillation import (
    Guided,
    Pair,
    clean_prediction,
    draw_interval,
    few_step_sample,
    matching_loss,
    noised,
    shortcut_target,
    velocity,
)
from .flow_matching import Batch, sample_sigma
from .history import HistoryMix, few_step_history
from .system import System


@dataclass(frozen=True)
class MutualRecipe:
    """What one step is made of; a weight of 0 switches its half off.

    Attributes:
        shortcut, matching: weights of ShortCut and of DMD.
        matching_every: steps from one DMD update of the generator to the next.
        fake_updates: updates of the online fake score for each of them.
        steps: few-step grids that are trained, drawn at random.
        substeps: Euler steps of the teacher within one interval.
        guidance: of video and audio, folded into few-step mode.
        matching_range: noise levels at which the two scores are compared.
    """

    shortcut: float = 1.0
    matching: float = 0.5
    matching_every: int = 4
    fake_updates: int = 4
    steps: tuple[int, ...] = (4, 8)
    substeps: int = 2
    guidance: tuple[float, float] = (3.0, 3.0)
    matching_range: tuple[float, float] = (0.02, 0.98)
    history: HistoryMix = field(default_factory=HistoryMix)
    window: int = 3
    sigma_mean: float = 0.3
    sigma_spread: float = 1.2
    caption_dropout: float = 0.1

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> MutualRecipe:
        """Build from JSON; lists become tuples and `history` a mix.

        Raises:
            TypeError: an entry that the recipe does not know.
        """
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if isinstance(kept.get("history"), dict):
            kept["history"] = HistoryMix(**{k: tuple(v) for k, v in kept["history"].items()})
        return cls(**kept)


class MutualLosses(NamedTuple):
    """Losses of one step, each summed over both streams; those that were not computed are 0."""

    flow: Tensor
    shortcut: Tensor
    matching: Tensor


class Prepared(NamedTuple):
    """One batch with the history that few-step mode made for it."""

    clean: Pair
    history: Pair
    ids: Tensor
    steps: int


def prepare(
    system: System, batch: Batch, recipe: MutualRecipe, progress: float, generator: torch.Generator
) -> Prepared:
    """Draw a grid and a kind of history, and let few-step mode make it."""
    dropped = torch.rand(len(batch.ids), generator=generator) < recipe.caption_dropout
    ids = torch.where(dropped[:, None], 0, batch.ids)
    steps = recipe.steps[int(torch.randint(len(recipe.steps), (), generator=generator))]
    start = recipe.history.start_step(steps, progress, generator)
    with torch.no_grad():
        text = system.text(ids)
    history = few_step_history(
        system.transformer,
        text,
        batch.video,
        batch.audio,
        steps=steps,
        start_step=start,
        window=recipe.window,
        generator=generator,
    )
    return Prepared(Pair(batch.video, batch.audio), Pair(*history), ids, steps)


def normal(like: Pair, generator: torch.Generator) -> Pair:
    """Standard normal noise shaped like both streams."""
    return like.map(lambda t: torch.randn(t.shape, generator=generator))


def guided(system: System, ids: Tensor, guidance: tuple[float, float]) -> Guided:
    """Multi-step mode of a network as a teacher."""
    with torch.no_grad():
        return Guided(
            system.transformer, system.text(ids), system.text(torch.zeros_like(ids)), *guidance
        )


def mutual_losses(
    system: System,
    teacher: System,
    fake: System | None,
    prepared: Prepared,
    recipe: MutualRecipe,
    generator: torch.Generator,
    *,
    matching: bool,
) -> MutualLosses:
    """Losses of the one network.

    Args:
        teacher: the averaged weights; never gets a gradient.
        fake: the online fake score, needed where `matching` is set.
        matching: whether this step has a DMD term.
    """
    model = system.transformer
    layout = model.config.layout
    clean, history, ids, steps = prepared
    size = len(ids)
    blocks = layout.blocks(clean.video.shape[2], clean.audio.shape[1])
    text = system.text(ids)
    zero = torch.zeros(())

    # Multi-step mode: the flow of the real block, d = 0.
    sigma = sample_sigma((size, blocks), recipe.sigma_mean, recipe.sigma_spread, generator)
    noise = normal(clean, generator)
    flow = _error(
        velocity(model, history, noised(clean, noise, sigma, layout), sigma, text),
        Pair(noise.video - clean.video, noise.audio - clean.audio),
    )

    shortcut = zero
    if recipe.shortcut:
        start, end = draw_interval((size, blocks), steps, generator)
        x = noised(clean, normal(clean, generator), start, layout)
        target = shortcut_target(
            guided(teacher, ids, recipe.guidance), history, x, start, end, recipe.substeps, layout
        )
        shortcut = _error(velocity(model, history, x, start, text, start - end), target)

    match = zero
    if matching and recipe.matching:
        if fake is None:
            raise ValueError("distribution matching needs the online fake score, found none")
        gradient_step = int(torch.randint(steps, (), generator=generator))
        sample = few_step_sample(
            model, history, normal(clean, generator), text, steps, gradient_step
        )
        low, high = recipe.matching_range
        level = low + (high - low) * torch.rand((size, blocks), generator=generator)
        with torch.no_grad():
            x = noised(sample.map(Tensor.detach), normal(clean, generator), level, layout)
            real_v = guided(teacher, ids, recipe.guidance).velocity(history, x, level)
            fake_v = velocity(fake.transformer, history, x, level, fake.text(ids))
        match = sum(
            matching_loss(
                sample,
                clean_prediction(x, real_v, level, layout),
                clean_prediction(x, fake_v, level, layout),
            )
        )
    return MutualLosses(flow, shortcut, match)


def fake_loss(
    system: System,
    fake: System,
    prepared: Prepared,
    recipe: MutualRecipe,
    generator: torch.Generator,
) -> Tensor:
    """Flow matching of the fake score on few-step mode's own samples, with the same history."""
    layout = system.transformer.config.layout
    clean, history, ids, steps = prepared
    size = len(ids)
    blocks = layout.blocks(clean.video.shape[2], clean.audio.shape[1])
    with torch.no_grad():
        text = system.text(ids)
        noise = normal(clean, generator)
        # With no step that carries a gradient this is the plain few-step sample.
        sample = few_step_sample(system.transformer, history, noise, text, steps, gradient_step=0)
    low, high = recipe.matching_range
    level = low + (high - low) * torch.rand((size, blocks), generator=generator)
    noise = normal(clean, generator)
    sample = sample.map(Tensor.detach)
    out = velocity(
        fake.transformer, history, noised(sample, noise, level, layout), level, fake.text(ids)
    )
    return _error(out, Pair(noise.video - sample.video, noise.audio - sample.audio))


def _error(found: Pair, target: Pair) -> Tensor:
    return F.mse_loss(found.video, target.video) + F.mse_loss(found.audio, target.audio)
