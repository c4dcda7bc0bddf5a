"""What both sampling nodes do with what is asked for: block after block, and what a page says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

from ..host import folders, kept_runs
from ..host.live import LiveRun
from ..host.page import Progress, stop_if_asked
from ..samplers.parking import spooled
from ..samplers.rollout import BeginAgain, Step, rollout
from ..samplers.state import BlockLatents, StreamState, rewound
from .request import Request

logger = logging.getLogger("mutualforcing")

Made = Iterator[tuple[BlockLatents, StreamState]]
_OPENING = 2
"""Blocks that are there before anything else is begun, where somebody waits to hear: the prefix and
a second, or the second of a typed line and, so that it need not wait again, the next one."""


def sample(asked: Request, progress: Progress, run: LiveRun) -> Made:
    """The blocks that were asked for, each with the state after it; with progress.

    Those that an earlier run made of the same inputs are not made again. A line that the page sends
    is followed from the block on that is being made, which is begun anew. Ends early where the page
    asks to stop, after the block that is being made. What somebody waits to hear, the first second
    and those of a typed line, is decoded before the next one is begun. Without an end it is made a
    little ahead of who plays it, and no more. What going on does not need of a long stream waits on
    disk, however long it gets.
    """
    state, awaited = asked.state, _OPENING  # blocks that somebody waits to hear

    def heed_lines() -> None:
        nonlocal awaited
        for line in run.lines():
            asked.tell(line, run, asked.seconds_to(state))
            awaited = _OPENING

    def on_step(step: Step) -> None:
        progress.step(step)
        if run.line_waits and step.step + 1 < step.steps:  # the last one is nearly the block
            progress.again(step.step + 1)
            heed_lines()
            raise BeginAgain

    for latents, state in _made(asked, progress, on_step):
        yield latents, state
        if awaited and not run.stop_asked:
            awaited -= 1
            run.wait_for(asked.seconds_to(state))
        run.wait_for_player(stop_if_asked)
        if run.stop_asked:
            return
        heed_lines()


def _made(asked: Request, progress: Progress, on_step: Callable[[Step], None]) -> Made:
    """Begins with what is known of the request."""
    state = asked.state
    end = state.next_block + (asked.blocks or 0)
    # What has no end is played from its beginning, for lines to be typed.
    known = kept_runs.longest(asked.asked, end) if asked.blocks else None
    if known is not None:
        there = known.next_block - state.next_block
        logger.info("%d of %d blocks were there already", there, asked.blocks)
        for index in range(state.next_block, known.next_block - 1):
            progress.known(asked.sampler.steps)
            yield known.block(index), rewound(known, index + 1)
        progress.known(asked.sampler.steps)
        yield known.block(known.next_block - 1), known
        state = known
    if asked.blocks and state.next_block == end:
        return

    ranks = asked.model.about.ranks
    rolled = rollout if ranks is None else ranks.rollout
    yield from rolled(
        asked.model,
        asked.prompt,
        state,
        end - state.next_block if asked.blocks else None,
        asked.sampler,
        on_step=on_step,
        on_rebuild=progress.rebuild,
        start=asked.start,
        given=asked.given,
        execution=asked.execution,
        settle=partial(spooled, folder=folders.temporary_folder()),
    )
