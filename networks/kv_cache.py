"""The rolling key-value cache, and the pass over one block that reads and extends it.

b batch, a heads, n tokens of this block, m tokens attended over, d head dim, f h w video latent grid,
s audio latents.
A `RollingCache` is a value: appending a block gives a new one that shares the older blocks' tensors, so two
futures can grow from one past. Keys are kept as they were before rotation and rotated when a block is
opened, at positions re-based so that the kept blocks follow the prefix directly: a stream of any age stays in
the range of positions that the network was trained on. Whole blocks are dropped, so both streams and all four
attention paths lose the same second at the same time (OmniForcing, section 3.4: modality-independent rolling
KV cache).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import KeyValueStore
from .modulation import Modulation
from .rope import RopeTable, StreamTables, rotate, stream_tables
from .transformer import Pass, TextKeys, patch_audio, patch_video, run_layers

PATHS = ("video", "audio", "audio_to_video", "video_to_audio")


class LayerKeys(NamedTuple):
    """One block's keys (unrotated) and values in one layer, a pair of (b, a, n, d) per attention path."""

    video: tuple[Tensor, Tensor]
    audio: tuple[Tensor, Tensor]
    audio_to_video: tuple[Tensor, Tensor]
    video_to_audio: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RollingCache:
    """The past as the network sees it: the global prefix (with its sink tokens) and the last blocks.

    Attributes:
        window: blocks kept besides the prefix.
        indices: absolute index of every kept block.
        blocks: their keys and values, one `LayerKeys` per layer.
    """

    window: int
    indices: tuple[int, ...] = ()
    blocks: tuple[tuple[LayerKeys, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window} blocks, expected at least 1")

    @property
    def next_block(self) -> int:
        """Absolute index of the block that comes next."""
        return self.indices[-1] + 1 if self.indices else 0

    def append(self, keys: tuple[LayerKeys, ...]) -> RollingCache:
        """A cache that also holds the next block; the oldest block after the prefix makes room for it."""
        indices, blocks = (*self.indices, self.next_block), (*self.blocks, keys)
        if len(indices) > 1 + self.window:
            indices, blocks = indices[:1] + indices[2:], blocks[:1] + blocks[2:]
        return replace(self, indices=indices, blocks=blocks)

    def to(self, like: Tensor) -> RollingCache:
        """The same keys and values in the dtype and on the device of `like` (itself if they are)."""
        blocks = tuple(
            tuple(LayerKeys(*((k.to(like), v.to(like)) for k, v in layer)) for layer in block)
            for block in self.blocks
        )
        return replace(self, blocks=blocks)

    def bytes(self) -> int:
        """Memory of the kept keys and values."""
        return sum(
            tensor.numel() * tensor.element_size()
            for block in self.blocks
            for layer in block
            for pair in layer
            for tensor in pair
        )


class _PathStore:
    """One attention path of one layer while a block is open: rotated past, then this block's slot."""

    def __init__(self, past: list[tuple[Tensor, Tensor]], rope: RopeTable, new_tokens: int) -> None:
        k0, v0 = past[0]
        self.past_tokens = sum(k.shape[2] for k, _ in past)
        shape = list(k0.shape)
        shape[2] = self.past_tokens + new_tokens
        self.k, self.v = k0.new_empty(shape), v0.new_empty(shape)
        start = 0
        for k, v in past:
            stop = start + k.shape[2]
            self.k[:, :, start:stop] = rotate(k, rope.tokens(start, stop))
            self.v[:, :, start:stop] = v
            start = stop

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.requires_grad or v.requires_grad:
            # Overwriting the slot would destroy what the backward pass needs.
            past = slice(0, self.past_tokens)
            return torch.cat((self.k[:, :, past], k), dim=2), torch.cat(
                (self.v[:, :, past], v), dim=2
            )
        self.k[:, :, self.past_tokens :] = k
        self.v[:, :, self.past_tokens :] = v
        return self.k, self.v


class _LayerStore:
    """The key-value store that attention asks, for one layer of an open block."""

    def __init__(self, paths: dict[str, _PathStore]) -> None:
        self.paths = paths
        self.record: dict[str, tuple[Tensor, Tensor]] | None = None

    def extend(self, path: str, k: Tensor, v: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        if self.record is not None:
            self.record[path] = (k.detach().clone(), v.detach().clone())
        k = rotate(k, rope)
        store = self.paths.get(path)
        return (k, v) if store is None else store.extend(k, v)


class OpenBlock:
    """The next block of a stream, ready to be denoised: the past is rotated and laid out once.

    Args:
        model: the network.
        cache: the past; not changed.
        height, width: latent grid of the video.
        like: tensor with the device and dtype to compute in.
    """

    def __init__(
        self, model: nn.Module, cache: RollingCache, height: int, width: int, like: Tensor
    ) -> None:
        config = model.config
        layout = config.layout
        self.model, self.cache = model, cache
        self.height, self.width = height, width
        kept = len(cache.indices)
        self.is_prefix = kept == 0
        sinks = config.num_audio_sink_tokens
        video_start, video_stop = (n * height * width for n in layout.video_span(kept))
        audio_start, audio_stop = layout.audio_span(kept)
        if not self.is_prefix:
            audio_start += sinks
        audio_stop += sinks
        whole = StreamTables(*(t.to(like) for t in stream_tables(config, kept + 1, height, width)))
        spans = {"video": (video_start, video_stop), "audio": (audio_start, audio_stop)}
        spans |= {"audio_to_video": spans["audio"], "video_to_audio": spans["video"]}
        tables = {
            "video": whole.video,
            "audio": whole.audio,
            "audio_to_video": whole.cross_audio,
            "video_to_audio": whole.cross_video,
        }
        self.tables = StreamTables(
            video=whole.video.tokens(video_start, video_stop),
            audio=whole.audio.tokens(audio_start, audio_stop),
            cross_video=whole.cross_video.tokens(video_start, video_stop),
            cross_audio=whole.cross_audio.tokens(audio_start, audio_stop),
        )
        self.stores: tuple[KeyValueStore, ...] = tuple(
            _LayerStore(
                {
                    path: _PathStore(
                        [getattr(block[layer], path) for block in cache.blocks],
                        tables[path],
                        spans[path][1] - spans[path][0],
                    )
                    for path in PATHS
                }
                if cache.blocks
                else {}
            )
            for layer in range(config.num_layers)
        )

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """(channels, f, h, w) of this block's video latents."""
        layout = self.model.config.layout
        frames = layout.video_first if self.is_prefix else layout.video_next
        return self.model.config.in_channels, frames, self.height, self.width

    @property
    def audio_shape(self) -> tuple[int, int]:
        """(s, channels) of this block's audio latents."""
        layout = self.model.config.layout
        return (
            layout.audio_first if self.is_prefix else layout.audio_next,
            self.model.config.audio_in_channels,
        )

    def velocity(
        self, video: Tensor, audio: Tensor, text: TextKeys, modulation: Modulation
    ) -> tuple[Tensor, Tensor]:
        """Velocity of noisy latents: video (b, c, f, h, w) and audio (b, s, c), same shapes out."""
        video_tokens, audio_tokens = self._run(video, audio, text, modulation, heads=True)
        sinks = self.model.config.num_audio_sink_tokens if self.is_prefix else 0
        frames = video.shape[2]
        return (
            rearrange(
                video_tokens, "b (f h w) c -> b c f h w", f=frames, h=self.height, w=self.width
            ),
            audio_tokens[:, sinks:],
        )

    def commit(
        self, video: Tensor, audio: Tensor, text: TextKeys, modulation: Modulation
    ) -> RollingCache:
        """Refresh: one pass over the clean latents whose keys and values become part of the past.

        `modulation` must be that of sigma 0 (OmniForcing's released loop, omniforcing.md section 4).
        """
        for store in self.stores:
            store.record = {}
        with torch.no_grad():
            self._run(video, audio, text, modulation, heads=False)
        keys = tuple(LayerKeys(**store.record) for store in self.stores)
        for store in self.stores:
            store.record = None
        return self.cache.append(keys)

    def _run(
        self, video: Tensor, audio: Tensor, text: TextKeys, modulation: Modulation, heads: bool
    ) -> tuple[Tensor, Tensor]:
        run = Pass(modulation, text, self.tables, self.stores)
        return run_layers(
            self.model,
            patch_video(self.model, _plain(rearrange(video, "b c f h w -> b (f h w) c"))),
            patch_audio(self.model, _plain(audio), with_sinks=self.is_prefix),
            run,
            heads=heads,
        )


def _plain(tokens: Tensor) -> Tensor:
    """The same tokens in rows, one after the other.

    Equal numbers that lie differently in memory go through different matrix kernels, which round
    differently: a state that was loaded or rebuilt would not go on bit for bit.
    """
    return tokens.clone(memory_format=torch.contiguous_format)
