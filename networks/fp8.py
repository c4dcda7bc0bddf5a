"""Matrix products in eight bits, as an option: half the memory, and twice the rate on new GPUs.

b batch, n tokens, c channels in, o channels out.
Every product of the layers (not of the heads, embedders or text projections) takes its weight in
float8 e4m3 with one scale per output channel, made once, and its tokens in float8 with one scale
per token, made each time. What it changes: a number keeps 3 bits after its first, so each product
is off by about 3 %, at random. What that does to a clip is for `lab.bench.rollout --fp8` to say. On
a CPU it is emulated. In ComfyUI, Load OmniForcing Model's "fp8, fast" is ComfyUI's own way to the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from . import triton_kernels

FORMAT = triton_kernels.FORMAT
_LARGEST = torch.finfo(FORMAT).max
_MULTIPLE = 16  # what the hardware's product asks of both channel counts


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, c) in float8, and the float32 scale (n, 1) to multiply each token with."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(FORMAT), scale


@cache
def _fused_quantised(device_type: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if device_type == "cuda" and triton_kernels.triton is not None:
        return triton_kernels.quantised
    return torch.compile(quantised, dynamic=True)


class Fp8Linear(nn.Module):
    """A Linear whose product is made in eight bits and comes out in the dtype of its tokens."""

    def __init__(self, linear: nn.Linear, *, compiled: bool = False) -> None:
        super().__init__()
        device = linear.weight.device.type
        self.quantised = _fused_quantised(device) if compiled else quantised
        weight, scale = quantised(linear.weight.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, o)."""
        tokens, scale = self.quantised(x.reshape(-1, x.shape[-1]))
        # With a bias, and sums that stay in the matrix units, cuBLAS refused the product for some
        # of these sizes on an H200 (torch 2.11, CUDA 13.0).
        out = torch._scaled_mm(
            tokens, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16
        )
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def unavailable(device: torch.device) -> str | None:
    """Why products in eight bits cannot run on a device, or None (a CPU emulates them)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "products in float8 need a GPU of compute capability 8.9 or newer (Ada, Hopper, ...)"
    if device.type not in ("cuda", "cpu"):
        return f"products in float8 are not to be had on {device.type}"
    return None


def use_fp8(model: nn.Module, *, compiled: bool = False) -> int:
    """Replace the products of a model's layers, in place; returns how many.

    The wide weights are freed as they are replaced. Products whose sizes the hardware cannot take
    stay.

    Args:
        compiled: fuse the rounding of the tokens, which on a GPU costs as much as the product
            otherwise.

    Raises:
        ValueError: the device cannot do it.
    """
    reason = unavailable(next(model.parameters()).device)
    if reason:
        raise ValueError(f"{reason}; leave float8 off")
    replaced = 0
    for module in list(model.transformer_blocks.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            if child.in_features % _MULTIPLE or child.out_features % _MULTIPLE:
                continue
            setattr(module, name, Fp8Linear(child, compiled=compiled))
            replaced += 1
    return replaced
