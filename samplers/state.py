"""The stream state: everything that is needed to go on from a block, as a value.

b batch, c channels, f h w video latent grid, s audio latents.
A state is never changed: the next block makes a new one that shares the older tensors, so it can be
held, forked and handed to several consumers (docs/architecture.md, decision 4). The clean latents
are kept whole (about 20 kB a second for the small model); keys and values only for the window, and
what is missing of them is made from the latents when the stream goes on: always the last block's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ..networks.kv_cache import RollingCache
from ..networks.layout import BlockLayout

STATE_VERSION = 2


class BlockLatents(NamedTuple):
    """One finished block: video (b, c, f, h, w) and audio (b, s, c), clean, float32 on the CPU."""

    video: Tensor
    audio: Tensor


@dataclass(frozen=True)
class StreamSettings:
    """What an artist fixes for the whole stream.

    Attributes:
        height, width: latent grid.
        window: blocks of history kept besides the prefix.
        seeds: one per clip of the batch.
    """

    height: int
    width: int
    window: int
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"stream settings: latent grid is {self.height}x{self.width}, expected at least 1x1"
            )
        if self.window < 1:
            raise ValueError(
                f"stream settings: window is {self.window} blocks, expected at least 1"
            )
        if not self.seeds:
            raise ValueError("stream settings: no seed, expected one per clip of the batch")


@dataclass(frozen=True)
class StreamState:
    """A stream after some blocks.

    Attributes:
        settings: fixed when the stream began.
        model_id: fingerprint of the network that made it; another network refuses it.
        layout: latents per block.
        latents: every finished block.
        cache: keys and values under the prompt, of all blocks but the last or fewer; None for none.
        unguided: the same for the empty prompt, where classifier-free guidance needed it.
    """

    settings: StreamSettings
    model_id: str
    layout: BlockLayout
    # Not printed: ComfyUI writes a node's inputs into its error reports, and these are megabytes of
    # numbers.
    latents: tuple[BlockLatents, ...] = field(default=(), repr=False)
    cache: RollingCache | None = field(default=None, repr=False)
    unguided: RollingCache | None = field(default=None, repr=False)
    version: int = STATE_VERSION

    @property
    def next_block(self) -> int:
        """Index of the block that comes next; equally the number of finished blocks."""
        return len(self.latents)

    def without_keys(self) -> StreamState:
        """The same state in little memory: keys and values are rebuilt when it goes on."""
        return replace(self, cache=None, unguided=None)

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


def check_state(state: StreamState, model_id: str, layout: BlockLayout) -> None:
    """Refuse a state that this network cannot go on from.

    Raises:
        ValueError: saying what was found, what was expected and what to do.
    """
    if state.version != STATE_VERSION:
        raise ValueError(
            f"stream state has version {state.version}, expected {STATE_VERSION}: it was made by "
            "another version of this pack; make the stream again, or open it with that version"
        )
    if state.layout != layout:
        raise ValueError(
            f"stream state has blocks of {state.layout}, expected {layout}: it belongs to another "
            "model"
        )
    if state.model_id != model_id:
        raise ValueError(
            f"stream state was made by model {state.model_id}, expected {model_id}: load the "
            "model that made it, or start a new stream"
        )
    for cache in (state.cache, state.unguided):
        if cache is not None and (
            cache.next_block > state.next_block or cache.window != state.settings.window
        ):
            raise ValueError(
                f"stream state holds keys up to block {cache.next_block} in a window of "
                f"{cache.window}, expected at most {state.next_block} and {state.settings.window}: "
                "go on from state.without_keys(), which makes them again"
            )
