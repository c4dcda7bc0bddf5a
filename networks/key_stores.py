"""Where the attentions of a layer find the past while a block is made: key-value stores.

b batch, a heads, n tokens of this block, m tokens attended over, d head dim.
Keys are kept unrotated, because the past moves to other positions as the window rolls. `JoinedPast`
puts them together with the block's and rotates them where they are used, one layer at a time, so
that a window is in memory once. A recorded pass needs its past in the same place each time:
`LaidOutPast` has all layers' rotated keys, and a copy of the values, in memory that stays.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .attention import KeyValueStore
from .kernels import Kernels
from .rope import RopeTable

KeysValues = tuple[Tensor, Tensor]


class Store(KeyValueStore, Protocol):
    """The store of one layer of a block that may follow one that is only now read."""

    def receive(self, name: str, k: Tensor, v: Tensor) -> None:
        """The keys (not rotated) and values of that block, the last one of the past."""
        ...


def _kept(record: dict[str, KeysValues] | None, name: str, k: Tensor, v: Tensor) -> None:
    for kept, new in zip(record[name], (k, v), strict=True) if record is not None else ():
        kept.copy_(new)


class JoinedPast:
    """The past as it is kept, put together and rotated each time.

    Args:
        past: (keys, values) of every block, by attention.
        tables: of the past and the block, by attention.

    Attributes:
        record: where the block's own keys and values are written, unrotated, by attention; None:
            nobody keeps them.
    """

    def __init__(
        self, kernels: Kernels, past: dict[str, list[KeysValues]], tables: dict[str, RopeTable]
    ) -> None:
        self.kernels, self.past, self.tables = kernels, past, tables
        self.record: dict[str, KeysValues] | None = None

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> KeysValues:
        """Keys and values of the past and the block."""
        _kept(self.record, name, k, v)
        past = self.past[name]
        if not past:
            return self.kernels.rotate(k, rope), v
        keys, values = zip(*past, (k, v), strict=True)
        k = self.kernels.rotate(torch.cat(keys, dim=2), self.tables[name])
        return k, torch.cat(values, dim=2)

    def receive(self, name: str, k: Tensor, v: Tensor) -> None:
        """Nothing to do: what is kept of that block is part of the past."""


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

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> KeysValues:
        """Keys and values of the past and the block."""
        _kept(self.record, name, k, v)
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
