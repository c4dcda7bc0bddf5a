"""Multi-head attention over LTX-2's modules, with keys that may come from a cache.

b batch, n query tokens, m key tokens, a heads, d head dim, c channels.
Queries and keys are normalised over the full inner width before the split into heads
(docs/omniforcing.md, section 1). The kernel is a parameter: `scaled_dot_product_attention` here,
ComfyUI's choice (xformers, sage, flash) inside ComfyUI.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .few_step import adapted
from .kernels import PLAIN, Kernels
from .rope import RopeTable


class AttentionKernel(Protocol):
    """Softmax attention of q (b, a, n, d) over k, v (b, a, m, d); mask (n, m), True = visible."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return (b, a, n, d)."""
        ...


class KeyValueStore(Protocol):
    """Where attention finds the past: takes a block's keys and values, returns all of them."""

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> tuple[Tensor, ...]:
        """Keys (not rotated) and values (b, a, n, d) of this block -> rotated ones (b, a, m, d).

        Several pairs, one after the other, where parts of the batch have different pasts: those of
        its first half and those of its second, for instance.
        """
        ...


class KeyPattern(Protocol):
    """A sparser way than a mask to say which keys each query sees."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel) -> Tensor:
        """Attention of q (b, a, n, d) over k, v (b, a, m, d) under the pattern; (b, a, n, d)."""
        ...


class HostedNorm(Protocol):
    """The RMS norm of queries or keys in a network that a host holds.

    Attributes:
        eps: what is added to the mean square.
        interleaved: whether the host's rows have a rotation's pairs side by side.
    """

    eps: float
    interleaved: bool

    def weight_for(self, x: Tensor) -> Tensor | None:
        """Its weight as it is multiplied with x, in the host's order; None: it has to be called."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x (b, n, c) normalised over its whole width, in split order."""
        ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Torch's own scaled dot product attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Parameters of one attention, under LTX-2's names; `attend` below runs it."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        eps: float,
        operations: object,
        gated: bool = False,
        dtype: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        kwargs = {"dtype": dtype, "device": device}
        self.heads = heads
        self.to_q = operations.Linear(query_dim, inner, **kwargs)
        self.to_k = operations.Linear(context_dim, inner, **kwargs)
        self.to_v = operations.Linear(context_dim, inner, **kwargs)
        self.to_out = nn.ModuleList([operations.Linear(inner, query_dim, **kwargs)])
        self.q_norm = operations.RMSNorm(inner, eps=eps, **kwargs)
        self.k_norm = operations.RMSNorm(inner, eps=eps, **kwargs)
        self.to_gate_logits = operations.Linear(query_dim, heads, **kwargs) if gated else None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, a*d) -> (b, a, n, d)."""
    return rearrange(x, "b n (a d) -> b a n d", a=heads)


def normed_heads(
    norm: nn.Module | HostedNorm,
    x: Tensor,
    heads: int,
    kernels: Kernels,
    table: RopeTable | None = None,
) -> Tensor:
    """Queries or keys x (b, n, c), normalised and rotated; (b, a, n, d).

    `norm` is asked for its weight, to do all of it at once. A host's that has none to give (it
    may lie elsewhere, or be patched on the way) is called.
    """
    if type(norm) is nn.RMSNorm:
        return kernels.norm_heads(x, norm.weight, norm.eps, heads, table)
    weight_for = getattr(norm, "weight_for", None)
    weight = None if weight_for is None else weight_for(x)
    if weight is not None:
        return kernels.norm_heads(x, weight, norm.eps, heads, table, norm.interleaved)
    x = split_heads(norm(x), heads)
    return x if table is None else kernels.rotate(x, table)


def keys_values(
    module: nn.Module,
    context: Tensor,
    heads: int,
    factors: Tensor | None = None,
    kernels: Kernels = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Normalised, unrotated keys and values (b, a, m, d) of a context (b, m, c)."""
    k = normed_heads(module.k_norm, adapted(module.to_k, context, factors), heads, kernels)
    return k, split_heads(adapted(module.to_v, context, factors), heads)


def attend(
    module: nn.Module,
    x: Tensor,
    heads: int,
    kernel: AttentionKernel,
    *,
    key_values: tuple[Tensor, ...],
    query_rope: RopeTable | None = None,
    mask: Tensor | KeyPattern | None = None,
    kernels: Kernels = PLAIN,
    factors: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """Attend from x (b, n, c) over ready (rotated) keys and values; (b, n, c).

    There may be a pair of them for each of several equal parts of the batch, without a mask.
    What each head found is gated by x where the module has gates (docs/ltx23.md, section 1).

    Args:
        q: x's queries (b, a, n, d), normalised and rotated, where they are there already.
    """
    if q is None:
        q = adapted(module.to_q, x, factors)
        q = normed_heads(module.q_norm, q, heads, kernels, query_rope)
    k, v, *others = (x.to(q.dtype) for x in key_values)
    if others:
        out = _in_parts(kernel, q, k, v, *others)
    elif mask is None or isinstance(mask, Tensor):
        out = kernel(q, k, v, mask)
    else:
        out = mask.attend(q, k, v, kernel)
    gates = getattr(module, "to_gate_logits", None)
    if gates is not None:
        out = kernels.gate_heads(out, gates(x))
    return adapted(module.to_out[0], rearrange(out, "b a n d -> b n (a d)"), factors)


def _in_parts(kernel: AttentionKernel, q: Tensor, *key_values: Tensor) -> Tensor:
    """Each part of a batch of queries over its own keys and values."""
    pairs = list(zip(key_values[::2], key_values[1::2], strict=True))
    parts = [
        # The layout in which heads lie side by side is what the product after it needs.
        rearrange(kernel(part, k, v, None), "b a n d -> b n a d")
        for part, (k, v) in zip(q.chunk(len(pairs)), pairs, strict=True)
    ]
    return rearrange(torch.cat(parts), "b n a d -> b a n d")
