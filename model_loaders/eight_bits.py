"""Weights in eight bits with their scales, in the layers only: half the memory.

c channels in, o channels out.
A plain cast to float8 leaves numbers as they are, and those of a network are so small that many
fall where e4m3 has few bits or none. With a scale each matrix fills the format's range, and its
numbers are 2.6 % off, large or small. Whole numbers with a scale for each row are nearer where the
largest of a row is no more than a dozen times the usual one: 0.9 % for 4096 normally distributed
ones. What lies outside the layers (heads, embedders, connectors) is a hundredth of the memory and
stays. The names are ComfyUI's, which multiplies with such matrices or multiplies them out. `make
ltx2` measures what each format changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks import kept_keys
from ..networks.fp8 import quantised

LAYERS, _WEIGHT = "transformer_blocks.", ".weight"
_MULTIPLIED_OUT = "full_precision_matrix_mult"


def in_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (o, c) in float8, and the float32 scale () to multiply it with."""
    data, scale = quantised(weight.reshape(1, -1))
    return data.view(weight.shape), scale.squeeze()


class Format(NamedTuple):
    """One way to have a matrix in eight bits, by ComfyUI's name."""

    name: str
    rounded: Callable[[Tensor], tuple[Tensor, Tensor]]


class _Rounded(NamedTuple):
    """A matrix in one of the formats."""

    format: str
    data: Tensor
    scale: Tensor

    def off(self, weight: Tensor) -> Tensor:
        """How far it is from what it was made of, a distance ()."""
        return (self.data.float() * self.scale - weight).norm()


FLOAT8 = Format("float8_e4m3fn", in_float8)
INT8 = Format("int8_tensorwise", kept_keys.rounded)


def in_eight_bits(
    tensors: dict[str, Tensor],
    formats: Sequence[Format],
    *,
    products: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """A network's tensors with the matrices of its layers in eight bits.

    Args:
        tensors: by LTX-2's names.
        formats: each matrix is in that which is nearest to it.
        products: whether tokens are to be rounded as well, and multiplied in eight bits.
        device: where it is worked out, one matrix after the other; a card is quicker.
    """
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not (name.startswith(LAYERS) and name.endswith(_WEIGHT) and value.ndim == 2):
            made[name] = value
            continue
        weight = value.to(device)
        tried = [_Rounded(one.name, *one.rounded(weight)) for one in formats]
        best = min(tried, key=lambda one: one.off(weight)) if len(tried) > 1 else tried[0]
        described = {"format": best.format} | ({} if products else {_MULTIPLIED_OUT: True})
        layer = name.removesuffix(_WEIGHT)
        made |= {
            name: best.data.to(value.device),
            f"{layer}.weight_scale": best.scale.to(value.device),
            f"{layer}.comfy_quant": torch.tensor(
                list(json.dumps(described).encode()), dtype=torch.uint8
            ),
        }
    return made
