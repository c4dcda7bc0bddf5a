"""Few-step mode learns from a teacher: ShortCut and distribution matching (DMD).

Source: docs/mutual_forcing.md, section 3.3, b and c (Mutual Forcing, arXiv 2604.25819).

b batch, r noisy copies, k blocks, c channels, f h w video latent grid, s audio latents.
Mutual Forcing works on all blocks of a clip in parallel, each given its own history; its teacher is
the network's own multi-step mode with averaged weights. The rival method uses the same losses on
whole rollouts, with a bidirectional teacher (lab.training.self_forcing).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...networks.full_sequence import Told
from ...networks.layout import BlockLayout
from ...samplers.sigmas import few_step_sigmas
from ...samplers.steps import euler, guided
from .data import Asked
from .draws import Draws
from .pair import Pair, block_count, blockwise, by_block, velocity
from .system import Parts


class Guided(NamedTuple):
    """A multi-step teacher: network, what it is told, the empty prompt, guidance per modality."""

    model: nn.Module
    told: Told
    empty: Told
    video_guidance: float | Tensor
    audio_guidance: float | Tensor

    @torch.no_grad()
    def velocity(self, history: Pair | None, x: Pair, sigma: Tensor) -> Pair:
        """Guided velocity: u + w (c - u). Without a history the teacher sees the whole clip."""
        conditional = velocity(self.model, history, x, sigma, self.told)
        scales = self.video_guidance, self.audio_guidance
        if all(not isinstance(scale, Tensor) and scale == 1 for scale in scales):
            return conditional
        empty = velocity(self.model, history, x, sigma, self.empty)
        return Pair(
            guided(empty.video, conditional.video, self.video_guidance),
            guided(empty.audio, conditional.audio, self.audio_guidance),
        )


@torch.no_grad()
def guided_teacher(
    system: Parts, asked: Asked, guidance: tuple[float | Tensor, float | Tensor]
) -> Guided:
    """Multi-step mode of a network as a teacher."""
    return Guided(system.transformer, system.told(asked), system.told_nothing(asked), *guidance)


def draw_interval(blocks: int, steps: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Random steps of the few-step grid: where each begins and ends, both (b, k)."""
    index = draws.integers(steps, blocks)
    grid = torch.tensor(few_step_sigmas(steps)).to(index.device)
    return grid[index], grid[index + 1]


@torch.no_grad()
def shortcut_target(
    teacher: Guided,
    history: Pair,
    x: Pair,
    start: Tensor,
    end: Tensor,
    substeps: int,
    layout: BlockLayout,
) -> Pair:
    """The teacher's average velocity along its own path from sigma `start` to `end`, (b, k)."""
    at = x
    for sigma, following in pairwise(
        torch.lerp(start, end, i / substeps) for i in range(substeps + 1)
    ):
        slope = teacher.velocity(history, at, sigma)
        at = Pair(*map(euler, at, slope, blockwise(sigma, layout), blockwise(following, layout)))
    whole = blockwise(start - end, layout)
    return Pair(*((a - b) / s for a, b, s in zip(x, at, whole, strict=True)))


def few_step_sample(
    model: nn.Module, history: Pair, noise: Pair, told: Told, steps: int, gradient_step: int
) -> Pair:
    """Blocks sampled in few-step mode, each given its history, with gradient through one step only.

    The value is that of the whole deterministic path. The gradient treats the later steps as a
    constant displacement, as Self-Forcing's random exit step does for its sampler; it is divided by
    the step's length d, so that no step of a grid counts more than another (the last is 4.5 times
    as long as the first).
    """
    grid = few_step_sigmas(steps)
    shape = (len(noise.video), block_count(noise, model.config.layout))
    x, carried = noise, None
    for step in range(steps):
        sigma = torch.full(shape, grid[step], device=noise.video.device)
        d = grid[step] - grid[step + 1]
        with torch.set_grad_enabled(step == gradient_step and torch.is_grad_enabled()):
            u = velocity(model, history, x, sigma, told, torch.full_like(sigma, d))
        if step == gradient_step:
            carried = u.map(lambda t: t.detach() - t)
        x = Pair(*(euler(a, b.detach(), *grid[step : step + 2]) for a, b in zip(x, u, strict=True)))
    return Pair(*(a.detach() + c for a, c in zip(x, carried, strict=True)))


def matching_loss(sample: Pair, real: Pair, fake: Pair, layout: BlockLayout | None) -> Pair:
    """DMD loss of each modality from the two scores' predictions of the clean sample.

    The gradient on the sample is (fake - real), normalised per clip and modality by mean |sample -
    real| (docs/omniforcing.md, section 6).

    Args:
        layout: given where every block is a sample with a noise level of its own: normalised per
            block, every block counting the same. None: the clip is one sample.
    """

    def one(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        dims = tuple(range(1, x.ndim))
        scale = (x.detach() - real).abs().mean(dims, keepdim=True) + 1e-8
        target = x.detach() - (fake - real) / scale
        return 0.5 * (x - target).square().mean()

    parts = [[pair] if layout is None else by_block(pair, layout) for pair in (sample, real, fake)]
    losses = [
        [one(*values) for values in zip(*pairs, strict=True)] for pairs in zip(*parts, strict=True)
    ]
    return Pair(*(torch.stack(modality).mean() for modality in zip(*losses, strict=True)))
