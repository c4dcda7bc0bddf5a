"""One denoising step: what is done with a velocity, written once for sampling and training.

A noisy latent is x = (1 - sigma) x0 + sigma e, so the velocity dx/dsigma is v = e - x0 (rectified
flow, arXiv:2209.03003, with noise at sigma 1). Tensors are of any one shape; noise levels are
numbers, or tensors that broadcast.
"""

from __future__ import annotations

from torch import Tensor

Level = float | Tensor


def add_noise(clean: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """The noisy latent at level sigma: (1 - sigma) x0 + sigma e."""
    return (1 - sigma) * clean + sigma * noise


def predicted_clean(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """The clean latent that a velocity at level sigma points to: x - sigma v."""
    return x - sigma * velocity


def guided(unguided: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598), u + w (c - u): w = 1 is c alone."""
    return unguided + scale * (conditional - unguided)


def euler(x: Tensor, velocity: Tensor, sigma: Level, next_sigma: Level) -> Tensor:
    """Along the velocity from level sigma down to the next."""
    return x - (sigma - next_sigma) * velocity


def renoise(
    x: Tensor, velocity: Tensor, sigma: Level, next_sigma: Level, noise: Tensor | None
) -> Tensor:
    """The predicted clean latent, noised again to the next level.

    Args:
        noise: fresh; None where the next level is 0.
    """
    clean = predicted_clean(x, velocity, sigma)
    return clean if noise is None else add_noise(clean, noise, next_sigma)
