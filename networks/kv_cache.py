"""The rolling key-value cache, and the pass over one block that reads and extends it.

l layers, b batch, a heads, n tokens of this block, m tokens attended over, d head dim, f h w video
latent grid, s audio latents.
A `RollingCache` is a value: appending a block gives a new one that shares the older blocks'
tensors, so two futures can grow from one past. Keys are kept as they were before rotation and
rotated when a block is opened, at positions re-based so that the kept blocks follow the prefix
directly: a stream of any age stays in the range of positions that the network was trained on. A
checkpoint that was trained otherwise asks for absolute ones in its config. Whole blocks are
dropped, so both modalities and all four attentions lose the same second at the same
time (OmniForcing, arXiv 2603.11647, section 3.4: modality-independent rolling KV cache).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import KeyValueStore
from .execution import EAGER, Tensors, Workspace
from .kernels import Kernels
from .lanes import ONE_LANE
from .layer import Pass, Text
from .memory_branch import Remembered, encoded
from .modulation import Modulation, SharedModulation
from .rope import ModalityTables, RopeTable
from .transformer import patch_audio, patch_video, run_layers, write_keys

KeysValues = tuple[Tensor, Tensor]


class BlockKeys(NamedTuple):
    """One block's keys (unrotated) and values of all layers, each (l, b, a, n, d)."""

    video: KeysValues
    audio: KeysValues
    audio_to_video: KeysValues
    video_to_audio: KeysValues


ATTENTIONS = BlockKeys._fields


def kept_blocks(end: int, window: int, opening: int) -> tuple[int, ...]:
    """Which of the first `end` blocks are kept: the prefix and the last `window`, but all of them
    while the blocks of the opening are being made (`TransformerConfig.opening_blocks`)."""
    first = max(1, end - window) if end >= opening else 1
    return (*range(min(end, 1)), *range(first, end))


@dataclass(frozen=True)
class RollingCache:
    """The past as the network sees it: the global prefix (with its sinks) and the last blocks.

    Attributes:
        window: blocks kept besides the prefix.
        indices: absolute index of every kept block.
        blocks: their keys and values.
        opening: blocks from the first on that all see all before them.
    """

    window: int
    indices: tuple[int, ...] = ()
    blocks: tuple[BlockKeys, ...] = ()
    opening: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window} blocks, expected at least 1")

    @property
    def next_block(self) -> int:
        """Absolute index of the block that comes next."""
        return self.indices[-1] + 1 if self.indices else 0

    def append(self, keys: BlockKeys, index: int | None = None) -> RollingCache:
        """A cache that also holds the next block, or a later one, if only some of the past is read
        again; the oldest ones after the prefix make room."""
        index = self.next_block if index is None else index
        held = dict(zip((*self.indices, index), (*self.blocks, keys), strict=True))
        kept = kept_blocks(index + 1, self.window, self.opening)
        indices = tuple(index for index in kept if index in held)
        return replace(self, indices=indices, blocks=tuple(held[index] for index in indices))

    def to(self, like: Tensor) -> RollingCache:
        """The same keys and values in the dtype and on the device of `like`."""
        blocks = tuple(
            BlockKeys(*((k.to(like), v.to(like)) for k, v in block)) for block in self.blocks
        )
        return replace(self, blocks=blocks)

    def bytes(self) -> int:
        """Memory of the kept keys and values."""
        return sum(
            tensor.numel() * tensor.element_size()
            for block in self.blocks
            for keys_values in block
            for tensor in keys_values
        )


class _Slot:
    """One attention of a layer of an open block: rotated past, then room for the block."""

    def __init__(self, k: Tensor, v: Tensor, past: int) -> None:
        self.k, self.v = k, v
        self.past = k[:, :, :past], v[:, :, :past]
        self.new_k, self.new_v = k[:, :, past:], v[:, :, past:]


class _LayerStore:
    """The key-value store that attention asks, for one layer of an open block."""

    def __init__(self, kernels: Kernels, slots: dict[str, _Slot]) -> None:
        self.kernels, self.slots = kernels, slots
        self.record: dict[str, KeysValues] | None = None

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> KeysValues:
        if self.record is not None:
            for kept, new in zip(self.record[name], (k, v), strict=True):
                kept.copy_(new)
        slot = self.slots.get(name)
        if slot is None:
            return self.kernels.rotate(k, rope), v
        if k.requires_grad or v.requires_grad:
            # Overwriting the slot would destroy what the backward pass needs.
            past_k, past_v = slot.past
            k = self.kernels.rotate(k, rope)
            return torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        self.kernels.rotate_into(slot.new_k, k, *rope)
        slot.new_v.copy_(v)
        return slot.k, slot.v


class OpenBlock:
    """The next block of a stream, ready to be denoised: the past is rotated and laid out once.

    Args:
        model: the network.
        cache: the past; not changed.
        height, width: latent grid of the video.
        like: tensor with the device and dtype to compute in.
        workspace: shared by the blocks of a stream, which are opened one at a time; by default a
            new one.
        index: of the block in the stream; by default it follows the last one of the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: RollingCache,
        height: int,
        width: int,
        like: Tensor,
        workspace: Workspace | None = None,
        index: int | None = None,
    ) -> None:
        config = model.config
        layout = config.layout
        self.model, self.cache, self.like = model, cache, like
        self.height, self.width = height, width
        self.workspace = workspace or Workspace(EAGER, like.device)
        self.index = cache.next_block if index is None else index
        kept = len(cache.indices)
        self.is_prefix = kept == 0
        # From here on all blocks have the shape of this one.
        self.is_full = kept == 1 + cache.window and self.index >= cache.opening
        sinks = config.num_audio_sink_tokens
        video = tuple(n * height * width for n in layout.video_span(kept))
        start, stop = layout.audio_span(kept)
        audio = (start if self.is_prefix else start + sinks, stop + sinks)
        self.spans = {
            "video": video,
            "audio": audio,
            "audio_to_video": audio,
            "video_to_audio": video,
        }
        # Room for a power of two of blocks, so that a growing window is not laid out anew for each.
        most = max(2 + cache.window, cache.opening)
        self.capacity = min(most, 1 << kept.bit_length())
        if config.absolute_positions:
            places = (*cache.indices, self.index)
            whole = self.workspace.tables_at(config, places, height, width, like)
        else:
            whole = self.workspace.tables(config, self.capacity, height, width, like)
        self.tables = ModalityTables(
            video=whole.video.tokens(*video),
            audio=whole.audio.tokens(*audio),
            cross_video=whole.cross_video.tokens(*video),
            cross_audio=whole.cross_audio.tokens(*audio),
        )
        tables = {
            "video": whole.video,
            "audio": whole.audio,
            "audio_to_video": whole.cross_audio,
            "video_to_audio": whole.cross_video,
        }
        with self.workspace.watch("open"):
            laid_out = {
                name: self._lay_out(name, tables[name]) for name in ATTENTIONS if cache.blocks
            }
        self._stores = tuple(
            _LayerStore(
                self.workspace.kernels,
                {
                    name: _Slot(k[layer], v[layer], self.spans[name][0])
                    for name, (k, v) in laid_out.items()
                },
            )
            for layer in range(config.num_layers)
        )
        self.stores: tuple[KeyValueStore, ...] = self._stores

    def _heads(self, name: str) -> tuple[int, int]:
        config = self.model.config
        if name == "video":
            return config.num_attention_heads, config.attention_head_dim
        return config.audio_num_attention_heads, config.audio_attention_head_dim

    def _lay_out(self, name: str, table: RopeTable) -> KeysValues:
        """Rotated keys, and values, of the past in all layers: (l, b, a, m, d), then room."""
        layout, grid = self.model.config.layout, self.height * self.width
        if name in ("video", "video_to_audio"):
            room = layout.video_latents(self.capacity) * grid
        else:
            room = layout.audio_latents(self.capacity) + self.model.config.num_audio_sink_tokens
        first, _ = getattr(self.cache.blocks[0], name)
        layers, batch, heads, _, dim = first.shape
        all_k, all_v = self.workspace.buffers(name, (layers, batch, heads, room, dim), self.like)
        start = 0
        for block in self.cache.blocks:
            k, v = getattr(block, name)
            stop = start + k.shape[3]
            self.workspace.kernels.rotate_into(
                all_k[..., start:stop, :], k, *table.tokens(start, stop)
            )
            all_v[..., start:stop, :] = v
            start = stop
        end = self.spans[name][1]
        return all_k[..., :end, :], all_v[..., :end, :]

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
        self,
        video: Tensor,
        audio: Tensor,
        text: Text,
        modulation: Modulation,
        track: Tensor | None = None,
        memory: Remembered | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity of noisy latents: video (b, c, f, h, w) and audio (b, s, c), same shapes out.

        `track` (b, s, c) is the timed transcript of the audio, `memory` what a network with a
        memory branch is told of the stream.
        """

        def denoise(video: Tensor, audio: Tensor, run: Pass) -> Tensors:
            return run_layers(self.model, video, audio, run)

        with self.workspace.watch("denoise"):
            video_tokens, audio_tokens = self._run(
                "denoise", denoise, video, audio, text, modulation, track, memory
            )
        sinks = self.model.config.num_audio_sink_tokens if self.is_prefix else 0
        frames = video.shape[2]
        return (
            rearrange(
                video_tokens, "b (f h w) c -> b c f h w", f=frames, h=self.height, w=self.width
            ),
            audio_tokens[:, sinks:],
        )

    @torch.no_grad()
    def commit(
        self,
        video: Tensor,
        audio: Tensor,
        text: Text,
        modulation: Modulation,
        track: Tensor | None = None,
        memory: Remembered | None = None,
    ) -> RollingCache:
        """Refresh: one pass over the clean latents whose keys and values become part of the past.

        `modulation` must be that of sigma 0 (OmniForcing's released loop, docs/omniforcing.md
        section 4).
        """

        def refresh(video: Tensor, audio: Tensor, run: Pass) -> Tensors:
            kept = {name: self._new_keys(name, video.shape[0]) for name in ATTENTIONS}
            for layer, store in enumerate(self._stores):
                store.record = {name: (k[layer], v[layer]) for name, (k, v) in kept.items()}
            write_keys(self.model, video, audio, run)
            for store in self._stores:
                store.record = None
            return tuple(tensor for name in ATTENTIONS for tensor in kept[name])

        with self.workspace.watch("refresh"):
            flat = self._run("refresh", refresh, video, audio, text, modulation, track, memory)
        keys_values = zip(flat[::2], flat[1::2], strict=True)
        return self.cache.append(BlockKeys(*keys_values), self.index)

    def _new_keys(self, name: str, batch: int) -> KeysValues:
        heads, dim = self._heads(name)
        start, stop = self.spans[name]
        shape = self.model.config.num_layers, batch, heads, stop - start, dim
        return self.like.new_empty(shape), self.like.new_empty(shape)

    def _run(
        self,
        name: str,
        function: object,
        video: Tensor,
        audio: Tensor,
        text: Text,
        modulation: Modulation,
        track: Tensor | None = None,
        memory: Remembered | None = None,
    ) -> Tensors:
        shared = isinstance(modulation, SharedModulation)
        tracks = () if track is None else (_plain(track),)
        remembered = () if memory is None else tuple(memory)

        def whole(video: Tensor, audio: Tensor, *rest: Tensor) -> Tensors:
            told, rest = rest[: len(tracks)], rest[len(tracks) :]
            past, flat = rest[: len(remembered)], rest[len(remembered) :]
            run = Pass(
                modulation.at(*flat) if shared else modulation,
                text,
                self.tables,
                self.stores,
                kernels=self.workspace.kernels,
                # What is made layer by layer would be made on one lane and read on the other.
                lanes=self.workspace.lanes if shared else ONE_LANE,
                memory=encoded(self.model, Remembered(*past)) if past else None,
            )
            patched = patch_audio(self.model, audio, self.is_prefix, *told)
            return function(patch_video(self.model, video), patched, run)

        frames = _plain(rearrange(video, "b c f h w -> b (f h w) c"))
        tokens = frames, _plain(audio), *tracks, *remembered
        if not shared:
            return whole(*tokens)
        return self.workspace.run(name, self.is_full, text, whole, *tokens, modulation.flat)


def _plain(tokens: Tensor) -> Tensor:
    """The same tokens, laid out one after the other.

    Equal numbers that lie differently in memory go through different matrix kernels, which round
    differently: a state that was loaded or rebuilt would not go on bit for bit.
    """
    return tokens.clone(memory_format=torch.contiguous_format)
