"""Where the attentions of a layer find the past while a block is made: key-value stores.

b batch, a heads, n tokens of this block, m tokens attended over, d head dim.
Keys are kept unrotated, because the past moves to other positions as the window rolls. `JoinedPast`
puts them together with the block's and rotates them where they are used, one layer at a time, so
that a window is in memory once, and as it is kept there (`kept_keys.py`). A recorded pass needs its
past in the same place each time: `LaidOutPast` has all layers' rotated keys, and a copy of the
values, in memory that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .attention import KeyValueStore
from .kept_keys import BlockKeys, Kept, KeysValues, as_kept, read, write
from .kernels import Kernels
from .rope import RopeTable

Rooms = Callable[[str, tuple[int, ...], Tensor], tuple[Tensor, Tensor]]
"""Memory for the keys and values of an attention, of a shape, like another tensor."""


class Store(KeyValueStore, Protocol):
    """The store of one layer of a block that may follow one that is only now read."""

    def receive(self, name: str, k: Tensor, v: Tensor) -> None:
        """The keys (not rotated) and values of that block, the last one of the past."""
        ...


class JoinedPast:
    """The past as it is kept, put together and rotated each time.

    Args:
        past: what is kept of every block, of this layer, where it is computed.
        tables: of the past and the block, by attention.
        rooms: where they are put together; None: in new memory, in fewer and larger steps.

    Attributes:
        record: where the block's own keys and values are written, unrotated, by attention; None:
            nobody keeps them.
    """

    def __init__(
        self,
        kernels: Kernels,
        kept: Kept,
        past: Callable[[], Sequence[BlockKeys]],
        tables: dict[str, RopeTable],
        rooms: Rooms | None = None,
    ) -> None:
        self.kernels, self.kept, self.past, self.tables = kernels, kept, past, tables
        self.rooms = rooms
        self.record: dict[str, KeysValues] | None = None
        self._received: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and the block."""
        if self.record is not None:
            write(self.record[name], k, v)
        parts = [getattr(block, name) for block in self.past()]
        if name in self._received:
            parts.append(self._received.pop(name))
        if not parts:
            return self.kernels.rotate(k, rope), v
        parts.append((k, v))
        table = self.tables[name]
        if self.rooms is None or torch.is_grad_enabled():
            keys, values = zip(*(read(part, k) for part in parts), strict=True)
            k = self.kernels.rotate(torch.cat(keys, dim=2), table)
            return k, torch.cat(values, dim=2)
        batch, heads, _, dim = k.shape
        all_k, all_v = self.rooms(name, (batch, heads, table.cos.shape[1], dim), k)
        stop = 0
        for part in parts:
            start, stop = stop, stop + part[0].shape[2]
            places = all_k[:, :, start:stop], all_v[:, :, start:stop]
            self.kernels.keep(*places, *read(part, k), table.tokens(start, stop))
        return all_k, all_v

    def receive(self, name: str, k: Tensor, v: Tensor) -> None:
        """Until the block's own come."""
        self._received[name] = as_kept(self.kept, k, v)


class Slot:
    """One attention of a layer: rotated keys, values, and which of its tokens are the block's.

    Args:
        table: of the past and the block.
    """

    def __init__(self, k: Tensor, v: Tensor, start: int, table: RopeTable) -> None:
        self.k, self.v, self.start, self.table = k, v, start, table

    def write(self, kernels: Kernels, k: Tensor, v: Tensor, stop: int) -> None:
        """Tokens that end before `stop`."""
        start = stop - k.shape[2]
        rooms = self.k[:, :, start:stop], self.v[:, :, start:stop]
        kernels.keep(*rooms, k, v, self.table.tokens(start, stop))


class LaidOutPast:
    """The past in memory that stays, by attention, with room for the block. Without gradients."""

    def __init__(self, kernels: Kernels, slots: dict[str, Slot]) -> None:
        self.kernels, self.slots = kernels, slots
        self.record: dict[str, KeysValues] | None = None

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and the block."""
        if self.record is not None:
            write(self.record[name], k, v)
        slot = self.slots.get(name)
        if slot is None:
            return self.kernels.rotate(k, rope), v
        slot.write(self.kernels, k, v, slot.k.shape[2])
        return slot.k, slot.v

    def receive(self, name: str, k: Tensor, v: Tensor) -> None:
        """Into the place that is free for them."""
        self.slots[name].write(self.kernels, k, v, self.slots[name].start)


class TwoPasts:
    """A batch of two halves: a block that is read, and the one after it, which sees the first.

    Tables of the whole batch (2b, a, n, r) or, where both halves have the same, (a, n, r).
    """

    def __init__(self, first: Store, second: Store) -> None:
        self.first, self.second = first, second

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> tuple[Tensor, ...]:
        """Keys and values of the first half and its past, then those of the second."""
        one, other = rope, rope
        if rope.cos.ndim == 4:
            one, other = (RopeTable(rope.cos[i], rope.sin[i]) for i in (0, -1))
        (k, next_k), (v, next_v) = k.chunk(2), v.chunk(2)
        first = self.first.extend(name, k, v, one)
        self.second.receive(name, k, v)
        return *first, *self.second.extend(name, next_k, next_v, other)


def tables_beside(one: RopeTable, other: RopeTable, batch: int) -> RopeTable:
    """The tables (a, n, r) of both halves of a batch of 2 * batch, as `TwoPasts` has them."""
    return RopeTable(
        *(torch.stack(pair).repeat_interleave(batch, 0) for pair in zip(one, other, strict=True))
    )
