"""TaoMate's memory on the small network, on and off: do ten minutes keep better with it?

    python launch.py lab.training.memory --init runs/1.safetensors runs/2.safetensors \
        --latents runs/plain runs/transcripts --steps 50 --seconds 600 --out runs/memory

Source: docs/ltx23.md, sections 3 and 4. What configs/memory.json names, once for every file of
--init (trainings of one model from different seeds):

- shipped: the model as it is; colours: the same with every block given block 0's colours.
- steps: few-step mode trained for --steps more on rollouts far past the window.
- memory: likewise, with a memory branch that learns beside it from the flow of real blocks;
  memory+colours: its weights, and block 0's colours as well.

OUT/models has the model files, OUT/horizon what lab.metrics.horizon makes of them. What is done is
not done again, and a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from ...model_loaders.bundle import shipped_model_path
from ...networks.config import TransformerConfig
from ...samplers.atomic_file import replacing
from .. import command
from ..report import write_json
from . import ship, train
from .ablations import merged
from .comparison import launched

VARIANTS = train.CONFIGS / "memory.json"
INIT = "init"


def settings_of(args: argparse.Namespace, name: str) -> dict[str, dict[str, object]]:
    """The config of a variant; that of what its weights come from, changed, if they do."""
    changes = json.loads(VARIANTS.read_text())
    own = changes[name]
    if own.get("weights", INIT) != INIT:
        base = settings_of(args, own["weights"])
    else:
        settings = train.read_settings(args.config, "mutual", "mutual")
        base = merged({k: v for k, v in settings.items() if k != "stages"}, changes["all"])
    return merged(base, {key: value for key, value in own.items() if key != "weights"})


def run_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The run of a variant from one file of --init; it is trained, or its weights taken over."""
    run = args.out / f"{name}_{seed}"
    if (run / "done").exists():
        return run
    settings = settings_of(args, name)
    run.mkdir(parents=True, exist_ok=True)
    source = json.loads(VARIANTS.read_text())[name].get("weights")
    if source is None:
        write_json(run / "settings.json", settings)
        line = ["--stage", "mutual", "--config", run / "settings.json", "--init", args.init[seed]]
        line += ["--latents", *args.latents, "--steps", args.steps, "--seed", seed, "--out", run]
        line += ["--log-every", 5, "--threads", args.threads]
        train.Run(train.parser().parse_args([str(part) for part in line])).train()
    else:
        weights = args.init[seed] if source == INIT else run_of(args, source, seed)
        config = TransformerConfig.from_dict(settings["transformer"])
        write_json(run / "config.json", {"transformer": config.to_dict()})
        with replacing(run / "weights.safetensors") as part:
            save_file(train.starting_weights(weights), part)
    (run / "done").touch()
    return run


def model_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The model file of a variant."""
    model = args.out / "models" / f"{name}_{seed}.safetensors"
    if not model.exists():
        codecs = ["--codecs", args.codecs, args.codecs]
        line = ["--run", run_of(args, name, seed), *codecs, "--out", model, "--default-mode", "few"]
        ship.work(ship.parser().parse_args([str(part) for part in line]))
    return model


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = [name for name in json.loads(VARIANTS.read_text()) if name != "all"]
    p = command.parser("lab.training.memory", __doc__)
    p.add_argument("--config", type=Path, default=train.CONFIGS / "steered.json")
    p.add_argument("--init", type=Path, nargs="+", required=True, help="runs or model files")
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--codecs", type=Path, default=shipped_model_path(), help="model file")
    p.add_argument("--variants", nargs="+", choices=known, default=known)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--seconds", type=int, default=600)
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--threads", type=int, default=1)
    command.add_pool_options(p)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Train and measure; every variant of one seed before the next seed."""
    files: dict[str, list[str]] = {}
    for seed in range(len(args.init)):
        for name in args.variants:
            files.setdefault(name, []).append(str(model_of(args, name, seed)))
    models = [f"{name}={','.join(ones)}" for name, ones in files.items()]
    rows = [f"{name}:few:4" for name in files]
    size = ["--seconds", args.seconds, "--prompts", args.prompts, "--seeds", 1]
    rest = ["--codecs", args.codecs, "--out", args.out / "horizon"]
    rest += [] if args.ray is None else ["--ray", args.ray]
    rest += [] if args.workers is None else ["--workers", args.workers]
    launched("lab.metrics.horizon", "--models", *models, "--rows", *rows, *size, *rest)


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
