"""Train Mutual Forcing, its rivals and its ablations alike, and measure them side by side.

    python launch.py lab.training.comparison --config lab/training/configs/omniforcing.json \
        --init models/mutual_forcing_small.safetensors --latents runs/plain runs/transcripts \
        --methods mutual omniforcing --trainings 3 --out runs/comparison

Every method of configs/methods.json, and OmniForcing's three stages (lab.training.omniforcing),
start from the same multi-step weights and the same data, few-step mode untaught. The budget is
minutes of one core (--minutes), or the steps that the config gives each stage. One bidirectional
teacher serves all trainings; what it takes is a line of its own.
OUT/models holds a model file per training. OUT/compare has the table of quality, OUT/held_out the
same of prompts with combinations that the config holds out from the data, OUT/horizon the
minute-long streams, OUT/steered syllables and switches, OUT/cost what the trainings took. What is
done is not done again.
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
from pathlib import Path
from typing import NamedTuple

import torch

from ...jobs.worker import Refused, Report, this_process
from ...model_loaders.bundle import load_bundle, shipped_model_path
from ...networks.config import TransformerConfig
from .. import command
from ..metrics import switches, syllables
from ..metrics.candidates import candidate_of
from ..metrics.claims import Estimate
from ..metrics.compare import cell
from ..report import publish, said, table, write_json
from . import omniforcing, train

logger = logging.getLogger("mutualforcing")
TAUGHT, TEACHER, OMNIFORCING = "dmd_self_forcing", "bidirectional", "omniforcing"
# Teacher forcing alone has no few-step mode, and the rivals' sampler is another. Fifty steps are a
# row of the shipped model only (make evaluate): they take as long as all others together.
ROWS = {
    "teacher_forcing": ("multi:4",),
    TAUGHT: ("few:4:renoise",),
    OMNIFORCING: ("few:4:renoise",),
}
RIVALS = (
    "teacher_forcing",
    "shortcut_teacher_forcing",
    "dmd_teacher_forcing",
    TAUGHT,
    OMNIFORCING,
)
STEERED = {"syllables": 3, "switched": 3, "kept": 3}


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


def settings_of(args: argparse.Namespace, method: str) -> Mapping[str, Mapping[str, object]]:
    """The config of a method, or of the teacher."""
    if method == TEACHER:
        return train.read_settings(args.config, TEACHER, "mutual")
    return train.read_settings(args.config, "mutual", method)


def begun(args: argparse.Namespace) -> Path:
    """The weights to start from: of few-step adapters, where the config has any, fresh ones."""
    transformer = settings_of(args, "mutual")["transformer"]
    if not transformer.get("few_step_rank"):
        return args.init
    return train.untaught(args.init, TransformerConfig.from_dict(transformer), args.out / "init")


def run_of(args: argparse.Namespace, method: str, seed: int) -> Path:
    """The folder of one training, that of the teacher for all."""
    return args.out / (TEACHER if method == TEACHER else f"{method}_{seed}")


def trained(args: argparse.Namespace, method: str, seed: int) -> None:
    """Train one method from one seed, unless it is done."""
    out = run_of(args, method, seed)
    if (out / "done").exists():
        return
    shared = ["--init", begun(args), "--latents", *args.latents]
    shared += ["--seed", seed, "--config", args.config, "--out", out]
    teacher = ["--teacher", args.out / TEACHER]
    if method == OMNIFORCING:
        launched("lab.training.omniforcing", *teacher, *shared)
    else:
        own = ["--stage", "mutual", "--method", method]
        own += teacher if method == TAUGHT else []
        if method == TEACHER:
            own = ["--stage", TEACHER]
        launched("lab.training.train", *own, *shared, *budget(args, method), "--log-every", 10)
    (out / "done").touch()
    logger.info("%s: trained", out.name)


def budget(args: argparse.Namespace, method: str) -> list[object]:
    """How long a method, or the teacher, is trained.

    Raises:
        ValueError: neither the command line nor the config says it.
    """
    if args.minutes is not None:
        return ["--minutes", args.minutes]
    steps = settings_of(args, method)["recipe"].get("steps")
    if steps is None:
        raise ValueError(f"{args.config} says no steps of a stage; give --minutes")
    return ["--steps", steps]


def model_of(args: argparse.Namespace, method: str, seed: int) -> Path:
    """Where the model file of a training lies; it is written if it is not there."""
    model = args.out / "models" / f"{method}_{seed}.safetensors"
    if not model.exists():
        run = run_of(args, method, seed)
        last = run / list(omniforcing.CHAIN)[-1] if method == OMNIFORCING else run
        codecs = ["--codecs", args.codecs, args.codecs]
        launched("lab.training.ship", "--run", last, *codecs, "--out", model)
    return model


class Training(NamedTuple):
    """One training of a method."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method}_{self.seed}"

    @property
    def cost(self) -> float:
        """Those with a teacher take longest."""
        return 1.0 + (self.method in (TAUGHT, OMNIFORCING))

    def text(self) -> str:
        """What `Trainer.read` reads."""
        return json.dumps(self)


class Trainer:
    """Takes one training after the other, each in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, this_process()

    def read(self, text: str) -> Training:
        """A training from its text."""
        return Training(*json.loads(text))

    def run(self, one: Training, _report: Report) -> dict[str, object]:
        """Train; a training that was killed goes on.

        Raises:
            Refused: it failed.
        """
        began = time.perf_counter()
        try:
            trained(self.args, *one)
        except subprocess.CalledProcessError as error:
            raise Refused(f"{' '.join(error.cmd[2:4])} ended with {error.returncode}") from error
        took = time.perf_counter() - began
        return {"seconds": took, "took": took, "worker": self.name}


def trainer_of(argv: Sequence[str], device: str) -> Trainer:
    """A worker in a process of Ray's, for this command's line."""
    del device
    return Trainer(parser().parse_args(argv))


def train_all(args: argparse.Namespace) -> None:
    """Train the methods, several at once; those with a teacher take longest, so they begin."""
    if any(method in (TAUGHT, OMNIFORCING) for method in args.methods):
        trained(args, TEACHER, args.seed)
    trainings = [Training(method, seed) for seed in seeds_of(args) for method in args.methods]

    def is_done(one: Training) -> bool:
        return (run_of(args, *one) / "done").exists()

    of = f"{__name__}:{trainer_of.__name__}"
    settings = {"argv": sys.argv[1:], "device": "cpu"}
    command.in_parts(args, trainings, is_done, lambda: Trainer(args), lambda: (of, settings))
    missing = [one.name for one in trainings if not is_done(one)]
    if missing:
        raise ValueError(f"not trained: {', '.join(missing)}; the lines above say why")


def seeds_of(args: argparse.Namespace) -> range:
    """Of the trainings."""
    return range(args.seed, args.seed + args.trainings)


@torch.no_grad()
def steered(args: argparse.Namespace, method: str, seed: int) -> dict[str, float]:
    """Syllables right, and attributes right two seconds after a switch, unless they are there."""
    path = args.out / "steered" / f"{method}_{seed}.json"
    if not path.exists():
        bundle = load_bundle(model_of(args, method, seed))
        sampler = candidate_of(rows_of(method)[0]).sampler
        prompts = syllables.speech_prompts(0, args.steered)
        clips = syllables.generated(bundle, [prompts], syllables.SECONDS, sampler, None)
        told = [syllables.told_by(bundle, prompt, syllables.SECONDS) for prompt in prompts]
        free, *_ = syllables.measured(bundle, clips, told, syllables.Probe(bundle, 0))
        streams = switches.held_out_switches(0, args.steered)
        right = switches.shares_right(streams, switches.generated(bundle, streams, sampler, None))
        numbers = float(free[:, 0].mean()), right["switched", 2], right["kept", 2]
        path.parent.mkdir(exist_ok=True)
        write_json(path, dict(zip(STEERED, numbers, strict=True)))
    return json.loads(path.read_text())


def tell_steered(args: argparse.Namespace) -> None:
    """The table of what is said and followed."""
    rows = {
        method: [steered(args, method, seed) for seed in seeds_of(args)] for method in args.methods
    }
    lines = [
        [
            rows_of(method)[0],
            *(
                cell(Estimate(tuple(one[key] for one in found), True), digits)
                for key, digits in STEERED.items()
            ),
        ]
        for method, found in rows.items()
    ]
    publish(args.out / "steered" / "table", {"rows": rows}, table(["", *STEERED], lines))


def spent(run: Path) -> dict[str, float]:
    """What a run took, by its log: steps, updates of the network, seconds, and memory."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "seconds" in line]
    record = json.loads((run / "config.json").read_text())
    dmd = record["stage"] in ("bidirectional_dmd", "self_forcing") or record["method"] == TAUGHT
    every = record["mutual"]["matching_every"] if dmd else 1
    steps = lines[-1]["step"]
    return {
        "steps": steps,
        "updates": -(-steps // every),
        "seconds": lines[-1]["seconds"],
        "peak MB": max(line["peak MB"] for line in lines),
    }


def tell_cost(args: argparse.Namespace) -> None:
    """The table of what the trainings took, stage by stage, means over the seeds."""
    runs: dict[str, list[Path]] = {}
    if (args.out / TEACHER).exists():
        runs["the teacher, once for all"] = [args.out / TEACHER]
    for method in args.methods:
        folders = [run_of(args, method, seed) for seed in seeds_of(args)]
        if method != OMNIFORCING:
            runs[method] = folders
            continue
        for stage in list(omniforcing.CHAIN)[1:]:
            runs[f"{method}: {stage}"] = [folder / stage for folder in folders]
    found = {name: [spent(run) for run in folders] for name, folders in runs.items()}
    heads = list(next(iter(found.values()))[0])
    lines = [
        [name, *(said(sum(one[key] for one in ones) / len(ones), 0) for key in heads)]
        for name, ones in found.items()
    ]
    publish(args.out / "cost", {"rows": found}, table(["", *heads], lines))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = [*json.loads((train.CONFIGS / "methods.json").read_text()), OMNIFORCING]
    p = command.parser("lab.training.comparison", __doc__)
    p.add_argument("--config", type=Path, default=train.CONFIGS / "comparison.json")
    p.add_argument("--init", type=Path, required=True, help="multi-step weights: run or model file")
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--codecs", type=Path, default=shipped_model_path(), help="model file")
    p.add_argument("--minutes", type=float, help="of one core, for each method; default: by steps")
    p.add_argument("--seed", type=int, default=0, help="of the first training")
    p.add_argument("--trainings", type=int, default=1, help="of each method, seed after seed")
    p.add_argument("--methods", nargs="+", choices=known, default=known[:-1])
    command.add_pool_options(p)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--seeds", type=int, default=3, help="sampling seeds")
    p.add_argument("--steered", type=int, default=12, help="prompts that speak, and switches")
    p.add_argument("--long-prompts", type=int, default=16)
    p.add_argument("--long-seeds", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Train all methods and measure them."""
    train_all(args)
    tell_cost(args)
    models = []
    for method in args.methods:
        files = ",".join(str(model_of(args, method, seed)) for seed in seeds_of(args))
        models.append(f"{method}={files}")
    if settings_of(args, "mutual")["transformer"].get("transcript_channels"):
        tell_steered(args)
    shared = ["--models", *models, "--codecs", args.codecs]
    shared += [] if args.ray is None else ["--ray", args.ray]
    shared += [] if args.workers is None else ["--workers", args.workers]
    rivals = [method for method in RIVALS if method in args.methods]
    claims = ["--claims", "mutual", "--baselines", *rivals] if "mutual" in args.methods else []
    compared(args, "compare", [*claims, *shared])
    held_out = settings_of(args, "mutual").get("held_out")
    if held_out:
        words = ["--combinations", *(",".join(one) for one in held_out)]
        compared(args, "held_out", [*words, *claims, *shared])
    rows = [rows_of(method)[0] for method in args.methods]
    long = ["--prompts", args.long_prompts, "--seeds", args.long_seeds]
    launched("lab.metrics.horizon", "--rows", *rows, *long, *shared, "--out", args.out / "horizon")


def compared(args: argparse.Namespace, name: str, options: Sequence[object]) -> None:
    """The table of quality, under a name."""
    rows = [row for method in args.methods for row in rows_of(method)]
    size = ["--prompts", args.prompts, "--seeds", args.seeds, "--out", args.out / name]
    launched("lab.metrics.compare", "--rows", *rows, *size, *options)


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
