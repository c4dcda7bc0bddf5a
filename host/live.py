"""Runs of sampling nodes, while they go on: what the page may see of them and ask of them.

A node opens a `LiveRun` for as long as it samples and looks into it after every block; the page's
routes (another thread) find it by ComfyUI's names of the prompt and of the node. A page that is
gone or broken is none of the sampling's business. Imports nothing of ComfyUI.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LEAD = 3.0
"""Seconds that an endless run may be ahead of who plays it; a typed line leaves them out, and from
its second on it is counted anew."""
_UNHEARD = 5.0
"""Seconds after which a page that does not say where it is counts as gone."""
WAITING, CHARACTERS = 16, 2000
"""Typed lines that may wait for the next block, and how long each may be."""
_REMEMBERED = 64
_RUNS: OrderedDict[tuple[str, str], LiveRun] = OrderedDict()
_LOCK = threading.Lock()

Tell = Callable[[dict[str, object]], None]


def _to_nobody(_status: dict[str, object]) -> None:
    """Where there is no page."""


class LiveRun:
    """One run of a sampling node.

    Args:
        key: ComfyUI's names of the prompt and of the node; empty outside its executor.
        clip: the fragmented mp4 that it writes; None where it writes none.
        asked: seconds of clip that were asked for; None where it goes on until it is stopped.
        tell: takes `status` whenever that changes.
        workflow: id of the workflow that the node is in, as the page knows it.
        preview: a clip that is like it, less exact, which is written and played while it samples;
            None where it is itself, or nothing is.
        live: whether the clip is written while it samples, and not only afterwards.

    Attributes:
        made: seconds of clip that are made.
        begun: what is in the clip from here on stays; before that it may still be replaced.
        followed: (second of the clip, line) for every typed line that took effect.
        words: what an artist should know of this run, a sentence each.
        stop_asked: finish the block that is being made, and let the graph go on with what there is.
        over: nothing is added any more.
        steered: lines from the page were taken, so it does not go by its inputs alone.
        watchers: how many play the clip at this moment.
    """

    def __init__(
        self,
        key: tuple[str, str],
        clip: Path | None,
        asked: float | None,
        *,
        tell: Tell = _to_nobody,
        workflow: str | None = None,
        preview: Path | None = None,
        live: bool = True,
    ) -> None:
        self.key, self.clip, self.asked, self.workflow = key, clip, asked, workflow
        self.preview, self._live = preview, live or preview is not None
        self.made, self.watchers = 0.0, 0
        self.begun = self.stop_asked = self.over = self.steered = False
        self.followed: list[tuple[float, str]] = []
        self.words: list[str] = []
        self._began, self._tell, self._lines = time.monotonic(), tell, list[str]()
        self._grown = threading.Condition()
        self._played: tuple[float, float] | None = None
        self._jump = 0.0  # the second that the page will jump to
        self._idle = 0.0
        self._ended: float | None = None

    @property
    def plays(self) -> bool:
        """Whether there is or will be something to play while it goes on."""
        return self.clip is not None and (self._live or self.begun)

    @property
    def status(self) -> dict[str, object]:
        """What the page shows of it, for JSON."""
        prompt_id, node_id = self.key
        return {
            "prompt_id": prompt_id,
            "node_id": node_id,
            "workflow": self.workflow,
            "plays": self.plays,
            "preview": self.preview is not None,
            "asked": self.asked,
            "made": self.made,
            "took": (self._ended or time.monotonic()) - self._began - self._idle,
            "followed": list(self.followed),
            "words": list(self.words),
            "stop_asked": self.stop_asked,
            "over": self.over,
        }

    def add(self, made: float, *, begun: bool = False) -> None:
        """Say how many seconds are made, and whether the clip only grows from here on."""
        with self._grown:
            self.made, self.begun = made, self.begun or begun
            self._grown.notify_all()
        self._tell(self.status)

    def wait_for(self, made: float, longest: float = 1.0) -> None:
        """Until so many seconds are made and written, or have taken too long for that."""
        with self._grown:
            self._grown.wait_for(lambda: self.made >= made, longest)

    def plays_at(self, second: float) -> None:
        """Take from the page which second of the clip it plays at this moment."""
        with self._grown:
            self._played = second, time.monotonic()
            if second >= self._jump:
                self._jump = 0.0
            self._grown.notify_all()

    def wait_for_player(self, look: Callable[[], None]) -> None:
        """Where it has no end and is played: until no more than `LEAD` lies ready, or something is
        asked of it.

        Args:
            look: called a few times a second; what it raises ends the wait.
        """
        began = time.monotonic()
        with self._grown:
            while self.asked is None and self._is_ahead():
                look()
                self._grown.wait(0.1)
        self._idle += time.monotonic() - began

    def _is_ahead(self) -> bool:
        if self._played is None or not self.watchers or self.stop_asked or self.line_waits:
            return False
        second, said = self._played
        return self.made - max(second, self._jump) > LEAD and time.monotonic() - said < _UNHEARD

    def follow(self, second: float, line: str) -> None:
        """Say from which second of the clip on a typed line is followed: a page that plays it
        jumps there as soon as enough of that is made."""
        self.followed.append((second, line))
        self._jump = second
        self._tell(self.status)

    def say(self, words: str) -> None:
        """Put a sentence on the node; the same one only once."""
        if words not in self.words:
            self.words.append(words)
            self._tell(self.status)

    def stop(self) -> None:
        """Ask it to end after the block that is being made, well."""
        with self._grown:
            self.stop_asked = True
            self._grown.notify_all()
        self._tell(self.status)

    def end(self) -> None:
        """Nothing is added any more."""
        with _LOCK:
            self.over, self._ended = True, time.monotonic()
        self._tell(self.status)

    def type(self, line: str) -> None:
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
        with self._grown:
            self._grown.notify_all()

    @property
    def line_waits(self) -> bool:
        """Whether a line came since the last call of `lines`."""
        return bool(self._lines)

    def lines(self) -> list[str]:
        """The lines that came since the last call, oldest first."""
        with _LOCK:
            lines, self._lines = self._lines, []
            self.steered = self.steered or bool(lines)
        return lines

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While somebody plays the clip: pictures need not be sent as well."""
        with _LOCK:
            self.watchers += 1
        try:
            yield
        finally:
            with _LOCK:
                self.watchers -= 1


@contextmanager
def live_run(run: LiveRun) -> Iterator[LiveRun]:
    """Remember a run, which goes on until the body ends, well or not."""
    with _LOCK:
        _RUNS[run.key] = run
        _RUNS.move_to_end(run.key)
        over = [key for key, other in _RUNS.items() if other.over]
        for key in over[: max(0, len(_RUNS) - _REMEMBERED)]:
            del _RUNS[key]
    run.add(0.0)
    try:
        yield run
    finally:
        run.end()


def run_of(prompt_id: str, node_id: str) -> LiveRun | None:
    """The latest run of this node in this prompt, going on or over; None if none is remembered."""
    with _LOCK:
        return _RUNS.get((prompt_id, node_id))


def runs() -> list[LiveRun]:
    """Every run that is remembered, the oldest first."""
    with _LOCK:
        return list(_RUNS.values())
