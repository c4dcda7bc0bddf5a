"""The stream state: everything that is needed to go on from a block, as a value.

b batch, c channels, f h w video latent grid, s audio latents.
A state is never changed: the next block makes a new one that shares the older tensors, so it can be
held, forked and handed to several consumers (docs/architecture.md, decision 4). The clean latents
are kept whole (about 20 kB a second for the small model); keys and values only for the window, and
what is missing of them is made from the latents when the stream goes on: always the last block's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.audio_codec import AudioDecoderState
from ..networks.checked import one_line, quoted
from ..networks.config import TransformerConfig
from ..networks.kept_keys import AS_COMPUTED, ATTENTIONS, EIGHT_BITS, KEPT, Kept
from ..networks.kv_cache import RollingCache, kept_blocks
from ..networks.layout import BlockLayout
from ..networks.video_codec import SPACE_STRIDE, VideoDecoderState
from ..networks.vocoder import Controls, VocoderState
from .clock import Clock
from .model import StreamModel
from .schedule import Line, check_lines
from .speech import Speech, check_speeches
from .stream_memory import AUDIO_TOKENS, COLOUR_GRID, StreamMemory, picture_tokens, remembered

STATE_VERSION = 2
SCALES = ("k_scale", "v_scale")
_LOOKED_BACK = 2  # blocks before the one that is decoded: decoders see a few latents back
# More than any picture has of latents a side (32 pixels each), and than any window has of seconds.
LARGEST_GRID, MOST_WINDOW = 256, 3600
# Noise goes by the digits of a seed; ComfyUI's have 64 bits.
SEEDS_END = 2**64


class BlockLatents(NamedTuple):
    """One finished block: video (b, c, f, h, w) and audio (b, s, c), clean, float32 on the CPU."""

    video: Tensor
    audio: Tensor


class DecodeState(NamedTuple):
    """What both decoders remember of the blocks before; never written into."""

    video: VideoDecoderState
    audio: AudioDecoderState

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that stays."""
        last, phase, _ = self.audio.vocoder
        named = {f"video.{i}": x for i, x in enumerate(self.video)}
        named |= {f"audio.{i}": x for i, x in enumerate(self.audio.caches)}
        return named | dict(zip(Controls._fields, last, strict=True)) | {"phase": phase}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], sample: int) -> DecodeState:
        """The same from `tensors`; KeyError names one that lacks."""

        def numbered(kind: str) -> tuple[Tensor, ...]:
            count = sum(name.startswith(f"{kind}.") for name in tensors)
            return tuple(tensors[f"{kind}.{i}"] for i in range(count))

        last = Controls(*(tensors[name] for name in Controls._fields))
        vocoder = VocoderState(last, tensors["phase"], sample)
        return cls(numbered("video"), AudioDecoderState(numbered("audio"), vocoder))

    def to(self, device: torch.device) -> DecodeState:
        """The same on a device, but for the phase, which stays with the host."""
        moved = {name: x if name == "phase" else x.to(device) for name, x in self.tensors().items()}
        return self.of(moved, self.audio.vocoder.sample)


class Memory(NamedTuple):
    """What decoders that look back only remember after the first `blocks` blocks of a stream."""

    blocks: int
    decoders: DecodeState


@dataclass(frozen=True)
class StreamSettings:
    """What an artist fixes for the whole stream.

    Attributes:
        height, width: latent grid.
        window: blocks of history kept besides the prefix.
        seeds: one per clip of the batch.
        kept: how and where keys and values wait for the next pass.
    """

    height: int
    width: int
    window: int
    seeds: tuple[int, ...] = (0,)
    kept: Kept = AS_COMPUTED

    def __post_init__(self) -> None:
        if not (1 <= self.height <= LARGEST_GRID and 1 <= self.width <= LARGEST_GRID):
            raise ValueError(
                f"stream settings: latent grid is {self.height}x{self.width}, expected 1 to "
                f"{LARGEST_GRID} a side"
            )
        if not 1 <= self.window <= MOST_WINDOW:
            raise ValueError(
                f"stream settings: window is {self.window} blocks, expected 1 to {MOST_WINDOW}"
            )
        if self.kept not in KEPT:
            raise ValueError(
                f"stream settings: keys and values are kept {quoted(self.kept)}, expected one of: "
                f"{', '.join(KEPT)}"
            )
        if not self.seeds:
            raise ValueError("stream settings: no seed, expected one per clip of the batch")
        for seed in self.seeds:
            if not -SEEDS_END <= seed < SEEDS_END:
                raise ValueError(
                    f"stream settings: a seed is {quoted(seed)}, expected {-SEEDS_END} to "
                    f"{SEEDS_END - 1}"
                )

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.height * SPACE_STRIDE, self.width * SPACE_STRIDE


@dataclass(frozen=True)
class StreamState:
    """A stream after some blocks.

    Attributes:
        settings: fixed when the stream began.
        model_id: fingerprint of the network that made it; another network refuses it.
        layout: latents per block.
        latents: every finished block but the first `dropped`.
        cache: keys and values under the prompt, of all blocks but the last or fewer; None for none.
        unguided: the same for the empty prompt, where classifier-free guidance needed it.
        schedule: the prompts that it followed, in the order of their times.
        speeches: what each clip was told to say; none where the network cannot be told.
        memory: of the decoders, after some of the blocks; None where the stream was not decoded.
        dropped: how many of the first blocks are not held any more (`trimmed`).
        prefix: the latents of block 0, where it is one of them.
        past: its memory, for a network that keeps one; None for any other.
    """

    settings: StreamSettings
    model_id: str
    layout: BlockLayout
    # Not printed: ComfyUI writes a node's inputs into its error reports, and these are megabytes of
    # numbers.
    latents: tuple[BlockLatents, ...] = field(default=(), repr=False)
    cache: RollingCache | None = field(default=None, repr=False)
    unguided: RollingCache | None = field(default=None, repr=False)
    schedule: tuple[Line, ...] = ()
    speeches: tuple[Speech, ...] = field(default=(), repr=False)
    memory: Memory | None = field(default=None, repr=False, compare=False)
    dropped: int = 0
    prefix: BlockLatents | None = field(default=None, repr=False)
    past: StreamMemory | None = field(default=None, repr=False)
    # What the network's makers call it, for a reader who is told that it is another.
    model_title: str = ""
    version: int = STATE_VERSION

    @property
    def next_block(self) -> int:
        """Index of the block that comes next; equally the number of finished blocks."""
        return self.dropped + len(self.latents)

    def block(self, index: int) -> BlockLatents:
        """The latents of one finished block.

        Raises:
            ValueError: the block was dropped.
        """
        if index == 0 and self.prefix is not None:
            return self.prefix
        if index < self.dropped:
            raise ValueError(
                f"the stream no longer holds its first {self.dropped} blocks, and block {index} is "
                "needed: go on from its end with the settings that it was made with, or use a "
                "state that was saved whole"
            )
        return self.latents[index - self.dropped]

    def trimmed(self, *, decoding: bool = True) -> StreamState:
        """The same state without the latents that going on does not need: as large at any age.

        It goes on bit for bit as before. What it can't do any more is to be decoded from its
        beginning, or to have keys made again (with guidance, where it had none).

        Args:
            decoding: keep what the decoders have not seen yet.
        """
        ends = [cache.next_block for cache in (self.cache, self.unguided) if cache is not None]
        ends = ends or [0]
        if decoding:
            ends.append(self.memory.blocks if self.memory else 0)
        # A new prompt may ask for the window to be read again.
        seen = min(self.next_block, *ends) - _LOOKED_BACK
        opening = 0 if self.cache is None else self.cache.opening
        first = min((seen, *kept_blocks(self.next_block, self.settings.window, opening)[1:]))
        if first <= self.dropped:
            return self
        clock = clock_of(self.layout)
        begin = clock.samples(first) / clock.sample_rate
        return replace(
            self,
            latents=self.latents[first - self.dropped :],
            dropped=first,
            prefix=self.block(0),
            speeches=tuple(speech.since(begin) for speech in self.speeches),
        )

    def without_keys(self) -> StreamState:
        """The same state in little memory: keys and values are rebuilt when it goes on."""
        return replace(self, cache=None, unguided=None)

    def key_bytes(self) -> int:
        """Memory of the keys and values."""
        caches = [cache for cache in (self.cache, self.unguided) if cache is not None]
        return sum(cache.bytes() for cache in caches)

    def reseeded(self, seeds: tuple[int, ...]) -> StreamState:
        """The same past with other seeds for what follows.

        Raises:
            ValueError: another number of seeds than the stream has clips.
        """
        if len(seeds) != len(self.settings.seeds):
            raise ValueError(
                f"stream state holds {len(self.settings.seeds)} clips, found {len(seeds)} seeds; "
                "give one each"
            )
        return replace(self, settings=replace(self.settings, seeds=seeds))


def clock_of(layout: BlockLayout) -> Clock:
    """The clock of a stream of this layout: a block's sound says how long it lasts."""
    clock = Clock(layout)
    frames = clock.frames(2) - clock.frames(1)
    samples = clock.samples(2) - clock.samples(1)
    return replace(clock, fps=Fraction(frames * clock.sample_rate, samples))


def rewound(state: StreamState, blocks: int) -> StreamState:
    """The stream as it was after its first `blocks` blocks.

    Keys and values of then are made again when it goes on, exactly those if its prompts can be
    encoded again; what the decoders remembered is made again as well.

    Raises:
        ValueError: the stream has not so many, or does not hold them any more.
    """
    if not 0 <= blocks <= state.next_block:
        raise ValueError(
            f"the stream has {state.next_block} blocks, expected to go back to one of them; found "
            f"{blocks}"
        )
    if blocks == state.next_block:
        return state
    if not blocks:
        state = replace(state, latents=(), dropped=0, prefix=None)
    elif state.dropped > 1:
        state.block(1)  # keys are made again from the beginning on
    clock = clock_of(state.layout)
    latents = state.latents[: max(0, blocks - state.dropped)]
    lines = tuple(line for line in state.schedule if clock.block_at(line.start) < blocks)
    end = clock.samples(blocks) / clock.sample_rate
    speeches = tuple(speech.until(end) for speech in state.speeches) if blocks else ()
    past = None
    if blocks and state.past is not None:
        *_, past = remembered(state.block(index) for index in range(blocks))
    state = state.without_keys()
    told = {"schedule": lines, "speeches": speeches, "past": past}
    return replace(state, latents=latents, memory=None, **told)


def take_of(state: StreamState, number: int) -> StreamState:
    """One clip of a batch, as a stream by itself that goes on as it would have gone on there.

    Args:
        number: from 0.

    Raises:
        ValueError: the batch has no such clip.
    """
    count = len(state.settings.seeds)
    if not 0 <= number < count:
        raise ValueError(f"take {number + 1} is not there: the stream has {count}")
    if count == 1:
        return state
    one = slice(number, number + 1)

    def keys(cache: RollingCache | None) -> RollingCache | None:
        if cache is None:
            return None
        return replace(
            cache, blocks=tuple(block.map(lambda x: x[:, one]) for block in cache.blocks)
        )

    memory = state.memory
    if memory is not None:
        tensors = {name: x[one] for name, x in memory.decoders.tensors().items()}
        sample = memory.decoders.audio.vocoder.sample
        memory = Memory(memory.blocks, DecodeState.of(tensors, sample))
    past = state.past
    if past is not None:
        past = StreamMemory.of({name: x[one] for name, x in past.tensors().items()})
    return replace(
        state,
        settings=replace(state.settings, seeds=state.settings.seeds[one]),
        latents=tuple(BlockLatents(video[one], audio[one]) for video, audio in state.latents),
        prefix=state.prefix and BlockLatents(*(x[one] for x in state.prefix)),
        past=past,
        cache=keys(state.cache),
        unguided=keys(state.unguided),
        schedule=tuple(
            replace(line, texts=line.texts[one] if len(line.texts) == count else line.texts)
            for line in state.schedule
        ),
        speeches=state.speeches[one],
        memory=memory,
    )


def check_state(state: StreamState, model: StreamModel) -> None:
    """Refuse a state that this network cannot go on from.

    Raises:
        ValueError: saying what was found, what was expected and what to do.
    """
    if state.version != STATE_VERSION:
        raise ValueError(
            f"stream state has version {state.version}, expected {STATE_VERSION}: it was made by "
            "another version of this pack; make the stream again, or open it with that version"
        )
    config = model.transformer.config
    if state.layout != config.layout:
        raise ValueError(
            f"stream state has blocks of {state.layout}, expected {config.layout}: it belongs to "
            "another model"
        )
    if state.model_id != model.model_id:
        made_by, loaded = (
            _named(state.model_title, state.model_id),
            _named(model.title, model.model_id),
        )
        raise ValueError(
            f"stream state was made by model {made_by}, expected {loaded}: load the model that "
            "made it, or start a new stream"
        )
    for cache in (state.cache, state.unguided):
        if cache is not None and (
            cache.next_block > state.next_block
            or cache.window != state.settings.window
            or cache.opening != config.opening_blocks
            or cache.kept != state.settings.kept
        ):
            raise ValueError(
                f"stream state holds keys up to block {cache.next_block} in a window of "
                f"{cache.window} ({cache.kept}), expected at most {state.next_block} and "
                f"{state.settings.window} ({state.settings.kept}): "
                "go on from state.without_keys(), which makes them again"
            )
    if (state.past is not None) != bool(config.keeps_memory and state.next_block):
        raise ValueError(
            f"stream state has {'a' if state.past else 'no'} memory of its {state.next_block} "
            f"blocks, expected {'one' if config.keeps_memory else 'none'} for this model: load "
            "the model that made it, or start a new stream"
        )
    clips = len(state.settings.seeds)
    check_lines(state.schedule, clips, state.next_block, Clock.of(config))
    check_speeches(state.speeches, clips, config.transcript_channels)
    # All others have the shapes of these; looking at each would take longer the older a stream is.
    check_shapes(state, sizes_of(config), {state.dropped, state.next_block - 1})


def _named(title: str, model_id: str) -> str:
    return f"{quoted(title)} ({one_line(model_id)})" if title else one_line(model_id)


def sizes_of(config: TransformerConfig) -> dict[str, int]:
    """What a network says about its streams' tensors, by the names of `check_shapes`."""
    video, audio = config.num_attention_heads, config.audio_num_attention_heads
    video_dim, audio_dim = config.attention_head_dim, config.audio_attention_head_dim
    heads = {"video": (video, video_dim)} | {name: (audio, audio_dim) for name in ATTENTIONS[1:]}
    sizes = {
        "video channels": config.in_channels,
        "audio channels": config.audio_in_channels,
        "layers": config.num_layers,
        "sounds of block 0": config.audio_first_block + config.num_audio_sink_tokens,
    }
    for name, (count, dim) in heads.items():
        sizes |= {f"{name} heads": count, f"{name} head size": dim}
    return sizes


def check_shapes(
    state: StreamState, known: Mapping[str, int], blocks: Collection[int] | None = None
) -> None:
    """Refuse a state with a tensor that does not have the shape that it must have.

    Args:
        known: sizes by name (`sizes_of`); what is not among them must only be the same in all
            tensors.
        blocks: whose latents to look at; None = all.

    Raises:
        ValueError: naming the tensor, what was found and what was expected.
    """
    layout, settings = state.layout, state.settings
    batch, grid = len(settings.seeds), settings.height * settings.width
    sizes = dict(known)

    def check(name: str, tensor: Tensor, *expected: int | str) -> None:
        found = tuple(tensor.shape)
        # A size that nobody knows yet is what the first tensor says, if it says anything.
        wanted = tuple(
            sizes.setdefault(size, max(1, length)) if isinstance(size, str) else size
            for size, length in zip(expected, found, strict=False)
        )
        if len(found) != len(expected) or found != wanted:
            raise ValueError(
                f"the stream's {name} is {found}, expected "
                f"({', '.join(str(sizes.get(size, size)) for size in expected)}); load the model "
                "that made it, or start a new stream"
            )

    held = range(state.dropped, state.next_block)
    of = held if blocks is None else sorted(b for b in blocks if b in held)
    for index in of if state.prefix is None else (0, *of):
        video, audio = state.block(index)
        frames, sounds = (stop - start for start, stop in _spans(layout, index))
        size = settings.height, settings.width
        check(f"video of block {index}", video, batch, "video channels", frames, *size)
        check(f"audio of block {index}", audio, batch, sounds, "audio channels")
    tokens = picture_tokens(settings.height, settings.width)
    of_a_block = {
        "video": (tokens, "video channels"),
        "audio": (AUDIO_TOKENS, "audio channels"),
        "patches": ("video channels", COLOUR_GRID, COLOUR_GRID),
    }
    for name, tensor in state.past.tensors().items() if state.past else ():
        size = of_a_block.get(name.rpartition(".")[2], ("video channels",))
        check(f"past.{name}", tensor, batch, *size)
    for branch, cache in (("cache", state.cache), ("unguided", state.unguided)):
        for index, block in () if cache is None else zip(cache.indices, cache.blocks, strict=True):
            frames, sounds = (stop - start for start, stop in _spans(layout, index))
            # Sink tokens stand before block 0; their number is the network's.
            heard = sounds if index else "sounds of block 0"
            tokens = frames * grid, heard, heard, frames * grid
            for name, count, pair in zip(ATTENTIONS, tokens, block, strict=True):
                row = "layers", batch, f"{name} heads", count
                for part, tensor in zip(parts_of(settings.kept), pair, strict=True):
                    last = 1 if part in SCALES else f"{name} head size"
                    check(f"{branch}.{index}.{name}.{part}", tensor, *row, last)


def parts_of(kept: Kept) -> tuple[str, ...]:
    """The names of an attention's tensors."""
    return ("k", "v", *SCALES) if kept == EIGHT_BITS else ("k", "v")


def _spans(layout: BlockLayout, block: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return layout.video_span(block), layout.audio_span(block)
