"""Train Mutual Forcing, its rivals and its ablations alike, and measure them side by side.

    python launch.py lab.training.comparison --init runs/joint --minutes 7 --out runs/comparison \
        --latents runs/latents1 runs/short13 --codecs models/mutual_forcing_small.safetensors

Every method of configs/methods.json starts from the same multi-step weights and gets the same
minutes of one core on the same data. The rival's teacher gets as many again, which are not counted.
OUT/models holds a model file per method, OUT/compare the table and OUT/horizon the minute-long
streams. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...model_loaders.bundle import shipped_model_path
from .. import command
from .train import CONFIGS

logger = logging.getLogger("mutualforcing")
TAUGHT, TEACHER = "dmd_self_forcing", "bidirectional"
# Teacher forcing alone has no few-step mode, and the rival's sampler is another. Fifty steps are a
# row of the shipped model only (make evaluate): they take as long as all others together.
ROWS = {
    "mutual": ("few:4", "few:8"),
    "teacher_forcing": ("multi:4",),
    TAUGHT: ("few:4:renoise",),
}
RIVALS = ("teacher_forcing", "shortcut_teacher_forcing", "dmd_teacher_forcing", TAUGHT)


def rows_of(method: str) -> list[str]:
    """Rows of the table that show a method: few-step mode at 4 steps wherever it has one."""
    return [f"{method}:{row}" for row in ROWS.get(method, ("few:4",))]


def launched(module: str, *args: object) -> None:
    """Run a command of this pack on one thread.

    Raises:
        subprocess.CalledProcessError: it failed; its own words are on the screen.
    """
    line = command.started(module, *args)
    subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(args: argparse.Namespace, method: str) -> None:
    """Train one method, its teacher first if it has one, into a model file, unless it is done."""
    model = model_of(args.out, method)
    done = args.out / method / "done"
    if not done.exists():
        own = ["--stage", "mutual", "--method", method]
        if method == TEACHER:
            own = ["--stage", TEACHER]
        elif method == TAUGHT:
            train(args, TEACHER)
            own += ["--teacher", args.out / TEACHER]
        shared = ["--init", args.init, "--latents", *args.latents, "--minutes", args.minutes]
        shared += ["--seed", args.seed, "--config", args.config, "--out", args.out / method]
        launched("lab.training.train", *own, *shared)
        done.touch()
    if method != TEACHER and not model.exists():
        codecs = ["--codecs", args.codecs, args.codecs]
        launched("lab.training.ship", "--run", args.out / method, *codecs, "--out", model)
    logger.info("%s: trained", method)


def model_of(out: Path, method: str) -> Path:
    """Where the model file of a method lies."""
    return out / "models" / f"{method}.safetensors"


def train_all(args: argparse.Namespace) -> None:
    """Train the methods, several at once; the one with a teacher takes longest, so it begins."""
    methods = sorted(args.methods, key=lambda method: method != TAUGHT)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda method: train(args, method), methods))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = list(json.loads((CONFIGS / "methods.json").read_text()))
    p = command.parser("lab.training.comparison", __doc__)
    p.add_argument("--config", type=Path, default=CONFIGS / "comparison.json")
    p.add_argument("--init", type=Path, required=True, help="multi-step weights: run or model file")
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--codecs", type=Path, default=shipped_model_path(), help="model file")
    p.add_argument("--minutes", type=float, default=7, help="of one core, for each method")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--methods", nargs="+", choices=known, default=known)
    p.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--long-prompts", type=int, default=16)
    p.add_argument("--long-seeds", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Train all methods and measure them."""
    train_all(args)

    models = [f"{method}={model_of(args.out, method)}" for method in args.methods]
    rows = [row for method in args.methods for row in rows_of(method)]
    shared = ["--codecs", args.codecs, "--jobs", args.jobs]
    compared = ["--prompts", args.prompts, "--seeds", args.seeds, "--out", args.out / "compare"]
    rivals = [method for method in RIVALS if method in args.methods]
    claims = ["--claims", "mutual", "--baselines", *rivals] if "mutual" in args.methods else []
    compared += [*claims, *shared]
    launched("lab.metrics.compare", "--models", *models, "--rows", *rows, *compared)
    rows = [rows_of(method)[0] for method in args.methods]
    long = ["--prompts", args.long_prompts, "--seeds", args.long_seeds]
    long += ["--out", args.out / "horizon"]
    launched("lab.metrics.horizon", "--models", *models, "--rows", *rows, *long, *shared)


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
