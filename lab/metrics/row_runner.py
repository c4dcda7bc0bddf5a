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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ... import shell
from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.rollout import NonFiniteBlockError, Step
from .command import write_json
from .features import Reference, load_reference, save_reference
from .record import ROOT, record
from .rows import BATCH, REFERENCE_DRAWS, Protocol, Row, measure, row_of, true_reference
from .score import Table

log = logging.getLogger("mutualforcing")

Scores = list[list[Table]]  # by seed and piece


class Made(NamedTuple):
    """A finished row.

    Attributes:
        record: with what it was made; a table's rows may have been made at different times.
        cpu_seconds: of all threads, clips and measuring together.
    """

    scores: Scores
    record: Table
    cpu_seconds: float


def add_row_options(p: argparse.ArgumentParser) -> None:
    """Which models, asked in which ways, on how many prompts."""
    p.add_argument("--models", nargs="+", required=True, metavar="NAME=FILE")
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


@dataclass(frozen=True)
class Plan:
    """Everything that rows are made from.

    Attributes:
        rows: in the order of the table, those without a model first.
        files: model files by name.
        settings: by the label of each row that is wanted now, what it depends on, as in its file.
    """

    rows: tuple[Row, ...]
    files: dict[str, Path]
    settings: dict[str, Table]
    protocol: Protocol
    codecs: Bundle
    folder: Path
    device: str

    def path(self, row: Row) -> Path:
        """Where a row is kept."""
        return self.folder / f"{row.label.replace(':', '-')}.json"


def plan_of(args: argparse.Namespace, protocol: Protocol, floors: Sequence[str]) -> Plan:
    """What the command line asks for.

    Args:
        floors: which of WITHOUT_MODEL come before the models' rows.

    Raises:
        ValueError: models or rows that cannot be read.
        OSError: likewise.
    """
    files = {}
    for given in args.models:
        name, equals, file = given.partition("=")
        if not equals or not name or name in files:
            raise ValueError(f"found --models {given!r}, expected NAME=FILE, each NAME once")
        files[name] = Path(file)
    asked = [row_of(label) for label in dict.fromkeys(args.rows)]
    unknown = [row.label for row in asked if row.name not in files]
    if unknown:
        raise ValueError(f"found rows {unknown}, expected names of --models: {sorted(files)}")
    missing = [str(files[row.name]) for row in asked if not files[row.name].is_file()]
    if missing:
        raise ValueError(f"no such model file: {', '.join(dict.fromkeys(missing))}; check --models")
    rows = (*(Row(name, name) for name in floors), *asked)
    if args.only not in (None, *(row.label for row in rows)):
        raise ValueError(f"found --only {args.only!r}, expected one of the rows")
    codecs = load_bundle(args.codecs, device=args.device)
    settings = {
        row.label: _settings(row, protocol, codecs, files)
        for row in rows
        if args.only in (None, row.label)
    }
    return Plan(rows, files, settings, protocol, codecs, args.out / "rows", args.device)


def run(plan: Plan, args: argparse.Namespace, module: str) -> dict[str, Made]:
    """Every row by its label, from the file or made now; rows that fail are missing.

    Args:
        args: of `add_row_options`.
        module: the command's own, to start it again for single rows.
    """
    wanted = [row for row in plan.rows if row.label in plan.settings]
    to_do = [row for row in wanted if _kept(plan, row) is None]
    # The longest first, so that no process is left with it at the end.
    to_do.sort(key=lambda row: -row.evaluations)
    if to_do:
        reference = _reference(plan)
    if args.jobs > 1 and len(to_do) > 1:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda row: _start(plan, row, module), to_do))
    else:
        for row in to_do:
            _make(plan, row, reference)
    found = {row.label: _kept(plan, row) for row in wanted}
    return {label: made for label, made in found.items() if made is not None}


def _settings(row: Row, protocol: Protocol, codecs: Bundle, files: Mapping[str, Path]) -> Table:
    settings: Table = {
        "protocol": asdict(protocol),
        "codecs": codecs.model_id,
        "reference draws": REFERENCE_DRAWS,
    }
    if row.sampler is not None:
        model = load_bundle(files[row.name])
        settings |= {"model": model.model_id, "window": model.stream.window}
        settings["sampler"] = asdict(row.sampler) | {"sigmas": list(row.sampler.sigmas)}
    return settings


def _kept(plan: Plan, row: Row) -> Made | None:
    """What a row's file holds, if it is whole and was made with these settings."""
    try:
        content = json.loads(plan.path(row).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if content["settings"] != plan.settings[row.label]:
        return None
    return Made(content["scores"], content["record"], content["CPU seconds"])


def _reference(plan: Plan) -> Reference:
    protocol = plan.protocol
    size = f"{protocol.prompts}x{REFERENCE_DRAWS}x{protocol.seconds}s"
    path = plan.folder / f"reference-{size}-{plan.codecs.model_id}.safetensors"
    if not path.exists():
        log.info("true clips to measure distances from ...")
        save_reference(path, true_reference(plan.codecs, protocol))
    return load_reference(path)


def _make(plan: Plan, row: Row, reference: Reference) -> None:
    """Make one row here, and keep it."""
    protocol, model = plan.protocol, plan.codecs
    if row.sampler is not None:
        model = load_bundle(plan.files[row.name], device=plan.device)
    batches = -(-protocol.prompts // BATCH) * protocol.seeds
    blocks = model.clock.blocks_for(protocol.seconds * protocol.pieces)
    steps = batches * blocks * row.sampler.steps if row.sampler is not None else None
    began, cpu = time.perf_counter(), time.process_time()
    try:
        with shell.progress(total=steps, desc=row.label, unit="step", disable=None) as bar:

            def progress(_: Step) -> None:
                bar.update()

            scored = measure(row, protocol, model, plan.codecs, reference, progress)
    except (NonFiniteBlockError, ValueError) as error:
        log.error("row %s cannot be measured: %s", row.label, error)
        return
    content = {
        "row": row.label,
        "record": record(),
        "settings": plan.settings[row.label],
        "evaluations per block": row.evaluations,
        "seconds": time.perf_counter() - began,
        "CPU seconds": time.process_time() - cpu,
        "scores": scored,
    }
    write_json(plan.path(row), content)
    log.info("%s: done in %.0f s", row.label, content["seconds"])


def _start(plan: Plan, row: Row, module: str) -> None:
    """Make one row in a process of its own."""
    command = [sys.executable, str(ROOT / "launch.py"), module, *sys.argv[1:]]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", row.label, "--jobs", "1"], env=threads, capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        log.error("row %s failed: %s", row.label, lines[-1] if lines else "no word why")
    else:
        log.info("%s: done", row.label)
