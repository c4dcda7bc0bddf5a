"""What keeps stage II of OmniForcing stable: its Table 3, on the small network.

    python launch.py lab.training.stabilisers --teacher runs/omniforcing/bidirectional_dmd \
        --steps 100 --seeds 3 --latents runs/plain --held-out runs/held_out --out runs/stabilisers

Source: OmniForcing (arXiv 2603.11647), section 4.3 and Table 3.
A variant is causal ODE regression (lab.training.causal_ode) with what configs/stabilisers.json
changes: numbers of sinks, rotated sinks, and other forms of attention
(lab.training.attention_forms). All begin as the teacher, which has no sinks, and take the same
steps on the same draws, in float32 and in bfloat16. OUT/rows has the numbers of each run; what is
there is not made again, and a run that was killed goes on. Columns: whether the loss stayed finite
and fell, the largest gradient norm, the error of the clean clip that is predicted at sigma 0.5 on
held-out clips, and attributes right of clips in four steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ...model_loaders.bundle import load_bundle, shipped_model_path
from ...samplers.rollout import NonFiniteBlockError, sampler_settings
from .. import command
from ..metrics.claims import Estimate
from ..metrics.clips import generate, held_out
from ..metrics.compare import cell
from ..metrics.score import judge, summary
from ..metrics.shortcut import HeldOutClips
from ..report import publish, table, write_json
from . import train
from .ablations import merged
from .pair import Pair, block_count, clean_prediction, noised, velocity
from .system import System

log = logging.getLogger("mutualforcing")
VARIANTS = train.CONFIGS / "stabilisers.json"
PRECISIONS = ("float32", "bfloat16")
SIGMA = 0.5
FALLS = 0.9  # of the first tenth's loss, at most, in the last tenth of a run that learns
COLUMNS = {"largest gradient": 2, "loss at 0.5": 4, "attributes": 3}
STABLE, PLATEAU, BROKEN = "stable", "plateau", "not finite"


def run_of(args: argparse.Namespace, name: str, precision: str, seed: int) -> train.Run:
    """The run of a variant, as far as it has come."""
    out = args.out / f"{name} {precision} {seed}".replace(",", "").replace(" ", "_")
    out.mkdir(parents=True, exist_ok=True)
    settings = train.read_settings(args.config, "causal_ode", "mutual")
    settings = {key: value for key, value in settings.items() if key != "stages"}
    changes = json.loads(VARIANTS.read_text())[name] | {"recipe": {"dtype": precision}}
    write_json(out / "settings.json", merged(settings, changes))
    line = ["--stage", "causal_ode", "--config", out / "settings.json", "--out", out]
    line += ["--init", args.teacher, "--teacher", args.teacher, "--latents", *args.latents]
    line += ["--steps", args.steps, "--seed", seed, "--log-every", 1]
    return train.Run(train.parser().parse_args([str(part) for part in line]))


def verdict(losses: list[float]) -> str:
    """Convergence, from the losses of all steps."""
    if not torch.isfinite(torch.tensor(losses)).all():
        return BROKEN
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]), sum(losses[-part:])
    return STABLE if last <= FALLS * first else PLATEAU


@torch.no_grad()
def one_step_error(system: System, clips: HeldOutClips) -> float:
    """Mean squared error of the clean clip predicted at SIGMA, over both modalities' latents."""
    layout = system.transformer.config.layout
    level = torch.full((len(clips.clean.video), block_count(clips.clean, layout)), SIGMA)
    x = noised(clips.clean, clips.noise, level, layout)
    told = system.told(clips.asked)
    v = velocity(system.transformer, clips.clean, x, level, told, level)
    found = clean_prediction(x, v, level, layout)
    errors = Pair(*((a - b).square().mean() for a, b in zip(found, clips.clean, strict=True)))
    return float(sum(errors))


@torch.no_grad()
def attributes_right(args: argparse.Namespace, system: System) -> float:
    """Of short clips, through the codecs of the shipped model; 0 where the network breaks down."""
    bundle = replace(
        load_bundle(args.codecs), transformer=system.transformer, text_encoder=system.text_encoder
    )
    blocks = bundle.clock.blocks_for(args.seconds)
    count, sampler = args.prompts, sampler_settings("few", 4, None, "renoise")
    try:
        clips = generate(bundle, held_out(count), range(count), blocks, sampler)
    except NonFiniteBlockError:
        return 0.0
    return summary([judge(clip, bundle.clock) for clip in clips])["attributes"]


def row(args: argparse.Namespace, name: str, precision: str, seed: int) -> dict[str, object]:
    """The numbers of one run, trained and measured unless they are there."""
    path = args.out / "rows" / f"{name} {precision} {seed}.json".replace(",", "").replace(" ", "_")
    if not path.exists():
        run = run_of(args, name, precision, seed)
        run.train()
        lines = [json.loads(x) for x in (run.args.out / "log.jsonl").read_text().splitlines()]
        losses, norms = ([line[key] for line in lines] for key in ("regression", "gradient"))
        found: dict[str, object] = {"convergence": verdict(losses)}
        if found["convergence"] != BROKEN:
            system = copy.deepcopy(run.stage.system).float().eval()
            config = system.transformer.config
            clips = HeldOutClips.read(args.held_out, config, args.held_out_clips)
            numbers = max(norms), one_step_error(system, clips), attributes_right(args, system)
            found |= dict(zip(COLUMNS, numbers, strict=True))
        path.parent.mkdir(exist_ok=True)
        write_json(path, found)
    log.info("%s, %s, seed %d: %s", name, precision, seed, path.read_text().replace("\n", ""))
    return json.loads(path.read_text())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = list(json.loads(VARIANTS.read_text()))
    p = command.parser("lab.training.stabilisers", __doc__)
    p.add_argument("--config", type=Path, default=train.CONFIGS / "stability.json")
    p.add_argument("--teacher", type=Path, required=True, help="run of stage I, without sinks")
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--held-out", type=Path, nargs="+", required=True, help="sets never trained on")
    p.add_argument("--held-out-clips", type=int, default=16)
    p.add_argument("--codecs", type=Path, default=shipped_model_path(), help="model file")
    p.add_argument("--variants", nargs="+", choices=known, default=known)
    p.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--seconds", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Train, measure, print and write; seed by seed, so that what there is is a whole table."""
    runs = [(name, precision) for precision in args.precisions for name in args.variants]
    found: dict[str, list[dict[str, object]]] = {}
    for seed in range(args.seeds):
        for name, precision in runs:
            found.setdefault(f"{name}, {precision}", []).append(row(args, name, precision, seed))
    lines = []
    for name, ones in found.items():
        kinds = ", ".join(dict.fromkeys(str(one["convergence"]) for one in ones))
        whole = [one for one in ones if one["convergence"] != BROKEN]
        cells = [
            cell(Estimate(tuple(one[key] for one in whole), True) if whole else None, digits)
            for key, digits in COLUMNS.items()
        ]
        lines.append([name, kinds, *cells])
    results = table(["", "convergence", *COLUMNS], lines)
    publish(args.out / "stabilisers", {"rows": found}, results)


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
