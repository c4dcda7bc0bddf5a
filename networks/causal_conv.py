"""Streaming causal building blocks: space and time apart, the past carried in a functional state.

Letters: b batch, f frames, h height, w width, c channels. Activations are (b, f, h, w, c): the
channel comes last, so that a temporal conv is one matrix product over stacked frames, and a spatial
conv sees a channels-last image without a copy.

A stream is cut anywhere and still computes the same numbers, because each temporal layer asks
`Stream` for the few frames before its input; what it will need next time goes into the next state.
Before the first frame of a stream every layer sees copies of its first frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

StreamState = tuple[Tensor, ...]


class Stream:
    """One pass over one chunk: gives each temporal layer its past, collects the state after it.

    Layers must call `extend` in the same order in every pass; the state is a tuple in that order.
    """

    def __init__(self, state: StreamState | None = None) -> None:
        self._past = None if state is None else list(state)
        self._next: list[Tensor] = []

    @property
    def starts(self) -> bool:
        """Whether this chunk is the first of its stream."""
        return self._past is None

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """Return x (b f h w c) with `frames` past frames before it: (b, frames + f, h, w, c).

        Raises:
            ValueError: when the state is of another network or of another batch, size or width.
        """
        if self._past is None:
            past = x[:, :1].expand(-1, frames, -1, -1, -1)
        else:
            index = len(self._next)
            if index >= len(self._past):
                raise ValueError(
                    f"the stream state has {len(self._past)} tensors and the network needs more; "
                    "pass the state that this network's previous call returned, or None at a "
                    "stream's start"
                )
            past = self._past[index]
            expected = (x.shape[0], frames, *x.shape[2:])
            if tuple(past.shape) != expected:
                raise ValueError(
                    f"stream state {index} has shape {tuple(past.shape)}, expected {expected} "
                    "(b f h w c); batch and size stay the same within a stream, start a new one "
                    "with None"
                )
        extended = torch.cat([past.to(x.dtype), x], dim=1)
        # A copy, so that a state keeps these frames alive and not the whole chunk.
        self._next.append(extended[:, extended.shape[1] - frames :].detach().clone())
        return extended

    def state(self) -> StreamState:
        """Return the state for the next chunk (never written to afterwards)."""
        return tuple(self._next)


def norm(x: Tensor) -> Tensor:
    """RMS norm over the channels of each position, (.., c); the next layer holds the scale."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-5)


class SpatialConv(nn.Conv2d):
    """3x3 convolution of each frame on its own; (b f h w c) -> (b f h' w' c')."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x, "b f h w c -> (b f) c h w"))
        return rearrange(y, "(b f) c h w -> b f h w c", b=x.shape[0])


class TemporalConv(nn.Module):
    """Causal convolution over three frames at each position; (b f h w c) -> (b f h w c')."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * inputs, outputs)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream.extend(x, 2)
        return self.linear(torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=-1))


class TemporalDown(nn.Module):
    """Half the frame rate, first frame kept; (b 1+2k h w c) -> (b 1+k h w c').

    Output j > 0 sees the input frames 2j-2, 2j-1 and 2j: never one after the frame it stands for.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1], x[:, :1], x], dim=1)
        return self.linear(torch.cat([x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]], dim=-1))


class TemporalUp(nn.Module):
    """Twice the frame rate; (b f h w c) -> (b 2f h w c'), 2f-1 frames at a stream's start."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = rearrange(self.linear(x), "b f h w (t c) -> b (f t) h w c", t=2)
        # The first latent stands for one frame, so the first of its two is a duplicate.
        return x[:, 1:] if stream.starts else x


class SpatialUp(nn.Module):
    """Twice the height and width; (b f h w c) -> (b f 2h 2w c')."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 4 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.linear(x), "b f h w (y x c) -> b f (h y) (w x) c", y=2, x=2)


class ResidualBlock(nn.Module):
    """x + time(silu(space(silu(norm(x))))); without `temporal` the second layer mixes channels
    only."""

    def __init__(self, width: int, temporal: bool) -> None:
        super().__init__()
        self.space = SpatialConv(width, width)
        self.time = TemporalConv(width, width) if temporal else nn.Linear(width, width)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = F.silu(self.space(F.silu(norm(x))))
        return x + (self.time(y, stream) if isinstance(self.time, TemporalConv) else self.time(y))


class Pipeline(nn.ModuleList):
    """Layers in a row over one stream, each given the stream when it has to do with time."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for layer in self:
            streams = isinstance(layer, ResidualBlock | TemporalConv | TemporalUp)
            x = layer(x, stream) if streams else layer(x)
        return x
