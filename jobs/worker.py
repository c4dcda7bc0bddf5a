"""Makes one clip after another with one model, each from where it was left."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..model_loaders.bundle import load_bundle
from ..networks.execution import Execution, device_named
from ..samplers.clip_writer import ClipWriter
from ..samplers.decode import DecodedBlock
from ..samplers.live import decoded_live
from ..samplers.rollout import NonFiniteBlockError, rollout
from ..samplers.schedule import written
from ..samplers.state import BlockLatents, StreamState
from ..samplers.state_file import save_state
from .checkpoints import Checkpoints
from .request import Job, lines_of, sampler_of, starting_state
from .storage import Storage

Report = Callable[[float, float], None]
"""Called with the seconds of a clip that are made, and all that are wanted."""


def this_process() -> str:
    """A worker's name, for people."""
    return f"{socket.gethostname()}/{os.getpid()}"


class Refused(Exception):  # noqa: N818 - the job is at fault, not the worker
    """A job cannot be done by anybody; the message says why."""


class Worker:
    """A model on a device, and where its clips go.

    Args:
        address: as for `Storage`.
        every: seconds after which what was made is kept (`Checkpoints`).
        decode_device: where pictures and sound are decoded, if it is another.

    Raises:
        ValueError: a model, a device or a path that cannot be used here.
    """

    def __init__(
        self,
        model: Path,
        address: str,
        device: str = "cpu",
        path: str = "automatic",
        every: float = 5.0,
        decode_device: str | None = None,
    ) -> None:
        self.execution = Execution.named(path)
        placed = device_named(device)
        reason = self.execution.unavailable(placed)
        if reason:
            raise ValueError(f"--path {path}: {reason}")
        decoding = device_named(decode_device or device)
        self.bundle = load_bundle(model, device=placed, decode_device=decoding)
        self.storage, self.every = Storage(address), every
        self.name = this_process()

    def read(self, text: str) -> Job:
        """A job from its text."""
        return Job.model_validate_json(text)

    def run(self, job: Job, report: Report | None = None) -> dict[str, object]:
        """Make a clip whole, from its last checkpoint on; what it was is in the answer.

        Raises:
            Refused: it cannot be made.
            OSError: a file cannot be written.
        """
        began = time.perf_counter()
        try:
            start = starting_state(job, self.bundle)
            lines = lines_of(job, self.bundle, start)
            sampler = sampler_of(job, self.bundle)
        except (ValueError, OSError) as error:
            raise Refused((isinstance(error, OSError) and error.strerror) or str(error)) from error
        clock, first = self.bundle.clock, start.next_block
        end = first + clock.blocks_for(job.seconds, first)
        before = clock.seconds(first)
        wanted = float(clock.seconds(end) - before)
        kept = Checkpoints(self.storage, job.name, first)
        state = kept.latest(self.bundle) or start
        begun_at, last = state.next_block, state
        pending: list[BlockLatents] = []
        saved = time.monotonic()

        def all_blocks() -> Iterator[tuple[BlockLatents, StreamState]]:
            """Those that were kept, and then new ones."""
            for index, block in enumerate(kept.blocks(begun_at), start=first + 1):
                yield block, replace(start, latents=(block,), dropped=index - 1, prefix=block)
            yield from rollout(
                self.bundle,
                self.bundle.schedule(lines, guided=sampler.guidance != 1),
                state,
                end - begun_at,
                sampler,
                execution=self.execution,
                settle=lambda settled: settled.trimmed(decoding=False),
            )

        # In the job's folder, so that nothing is left of one that is killed.
        with self.storage.writing(f"{kept.folder}/clip") as path:
            notes = {"job": job.model_dump_json(exclude_none=True)}
            with ClipWriter(path, clock, *self.bundle.pixel_size, notes=notes) as writer:

                def use(decoded: DecodedBlock, now: StreamState) -> None:
                    nonlocal saved, last
                    fresh = now.next_block > begun_at
                    writer.tag(written((now if fresh else state).schedule))
                    writer.write(decoded)
                    if report is not None:
                        report(float(clock.seconds(now.next_block) - before), wanted)
                    if not fresh:
                        return
                    last = now
                    pending.append(now.block(now.next_block - 1))
                    if now.next_block == end or time.monotonic() - saved >= self.every:
                        kept.save(now, pending)
                        pending.clear()
                        saved = time.monotonic()

                try:
                    blocks = decoded_live(all_blocks(), self.bundle.decoder(), start, use)
                    for _ in islice(blocks, end - first):
                        pass
                except (NonFiniteBlockError, ValueError) as error:
                    raise Refused(str(error)) from error
            if not writer.frames:
                raise Refused("no block was made of it")
        if job.state_out:
            with self.storage.writing(f"{kept.folder}/stream") as path:
                save_state(path, last.trimmed())
            self.storage.move(f"{kept.folder}/stream", f"{job.name}.state")
        self.storage.move(f"{kept.folder}/clip", f"{job.name}.mp4")
        kept.clear()
        return {
            "file": f"{job.name}.mp4",
            **({"state": f"{job.name}.state"} if job.state_out else {}),
            "seconds": wanted,
            "took": round(time.perf_counter() - began, 3),
            "went on from block": begun_at,
            "worker": self.name,
            "model": self.bundle.model_id,
            "seed": start.settings.seeds[0],
        }
