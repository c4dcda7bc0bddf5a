"""Rows of a comparison made once and kept: OUT/rows holds a file per row, and a row that is done is
not made again.

Rows are independent of each other, so with --jobs N each of N processes of one thread makes one at
a time: the same command with `--only ROW`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ... import shell
from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.rollout import NonFiniteBlockError, Step
from ..command import started
from ..report import record, write_json
from .candidates import (
    BATCH,
    REFERENCE_DRAWS,
    Candidate,
    Protocol,
    candidate_of,
    measure,
    true_reference,
)
from .features import Reference, load_reference, save_reference
from .score import Table

log = logging.getLogger("mutualforcing")

Scores = list[list[list[Table]]]  # by training, sampling seed and piece


class Made(NamedTuple):
    """A finished row.

    Attributes:
        records: with what each training was measured, and how long that took: files of one table
            may have been made at different times.
    """

    scores: Scores
    records: list[Table]


def add_row_options(p: argparse.ArgumentParser) -> None:
    """Which models, asked in which ways, on how many prompts."""
    p.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME=FILES",
        help="several files, joined by commas, are trainings of one method from different seeds",
    )
    p.add_argument(
        "--rows",
        nargs="+",
        required=True,
        metavar="NAME:MODE:STEPS",
        help="a fourth part is a guidance (multi) or a sampling method",
    )
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--seeds", type=int, default=3, help="sampling seeds, each with every prompt")
    p.add_argument(
        "--combinations",
        nargs="+",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="WORD,WORD",
        help="only prompts that have all words of one of these",
    )
    p.add_argument(
        "--codecs",
        type=Path,
        default=shipped_model_path(),
        help="model file in whose codecs distances are measured; default: shipped",
    )
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--jobs", type=int, default=1, help="rows made at once, in processes of one thread"
    )
    p.add_argument("--only", metavar="ROW", help="make this one row and stop; what --jobs starts")
    p.add_argument("--check", action="store_true", help="exit with 1 when a claim is missed")
    p.add_argument(
        "--out", type=Path, required=True, help="folder; delete its rows/ to measure anew"
    )


class Job(NamedTuple):
    """One training's part of a row: what is made at once and kept in a file.

    Attributes:
        file: of the model; None for the rows without one.
    """

    label: str
    candidate: Candidate
    file: Path | None


@dataclass(frozen=True)
class Comparison:
    """Everything that rows are made from.

    Attributes:
        candidates: in the order of the table, those without a model first.
        names: of the models, as on the command line.
        settings: by the label of each job that is wanted now, what it depends on, as in its file.
    """

    candidates: tuple[Candidate, ...]
    names: tuple[str, ...]
    jobs: tuple[Job, ...]
    settings: dict[str, Table]
    protocol: Protocol
    codecs: Bundle
    folder: Path
    device: str

    def path(self, job: Job) -> Path:
        """Where a job's part of a row is kept."""
        return self.folder / f"{job.label.replace(':', '-')}.json"


def comparison_of(
    args: argparse.Namespace, protocol: Protocol, floors: Sequence[str]
) -> Comparison:
    """What the command line asks for.

    Args:
        floors: which of WITHOUT_MODEL come before the models' rows.

    Raises:
        ValueError: models or rows that cannot be read.
        OSError: likewise.
    """
    files: dict[str, list[Path]] = {}
    for given in args.models:
        name, equals, paths = given.partition("=")
        if not equals or not name or name in files:
            raise ValueError(f"found --models {given!r}, expected NAME=FILE, each NAME once")
        files[name] = [Path(path) for path in paths.split(",")]
    asked = [candidate_of(label) for label in dict.fromkeys(args.rows)]
    unknown = [one.label for one in asked if one.name not in files]
    if unknown:
        raise ValueError(f"found rows {unknown}, expected names of --models: {sorted(files)}")
    jobs = [Job(name, Candidate(name, name), None) for name in floors]
    for one in asked:
        for number, file in enumerate(files[one.name], start=1):
            if not file.is_file():
                raise ValueError(f"no such model file: {file}; check --models")
            numbered = len(files[one.name]) > 1
            jobs.append(Job(f"{one.label}#{number}" if numbered else one.label, one, file))
    if args.only not in (None, *(job.label for job in jobs)):
        raise ValueError(f"found --only {args.only!r}, expected one of the rows")
    codecs = load_bundle(args.codecs, device=args.device)
    settings = {
        job.label: _settings(job, protocol, codecs)
        for job in jobs
        if args.only in (None, job.label)
    }
    candidates = dict.fromkeys(job.candidate for job in jobs)
    folder = args.out / "rows"
    about = settings, protocol, codecs, folder, args.device
    return Comparison(tuple(candidates), tuple(files), tuple(jobs), *about)


def run(comparison: Comparison, args: argparse.Namespace, module: str) -> dict[str, Made]:
    """Every row by its label, from files or made now; rows of which a part fails are missing.

    Args:
        args: of `add_row_options`.
        module: the command's own, to start it again for single jobs.
    """
    wanted = [job for job in comparison.jobs if job.label in comparison.settings]
    to_do = [job for job in wanted if _kept(comparison, job) is None]
    # The longest first, so that no process is left with it at the end.
    to_do.sort(key=lambda job: -job.candidate.evaluations)
    if to_do:
        reference = _reference(comparison)
    if args.jobs > 1 and len(to_do) > 1:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: _start(job, module), to_do))
    else:
        for job in to_do:
            _make(comparison, job, reference)
    parts: dict[str, list[Table | None]] = {}
    for job in wanted:
        parts.setdefault(job.candidate.label, []).append(_kept(comparison, job))
    return {
        label: Made(
            [part["scores"] for part in trainings],
            [{key: part[key] for key in ("CPU seconds", "record")} for part in trainings],
        )
        for label, trainings in parts.items()
        if None not in trainings
    }


def _settings(job: Job, protocol: Protocol, codecs: Bundle) -> Table:
    settings: Table = {
        "protocol": protocol.described(),
        "codecs": codecs.model_id,
        "reference draws": REFERENCE_DRAWS,
    }
    sampler = job.candidate.sampler
    if sampler is not None:
        model = load_bundle(job.file)
        settings |= {"model": model.model_id, "window": model.stream.window}
        settings["sampler"] = asdict(sampler) | {"sigmas": list(sampler.sigmas)}
    return settings


def _kept(comparison: Comparison, job: Job) -> Table | None:
    """What a job's file holds, if it is whole and was made with these settings."""
    try:
        content = json.loads(comparison.path(job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if content["settings"] == comparison.settings[job.label] else None


def _reference(comparison: Comparison) -> Reference:
    protocol = comparison.protocol
    size = f"{protocol.prompts}x{REFERENCE_DRAWS}x{protocol.seconds}s"
    size += "".join(f"-{'.'.join(one)}" for one in protocol.combinations)
    path = comparison.folder / f"reference-{size}-{comparison.codecs.model_id}.safetensors"
    if not path.exists():
        log.info("true clips to measure distances from ...")
        save_reference(path, true_reference(comparison.codecs, protocol))
    return load_reference(path)


def _make(comparison: Comparison, job: Job, reference: Reference) -> None:
    """Make one part of a row here, and keep it."""
    candidate = job.candidate
    protocol, model = comparison.protocol, comparison.codecs
    if candidate.sampler is not None:
        model = load_bundle(job.file, device=comparison.device)
    batches = -(-protocol.prompts // BATCH) * protocol.seeds
    blocks = model.clock.blocks_for(protocol.seconds * protocol.pieces)
    steps = batches * blocks * candidate.sampler.steps if candidate.sampler is not None else None
    began, cpu = time.perf_counter(), time.process_time()
    try:
        with shell.progress(total=steps, desc=job.label, unit="step", disable=None) as bar:

            def progress(_: Step) -> None:
                bar.update()

            scored = measure(candidate, protocol, model, comparison.codecs, reference, progress)
    except (NonFiniteBlockError, ValueError) as error:
        log.error("row %s cannot be measured: %s", job.label, error)
        return
    content = {
        "row": job.label,
        "record": record(),
        "settings": comparison.settings[job.label],
        "evaluations per block": candidate.evaluations,
        "seconds": time.perf_counter() - began,
        "CPU seconds": time.process_time() - cpu,
        "scores": scored,
    }
    write_json(comparison.path(job), content)
    log.info("%s: done in %.0f s", job.label, content["seconds"])


def _start(job: Job, module: str) -> None:
    """Make one part of a row in a process of its own."""
    command = started(module, *sys.argv[1:], "--only", job.label, "--jobs", "1")
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=threads, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        log.error("row %s failed: %s", job.label, lines[-1] if lines else "no word why")
    else:
        log.info("%s: done", job.label)
