"""The last runs' streams, so that a longer length makes only what is new.

ComfyUI keeps what a node gave for as long as its inputs are the same; with another length they are
not, though all that was made before would come out again bit for bit. Imports nothing of ComfyUI.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..samplers.state import StreamState

RUNS = 4
MOST_BYTES = 2**30
"""Of keys and values that are kept for a run; LTX-2's are too large for a guess."""


@dataclass(frozen=True)
class _Run:
    asked: tuple[object, ...]
    state: StreamState

    def is_of(self, asked: Sequence[object]) -> bool:
        found = (one() if isinstance(one, weakref.ref) else one for one in self.asked)
        alike = all(_same(a, b) for a, b in zip(found, asked, strict=False))
        return alike and len(asked) == len(self.asked)


_RUNS: deque[_Run] = deque(maxlen=RUNS)


def longest(asked: Sequence[object], blocks: int) -> StreamState | None:
    """The longest stream of at most so many blocks that was made of these inputs, if one was."""
    found = [run.state for run in _RUNS if run.is_of(asked) and run.state.next_block <= blocks]
    return max(found, key=lambda state: state.next_block, default=None)


def keep(asked: Sequence[object], state: StreamState) -> StreamState:
    """Remember what was made of these inputs; the same, or one as long that was made before.

    Args:
        asked: everything that the stream goes by, but for its length. What is on a wire must be
            the same object; it isn't kept alive, so what it was used for is forgotten with it.
    """
    known = longest(asked, state.next_block)
    if known is not None and known.next_block == state.next_block:
        return known
    if state.key_bytes() <= MOST_BYTES:
        _RUNS.append(_Run(tuple(map(_weak, asked)), state))
    return state


def _weak(one: object) -> object:
    """A reference that does not hold what is on a wire, where there may be one."""
    if isinstance(one, int | float | str | dict | list) or one is None:
        return one
    return weakref.ref(one, _forget)


def _forget(gone: weakref.ref) -> None:
    left = [run for run in _RUNS if not any(one is gone for one in run.asked)]
    _RUNS.clear()
    _RUNS.extend(left)


def _same(one: object, other: object) -> bool:
    plain = isinstance(one, int | float | str | dict)
    return one is other or (plain and type(one) is type(other) and one == other)
