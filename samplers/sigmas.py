"""Noise schedules: LTX-2's shifted and stretched list, and the entries that few-step mode visits.

Source of LTX-2's scheduler: docs/omniforcing.md, section 5.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

TERMINAL = 0.1
BASE_TOKENS, MAX_TOKENS = 1024, 4096
BASE_SHIFT, MAX_SHIFT = 0.95, 2.05
MOST_STEPS = 1000  # as many as the noise levels that LTX-2 was trained with have names
FEW_STEP_GRID = 40
# Entries of that grid which few-step mode visits: those nearest to 1000, 909, 725, 421 and 0
# thousandths (docs/omniforcing.md, section 5), and TaoMate's (docs/ltx23.md, section 5).
OMNIFORCING, TAOMATE = (0, 17, 29, 36, 40), (0, 28, 34, 40)


def ltx2_sigmas(steps: int, tokens: int = MAX_TOKENS) -> tuple[float, ...]:
    """LTX-2's schedule of `steps` steps: steps + 1 values from 1 to 0, the last but one at 0.1.

    Args:
        tokens: sequence length that sets the shift; OmniForcing leaves it at 4096.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps is {steps}, expected 1 to {MOST_STEPS}")
    shift = BASE_SHIFT + (MAX_SHIFT - BASE_SHIFT) * (tokens - BASE_TOKENS) / (
        MAX_TOKENS - BASE_TOKENS
    )
    grid = torch.linspace(1.0, 0.0, steps + 1)
    factor = math.exp(shift)
    inner = grid[:-1]
    shifted = factor / (factor + (1.0 / inner - 1.0))
    if steps > 1:
        rest = 1.0 - shifted
        shifted = 1.0 - rest * (1.0 - TERMINAL) / rest[-1]
    return (*shifted.tolist(), 0.0)


def few_step_sigmas(steps: int, trained: tuple[int, ...] = OMNIFORCING) -> tuple[float, ...]:
    """The schedule of few-step mode, from the list of 40 steps.

    As many steps as were trained visit their entries, twice as many halve the intervals; other
    numbers take entries at even distances.

    Raises:
        ValueError: more steps than the list has.
    """
    usual = len(trained) - 1
    if not 1 <= steps <= FEW_STEP_GRID:
        raise ValueError(
            f"few-step mode was asked for {steps} steps, expected 1 to {FEW_STEP_GRID} ({usual} "
            f"and {2 * usual} are trained)"
        )
    grid = ltx2_sigmas(FEW_STEP_GRID)
    if steps == usual:
        indices = list(trained)
    elif steps == 2 * usual:
        indices = [trained[0]]
        for a, b in pairwise(trained):
            indices += [(a + b + 1) // 2, b]
    else:
        indices = [round(i * FEW_STEP_GRID / steps) for i in range(steps + 1)]
    return tuple(grid[i] for i in indices)
