"""The rolling key-value cache, and the pass over one block that reads and extends it.

l layers, b batch, a heads, n tokens of this block, m tokens attended over, d head dim, f h w video
latent grid, s audio latents.
A `RollingCache` is a value: appending a block gives a new one that shares the older blocks'
tensors, so two futures can grow from one past. Keys are kept as they were before rotation and
rotated where they are used, at positions re-based so that the kept blocks follow the prefix
directly: a stream of any age stays in the range of positions that the network was trained on. A
checkpoint that was trained otherwise asks for absolute ones in its config. Whole blocks are
dropped, so both modalities and all four attentions lose the same second at the same
time (OmniForcing, arXiv 2603.11647, section 3.4: modality-independent rolling KV cache).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import TransformerConfig
from .execution import EAGER, Tensors, Workspace
from .kept_keys import (
    AS_COMPUTED,
    ATTENTIONS,
    ON_HOST,
    BlockKeys,
    Kept,
    KeysValues,
    kept_bytes,
    placed,
    room,
)
from .key_stores import JoinedPast, LaidOutPast, Rooms, Slot, TwoPasts, tables_beside
from .lanes import ONE_LANE
from .layer import FreshKeys, Pass, Text
from .memory_branch import Remembered, encoded
from .modulation import Modulation, SharedModulation
from .rope import ModalityTables
from .tensor_parallel import part_of
from .transformer import patch_audio, patch_video, run_layers, write_keys

NO_PAST = FreshKeys()


def kept_blocks(end: int, window: int, opening: int) -> tuple[int, ...]:
    """Which of the first `end` blocks are kept: the prefix and the last `window`, but all of them
    while the blocks of the opening are being made (`TransformerConfig.opening_blocks`)."""
    first = max(1, end - window) if end >= opening else 1
    return (*range(min(end, 1)), *range(first, end))


def most_blocks(config: TransformerConfig, window: int) -> int:
    """Blocks whose keys a stream of any age needs at once: those that it keeps, and the next."""
    return max(2 + window, config.opening_blocks)


def key_bytes(
    config: TransformerConfig,
    blocks: int,
    height: int,
    width: int,
    element_size: int,
    kept: Kept = AS_COMPUTED,
) -> int:
    """Memory of the keys and values of the first `blocks` blocks of one clip, in all layers, where
    they are computed."""
    video = config.layout.video_latents(blocks) * height * width
    audio = config.layout.audio_latents(blocks) + config.num_audio_sink_tokens
    crossing = video + audio
    numbers = video * config.video_dim + (audio + crossing) * config.audio_dim
    rows = video * config.num_attention_heads
    rows += (audio + crossing) * config.audio_num_attention_heads
    each = 2 * config.num_layers
    return kept_bytes(kept, each * numbers, each * rows, element_size)


@dataclass(frozen=True)
class RollingCache:
    """The past as the network sees it: the global prefix (with its sinks) and the last blocks.

    Attributes:
        window: blocks kept besides the prefix.
        indices: absolute index of every kept block.
        blocks: their keys and values.
        opening: blocks from the first on that all see all before them.
        kept: how and where the keys and values lie.
    """

    window: int
    indices: tuple[int, ...] = ()
    blocks: tuple[BlockKeys, ...] = ()
    opening: int = 0
    kept: Kept = AS_COMPUTED

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window} blocks, expected at least 1")

    @property
    def next_block(self) -> int:
        """Absolute index of the block that comes next."""
        return self.indices[-1] + 1 if self.indices else 0

    def append(self, keys: BlockKeys | None, index: int | None = None) -> RollingCache:
        """A cache that also holds the next block, or a later one, if only some of the past is read
        again; the oldest ones after the prefix make room. None: it is still to be read."""
        index = self.next_block if index is None else index
        held = dict(zip((*self.indices, index), (*self.blocks, keys), strict=True))
        kept = kept_blocks(index + 1, self.window, self.opening)
        indices = tuple(index for index in kept if index in held)
        return replace(self, indices=indices, blocks=tuple(held[index] for index in indices))

    def to(self, like: Tensor) -> RollingCache:
        """The same keys and values as they are kept where `like` is computed."""
        place = partial(placed, self.kept, like=like)
        return replace(self, blocks=tuple(block.map(place) for block in self.blocks))

    def bytes(self) -> int:
        """Memory of the kept keys and values."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors())


class BlockInput(NamedTuple):
    """What a pass over a block reads besides the past.

    Attributes:
        video, audio: latents (b, c, f, h, w) and (b, s, c).
        text: keys of its prompt.
        track: (b, s, c) what the audio is told (`transformer.patch_audio`); None for nothing.
        memory: what a network with a memory branch is told of the stream.
    """

    video: Tensor
    audio: Tensor
    text: Text
    track: Tensor | None = None
    memory: Remembered | None = None


class OpenBlock:
    """The next block of a stream, ready to be denoised.

    Args:
        model: the network.
        cache: the past; not changed.
        height, width: latent grid of the video.
        like: tensor with the device and dtype to compute in.
        workspace: shared by the blocks of a stream, of which one may be open at a time, or one and
            the one that it `follows`; by default a new one.
        index: of the block in the stream; by default it follows the last one of the cache.
        follows: the block before it, where that is to be read in this one's first pass: the block
            as it was opened, and its clean latents.

    Attributes:
        cache: of a block that follows another, without that one's keys until its first pass.
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
        follows: tuple[OpenBlock, BlockInput] | None = None,
    ) -> None:
        config = model.config
        layout = config.layout
        self.model, self.cache, self.like = model, cache, like
        self.height, self.width = height, width
        self.workspace = workspace or Workspace(EAGER, like.device)
        self.follows = follows
        self.place = 0 if follows is None else 1 - follows[0].place
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
        # Room for a power of two of blocks, so that a growing window is not laid out anew for each;
        # where passes are recorded, never anywhere else, although less is read again for a prompt.
        self.capacity = most_blocks(config, cache.window)
        if not self.workspace.keeps_still:
            self.capacity = min(self.capacity, 1 << kept.bit_length())
        if config.absolute_positions:
            places = (*cache.indices, self.index)
            whole = self.workspace.tables_at(config, places, height, width, like, self.place)
        else:
            whole = self.workspace.tables(config, self.capacity, height, width, like)
        part = part_of(model)
        if part is not None:
            whole = part.tables(whole)
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
        self._past_tables = {
            name: table.tokens(0, self.spans[name][1]) for name, table in tables.items()
        }
        with self.workspace.watch("open"):
            self.stores: tuple[JoinedPast | LaidOutPast, ...] = (
                self._laid_out() if self.workspace.lays_out else self._joined(cache)
            )

    def followed(self, clean: BlockInput) -> OpenBlock:
        """The next block, opened before this one is read: its first pass does both at once.

        Under causality that is exact, and both blocks' tokens go through each product together.
        Both must be of the same shape, so this one may not be the first.

        Args:
            clean: this block's latents, and what they are read with.
        """
        if self.is_prefix:
            raise ValueError("the first block has another shape than the next; commit it first")
        return OpenBlock(
            self.model,
            self.cache.append(None, self.index),
            self.height,
            self.width,
            self.like,
            self.workspace,
            follows=(self, clean),
        )

    def _joined(self, cache: RollingCache) -> tuple[JoinedPast, ...]:
        """Stores that put the past together where it is used."""
        known = [block for block in cache.blocks if block is not None]
        layers = self.model.config.num_layers
        carrier = self.workspace.carrier(layers) if cache.kept == ON_HOST and known else None

        def past(layer: int) -> Callable[[], list[BlockKeys]]:
            if carrier is not None:
                return partial(carrier.bring, layer, known)
            held = [block.layer(layer) for block in known]
            return lambda: held

        return tuple(
            JoinedPast(
                self.workspace.kernels,
                cache.kept,
                past(layer),
                self._past_tables,
                self._rooms(cache.kept),
            )
            for layer in range(layers)
        )

    def _rooms(self, kept: Kept) -> Rooms | None:
        """On a CPU the same memory for all layers, because new memory costs time there. Elsewhere
        new one: the lanes do not wait for each other before they lay out another layer's."""

        def again(name: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
            return self.workspace.buffers(f"{name}{self.place}", shape, like)

        def anew(_name: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
            return like.new_empty(shape), like.new_empty(shape)

        if self.like.device.type == "cpu":
            return again
        return None if kept == AS_COMPUTED else anew

    def _laid_out(self) -> tuple[LaidOutPast, ...]:
        """Stores that have the past rotated and laid out, in memory that stays."""
        return self._slots({name: self._lay_out(name) for name in ATTENTIONS if self.cache.blocks})

    def _slots(self, laid_out: dict[str, tuple[Tensor, Tensor]]) -> tuple[LaidOutPast, ...]:
        ends = {name: self.spans[name] for name in laid_out}
        return tuple(
            LaidOutPast(
                self.workspace.kernels,
                {
                    name: Slot(
                        k[layer, ..., : ends[name][1], :],
                        v[layer, ..., : ends[name][1], :],
                        ends[name][0],
                        self._past_tables[name],
                    )
                    for name, (k, v) in laid_out.items()
                },
            )
            for layer in range(self.model.config.num_layers)
        )

    def _heads(self, name: str) -> tuple[int, int]:
        config, part = self.model.config, part_of(self.model)
        heads, dim = config.audio_num_attention_heads, config.audio_attention_head_dim
        if name == "video":
            heads, dim = config.num_attention_heads, config.attention_head_dim
        return heads if part is None else part.count(name), dim

    def _lay_out(self, name: str) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of the past in all layers: (l, b, a, m, d), then room."""
        layout, grid = self.model.config.layout, self.height * self.width
        table = self._past_tables[name]
        if name in ("video", "video_to_audio"):
            room = layout.video_latents(self.capacity) * grid
        else:
            room = layout.audio_latents(self.capacity) + self.model.config.num_audio_sink_tokens
        first, _ = getattr(self.cache.blocks[0], name)
        layers, batch, heads, _, dim = first.shape
        shape = layers, batch, heads, room, dim
        all_k, all_v = self.workspace.buffers(f"{name}{self.place}", shape, self.like)
        start = 0
        for block in self.cache.blocks:
            if block is None:  # this one is read later
                break
            k, v = getattr(block, name)
            stop = start + k.shape[3]
            rooms = all_k[..., start:stop, :], all_v[..., start:stop, :]
            self.workspace.kernels.keep(*rooms, k, v, table.tokens(start, stop))
            start = stop
        return all_k, all_v

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

        `track` (b, s, c) is what the audio is told, `memory` what a network with a
        memory branch is told of the stream. The first pass of a block that `follows` another reads
        that one as well, and its modulation is that of both (`SigmaConstants.after_refresh`).
        """
        given = BlockInput(video, audio, text, track, memory)

        network = getattr(modulation, "network", None) or self.model

        def denoise(video: Tensor, audio: Tensor, run: Pass) -> Tensors:
            run = replace(run, stores=self.stores)
            recompute = getattr(self.model, "recompute", False)
            return run_layers(network, video, audio, run, recompute=recompute)

        if self.follows is None:
            with self.workspace.watch("denoise"):
                video_tokens, audio_tokens = self._run("denoise", denoise, (given,), modulation)
        else:
            with self.workspace.watch("refresh and denoise"):
                video_tokens, audio_tokens = self._refresh_and_denoise(given, modulation)
        sinks = self.model.config.num_audio_sink_tokens if self.is_prefix else 0
        frames = video.shape[2]
        return (
            rearrange(
                video_tokens, "b (f h w) c -> b c f h w", f=frames, h=self.height, w=self.width
            ),
            audio_tokens[:, sinks:],
        )

    @torch.no_grad()
    def _refresh_and_denoise(self, given: BlockInput, modulation: SharedModulation) -> Tensors:
        """Both halves of a batch: the block that this one follows, and this one."""
        before, clean = self.follows
        batch = given.video.shape[0]
        alike = before.spans == self.spans and not self.model.config.absolute_positions

        def both(video: Tensor, audio: Tensor, run: Pass) -> Tensors:
            kept = before.recorded(batch)
            tables = run.tables
            if not alike:
                tables = ModalityTables(
                    *(
                        tables_beside(*pair, batch)
                        for pair in zip(before.tables, self.tables, strict=True)
                    )
                )
            pairs = zip(before.stores, self.stores, strict=True)
            run = replace(run, tables=tables, stores=tuple(TwoPasts(*pair) for pair in pairs))
            velocity = run_layers(self.model, video, audio, run, latter=True)
            before.record_nothing()
            return *velocity, *kept.tensors()

        name = "refresh and denoise"
        repeats = before.is_full and self.is_full
        out = self._run(name, both, (clean, given), modulation, repeats)
        self.cache = before.cache.append(BlockKeys.of(out[2:]), before.index)
        self.follows = None
        if not self.workspace.lays_out:
            self.stores = self._joined(self.cache)
        elif self.workspace.taped and not self.model.config.absolute_positions:
            self._move()
        return out[:2]

    def _move(self) -> None:
        """To the first place, so that passes are noted there alone: a small past is soon copied."""
        held = {name: self.workspace.brought(name, f"{name}{self.place}") for name in ATTENTIONS}
        self.place = 0
        self.stores = self._slots(held)

    @torch.no_grad()
    def commit(
        self,
        video: Tensor,
        audio: Tensor,
        text: Text,
        modulation: Modulation,
        track: Tensor | None = None,
        memory: Remembered | None = None,
        *,
        alike: bool = False,
    ) -> RollingCache:
        """Refresh: one pass over the clean latents whose keys and values become part of the past.

        `modulation` must be that of sigma 0 (OmniForcing's released loop, docs/omniforcing.md,
        section 4).

        Args:
            alike: bit for bit what the first pass of the next block would write (`followed`). A
                product of twice as many rows may go through another kernel, which rounds
                differently; so it is made of as many here, and half of them are for nothing.
        """
        given, batch = (BlockInput(video, audio, text, track, memory),), video.shape[0]
        name = "refresh"
        if alike:
            name, given = "refresh alike", given * 2

        def refresh(video: Tensor, audio: Tensor, run: Pass) -> Tensors:
            kept, stores = self.recorded(batch), self.stores
            if alike:
                stores = tuple(TwoPasts(store, NO_PAST) for store in stores)
            write_keys(self.model, video, audio, replace(run, stores=stores))
            self.record_nothing()
            return kept.tensors()

        with self.workspace.watch("refresh"):
            flat = self._run(name, refresh, given, modulation)
        return self.cache.append(BlockKeys.of(flat), self.index)

    def recorded(self, batch: int) -> BlockKeys:
        """Where the keys and values of this block go that are made from now on."""

        def place(name: str) -> KeysValues:
            heads, dim = self._heads(name)
            start, stop = self.spans[name]
            shape = self.model.config.num_layers, batch, heads, stop - start, dim
            return room(self.cache.kept, shape, self.like)

        kept = BlockKeys(*map(place, ATTENTIONS))
        for layer, store in enumerate(self.stores):
            store.record = kept.layer(layer)._asdict()
        return kept

    def record_nothing(self) -> None:
        """Keys and values that are made from now on are not kept."""
        for store in self.stores:
            store.record = None

    def _run(
        self,
        name: str,
        function: Callable[[Tensor, Tensor, Pass], Tensors],
        given: tuple[BlockInput, ...],
        modulation: Modulation,
        repeats: bool | None = None,
    ) -> Tensors:
        """A pass over one block, or over two of the same shape as the halves of a batch."""
        shared = isinstance(modulation, SharedModulation)
        video, audio, texts, tracks, memories = zip(*given, strict=True)
        tracks = () if tracks[0] is None else (_plain(_stacked(tracks)),)
        remembered = ()
        if memories[0] is not None:
            remembered = tuple(map(_stacked, zip(*memories, strict=True)))

        def whole(video: Tensor, audio: Tensor, *rest: Tensor) -> Tensors:
            told, rest = rest[: len(tracks)], rest[len(tracks) :]
            past, flat = rest[: len(remembered)], rest[len(remembered) :]
            text, *other = texts
            for one in other:
                text = text.beside(one)
            run = Pass(
                modulation.at(*flat) if shared else modulation,
                text,
                self.tables,
                (),
                kernels=self.workspace.kernels,
                # What is made layer by layer would be made on one lane and read on the other.
                lanes=self.workspace.lanes if shared else ONE_LANE,
                memory=encoded(self.model, Remembered(*past)) if past else None,
            )
            patched = patch_audio(self.model, audio, self.is_prefix, *told)
            return function(patch_video(self.model, video), patched, run)

        frames = _plain(rearrange(_stacked(video), "b c f h w -> b (f h w) c"))
        tokens = frames, _plain(_stacked(audio)), *tracks, *remembered
        if not shared:
            return whole(*tokens)
        texts = self.workspace.still(texts)
        repeats = self.is_full if repeats is None else repeats
        flat = modulation.flat
        if 1 < len(flat) < len(frames):  # one for each half of the batch
            flat = flat.repeat_interleave(len(frames) // 2, 0)
        return self.workspace.run(name, self.place, repeats, texts, whole, *tokens, flat)


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _plain(tokens: Tensor) -> Tensor:
    """The same tokens, laid out one after the other.

    Equal numbers that lie differently in memory go through different matrix kernels, which round
    differently: a state that was loaded or rebuilt would not go on bit for bit.
    """
    return tokens.clone(memory_format=torch.contiguous_format)
