"""The command lines of the laboratory: one way to read, run, fail and start one another."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from .. import shell
from ..jobs.pools import InTurn, Job, OnRay, Pool, Worker
from ..jobs.run import run as run_jobs
from ..model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ..samplers.rollout import Mode, SamplerSettings, sampler_settings

log = logging.getLogger("mutualforcing")
ROOT = Path(__file__).resolve().parents[1]


def parser(module: str, about: str) -> shell.Parser:
    """A command line that explains itself with its module's docstring."""
    return shell.Parser(
        prog=f"launch.py {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(
    p: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    timed: bool = False,
) -> int:
    """Read the command line and do the work; returns the exit status, 2 for what cannot be done.

    What the work logs goes to standard output: results are what these commands are for.

    Args:
        timed: whether every line says when.
    """
    args = p.parse_args(argv)
    form = "%(asctime)s %(message)s" if timed else "%(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout)
    try:
        for name, value in vars(args).items():
            # What is 0 if nothing is said may be 0: a number to start from, or "none".
            least = 0 if p.get_default(name) == 0 else 1
            if type(value) is int and value < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is {value}, expected at least {least}")
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        return work(args) or 0
    except (ValueError, OSError, ImportError) as error:
        log.error("%s", error)
        log.debug("raised here", exc_info=True)
        return 2


def started(module: str, *options: object) -> list[str]:
    """The command that runs another module of this pack in a process of its own."""
    return [sys.executable, str(ROOT / "launch.py"), module, *map(str, options)]


def add_pool_options(p: argparse.ArgumentParser) -> None:
    """Who does work that has parts: this process, or Ray's workers, of one thread each."""
    p.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="make parts side by side, on this machine or a cluster; default: in turn",
    )
    p.add_argument("--workers", type=int, help="of Ray; default: one per core or card")


def in_parts(
    args: argparse.Namespace,
    parts: Sequence[Job],
    is_done: Callable[[Job], bool],
    here: Callable[[], Worker],
    there: Callable[[], tuple[str, Mapping[str, object]]],
) -> None:
    """Make the parts that are not done, by `add_pool_options`; what fails is named and left out.

    Args:
        here: makes a worker in this process.
        there: what makes one elsewhere, as MODULE:NAME, and its arguments. Either is called only
            where something is to be made.

    Raises:
        KeyboardInterrupt: it was asked to stop before all had their turn.
        ValueError: no worker can begin.
    """

    class Files:
        """The parts' own files say what is done."""

        def is_done(self, job: Job) -> bool:
            """Whether its file is there."""
            return is_done(job)

        def note(self, *_job: object, **_facts: object) -> None:
            """They say it already."""

    def pool() -> Pool:
        if args.ray is None:
            return InTurn(here())
        of, settings = there()
        return OnRay(settings, args.ray or None, args.workers, of)

    _, all_had_their_turn = run_jobs(parts, Files(), pool)
    if not all_had_their_turn:
        raise KeyboardInterrupt


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Which model, and how it samples."""
    p.add_argument("--model", type=Path, default=shipped_model_path(), help="default: shipped")
    p.add_argument("--mode", choices=get_args(Mode), help="default: the model's own")
    p.add_argument("--steps", type=int, help="default: the mode's own")
    p.add_argument("--guidance", type=float, help="default: the mode's own")
    p.add_argument("--window", type=int, help="blocks of history; default: the model's own")
    p.add_argument("--device", default="cpu")


def add_result_options(p: argparse.ArgumentParser, out: str = "write OUT.json and OUT.md") -> None:
    """Where results go, and whether a missed target is an error."""
    p.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    p.add_argument("--out", type=Path, required=True, help=out)


def open_model(args: argparse.Namespace) -> tuple[Bundle, SamplerSettings]:
    """The model and how it samples, by `add_model_options`.

    Raises:
        ValueError: no such model, or settings that do not go together.
        OSError: it cannot be read.
    """
    bundle = load_bundle(args.model, device=args.device)
    mode = args.mode or bundle.stream.default_mode
    return bundle, sampler_settings(mode, args.steps, args.guidance)
