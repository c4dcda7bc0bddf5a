"""How much faster workers side by side make many clips than one after the other.

    python launch.py lab.bench.jobs --jobs 8 --seconds 10 --workers 2 --out docs/measured/jobs

The same jobs in turn in this process, by workers that Ray keeps on this machine (begun before the
clock), and four takes of one prompt as four jobs against one batch; in turn, so that whatever else
the machine does meets all alike. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from ... import shell
from ...jobs.manifest import Manifest
from ...jobs.pools import InTurn, OnRay, Pool
from ...jobs.request import Job
from ...jobs.run import run
from ...jobs.storage import Storage
from ...jobs.worker import Worker
from ...model_loaders.bundle import shipped_model_path
from ...networks.execution import cores
from .. import command
from ..report import publish, table
from . import clip

MODULE = "lab.bench.jobs"
TAKES = 4


def seconds_of(jobs: Sequence[Job], pool: Pool, folder: Path, model_id: str) -> float:
    """How long a pool takes for jobs, from its first until its last."""
    manifest = Manifest(Storage(str(folder)), jobs, model_id)
    began = time.perf_counter()
    failed, _ = run(jobs, manifest, lambda: pool)
    if failed:
        raise ValueError(f"{failed} jobs failed; the lines above say why")
    return time.perf_counter() - began


def parser() -> shell.Parser:
    """The command line."""
    made = command.parser(MODULE, __doc__)
    add = made.add_argument
    add("--model", type=shell.Input(), default=shipped_model_path(), help="default: shipped")
    add("--jobs", type=shell.whole(1, 1000), default=8, help="how many clips (8)")
    add("--seconds", type=shell.whole(1, 3600), default=10, help="length of each (10)")
    add("--workers", type=shell.whole(1, 256), default=cores(), help="of Ray (one per core)")
    add("--rounds", type=shell.whole(1, 100), default=2, help="how often (2)")
    add("--out", type=Path, help="write OUT.json and OUT.md as well")
    return made


@torch.no_grad()
def work(args: object) -> None:
    """Measure, print and write.

    Raises:
        ValueError: no such model, or no Ray.
    """
    torch.set_num_threads(1)

    def asked(count: int) -> list[Job]:
        return [
            Job(name=str(n), prompt=clip.PROMPT, seconds=args.seconds, seed=n) for n in range(count)
        ]

    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)

            def settings(name: str, folder: Path = folder) -> dict[str, object]:
                return {"model": args.model.absolute(), "address": str(folder / name)}

            worker = Worker(**settings("turn"))
            model_id = worker.bundle.model_id
            ways = [("in turn", InTurn(worker), asked(args.jobs), "turn")]
            rayed = OnRay(settings("ray"), None, args.workers)
            rayed.wait_until_ready()
            ways.append((f"{args.workers} workers", rayed, asked(args.jobs), "ray"))
            takes = InTurn(Worker(**settings("takes")))
            ways.append((f"{TAKES} takes as jobs, in turn", takes, asked(TAKES), "takes"))
            for name, pool, jobs, where in ways:
                took = seconds_of(jobs, pool, folder / where, model_id)
                found.setdefault(name, []).append(took)
            way, path = clip.Way(1, cores() > 1), folder / "batch.mp4"
            batch = clip.seconds_of(worker.bundle, way, args.seconds, path, TAKES)
            found.setdefault(f"{TAKES} takes as one batch", []).append(batch)
    times = {name: median(took) for name, took in found.items()}
    turn, workers, takes, batch = times.values()
    clips = [args.jobs, args.jobs, TAKES, TAKES]
    rows = [
        [name, f"{count * args.seconds / took:.2f}"]
        for (name, took), count in zip(times.items(), clips, strict=True)
    ]
    lines = [
        f"{args.jobs} clips of {args.seconds} s, times real time (median of {args.rounds}):",
        "",
        *table(["", "seconds of clip a second"], rows),
        "",
        f"- {args.workers} workers over one: {turn / workers:.2f}",
        f"- {TAKES} takes as one batch over as many jobs: {takes / batch:.2f}",
    ]
    ratios = {"workers over one": turn / workers, "batch over jobs": takes / batch}
    publish(args.out, {"cores": cores(), "seconds": found, "ratios": ratios}, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
