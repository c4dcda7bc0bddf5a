"""The history that multi-step mode trains on, made by few-step mode itself.

Source: docs/mutual_forcing.md, section 3.4 (Mutual Forcing, arXiv 2604.25819, leaves it open).
b batch, k blocks, c channels, f h w video latent grid, s audio latents.
A free rollout would drift from the real clip, and the real next block would not follow from it. So
most histories are resampled: each real block is noised to a level of the few-step grid and finished
by few-step mode, block after block, on the history made so far. Level 1 is a full rollout, level 0
the real block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from ...networks.config import TransformerConfig
from ...networks.full_sequence import Told
from ...networks.kv_cache import OpenBlock, RollingCache
from ...networks.memory_branch import Remembered
from ...samplers.rollout import SigmaConstants
from ...samplers.sigmas import few_step_sigmas
from ...samplers.steps import add_noise, euler
from ...samplers.stream_memory import StreamMemory, remembered
from .draws import Draws
from .pair import Pair, by_block, joined


@dataclass(frozen=True)
class HistoryMix:
    """How often which kind of history is used; the rest is resampled from a low level.

    Attributes:
        real: share of teacher-forced histories, at the start and at the end of training (linear
            between).
        rollout: share of full rollouts, likewise.
        highest: noise level up to which real blocks are noised before few-step mode finishes them:
            above it hardly anything of them is left, and the real next block would no more follow.
        further: blocks by which a full rollout is at most longer than the clip.
    """

    real: tuple[float, float] = (0.5, 0.3)
    rollout: tuple[float, float] = (0.0, 0.2)
    highest: float = 0.75
    further: int = 0

    def __post_init__(self) -> None:
        for real, rollout in zip(self.real, self.rollout, strict=True):
            if real < 0 or rollout < 0 or real + rollout > 1:
                raise ValueError(
                    f"history mix: found shares real {real} and rollout {rollout}, expected both "
                    "at least 0 "
                    "and at most 1 together"
                )

    def start_step(self, steps: int, progress: float, draws: Draws) -> int:
        """Grid index from which a history is finished: 0 = full rollout, `steps` = real."""

        def share(ends: tuple[float, float]) -> float:
            return ends[0] + (ends[1] - ends[0]) * min(1.0, max(0.0, progress))

        draw = draws.level()
        if draw < share(self.real):
            return steps
        if draw < share(self.real) + share(self.rollout):
            return 0
        low = self._low_steps(steps)
        return low[draws.choice(len(low))]

    def _low_steps(self, steps: int) -> list[int]:
        sigmas = few_step_sigmas(steps)
        return [step for step in range(1, steps) if sigmas[step] <= self.highest]

    def check_levels(self, grids: tuple[int, ...]) -> None:
        """Refuse a mix that resamples from levels that a grid does not have.

        Raises:
            ValueError: naming the grid and its lowest level.
        """
        resamples = any(a + b < 1 for a, b in zip(self.real, self.rollout, strict=True))
        for steps in grids if resamples else ():
            if not self._low_steps(steps):
                raise ValueError(
                    f"history mix: highest is {self.highest}, below every level of the grid of "
                    f"{steps} steps, whose lowest is {few_step_sigmas(steps)[-2]:.3f}; raise it, "
                    "or make real and rollout 1 together"
                )

    def further_blocks(self, start_step: int, draws: Draws) -> int:
        """By how many blocks this history is rolled out further than the clip is long."""
        return draws.choice(self.further + 1) if self.further and start_step == 0 else 0


def rolled_places(blocks: int, further: int) -> list[int]:
    """Places in a clip of what is rolled out: further blocks come after the prefix, and fall out.

    They are told what block 1 is. A prefix alone has nothing after it.
    """
    return [0, *[1] * (further if blocks > 1 else 0), *range(1, blocks)]


class History(NamedTuple):
    """A history, and what is told in each block after the first of the stream before it (None: it
    has no memory)."""

    clip: Pair
    memory: tuple[Remembered, ...] | None


@torch.no_grad()
def few_step_history(
    model: nn.Module,
    told: Told,
    clean: Pair,
    *,
    steps: int,
    start_step: int,
    window: int,
    draws: Draws,
    further: int = 0,
) -> History:
    """A history of the real clip's shape, finished by few-step mode from `start_step` on.

    Nobody sees the last block of a history, so it is left as it is, but for full rollouts, which
    are clips of their own. A network that keeps a memory makes it under its memory, as the sampler
    does.

    Args:
        clean: real latents.
        steps: few-step grid (4 or 8).
        start_step: 0 starts from noise, `steps` returns the real clip.
        window: blocks that the rolling cache keeps.
        further: blocks to roll out beyond the clip's length. The oldest after the prefix fall out,
            as they do from the cache of a long stream: so few-step mode also learns to go on from
            its own later drift.
    """
    config = model.config
    if start_step == steps:
        return History(clean, real_memory(clean, config))
    blocks = by_block(clean, config.layout)
    sigmas = few_step_sigmas(steps)[start_step:]
    like = next(model.parameters()).new_empty(0)
    constants = SigmaConstants(model, like, told.guidance)
    places = [*range(len(blocks) - 1)] if start_step else rolled_places(len(blocks), further)
    cache, memory = RollingCache(window), None
    made, memories = [], []
    for index, place in enumerate(places):
        block, keys = blocks[place], told.block(place)
        track = told.block_track(place, config.layout)
        past = memory.told() if config.memory_interval and memory else None
        past = past and Remembered(*(value.to(like) for value in past))
        noise = block.noise(draws)
        x = Pair(*(add_noise(v, e, sigmas[0]) for v, e in zip(block, noise, strict=True)))
        opened = OpenBlock(model, cache, *block.video.shape[3:], like)
        for sigma, following in pairwise(sigmas):
            level = constants.at(sigma, sigma - following)
            u = opened.velocity(x.video.to(like), x.audio.to(like), keys, level, track, past)
            x = Pair(*(euler(a, v.float(), sigma, following) for a, v in zip(x, u, strict=True)))
        if config.anchored_colours and memory:
            x = x._replace(video=memory.settled(x.video))
        if config.keeps_memory:
            memory = memory.after(*x) if memory else StreamMemory.begun(*x)
            memories.append(memory)
        made.append(x)
        if index + 1 < len(places):
            keys = told.block(places[index + 1])
            done = x.map(lambda value: value.to(like))
            cache = opened.commit(*done, keys, constants.at(0.0), track, past)
    if start_step:
        return History(joined([*made, blocks[-1]]), _told(memories, config))
    later = len(blocks) - 1
    clip = [made[0], *made[len(made) - later :]]
    return History(joined(clip), _told(memories[-1 - later : -1], config))


def real_memory(clip: Pair, config: TransformerConfig) -> tuple[Remembered, ...] | None:
    """What each block of a real clip is told of those before it."""
    if not config.memory_interval:
        return None
    return _told(list(remembered(by_block(clip, config.layout)[:-1])), config)


def _told(
    memories: Sequence[StreamMemory], config: TransformerConfig
) -> tuple[Remembered, ...] | None:
    return tuple(memory.told() for memory in memories) if config.memory_interval else None
