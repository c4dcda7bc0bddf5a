"""Adapters that act in few-step mode alone, so that it cannot harm multi-step mode, its teacher.

b batch, n tokens, c channels, r rank.
Guided velocities are linear in w - 1 (classifier-free guidance, arXiv:2207.12598), so the step size
has its embedding and guidance has these: y = W x + (w - 1) / 2 * B (A x) where d > 0, and y = W x
where d = 0, bit for bit. Mutual Forcing (arXiv:2604.25819) shares all parameters between its modes;
a config without a rank does so.
"""

from __future__ import annotations

from torch import Tensor, nn

FEW_STEP = ".few_step."
"""What the names of the adapters' parameters have in them, between a layer's and their own."""


class FewStepAdapter(nn.Module):
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


def adapted(linear: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
    """A linear layer of x (b, n, c) with its adapter, if it has one, times gate (b, n or 1, 1)."""
    y = linear(x)
    adapter = getattr(linear, "few_step", None)
    if gate is None or adapter is None:
        return y
    return y + gate * adapter.up(adapter.down(x))


def attach(model: nn.Module, rank: int, operations: object, dtype: object, device: object) -> None:
    """Give a transformer its adapters: beside all that its tokens go through, but text keys."""

    def beside(linear: nn.Module) -> None:
        channels = linear.in_features, linear.out_features
        linear.few_step = FewStepAdapter(channels, rank, operations, dtype, device)

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
