"""A minute in one stream: does a block cost the same late as early, and is the scene the same?

    python launch.py lab.metrics.longrun --model FILE --seconds 60 --out docs/measured/longrun

writes OUT.json: seconds and memory of every block, block 60 against block 20, and the attributes of
the first and of the last 5 seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ... import shell
from ...model_loaders.bundle import Bundle
from ...samplers.decode import DecodedBlock, joined
from ...samplers.live import live_clip
from ...samplers.rollout import SamplerSettings
from .. import command
from ..report import publish, said
from .attributes import measure
from .clips import HeldOut, as_arrays, held_out

try:
    import resource
except ImportError:  # not on Windows, where memory is not measured
    resource = None

NEIGHBOURS = 2  # blocks to either side whose median stands for a block's time
ENDS = 5  # blocks at either end whose attributes are measured
EARLY, LATE = 20, 60


@dataclass(frozen=True)
class BlockCost:
    """What one block took.

    Attributes:
        seconds: on the clock, sampling and decoding.
        cpu_seconds: of all threads; steadier where the machine has other work.
        resident_mb, peak_mb: memory after it, and the most there ever was up to then.
    """

    seconds: float
    cpu_seconds: float
    resident_mb: float
    peak_mb: float


def resident_mb() -> float:
    """Memory of this process now, in MB of 2**20 bytes; the peak where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_mb()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    """The most memory this process ever had, in MB; 0 where the system does not tell."""
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def run(
    bundle: Bundle, text: str, blocks: int, sampler: SamplerSettings, seed: int, window: int | None
) -> tuple[list[BlockCost], DecodedBlock, DecodedBlock]:
    """Generate and decode `blocks` blocks after the prefix, keeping only both ends.

    Returns the cost of each block (the prefix first), and the first and last ENDS blocks.
    """
    prompt = bundle.prompt(text, guided=sampler.guidance != 1)
    state = bundle.begin((seed,), window)
    made = live_clip(bundle, prompt, state, blocks + 1, sampler, bundle.decoder())
    first: list[DecodedBlock] = []
    last: deque[DecodedBlock] = deque(maxlen=ENDS)
    costs = []
    clock, cpu = time.perf_counter(), time.process_time()
    for decoded, _ in shell.progress(made, total=blocks + 1):
        now, cpu_now = time.perf_counter(), time.process_time()
        costs.append(BlockCost(now - clock, cpu_now - cpu, resident_mb(), peak_mb()))
        if len(first) < ENDS + 1:  # the prefix is one frame
            first.append(decoded)
        last.append(decoded)
        clock, cpu = time.perf_counter(), time.process_time()
    return costs, joined(first), joined(last)


def near(costs: Sequence[BlockCost], block: int, name: str) -> float:
    """The median of a cost over a block and its neighbours; there may be none after the last."""
    part = costs[max(0, block - NEIGHBOURS) : block + NEIGHBOURS + 1]
    return float(np.median([getattr(cost, name) for cost in part]))


def kept(bundle: Bundle, prompt: HeldOut, part: DecodedBlock) -> dict[str, bool]:
    """Which attributes are right in one part of the stream."""
    video, audio = as_arrays(part)
    rate, fps = bundle.clock.sample_rate, float(bundle.clock.fps)
    found = measure(video, audio, rate, fps, prompt.scene.kind)
    truth = {"kind": prompt.scene.kind, **prompt.scene.attributes}
    return {key: value == truth[key] for key, value in found.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.longrun", __doc__)
    command.add_model_options(p)
    p.add_argument("--seconds", type=int, default=LATE)
    p.add_argument("--prompt", type=int, default=0, help="number of the held-out prompt")
    p.add_argument("--seed", type=int, default=0)
    command.add_result_options(p)
    return p


def work(args: argparse.Namespace) -> int:
    """Generate, measure, print and write. Returns the exit status."""
    if args.seconds < EARLY + NEIGHBOURS:
        raise ValueError(f"--seconds is {args.seconds}, expected at least {EARLY + NEIGHBOURS}")
    bundle, sampler = command.open_model(args)
    prompt = held_out(args.prompt + 1)[-1]
    costs, first, last = run(bundle, prompt.text, args.seconds, sampler, args.seed, args.window)
    late = len(costs) - 1
    ratios = {
        name: near(costs, late, name) / near(costs, EARLY, name)
        for name in ("seconds", "cpu_seconds")
    }
    peaks = costs[late].peak_mb / costs[EARLY].peak_mb if costs[EARLY].peak_mb else None
    met = ratios["seconds"] <= 1.10 and peaks is not None and peaks <= 1.05
    results = {
        "model": {"file": args.model.name, "id": bundle.model_id},
        "settings": {"mode": sampler.mode, "steps": sampler.steps, "guidance": sampler.guidance},
        "prompt": prompt.text,
        "seconds per block": near(costs, late, "seconds"),
        f"time of block {late} over block {EARLY}": ratios["seconds"],
        f"CPU time of block {late} over block {EARLY}": ratios["cpu_seconds"],
        f"peak memory at block {late} over block {EARLY}": peaks,
        "peak MB": costs[late].peak_mb,
        "met": met,
        "right at the start": kept(bundle, prompt, first),
        "right at the end": kept(bundle, prompt, last),
        "blocks": {
            name: [round(getattr(cost, name), 4) for cost in costs]
            for name in ("seconds", "cpu_seconds", "resident_mb", "peak_mb")
        },
    }
    lines = [f"- {key}: {said(value)}" for key, value in results.items() if key != "blocks"]
    publish(args.out, results, lines)
    return int(args.check and not met)


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
