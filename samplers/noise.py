"""Named noise: (seed, block, step, modality) gives the tensor, whatever was drawn before.

So a clip does not depend on how it was cut into chunks, on what ran earlier or on the device
(docs/architecture.md, decision 5). The global generators are left as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Modality = Literal["video", "audio"]


class NoiseSource(Protocol):
    """Gives the noise of one block, step and modality."""

    def __call__(self, block: int, step: int, modality: Modality, shape: tuple[int, ...]) -> Tensor:
        """Noise of `shape`, float32 on the CPU."""
        ...


def _number(*names: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def named_noise(
    seed: int, block: int, step: int, modality: Modality, shape: tuple[int, ...]
) -> Tensor:
    """Standard normal noise of `shape`, float32 on the CPU, from a generator of its own."""
    generator = torch.Generator(device="cpu").manual_seed(_number(seed, block, step, modality))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def noise_of(seeds: Sequence[int]) -> NoiseSource:
    """The noise source of a batch: entry i of every tensor comes from seeds[i] alone."""

    def source(block: int, step: int, modality: Modality, shape: tuple[int, ...]) -> Tensor:
        if shape[0] != len(seeds):
            raise ValueError(
                f"noise: found a batch of {shape[0]}, expected one entry per seed ({len(seeds)})"
            )
        return torch.stack([named_noise(seed, block, step, modality, shape[1:]) for seed in seeds])

    return source


def varied_seed(seed: int, variation: int) -> int:
    """The seed of another future of the same stream; variation 0 is the stream's own."""
    return seed if variation == 0 else _number(seed, "variation", variation)
