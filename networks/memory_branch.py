"""TaoMate's memory branch: a stream's beginning and its average, seen by some of the layers.

b batch, n tokens of one modality, k blocks, t memory tokens of one block, c channels.
After its own attention a modality attends over a few tokens that sum up the stream, and the video
is scaled and shifted by the stream's colours (docs/ltx23.md, section 3). What the tokens are is
`samplers/stream_memory.py`'s. The keys and values are not cached, so a block may be made under
another memory than those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionKernel, split_heads
from .config import TransformerConfig
from .kernels import Kernels

_PARTS = ("learned_memory_", "_memory_attn.", "_color_film.")


def is_memory(key: str) -> bool:
    """Whether a tensor of a network belongs to its memory branch."""
    return any(part in key for part in _PARTS)


class Remembered(NamedTuple):
    """What a block is told of the stream before it.

    Attributes:
        video, audio: tokens (b, t, latent channels), or (b, t, c) once they are encoded.
        colour: (b, 4 * latent channels) mean and log of the standard deviation of every channel,
            of the stream and of block 0.
    """

    video: Tensor
    audio: Tensor
    colour: Tensor


def of_all_blocks(memories: Sequence[Remembered], like: Tensor) -> Remembered:
    """What the k - 1 blocks after block 0 are told, in one: tokens (b, (k - 1) t, c) and colours
    (b, k - 1, c)."""
    video, audio, colour = zip(*memories, strict=True)
    both = (torch.cat(tokens, dim=1) for tokens in (video, audio))
    return Remembered(*(x.to(like) for x in (*both, torch.stack(colour, dim=1))))


class MemoryAttention(nn.Module):
    """Parameters of one modality's attention over the memory, under TaoMate's names."""

    def __init__(
        self, query_dim: int, dim: int, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.to_q = operations.Linear(query_dim, dim, bias=False, **kwargs)
        self.to_k = operations.Linear(dim, dim, bias=False, **kwargs)
        self.to_v = operations.Linear(dim, dim, bias=False, **kwargs)
        self.to_out = operations.Linear(dim, query_dim, **kwargs)


class ColourFilm(nn.Module):
    """Parameters of what the colours scale and shift the video by."""

    def __init__(
        self, colours: int, hidden: int, dim: int, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.net = nn.ModuleList(
            [
                operations.Linear(colours, hidden, **kwargs),
                nn.Identity(),
                operations.Linear(hidden, 2 * dim, **kwargs),
            ]
        )


def attach_encoders(
    model: nn.Module,
    config: TransformerConfig,
    operations: object,
    dtype: object = None,
    device: object = None,
) -> None:
    """Give a network what encodes the memory's tokens."""
    kwargs = {"dtype": dtype, "device": device}
    model.learned_memory_video_encoder = operations.Linear(
        config.in_channels, config.memory_video_dim, **kwargs
    )
    model.learned_memory_audio_encoder = operations.Linear(
        config.audio_in_channels, config.memory_audio_dim, **kwargs
    )


def attach_branch(
    block: nn.Module,
    config: TransformerConfig,
    operations: object,
    dtype: object = None,
    device: object = None,
) -> None:
    """Give a layer its memory branch."""
    rest = operations, dtype, device
    block.video_memory_attn = MemoryAttention(config.video_dim, config.memory_video_dim, *rest)
    block.audio_memory_attn = MemoryAttention(config.audio_dim, config.memory_audio_dim, *rest)
    block.video_color_film = ColourFilm(
        4 * config.in_channels, config.memory_film_hidden, config.video_dim, *rest
    )


def encoded(model: nn.Module, memory: Remembered) -> Remembered:
    """The memory as every layer attends over it."""
    return memory._replace(
        video=model.learned_memory_video_encoder(memory.video),
        audio=model.learned_memory_audio_encoder(memory.audio),
    )


def recalled(
    module: nn.Module,
    x: Tensor,
    memory: Tensor,
    heads: int,
    kernel: AttentionKernel,
    block: Tensor | None = None,
) -> Tensor:
    """Attention of normalised tokens x (b, n, c) over encoded memory tokens; (b, n, c).

    Args:
        block: of each token (n,), where the memory is that of all blocks (`of_all_blocks`).
    """
    q, k, v = (
        split_heads(part, heads)
        for part in (module.to_q(x), module.to_k(memory), module.to_v(memory))
    )
    mask = None
    if block is not None:
        told = torch.arange(memory.shape[1], device=x.device) * block.max() // memory.shape[1] + 1
        # Block 0 is told nothing: what it finds is dropped below, but a softmax must find some.
        mask = (block[:, None] == told) | (block == 0)[:, None]
    found = module.to_out(rearrange(kernel(q, k, v, mask), "b a n d -> b n (a d)"))
    return found if block is None else found * (block > 0)[:, None]


def coloured(
    module: nn.Module,
    x: Tensor,
    colour: Tensor,
    kernels: Kernels,
    eps: float,
    block: Tensor | None = None,
) -> Tensor:
    """Tokens x (b, n, c) plus themselves, normalised, scaled and shifted by the colours.

    Args:
        block: of each token (n,), where the colours are those of all blocks.
    """
    rows = module.net[2](F.silu(module.net[0](colour)))
    rows = rows[:, None] if block is None else F.pad(rows, (0, 0, 1, 0))[:, block]
    scale, shift = rows.chunk(2, dim=-1)
    return x + kernels.modulate(x, scale, shift, eps)
