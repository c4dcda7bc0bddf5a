"""What TaoMate keeps of a stream against drift: its beginning, an average of it, and its colours.

b batch, c channels, f h w video latent grid, s audio latents, t tokens.
Two things are done with it, or one of them. The network's memory branch is told of it (`told`), and
every block after block 0 is given block 0's colours before it is handed out (`settled`). Each
finished block moves the averages a little, and all of them are drawn back towards block 0
(docs/ltx23.md, section 4; the constants are TaoMate's, whose checkpoint does not carry them). All
in float32; a clip of a batch knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from ..networks.memory_branch import Remembered

VIDEO_DOWNSAMPLE, AUDIO_TOKENS, COLOUR_GRID = 4, 64, 4
VIDEO_RATE, AUDIO_RATE, COLOUR_RATE = 0.15, 0.10, 0.03
VIDEO_TETHER, AUDIO_TETHER, COLOUR_TETHER = 0.20, 0.10, 0.60
LEAST_GATE, GATE_MIDDLE, GATE_WIDTH = 0.1, 0.05, 0.10
LARGEST_DRIFT = 2.0
BLEND, PATCH, MOST_PATCH = 0.04, 0.015, 0.35
EPS = 1e-6
_SUMMARIES = "now", "anchor", "before"


class Summary(NamedTuple):
    """A block, or the average of a stream.

    Attributes:
        video: how the picture is laid out, (b, t, c); audio: likewise of the sound, (b, 64, c).
        mean, std: of every channel of the video, (b, c).
        patches: mean of each channel in 4 x 4 parts of the picture, (b, c, 4, 4).
    """

    video: Tensor
    audio: Tensor
    mean: Tensor
    std: Tensor
    patches: Tensor


class StreamMemory(NamedTuple):
    """After some blocks.

    Attributes:
        now: their average.
        anchor: block 0.
        spread: block 0's deviation (b, c), unbiased.
        before: the average under which the last one was made; None for block 0, made without any.
    """

    now: Summary
    anchor: Summary
    spread: Tensor
    before: Summary | None = None

    @classmethod
    def begun(cls, video: Tensor, audio: Tensor) -> StreamMemory:
        """After block 0: video (b, c, f, h, w), audio (b, s, c)."""
        first = _summary(video, audio)
        return cls(first, first, video.std(dim=(2, 3, 4)))

    def told(self) -> Remembered:
        """What the network is told of it in the next block."""
        return self._told(self.now)

    def was_told(self) -> Remembered | None:
        """What it was told in the last one."""
        return None if self.before is None else self._told(self.before)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that stays."""
        named = {
            f"{name}.{part}": tensor
            for name, summary in zip(_SUMMARIES, (self.now, self.anchor, self.before), strict=True)
            if summary is not None
            for part, tensor in summary._asdict().items()
        }
        return named | {"spread": self.spread}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> StreamMemory:
        """The same from `tensors`; KeyError names one that lacks."""
        now, anchor, before = (
            Summary(*(tensors[f"{name}.{part}"] for part in Summary._fields))
            if name != "before" or any(key.startswith("before.") for key in tensors)
            else None
            for name in _SUMMARIES
        )
        return cls(now, anchor, tensors["spread"], before)

    def _told(self, now: Summary) -> Remembered:
        anchor = self.anchor
        colours = now.mean, now.std.log(), anchor.mean, anchor.std.log()
        return Remembered(
            torch.cat((anchor.video, now.video), dim=1), now.audio, torch.cat(colours, dim=1)
        )

    def settled(self, video: Tensor) -> Tensor:
        """Denoised video (b, c, f, h, w) of a later block with block 0's colours."""
        mean, std = video.mean(dim=(2, 3, 4)), video.std(dim=(2, 3, 4))
        video = _moved(video, mean, std, self.anchor.mean, self.spread)
        mean, std = _colours(video)
        blended = video + BLEND * (_moved(video, mean, std, self.now.mean, self.now.std) - video)
        _, std = _colours(blended)
        most = MOST_PATCH * std[:, :, None, None]
        lacking = (self.now.patches - _patches(blended)).clamp(min=-most, max=most)
        size = video.shape[3:]
        lacking = F.interpolate(lacking, size=size, mode="bilinear", align_corners=False)
        return blended + PATCH * lacking[:, :, None]

    def after(self, video: Tensor, audio: Tensor) -> StreamMemory:
        """After one more block, as it is handed out."""
        now, anchor, new = self.now, self.anchor, _summary(video, audio)
        alike = F.cosine_similarity(new.video.flatten(1), anchor.video.flatten(1), dim=1)
        gate = LEAST_GATE + (1 - LEAST_GATE) * ((alike - GATE_MIDDLE) / GATE_WIDTH).sigmoid()
        off = ((new.mean - anchor.mean).abs() / anchor.std).mean(dim=1)
        off = off + 0.1 * (new.std / anchor.std).log().abs().mean(dim=1)

        def drawn(name: str, rate: Tensor | float, tether: float) -> Tensor:
            old, fresh, first = (getattr(summary, name) for summary in (now, new, anchor))
            if isinstance(rate, Tensor):
                rate = rearrange(rate, f"b -> b {' '.join('1' * (old.ndim - 1))}")
            return ((1 - rate) * old + rate * fresh) * (1 - tether) + tether * first

        def coloured(name: str) -> Tensor:
            moved, old = drawn(name, COLOUR_RATE * gate, COLOUR_TETHER), getattr(now, name)
            whole = rearrange(off <= LARGEST_DRIFT, f"b -> b {' '.join('1' * (old.ndim - 1))}")
            return torch.where(whole, moved, old)

        average = Summary(
            drawn("video", VIDEO_RATE * gate, VIDEO_TETHER),
            drawn("audio", AUDIO_RATE, AUDIO_TETHER),
            *map(coloured, ("mean", "std", "patches")),
        )
        return self._replace(now=average, before=now)


def remembered(blocks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[StreamMemory]:
    """The memory after each block of a stream, from the first on: (video, audio) as handed out."""
    memory = None
    for video, audio in blocks:
        memory = memory.after(video, audio) if memory else StreamMemory.begun(video, audio)
        yield memory


def _moved(x: Tensor, mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor) -> Tensor:
    """Video of this mean and deviation (b, c) with others."""
    mean, std, to_mean, to_std = (
        rearrange(value, "b c -> b c 1 1 1") for value in (mean, std, to_mean, to_std)
    )
    return (x - mean) / std.clamp(min=EPS) * to_std + to_mean


def _colours(video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (population's) of every channel, (b, c)."""
    return video.mean(dim=(2, 3, 4)), video.std(dim=(2, 3, 4), correction=0).clamp(min=EPS)


def _patches(video: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(reduce(video, "b c f h w -> b c h w", "mean"), COLOUR_GRID)


def _pooled(height: int, width: int) -> tuple[int, int]:
    """At least two a side, where TaoMate has one: of a picture that is standardised over itself
    one mean alone is always 0."""
    rows, columns = (max(min(2, size), size // VIDEO_DOWNSAMPLE) for size in (height, width))
    return rows, columns


def picture_tokens(height: int, width: int) -> int:
    """Tokens that sum up pictures on a latent grid."""
    rows, columns = _pooled(height, width)
    return rows * columns


def _summary(video: Tensor, audio: Tensor) -> Summary:
    picture = reduce(video, "b c f h w -> b c h w", "mean")
    tokens = F.adaptive_avg_pool2d(_standard(picture, (2, 3)), _pooled(*picture.shape[2:]))
    sound = F.adaptive_avg_pool1d(_standard(audio, (1,)).transpose(1, 2), AUDIO_TOKENS)
    return Summary(
        rearrange(tokens, "b c h w -> b (h w) c"),
        rearrange(sound, "b c s -> b s c"),
        *_colours(video),
        _patches(video),
    )


def _standard(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    std = x.std(dim=dims, correction=0, keepdim=True).clamp(min=EPS)
    return (x - x.mean(dim=dims, keepdim=True)) / std
