"""All jobs, the longest first, by whatever workers there are."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from .. import shell
from .pools import Job, Lost, Pool
from .worker import Refused

MOST_LOSSES = 5
"""Of one job: more workers than that are not given to it, it may be what kills them."""
_SHOWN = 12  # jobs in the making, in the table


class Book(Protocol):
    """Knows what became of each job."""

    def is_done(self, job: Job) -> bool:
        """Whether what it makes is there."""

    def note(self, job: Job, status: str, **facts: object) -> None:
        """Say what became of it."""


def run(jobs: Sequence[Job], book: Book, open_pool: Callable[[], Pool]) -> tuple[int, bool]:
    """Make what is not made yet; how many jobs have failed, and whether all had their turn.

    The first Ctrl-C lets what is being made be finished; the second one leaves it to the next run,
    which goes on from its last checkpoint.

    Raises:
        ValueError: no worker can begin.
        OSError: the book cannot be written.
    """
    waiting = sorted((job for job in jobs if not book.is_done(job)), key=lambda job: -job.cost)
    table = Table(len(jobs), len(jobs) - len(waiting))
    if not waiting:
        table.line("everything is there already")
        return 0, True
    losses: Counter[str] = Counter()
    failed = 0
    with shell.stoppable() as stop:
        pool = open_pool()
        try:
            while (waiting and not stop) or not pool.is_idle():
                while waiting and not stop and pool.has_room():
                    pool.begin(waiting.pop(0))
                for job, outcome in pool.finished(lambda now: table.show(now, len(waiting))):
                    if isinstance(outcome, Lost):
                        losses[job.name] += 1
                        if losses[job.name] <= MOST_LOSSES:
                            table.line(f"{job.name}: {outcome}; it goes on elsewhere")
                            waiting.insert(0, job)
                            continue
                        outcome = Refused(f"{outcome}, for the {losses[job.name]}th time")
                    if isinstance(outcome, Exception):
                        failed += 1
                        reason = getattr(outcome, "strerror", None) or str(outcome)
                        book.note(job, "refused", reason=reason)
                        table.done(f"{job.name}: refused: {reason}")
                        continue
                    lost = {"workers lost": losses[job.name]} if losses[job.name] else {}
                    book.note(job, "done", **outcome, **lost)
                    times = f"{outcome['seconds']:.1f} s in {outcome['took']:.1f} s"
                    table.done(f"{job.name}: {times} by {outcome['worker']}")
                if stop:
                    table.once("finishing what is being made; again to leave it for the next run")
        finally:
            table.show({}, len(waiting))
            pool.close()
    return failed, not waiting


class Table:
    """What is being made, on the terminal: lines for what ended, a table below on a screen."""

    def __init__(self, jobs: int, before: int) -> None:
        self.jobs, self.ended = jobs, before
        self.began, self._shown, self._said = time.monotonic(), 0, set()
        self._screen = False
        with suppress(ValueError, AttributeError):
            self._screen = sys.stderr.isatty()

    def _clear(self) -> str:
        return f"\x1b[{self._shown}A\x1b[J" if self._shown else ""

    def line(self, text: str) -> None:
        """Say something that stays."""
        shell.tell(f"{self._clear()}{text}\n", sys.stderr)
        self._shown = 0

    def once(self, text: str) -> None:
        """The same, the first time."""
        if text not in self._said:
            self._said.add(text)
            self.line(text)

    def done(self, text: str) -> None:
        """A job has ended."""
        self.ended += 1
        self.line(f"[{self.ended}/{self.jobs}] {text}")

    def show(self, making: Mapping[str, tuple[str, float, float]], waiting: int) -> None:
        """Draw the table anew."""
        if not self._screen:
            return
        rows = [
            f"  {shell.clean(name, 24):24} {made:7.1f} of {wanted:7.1f} s   {worker}"
            for name, (worker, made, wanted) in list(making.items())[:_SHOWN]
        ]
        if making:
            spent = time.monotonic() - self.began
            rows.append(f"  {waiting} wait, {self.ended} of {self.jobs} ended, {spent:.0f} s")
        shell.tell(self._clear() + "".join(f"{row}\n" for row in rows), sys.stderr)
        self._shown = len(rows)
