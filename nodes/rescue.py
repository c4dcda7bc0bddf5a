"""Nothing that was made is lost: a cancelled or failed run's blocks go to the output folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comfy_api.latest import io

from ..host import folders
from ..host.live import LiveRun
from ..host.streams import notes_of
from ..samplers.state import StreamState
from ..samplers.state_file import save_state

logger = logging.getLogger("mutualforcing")
UNFINISHED = "unfinished"


class Finished:
    """What is done so far: the stream's state, and the file that its clip is being written to."""

    def __init__(self, state: StreamState, clip: Path | None = None) -> None:
        self._before = state.next_block
        self.state, self.clip = state, clip

    @property
    def blocks(self) -> int:
        """Blocks finished by this run."""
        return self.state.next_block - self._before


@contextmanager
def rescue(finished: Finished, run: LiveRun, hidden: io.HiddenHolder) -> Iterator[None]:
    """Run the body; if it is cut short after at least one block, keep that and say where it lies.

    After a whole run the clip's working file is what goes on as VIDEO, or stays for the player;
    ComfyUI empties its temporary folder when it starts. The interruption or error itself goes on to
    ComfyUI. It may be a `BaseException`, so nothing is caught.
    """
    whole = False
    try:
        yield
        whole = True
    finally:
        if not whole and finished.blocks:
            _keep(finished, run, hidden)
        elif not whole and finished.clip is not None:
            finished.clip.unlink(missing_ok=True)


def _keep(finished: Finished, run: LiveRun, hidden: io.HiddenHolder) -> None:
    try:
        state = folders.output_file(UNFINISHED, "safetensors")
        if finished.clip is not None and finished.clip.is_file():
            clip = state.with_suffix(".mp4")  # one number for both
            shutil.move(finished.clip, clip)  # the two folders may lie on different disks
            run.clip = clip
            logger.warning("the clip so far was kept: %s", clip)
            run.say(f"the clip so far was kept: {folders.shown(clip)}")
        save_state(state, finished.state, notes=notes_of(finished.state, hidden))
        logger.warning("Load Stream can go on from where it stopped: %s", state)
        run.say(f"Load Stream can go on from where it stopped: {state.name}")
    except OSError as error:
        # The first error must stay the one that the artist sees.
        logger.error("what was finished could not all be kept: %s", error)
        run.say(f"what was finished could not all be kept: {error}")
