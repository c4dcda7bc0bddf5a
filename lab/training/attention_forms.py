"""Other forms of attention, which OmniForcing's sinks are held against (its Table 3).

b batch, n tokens, a heads, d head dim, c channels.
LTX-2 normalises queries and keys over their whole width in every attention; the paper's table has a
QK norm as an alternative to sinks. So a form without any norm is needed to ask what the norm does:
its scale is frozen at what it was on average, so that the network begins as nearly what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...networks.attention import Attention
from ...networks.full_sequence import Told
from ...samplers.sigmas import few_step_sigmas
from .pair import Pair, velocity
from .system import System

CLIPS, BLOCKS = 2, 2


class FrozenNorm(nn.Module):
    """A factor per channel where a norm was: x (b, n, c) times its weight over its mean size."""

    def __init__(self, norm: nn.RMSNorm, size: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach() / size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c)."""
        return x * self.weight


class HeadNorm(nn.Module):
    """QK norm (arXiv 2010.04245): every head normalised by itself, with the old norm's weight."""

    def __init__(self, norm: nn.RMSNorm, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.heads, self.eps = heads, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c)."""
        parts = rearrange(x, "b n (a d) -> b n a d", a=self.heads)
        normed = F.rms_norm(parts, parts.shape[-1:], eps=self.eps)
        return rearrange(normed, "b n a d -> b n (a d)") * self.weight


class TanhGate(nn.Module):
    """What attention found, times tanh of a number that begins at 0 (arXiv 2204.14198)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c)."""
        return torch.tanh(self.gate) * self.linear(x)


class _Sized(nn.Module):
    """A norm that keeps count of how large its input is."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.norm, self.squares = norm, []

    def forward(self, x: Tensor) -> Tensor:
        self.squares.append(x.square().mean())
        return self.norm(x)


def _attentions(system: System) -> Iterator[Attention]:
    return (module for module in system.modules() if isinstance(module, Attention))


def _replace(system: System, form: Callable[[nn.Module, int], nn.Module]) -> None:
    for module in _attentions(system):
        module.q_norm = form(module.q_norm, module.heads)
        module.k_norm = form(module.k_norm, module.heads)


@torch.no_grad()
def _freeze(system: System) -> None:
    """Norms to factors, of the sizes that noisy clips of no prompt have at the few-step levels."""
    _replace(system, lambda norm, _: _Sized(norm))
    config = system.transformer.config
    draw = torch.Generator().manual_seed(0)
    side = 2
    video = CLIPS, config.in_channels, config.layout.video_latents(BLOCKS), side, side
    audio = CLIPS, config.layout.audio_latents(BLOCKS), config.audio_in_channels
    x = Pair(torch.randn(video, generator=draw), torch.randn(audio, generator=draw))
    nothing = torch.zeros(CLIPS, 1, dtype=torch.long)
    for sigma in few_step_sigmas(4)[:-1]:
        level = torch.full((CLIPS, BLOCKS), sigma)
        velocity(system.transformer, x, x, level, Told(system.text(nothing)))
    _replace(system, lambda sized, _: FrozenNorm(sized.norm, _size(sized)))


def _size(sized: _Sized) -> Tensor:
    return torch.stack(sized.squares).mean().sqrt()


def alter(system: System, form: str) -> None:
    """Give a system, not placed yet, another form of attention.

    Args:
        form: "frozen norm" (no normalisation), "head norm" (QK norm over no other), or "tanh gate"
            (on what the sound attends to, itself and the pictures, over no norm).

    Raises:
        ValueError: an unknown form.
    """
    if form == "head norm":
        _replace(system, HeadNorm)
    elif form in ("frozen norm", "tanh gate"):
        _freeze(system)
        for block in system.transformer.transformer_blocks if form == "tanh gate" else ():
            for module in (block.audio_attn1, block.video_to_audio_attn):
                module.to_out[0] = TanhGate(module.to_out[0])
    else:
        raise ValueError(f"found attention {form!r}, expected frozen norm, head norm or tanh gate")
