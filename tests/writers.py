"""Three writers of one stream state, and a reader: `python launch.py tests.writers --seconds 10`.

Each writer saves a state of its own over and over under the one name; the reader loads it over and
over. Every read must be of one writer's state as a whole, and no save may fail.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.synchronize
import sys
import tempfile
import time
from pathlib import Path

import torch
from mutual_forcing.networks.layout import BlockLayout
from mutual_forcing.samplers.state import BlockLatents, StreamSettings, StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.samplers.tensor_file import TensorFileError

WRITERS = 3


def state_of(number: int) -> StreamState:
    """A state of about a megabyte in which every number is the writer's."""
    layout, blocks = BlockLayout(), 20 + number
    settings = StreamSettings(8, 8, 2, (number,))
    latents = tuple(
        BlockLatents(
            torch.full((1, 64, end - start, 8, 8), float(number)),
            torch.full((1, heard_end - heard_start, 64), float(number)),
        )
        for (start, end), (heard_start, heard_end) in (
            (layout.video_span(block), layout.audio_span(block)) for block in range(blocks)
        )
    )
    return StreamState(settings, "writers", layout, latents)


def write(
    path: Path,
    number: int,
    stop: multiprocessing.synchronize.Event,
    saves: multiprocessing.Queue[tuple[int, int]],
) -> None:
    """Save until told to stop; (saves, failures) go into the queue."""
    torch.set_num_threads(1)
    state, done, failed = state_of(number), 0, 0
    while not stop.is_set():
        try:
            save_state(path, state)
            done += 1
        except OSError:
            failed += 1
    saves.put((done, failed))


def contest(seconds: float, folder: Path) -> dict[str, int]:
    """Saves, saves that failed, reads, torn reads, and files left beside the state."""
    path = folder / "s.safetensors"
    save_state(path, state_of(0))
    context = multiprocessing.get_context("fork")
    stop, saves = context.Event(), context.Queue()
    writers = [
        context.Process(target=write, args=(path, number, stop, saves)) for number in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    reads = torn = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        reads += 1
        try:
            state = load_state(path)
        except TensorFileError:
            torn += 1
            continue
        number = state.settings.seeds[0]
        numbers = [x == number for block in state.latents for x in block]
        torn += state.next_block != 20 + number or not all(bool(same.all()) for same in numbers)
    stop.set()
    counts = [saves.get() for _ in writers]
    for writer in writers:
        writer.join()
    return {
        "saves": sum(done for done, _ in counts),
        "failed": sum(failed for _, failed in counts) + sum(w.exitcode != 0 for w in writers),
        "reads": reads,
        "torn": torn,
        "left": len(list(folder.iterdir())) - 1,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tests.writers", description="Three writers of one file.")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = contest(arguments.seconds, Path(folder))
    sys.stdout.write(
        f"{WRITERS} writers and a reader for {arguments.seconds:g} s: {found['saves']} saves, "
        f"{found['failed']} failed; {found['reads']} reads, {found['torn']} torn; "
        f"{found['left']} files left behind\n"
    )
    sys.exit(bool(found["failed"] or found["torn"] or found["left"]))


if __name__ == "__main__":
    main()
