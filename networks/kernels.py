"""The arithmetic that lies between two matrix products, in one place so that it can be fused.

b batch, a heads, n tokens, c channels, d head dim, r rotation pairs per head (d/2).
Each function is what happens from one product (or attention) to the next. Written plainly it is a
few passes over memory; compiled, one. The products themselves stay with their modules, so that
weights may be quantised, offloaded or patched by their host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .rope import RopeTable, rotate


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm of x (b, n, c): N(x) * scale + shift; the scale has its 1 added."""
    return torch.addcmul(shift, _norm(x, eps), scale)


def add_norm(x: Tensor, gate: Tensor, out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual x + gate * out, and the same normalised."""
    x = torch.addcmul(x, gate, out)
    return x, _norm(x, eps)


def add_modulate(
    x: Tensor, gate: Tensor, out: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual x + gate * out, and the same modulated."""
    x = torch.addcmul(x, gate, out)
    return x, modulate(x, scale, shift, eps)


def add_modulate_twice(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    shift: Tensor,
    other_scale: Tensor,
    other_shift: Tensor,
    eps: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual x + out or x + gate * out, and the same modulated in two ways."""
    x = x + out if gate is None else torch.addcmul(x, gate, out)
    normed = _norm(x, eps)
    return (
        x,
        torch.addcmul(shift, normed, scale),
        torch.addcmul(other_shift, normed, other_scale),
    )


def norm_heads(
    x: Tensor,
    weight: Tensor,
    eps: float,
    heads: int,
    table: RopeTable | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Queries or keys x (b, n, a*d), normalised over all heads, as (b, a, n, d) in split order.

    Args:
        table: angles to rotate them by; None: they stay.
        interleaved: the order of x and its weight, where pairs lie side by side.
    """
    x = F.rms_norm(x, weight.shape, weight, eps)
    order = "b n (a r two) -> b a n (two r)" if interleaved else "b n (a two r) -> b a n (two r)"
    x = rearrange(x, order, a=heads, two=2)
    return x if table is None else rotate(x, table)


def keep(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, table: RopeTable) -> None:
    """Write the rotated keys k (.., a, n, d) into `keys` and v, as it is, into `values`."""
    (first, second), (own, other), (cos, sin) = k.chunk(2, -1), keys.chunk(2, -1), table
    own.copy_(first).mul_(cos).sub_(second * sin)
    other.copy_(second).mul_(cos).add_(first * sin)
    values.copy_(v)


def gate_heads(out: Tensor, logits: Tensor) -> Tensor:
    """What each head found (b, a, n, d) times its gate, 0 to 2 and 1 at logits (b, n, a) of 0."""
    return out * (2 * rearrange(logits, "b n a -> b a n 1").sigmoid())


class Kernels(NamedTuple):
    """One way to carry out this file's functions."""

    modulate: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    add_modulate: Callable[..., tuple[Tensor, Tensor]]
    add_modulate_twice: Callable[..., tuple[Tensor, Tensor, Tensor]]
    norm_heads: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    keep: Callable[..., None]
    gate_heads: Callable[..., Tensor]


PLAIN = Kernels(
    modulate,
    add_norm,
    add_modulate,
    add_modulate_twice,
    norm_heads,
    rotate,
    keep,
    gate_heads,
)


@cache
def compiled_kernels() -> Kernels:
    """Each function fused by torch.compile, on its first call.

    With free sizes from the start: a kernel that was compiled for the sizes of the first block and
    another for the later ones would round differently, and a stream would depend on what ran before
    it.
    """
    return Kernels(*(torch.compile(function, dynamic=True) for function in PLAIN))
