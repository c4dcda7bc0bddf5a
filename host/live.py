"""Runs of sampling nodes, while they go on: what the page may see of them and ask of them.

A node opens a `LiveRun` for as long as it samples and looks into it after every block; the page's
routes (another thread) find it by ComfyUI's names of the prompt and of the node. A page that is
gone or broken is none of the sampling's business. Imports nothing of ComfyUI.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAITING, CHARACTERS = 16, 2000
"""Typed lines that may wait for the next block, and how long each may be."""
_REMEMBERED = 64
_RUNS: OrderedDict[tuple[str, str], LiveRun] = OrderedDict()
_LOCK = threading.Lock()


class LiveRun:
    """One run of a sampling node.

    Attributes:
        prompt_id, node_id: ComfyUI's names of the run; empty outside its executor.
        clip: the fragmented mp4 that it writes; None where nothing is written while it samples.
        begun: what is in the clip from here on stays; before that it may still be replaced.
        asked, made: seconds of clip that were asked for, and that are made; `asked` is None where
            it goes on until it is stopped.
        stop_asked: finish the block that is being made, and let the graph go on with what there is.
        over: nothing is added any more.
    """

    def __init__(
        self, prompt_id: str, node_id: str, clip: Path | None, asked: float | None
    ) -> None:
        self.prompt_id, self.node_id = prompt_id, node_id
        self.clip, self.asked, self.made = clip, asked, 0.0
        self.begun = self.stop_asked = self.over = False
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        """Take a line from the page: what happens from the next block on.

        Raises:
            ValueError: it is empty or too long, too many wait already, or the run is over.
        """
        line = " ".join(line.split())
        if not line or len(line) > CHARACTERS:
            raise ValueError(f"the line has {len(line)} characters, expected 1 to {CHARACTERS}")
        with _LOCK:
            if self.over:
                raise ValueError("this run is over: press Run for another one")
            if len(self._lines) >= WAITING:
                raise ValueError(f"{WAITING} lines wait already: send it again in a second")
            self._lines.append(line)

    def lines(self) -> list[str]:
        """The lines that came since the last call, oldest first."""
        with _LOCK:
            lines, self._lines = self._lines, []
        return lines


@contextmanager
def live_run(key: tuple[str, str], clip: Path | None, asked: float | None) -> Iterator[LiveRun]:
    """A run that is open until the body ends, well or not.

    Args:
        key: prompt id and node id, as `page.executing` gives them.
        clip, asked: see `LiveRun`.
    """
    run = LiveRun(*key, clip, asked)
    with _LOCK:
        _RUNS[key] = run
        _RUNS.move_to_end(key)
        over = [old for old, other in _RUNS.items() if other.over]
        for old in over[: max(0, len(_RUNS) - _REMEMBERED)]:
            del _RUNS[old]
    try:
        yield run
    finally:
        with _LOCK:
            run.over = True


def run_of(prompt_id: str, node_id: str) -> LiveRun | None:
    """The latest run of this node in this prompt, going on or over; None if none is remembered."""
    with _LOCK:
        return _RUNS.get((prompt_id, node_id))
