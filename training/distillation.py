"""Few-step mode learns from multi-step mode: ShortCut and distribution matching (mutual_forcing.md, 3.3 b, c).

b batch, r noisy copies, k blocks, c channels, f h w video latent grid, s audio latents.
Both work on all blocks of a clip in parallel, each given its own history, through `history_forward`. The teacher
is the network's own multi-step mode with averaged weights; no other model is involved but the online fake score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..networks.full_sequence import history_forward
from ..networks.layout import BlockLayout
from ..networks.transformer import TextKeys
from ..samplers.sigmas import few_step_sigmas
from .flow_matching import per_latent


class Pair(NamedTuple):
    """Both streams: video (b, c, f, h, w) and audio (b, s, c)."""

    video: Tensor
    audio: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """The same function on both."""
        return Pair(function(self.video), function(self.audio))


def blockwise(levels: Tensor, layout: BlockLayout) -> Pair:
    """Values per block (b, k) in shapes that multiply video and audio latents."""
    video, audio = per_latent(levels, layout)
    return Pair(video[:, None, :, None, None], audio[:, :, None])


def noised(clean: Pair, noise: Pair, sigma: Tensor, layout: BlockLayout) -> Pair:
    """(1 - sigma) x + sigma e with one sigma per block, (b, k)."""
    levels = blockwise(sigma, layout)
    return Pair(*((1 - s) * x + s * e for s, x, e in zip(levels, clean, noise, strict=True)))


def velocity(
    model: nn.Module,
    history: Pair,
    x: Pair,
    sigma: Tensor,
    text: TextKeys,
    step_size: Tensor | None = None,
) -> Pair:
    """Velocity of every block given its history, float32; sigma and step_size are (b, k)."""
    dtype = next(model.parameters()).dtype
    out = history_forward(
        model,
        history.map(lambda t: t.to(dtype)),
        x.map(lambda t: t[:, None].to(dtype)),
        sigma[:, None],
        text,
        step_size=None if step_size is None else step_size[:, None],
    )
    return Pair(*(t[:, 0].float() for t in out))


class Guided(NamedTuple):
    """A multi-step teacher: network, text keys of prompt and of the empty prompt, guidance per stream."""

    model: nn.Module
    text: TextKeys
    empty: TextKeys
    video_guidance: float
    audio_guidance: float

    @torch.no_grad()
    def velocity(self, history: Pair, x: Pair, sigma: Tensor) -> Pair:
        """Guided velocity: u + w (c - u)."""
        conditional = velocity(self.model, history, x, sigma, self.text)
        if self.video_guidance == self.audio_guidance == 1:
            return conditional
        empty = velocity(self.model, history, x, sigma, self.empty)
        return Pair(
            empty.video + self.video_guidance * (conditional.video - empty.video),
            empty.audio + self.audio_guidance * (conditional.audio - empty.audio),
        )


def draw_interval(
    shape: tuple[int, int], steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random steps of the few-step grid: where each begins and ends, both (b, k)."""
    grid = torch.tensor(few_step_sigmas(steps))
    index = torch.randint(0, steps, shape, generator=generator)
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
    """Average velocity of the teacher along its own path from sigma `start` to `end`, both (b, k)."""
    at = x
    for step in range(substeps):
        sigma = start + (end - start) * (step / substeps)
        span = blockwise((start - end) / substeps, layout)
        slope = teacher.velocity(history, at, sigma)
        at = Pair(*(a - s * v for a, s, v in zip(at, span, slope, strict=True)))
    whole = blockwise(start - end, layout)
    return Pair(*((a - b) / s for a, b, s in zip(x, at, whole, strict=True)))


def few_step_sample(
    model: nn.Module, history: Pair, noise: Pair, text: TextKeys, steps: int, gradient_step: int
) -> Pair:
    """Blocks sampled in few-step mode, each given its history, with gradient through one step only.

    The value is that of the whole deterministic path. The gradient treats the later steps as a constant
    displacement, as Self-Forcing's random exit step does for its sampler.
    """
    grid = few_step_sigmas(steps)
    batch, layout = noise.video.shape[0], model.config.layout
    blocks = layout.blocks(noise.video.shape[2], noise.audio.shape[1])
    x, carried = noise, None
    for step in range(steps):
        sigma = torch.full((batch, blocks), grid[step])
        d = grid[step] - grid[step + 1]
        with torch.set_grad_enabled(step == gradient_step):
            u = velocity(model, history, x, sigma, text, torch.full_like(sigma, d))
        if step == gradient_step:
            carried = u.map(lambda t, d=d: -d * (t - t.detach()))
        x = Pair(*(a - d * b.detach() for a, b in zip(x, u, strict=True)))
    return Pair(*(a.detach() + c for a, c in zip(x, carried, strict=True)))


def matching_loss(sample: Pair, real: Pair, fake: Pair) -> Pair:
    """DMD loss of each stream from the two scores' predictions of the clean block.

    The gradient on the sample is (fake - real), normalised per clip and stream by mean |sample - real|
    (omniforcing.md, section 6).
    """

    def one(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        dims = tuple(range(1, x.ndim))
        scale = (x.detach() - real).abs().mean(dims, keepdim=True) + 1e-8
        target = x.detach() - (fake - real) / scale
        return 0.5 * (x - target).square().mean()

    return Pair(
        one(sample.video, real.video, fake.video), one(sample.audio, real.audio, fake.audio)
    )


def clean_prediction(x: Pair, v: Pair, sigma: Tensor, layout: BlockLayout) -> Pair:
    """x0 = x - sigma v."""
    levels = blockwise(sigma, layout)
    return Pair(*(a - s * b for a, s, b in zip(x, levels, v, strict=True)))
