"""A clip that is written for the player alone: what fails of that ends nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..host.clip_file import clip_writer
from ..host.decoding import ClipDecoder
from ..host.live import LiveRun
from ..samplers.decode import DecodedBlock
from ..samplers.schedule import written
from ..samplers.state import StreamState
from .request import Request

Show = Callable[[DecodedBlock | None, StreamState], None]


@contextmanager
def player_file(
    path: Path, asked: Request, decoder: ClipDecoder, run: LiveRun, graph: dict[str, str]
) -> Iterator[Show]:
    """In the body: takes what is decoded, if anything, with the stream after it, and tells the run
    how much of that is made.

    Args:
        path: where to write it.
        decoder: what decodes.
    """
    with ExitStack() as files:
        writer = None
        try:
            writer = clip_writer(path, asked.model.clock, asked.state, decoder, graph)
            files.enter_context(writer)
        except (OSError, ValueError) as error:
            run.say(str(error))

        def show(decoded: DecodedBlock | None, after: StreamState) -> None:
            nonlocal writer
            if decoded is not None and writer is not None:
                try:
                    writer.tag(written(after.schedule))
                    writer.write(decoded)
                except OSError as error:
                    writer = None
                    run.say(str(error))
            run.add(asked.seconds_to(after), begun=writer is not None and writer.growing)

        yield show
