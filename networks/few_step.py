"""Adapters that act in few-step mode alone, so that it cannot harm multi-step mode, its teacher.

b batch, n tokens, c channels, r rank. Those for given pictures are of the same kind
(`picture_track.py`).
Guided velocities are linear in w - 1 (classifier-free guidance, arXiv:2207.12598), so the step size
has its embedding and guidance has these: y = W x + (w - 1) / 2 * B (A x) where d > 0, and y = W x
where d = 0, bit for bit. Mutual Forcing (arXiv:2604.25819) shares all parameters between its modes;
a config without a rank does so.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

FEW_STEP = ".few_step."
"""What the names of the adapters' parameters have in them, between a layer's and their own."""
ADAPTERS = "few_step", "pictures"
"""A layer's adapters by name, as their factors lie beside each other; `picture_track.py` has the
second ones."""


class Adapter(nn.Module):
    """The product of two thin matrices beside a linear layer; zero at first."""

    def __init__(
        self,
        channels: tuple[int, int],
        rank: int,
        operations: object,
        dtype: object,
        device: object,
    ) -> None:
        super().__init__()
        kwargs = {"bias": False, "dtype": dtype, "device": device}
        self.down = operations.Linear(channels[0], rank, **kwargs)
        self.up = operations.Linear(rank, channels[1], **kwargs)
        nn.init.zeros_(self.up.weight)


def adapted(linear: nn.Module, x: Tensor, factors: Tensor | None) -> Tensor:
    """A linear layer of x (b, n, c) with its adapters, if it has any, each times its own of the
    factors (b, n or 1, 1 or 2)."""
    y = linear(x)
    if factors is None:
        return y
    for name, factor in zip(ADAPTERS, factors.split(1, dim=-1), strict=False):
        adapter = getattr(linear, name, None)
        if adapter is not None:
            y = y + factor * adapter.up(adapter.down(x))
    return y


def gate_of(guidance: float | Tensor) -> float | Tensor:
    """The adapters' factor at a guidance."""
    return (guidance - 1) / 2


def attach(model: nn.Module, rank: int, operations: object, dtype: object, device: object) -> None:
    """Give a transformer its adapters: beside all that its tokens go through, but text keys."""

    def beside(linear: nn.Module) -> None:
        channels = linear.in_features, linear.out_features
        linear.few_step = Adapter(channels, rank, operations, dtype, device)

    for block in model.transformer_blocks:
        for attention in (
            block.attn1,
            block.audio_attn1,
            block.audio_to_video_attn,
            block.video_to_audio_attn,
        ):
            beside(attention.to_k)
            beside(attention.to_v)
        for attention in (
            block.attn1,
            block.audio_attn1,
            block.attn2,
            block.audio_attn2,
            block.audio_to_video_attn,
            block.video_to_audio_attn,
        ):
            beside(attention.to_q)
            beside(attention.to_out[0])
        for feed_forward in (block.ff, block.audio_ff):
            beside(feed_forward.net[0].proj)
            beside(feed_forward.net[2])
    for name, module in model.named_children():
        if name.endswith("adaln_single") and "prompt" not in name:
            beside(module.linear)
    beside(model.proj_out)
    beside(model.audio_proj_out)


FOLDED_BYTES = 2**28
"""Weights of a network up to which a second copy of them is nothing."""
# Where ComfyUI keeps what changes a weight on its way.
_PATCHES = ("weight_function", "weight_lowvram_function")


@torch.no_grad()
def folded(model: nn.Module, guidance: float, like: Tensor) -> nn.Module | None:
    """The network with its adapters as part of the weights, for passes whose tokens are all of
    few-step mode: the same up to rounding, without the adapters' products. All else is shared.

    None where it has none, where a second copy would be large, and where a host's weights are not
    there as they are multiplied: they lie elsewhere than `like`, or are patched on the way.
    """
    inner = getattr(model, "hosted", model)
    linears = [module for module in inner.modules() if hasattr(module, "few_step")]
    parts = [part for one in linears for part in (one, one.few_step.down, one.few_step.up)]
    if not parts or not all(_is_plain(part, like) for part in parts):
        return None
    if sum(one.weight.nbytes for one in linears) > FOLDED_BYTES:
        return None

    def twin(module: nn.Module) -> nn.Module:
        other = copy(module)
        other._modules = {name: twin(child) for name, child in module._modules.items()}
        adapter = other._modules.pop("few_step", None)
        if adapter is not None:
            thin = adapter.down.weight.t(), adapter.up.weight.t()
            weight = module.weight.t().addmm(*thin, alpha=gate_of(guidance)).t()
            # Input channels first: float32's products of few rows read that faster. bfloat16's take
            # ten times longer where a CPU has no instruction for them.
            weight = weight if weight.dtype == torch.float32 else weight.contiguous()
            other._parameters = module._parameters | {"weight": nn.Parameter(weight, False)}
        return other

    return twin(inner) if inner is model else model.over(twin(inner))


def _is_plain(linear: nn.Module, like: Tensor) -> bool:
    weight = linear.weight
    patched = any(getattr(linear, name, None) for name in _PATCHES)
    return (
        not patched
        and type(weight.data) is Tensor
        and weight.dtype == like.dtype
        and weight.device == like.device
    )
