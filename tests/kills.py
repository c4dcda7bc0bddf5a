"""Killed with -9 at random moments: `python launch.py tests.kills --times 20`.

Each time `generate.py` makes a clip and a stream, and is killed. Its file must play to within a
second of what had been handed over by then; its stream must be whole, at most three seconds behind,
and go on to the same bits as a stream that was never broken.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import torch
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import BlockLatents, StreamState
from mutual_forcing.samplers.state_file import load_state

ROOT = Path(__file__).resolve().parents[1]
SECONDS, PROMPT = 3600, "a red drum beats fast"
FURTHER = 2
_WORKER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import generate
from mutual_forcing.samplers.clip_writer import ClipWriter
write = ClipWriter.write
def told(writer, decoded):
    write(writer, decoded)
    print(writer.frames, writer.samples, flush=True)
ClipWriter.write = told
sys.exit(generate.main())
"""


class Killed(NamedTuple):
    """What was left: blocks handed over and saved, and how many frames and samples play less."""

    blocks: int
    saved: int
    frames_behind: int
    samples_behind: int
    same: bool

    @property
    def well(self) -> bool:
        """Whether nothing was lost beyond what may be."""
        near = self.frames_behind <= 24 and self.samples_behind <= 16000
        return near and self.blocks - self.saved <= 3 and self.same


def killed(model: Path, folder: Path, prompt: str, wait: float) -> tuple[int, int]:
    """Run and kill, `wait` seconds after the first block; frames and samples handed over."""
    words = [prompt, "--model", model, "--seconds", SECONDS, "-o", folder / "clip.mp4"]
    words += ["--mode", "few", "--steps", 4, "--state-out", folder / "stream.state"]
    command = [sys.executable, "-c", _WORKER, ROOT, *words]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines = [process.stdout.readline()]
    time.sleep(wait)
    process.kill()
    lines += process.stdout.read().splitlines()
    process.wait()
    frames, samples = max(tuple(map(int, line.split())) for line in lines if len(line.split()) == 2)
    return frames, samples


def playable(path: Path) -> tuple[int, int]:
    """Frames and samples of a file before it ends."""
    counts = []
    for kind in ("video", "audio"):
        count = 0
        with av.open(str(path)) as file:
            try:
                for frame in file.decode(**{kind: 0}):
                    count += 1 if kind == "video" else frame.samples
            except av.error.FFmpegError:
                pass
        counts.append(count)
    return counts[0], counts[1]


class Reference:
    """The stream that nobody breaks, as far as it is asked for."""

    def __init__(self, bundle: Bundle, prompt: str) -> None:
        self.bundle, self.prompt = bundle, bundle.prompt(prompt)
        self._made, self._blocks = self.going_on(bundle.begin(), SECONDS), list[BlockLatents]()

    def going_on(self, state: StreamState, blocks: int) -> Iterator[BlockLatents]:
        """Latents of further blocks."""
        sampler = sampler_settings("few", 4)
        made = rollout(
            self.bundle, self.prompt, state, blocks, sampler, settle=lambda s: s.trimmed()
        )
        return (latents for latents, _ in made)

    def is_followed_by(self, state: StreamState) -> bool:
        """Whether a state goes on to the same bits."""
        end = state.next_block + FURTHER
        while len(self._blocks) < end:
            self._blocks.append(next(self._made))
        expected = self._blocks[state.next_block : end]
        found = list(self.going_on(state, FURTHER))
        return all(
            torch.equal(a, b)
            for x, y in zip(found, expected, strict=True)
            for a, b in zip(x, y, strict=True)
        )


def kill_often(
    model: Path, prompt: str, times: int, longest: float, seed: int = 0
) -> Iterator[Killed]:
    """What each of so many kills left, at random moments up to `longest` after the first block."""
    torch.set_num_threads(1)
    bundle, moments = load_bundle(model), random.Random(seed)
    reference = Reference(bundle, prompt)
    for _ in range(times):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            frames, samples = killed(model, folder, prompt, moments.uniform(0, longest))
            seen, heard = playable(folder / "clip.mp4")
            blocks = next(n for n in range(1, SECONDS) if bundle.clock.frames(n) >= frames)
            path = folder / "stream.state"
            state = load_state(path) if path.exists() else bundle.begin()
            same = reference.is_followed_by(state)
            left = frames - seen, samples - heard
            yield Killed(blocks, state.next_block, *left, same)


def main() -> int:
    """Command line; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(prog="launch.py tests.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds after the first block")
    parser.add_argument("--model", type=Path, default=shipped_model_path())
    args = parser.parse_args()
    found = []
    for one in kill_often(args.model, PROMPT, args.times, args.longest):
        found.append(one)
        sys.stdout.write(f"{one} {'' if one.well else '<- lost'}\n")
        sys.stdout.flush()
    most = [max(values) for values in zip(*(one[:4] for one in found), strict=True)]
    sys.stdout.write(
        f"{sum(one.well for one in found)} of {len(found)} left what they should; at most "
        f"{most[2] / 24:.2f} s of picture and {most[3] / 16000:.2f} s of sound behind, the stream "
        f"{max(one.blocks - one.saved for one in found)} s; up to {most[0]} blocks\n"
    )
    return int(not all(one.well for one in found))


if __name__ == "__main__":
    sys.exit(main())
