"""What is kept of a clip in the making, so that whoever goes on with it makes the same bits.

Two kinds of files lie in the job's folder, both in the format of stream states: `state-N`, all that
is needed to go on after N blocks, and `blocks-M-N`, the latents of the blocks from M to N, from
which the clip's beginning is decoded once more. Both are the same bits whoever wrote them, so two
workers that believe to have the same job do no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from ..model_loaders.bundle import Bundle
from ..samplers.state import BlockLatents, StreamState, check_state
from ..samplers.state_file import load_state, save_state
from .storage import Storage

log = logging.getLogger("mutualforcing")
STATES = 2
"""Kept at a time: the one before the last serves where the last is damaged."""


class Checkpoints:
    """Of one job.

    Args:
        first: blocks that its stream had before it.
    """

    def __init__(self, storage: Storage, name: str, first: int) -> None:
        self.storage, self.folder = storage, f".making/{name}"
        self.first = first

    def _ends(self) -> list[int]:
        names = self.storage.names(self.folder)
        return sorted(int(name[6:]) for name in names if name.startswith("state-"))

    def latest(self, bundle: Bundle) -> StreamState | None:
        """The farthest state that can be gone on from, and that has all blocks before it."""
        for end in reversed(self._ends()):
            name = f"{self.folder}/state-{end:07}"
            try:
                with self.storage.reading(name) as path:
                    state = load_state(path)
                check_state(state, bundle)
                for _ in self.blocks(end):
                    pass
            except (ValueError, OSError) as error:
                log.warning("%s is left out: %s", name, error)
                self.storage.remove(name)
                continue
            return state
        return None

    def save(self, state: StreamState, blocks: list[BlockLatents]) -> None:
        """Keep a state and its last blocks, all since the last time.

        Raises:
            OSError: they cannot be written.
        """
        end, begin = state.next_block, state.next_block - len(blocks)
        # As if those before had been dropped.
        prefix = state.block(0) if begin else None
        held = replace(state.without_keys(), memory=None, past=None, prefix=prefix)
        held = replace(held, latents=tuple(blocks), dropped=begin)
        with self.storage.writing(f"{self.folder}/blocks-{begin:07}-{end:07}") as path:
            save_state(path, held)
        with self.storage.writing(f"{self.folder}/state-{end:07}") as path:
            save_state(path, state.trimmed())
        for older in self._ends()[:-STATES]:
            self.storage.remove(f"{self.folder}/state-{older:07}")

    def blocks(self, end: int) -> Iterator[BlockLatents]:
        """The job's blocks up to `end`, in order.

        Raises:
            ValueError: some are not there.
            OSError: they cannot be read.
        """
        at = self.first
        for name in self.storage.names(self.folder):
            begin, _, last = name.removeprefix("blocks-").partition("-")
            if not name.startswith("blocks-") or not int(begin) <= at < int(last) or at >= end:
                continue
            with self.storage.reading(f"{self.folder}/{name}") as path:
                state = load_state(path)
            for index in range(at, min(end, int(last))):
                yield state.block(index)
            at = min(end, int(last))
        if at < end:
            raise ValueError(f"blocks {at} to {end} of {self.folder} are not there")

    def clear(self) -> None:
        """Remove all of it: the clip is whole."""
        self.storage.remove(self.folder)
