"""Weights in float8 with one scale for each matrix, in the layers only: half the memory.

c channels in, o channels out.
A plain cast leaves numbers as they are, and those of a network are so small that many fall where
float8 e4m3 has few bits or none. With a scale each matrix fills the format's range. What lies
outside the layers (heads, embedders, connectors) is a hundredth of the memory and stays. The names
are ComfyUI's, which multiplies with such matrices or multiplies them out. `make ltx2` measures what
each format changes.
"""

from __future__ import annotations

import json
import re

import torch
from torch import Tensor

from ..networks.fp8 import quantised

LAYERS, _WEIGHT = "transformer_blocks.", ".weight"
# What attention reads and says, but for the text's: a fifth of the layers' weights, whose rounding
# nothing after it evens out.
_VALUES = re.compile(r"(?<!\.attn2)(?<!\.audio_attn2)\.to_(v|out\.0)\.weight$")
_MULTIPLIED_OUT = "full_precision_matrix_mult"


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (o, c) in float8, and the float32 scale () to multiply it with."""
    data, scale = quantised(weight.reshape(1, -1))
    return data.view(weight.shape), scale.squeeze()


def in_eight_bits(
    tensors: dict[str, Tensor],
    *,
    products: bool = False,
    closer: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """A network's tensors with the matrices of its layers in float8.

    Args:
        tensors: by LTX-2's names.
        products: whether tokens are to be rounded as well, and multiplied in float8.
        closer: leave those in 16 bits that take most of the difference for their size.
        device: where it is worked out, one matrix after the other; a card is quicker.
    """
    described = {"format": "float8_e4m3fn"} | ({} if products else {_MULTIPLIED_OUT: True})
    mark = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        wide = closer and _VALUES.search(name)
        if name.startswith(LAYERS) and name.endswith(_WEIGHT) and value.ndim == 2 and not wide:
            data, scale = rounded(value.to(device))
            layer = name.removesuffix(_WEIGHT)
            made |= {
                name: data.to(value.device),
                f"{layer}.weight_scale": scale.to(value.device),
                f"{layer}.comfy_quant": mark.clone(),
            }
        else:
            made[name] = value
    return made
