"""Time by stage, by the clock and by the processor, without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """Seconds on the clock, and of all of this process's threads (other work adds none)."""

    wall: float
    cpu: float


NO_TIME = Span(0.0, 0.0)


def now() -> Span:
    """Both clocks."""
    return Span(time.perf_counter(), time.process_time())


def since(start: Span) -> Span:
    """What has passed."""
    return Span(*(b - a for a, b in zip(start, now(), strict=True)))


def spanned(work: Callable[[], object], device: torch.device) -> Span:
    """How long some work takes, with all that it started on the device."""
    _finish(device)
    start = now()
    work()
    _finish(device)
    return since(start)


def best(work: Callable[[], object], device: torch.device, seconds: float) -> Span:
    """The shortest of at least three runs, and as many as fit into `seconds`, after a warm-up."""
    work()
    spans: list[Span] = []
    end = time.perf_counter() + seconds
    while len(spans) < 3 or time.perf_counter() < end:
        spans.append(spanned(work, device))
    return Span(min(span.wall for span in spans), min(span.cpu for span in spans))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up seconds by stage. On a GPU by events on the stream, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._done: list[tuple[str, object, object]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what happens inside under this name."""
        start = self._mark()
        yield
        self._done.append((stage, start, self._mark()))

    def _mark(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading; waits for what is not finished."""
        sums: dict[str, float] = {}
        for stage, start, end in self._done:
            if self._cuda:
                end.synchronize()
            took = start.elapsed_time(end) / 1000 if self._cuda else end - start
            sums[stage] = sums.get(stage, 0.0) + took
        self._done.clear()
        return sums
