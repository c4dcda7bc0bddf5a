"""How fast a clip with sound comes, as people wait for it: denoised, decoded and written.

    python launch.py lab.bench.clip --seconds 20 --neighbours 0 2 --out docs/measured/clip

Several ways to share the machine's cores, timed in turn, so that whatever else it does meets all
alike; alone and beside other programs that are busy. Writes OUT.json and OUT.md.

    python launch.py lab.bench.clip --seconds 20 --before /path/to/older/checkout

does so with an older version instead: each version's generate.py, with the model that it ships.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from ... import shell
from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...networks.execution import cores
from ...samplers.clip_writer import ClipWriter
from ...samplers.live import live_clip
from ...samplers.rollout import sampler_settings
from .. import command
from ..report import publish, table
from .against import finished

MODULE = "lab.bench.clip"
PROMPT = "a red ball bounces on a blue background"


class Way(NamedTuple):
    """How the work is laid out.

    Attributes:
        threads: of torch, on either side.
        overlap: decoding and writing beside denoising.
    """

    threads: int
    overlap: bool

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{threads}, {'side by side' if self.overlap else 'one after the other'}"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """While inside, `count` other programs keep a core busy each, as well as they can."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds_of(bundle: Bundle, way: Way, seconds: float, path: Path, takes: int = 1) -> float:
    """How long a clip takes from its prompt until its file is closed.

    Args:
        takes: clips of one prompt, made as one stream and shown side by side.
    """
    torch.set_num_threads(way.threads)
    sampler = sampler_settings(bundle.stream.default_mode)
    state = bundle.begin(tuple(range(takes)))
    blocks = bundle.clock.blocks_for(seconds)
    began = time.perf_counter()
    with ClipWriter(path, bundle.clock, *bundle.pixel_size, clips=takes) as writer:
        for _ in live_clip(
            bundle,
            bundle.prompt(PROMPT, guided=sampler.guidance != 1),
            state,
            blocks,
            sampler,
            bundle.decoder(),
            lambda decoded, _: writer.write(decoded),
            overlap=way.overlap,
        ):
            pass
    return time.perf_counter() - began


def seconds_by_generate(checkout: Path, threads: int | None, seconds: float, path: Path) -> float:
    """How long a version's generate.py takes for a clip, loading not counted, as it says itself.

    Args:
        threads: of torch; None = as that version does if nobody asks.

    Raises:
        ValueError: it cannot be started, fails, or does not say it.
    """
    asked = [PROMPT, "--seconds", str(seconds), "-o", str(path)]
    asked += [] if threads is None else ["--threads", str(threads)]
    said = finished([sys.executable, str(checkout / "generate.py"), *asked])
    found = re.search(r"\(([\d.]+) s, loading not counted\)", said)
    if found is None:
        raise ValueError(f"{checkout}: generate.py does not say how long it took: {said[-200:]}")
    return float(found[1])


def beside_older(args: argparse.Namespace, path: Path) -> dict[str, list[float]]:
    """Seconds of every run of the older version and of this one, in turn."""
    here = Path(__file__).resolve().parents[2]
    every = {
        "before, threads as usual": (args.before, None),
        "before, 1 thread": (args.before, 1),
        "now, as usual": (here, None),
    }
    took: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(args.rounds):
        for name, (checkout, threads) in every.items():
            took[name].append(seconds_by_generate(checkout, threads, args.seconds, path))
    return took


def parser() -> shell.Parser:
    """The command line."""
    made = command.parser(MODULE, __doc__)
    add = made.add_argument
    add("--model", type=shell.Input(), default=shipped_model_path(), help="default: shipped")
    add("--seconds", type=shell.whole(1, 3600), default=20, help="length of the clip (20)")
    add("--rounds", type=shell.whole(1, 100), default=3, help="how often each way (3)")
    add(
        "--threads",
        dest="counts",
        type=shell.threads,
        nargs="+",
        default=[1, cores()],
        help="of torch; each number is measured with both sides in turn and at once (1 and all)",
    )
    add(
        "--neighbours",
        type=shell.whole(0, 64),
        nargs="+",
        default=[0],
        help="other busy programs, one measurement for each number (0)",
    )
    add("--before", type=Path, metavar="CHECKOUT", help="time this older version and ours instead")
    add("--out", type=Path, help="write OUT.json and OUT.md as well")
    return made


def measured(args: argparse.Namespace, path: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by what else was busy and by the way."""
    bundle = load_bundle(args.model)
    before = torch.get_num_threads()
    every = [Way(n, overlap) for n in sorted(set(args.counts)) for overlap in (False, True)]
    found: dict[str, dict[str, list[float]]] = {}
    seconds_of(bundle, every[0], 2, path)
    for count in args.neighbours:
        took = found.setdefault(f"{count} busy neighbours", {})
        with neighbours(count):
            for _ in range(args.rounds):
                for way in every:
                    seconds = seconds_of(bundle, way, args.seconds, path)
                    took.setdefault(str(way), []).append(seconds)
    torch.set_num_threads(before)
    return found


@torch.no_grad()
def work(args: argparse.Namespace) -> None:
    """Measure, print and write.

    Raises:
        ValueError: no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        found = measured(args, path) if args.before is None else {"": beside_older(args, path)}
    rates = {
        beside: {way: args.seconds / median(times) for way, times in took.items()}
        for beside, took in found.items()
    }
    ways = next(iter(rates.values()))
    lines = [
        f"{args.seconds} s of clip, times real time (median of {args.rounds}):",
        "",
        *table(
            ["way", *found],
            [[way, *(f"{by_way[way]:.2f}" for by_way in rates.values())] for way in ways],
        ),
    ]
    publish(args.out, {"cores": cores(), "times real time": rates, "seconds": found}, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
