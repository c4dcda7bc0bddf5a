"""Rows of a comparison made once and kept: OUT/rows holds a file per row, and a row that is done is
not made again.

Rows are independent of each other, so they may be made side by side (--ray).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ...jobs.worker import Refused, Report, this_process
from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.rollout import NonFiniteBlockError, Step
from .. import command
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
    command.add_pool_options(p)
    p.add_argument("--check", action="store_true", help="exit with 1 when a claim is missed")
    p.add_argument(
        "--out", type=Path, required=True, help="folder; delete its rows/ to measure anew"
    )


class Part(NamedTuple):
    """One training's part of a row: what is made at once and kept in a file.

    Attributes:
        file: of the model; None for the rows without one.
    """

    name: str
    candidate: Candidate
    file: Path | None

    @property
    def cost(self) -> float:
        """Evaluations per block."""
        return self.candidate.evaluations

    def text(self) -> str:
        """What `RowWorker.read` reads."""
        return self.name


@dataclass(frozen=True)
class Comparison:
    """Everything that rows are made from.

    Attributes:
        candidates: in the order of the table, those without a model first.
        names: of the models, as on the command line.
        settings: by the name of each part, what it depends on, as in its file.
    """

    candidates: tuple[Candidate, ...]
    names: tuple[str, ...]
    parts: tuple[Part, ...]
    settings: dict[str, Table]
    protocol: Protocol
    codecs: Bundle
    folder: Path
    device: str

    def path(self, part: Part) -> Path:
        """Where a part of a row is kept."""
        return self.folder / f"{part.name.replace(':', '-')}.json"


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
    parts = [Part(name, Candidate(name, name), None) for name in floors]
    for one in asked:
        for number, file in enumerate(files[one.name], start=1):
            if not file.is_file():
                raise ValueError(f"no such model file: {file}; check --models")
            numbered = len(files[one.name]) > 1
            parts.append(Part(f"{one.label}#{number}" if numbered else one.label, one, file))
    codecs = load_bundle(args.codecs, device=args.device)
    settings = {part.name: _settings(part, protocol, codecs) for part in parts}
    candidates = dict.fromkeys(part.candidate for part in parts)
    folder = args.out / "rows"
    about = settings, protocol, codecs, folder, args.device
    return Comparison(tuple(candidates), tuple(files), tuple(parts), *about)


def run(comparison: Comparison, args: argparse.Namespace, module: str) -> dict[str, Made]:
    """Every row by its label, from files or made now; rows of which a part fails are missing.

    Args:
        args: of `add_row_options`.
        module: the command's own, whose `comparison_from` a worker elsewhere asks.
    """
    wanted = comparison.parts

    def is_done(part: Part) -> bool:
        return _kept(comparison, part) is not None

    def there() -> tuple[str, Table]:
        _reference(comparison)  # once, before workers would each make it
        settings = {"module": module, "argv": sys.argv[1:], "device": args.device}
        return f"{__name__}:{worker_of.__name__}", settings

    command.in_parts(args, wanted, is_done, lambda: RowWorker(comparison), there)
    parts: dict[str, list[Table | None]] = {}
    for part in wanted:
        parts.setdefault(part.candidate.label, []).append(_kept(comparison, part))
    return {
        label: Made(
            [part["scores"] for part in trainings],
            [{key: part[key] for key in ("CPU seconds", "record")} for part in trainings],
        )
        for label, trainings in parts.items()
        if None not in trainings
    }


def worker_of(module: str, argv: Sequence[str], device: str) -> RowWorker:
    """A worker in a process of Ray's, for the command line of a module."""
    made = importlib.import_module(f"{__package__.partition('.')[0]}.{module}")
    args = made.parser().parse_args(argv)
    args.device = device
    return RowWorker(made.comparison_from(args))


def _settings(part: Part, protocol: Protocol, codecs: Bundle) -> Table:
    settings: Table = {
        "protocol": protocol.described(),
        "codecs": codecs.model_id,
        "reference draws": REFERENCE_DRAWS,
    }
    sampler = part.candidate.sampler
    if sampler is not None:
        model = load_bundle(part.file)
        settings |= {"model": model.model_id, "window": model.stream.window}
        settings["sampler"] = asdict(sampler) | {"sigmas": list(sampler.sigmas)}
    return settings


def _kept(comparison: Comparison, part: Part) -> Table | None:
    """What a part's file holds, if it is whole and was made with these settings."""
    try:
        content = json.loads(comparison.path(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if content["settings"] == comparison.settings[part.name] else None


def _reference(comparison: Comparison) -> Reference:
    protocol = comparison.protocol
    size = f"{protocol.prompts}x{REFERENCE_DRAWS}x{protocol.seconds}s"
    size += "".join(f"-{'.'.join(one)}" for one in protocol.combinations)
    path = comparison.folder / f"reference-{size}-{comparison.codecs.model_id}.safetensors"
    if not path.exists():
        logging.getLogger("mutualforcing").info("true clips to measure distances from ...")
        save_reference(path, true_reference(comparison.codecs, protocol))
    return load_reference(path)


class RowWorker:
    """Makes parts of rows, and keeps them in their files."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.reference = comparison, _reference(comparison)
        self.name = this_process()

    def read(self, text: str) -> Part:
        """The part of that name."""
        return next(part for part in self.comparison.parts if part.name == text)

    @torch.no_grad()
    def run(self, part: Part, report: Report) -> dict[str, object]:
        """Make a part.

        Raises:
            Refused: the network breaks down.
            OSError: the file cannot be written.
        """
        comparison, candidate = self.comparison, part.candidate
        protocol, model = comparison.protocol, comparison.codecs
        began, cpu, steps = time.perf_counter(), time.process_time(), 0
        seconds = protocol.prompts * protocol.seeds * protocol.seconds * protocol.pieces

        try:
            if candidate.sampler is not None:
                model = load_bundle(part.file, device=comparison.device)
            batches = -(-protocol.prompts // BATCH) * protocol.seeds
            blocks = batches * model.clock.blocks_for(protocol.seconds * protocol.pieces)

            def progress(_: Step) -> None:
                nonlocal steps
                steps += 1
                report(seconds * steps / (blocks * candidate.sampler.steps), seconds)

            scored = measure(
                candidate, protocol, model, comparison.codecs, self.reference, progress
            )
        except (NonFiniteBlockError, ValueError) as error:
            raise Refused(str(error)) from error
        took = time.perf_counter() - began
        content = {
            "row": part.name,
            "record": record(),
            "settings": comparison.settings[part.name],
            "evaluations per block": candidate.evaluations,
            "seconds": took,
            "CPU seconds": time.process_time() - cpu,
            "scores": scored,
        }
        write_json(comparison.path(part), content)
        return {"seconds": seconds, "took": took, "worker": self.name}
