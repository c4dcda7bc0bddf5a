"""Everything that is random in a training step, the same on one process as on many.

b clips of this process's share of the batch.
Every clip of a batch has a generator of its own, named by seed, step and its place in the batch;
what all clips share comes from one more. So neither the number of processes nor the device changes
what is drawn, and a run that goes on after a kill draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import torch
from torch import Tensor

from ...samplers.noise import varied_seed


class Draws:
    """The random numbers of one step.

    Args:
        seed, step: name them.
        clips: places in the whole batch of the clips that this process has.
        device: where the numbers are wanted; they are drawn on the CPU.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        clips: Iterable[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        named = varied_seed(seed, 1 + step)
        self._places = list(clips)
        self._common = torch.Generator().manual_seed(named)
        self._clips = [
            torch.Generator().manual_seed(varied_seed(named, 1 + place)) for place in self._places
        ]

    def every(self, step: int) -> tuple[list[int], Draws]:
        """Each `step`-th clip of the whole batch: which of them are here, and draws for them alone.

        Raises:
            ValueError: processes would have unlike numbers of them.
        """
        if len(self._places) % step:
            raise ValueError(
                f"found {len(self._places)} clips in this process's share of the batch, expected a "
                "multiple of "
                f"{step}, of which one is taken; change the batch, taught_every or the number of "
                "processes"
            )
        rows = [row for row, place in enumerate(self._places) if place % step == 0]
        some = copy(self)
        some._places = [self._places[row] for row in rows]
        some._clips = [self._clips[row] for row in rows]
        return rows, some

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise for every clip, (b, *shape) float32."""
        return self._stacked(torch.randn(shape, generator=generator) for generator in self._clips)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from [0, 1) for every clip, (b, *shape)."""
        return self._stacked(torch.rand(shape, generator=generator) for generator in self._clips)

    def integers(self, limit: int, *shape: int) -> Tensor:
        """Integers from [0, limit) for every clip, (b, *shape)."""
        return self._stacked(
            torch.randint(limit, shape, generator=generator) for generator in self._clips
        )

    def level(self) -> float:
        """One number from [0, 1) that all clips share."""
        return float(torch.rand((), generator=self._common))

    def choice(self, limit: int) -> int:
        """One integer from [0, limit) that all clips share."""
        return int(torch.randint(limit, (), generator=self._common))

    def weighted(self, weights: Tensor, count: int) -> Tensor:
        """`count` indices into `weights`, drawn by weight, with replacement, for all clips."""
        return torch.multinomial(weights, count, replacement=True, generator=self._common)

    def _stacked(self, rows: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(rows)).to(self.device)
