"""OmniForcing's three stages and the teacher that they need, one after the other.

    python launch.py lab.training.omniforcing --init models/mutual_forcing_small.safetensors \
        --latents runs/plain runs/short --out runs/omniforcing

Source: OmniForcing (arXiv 2603.11647), section 3.3; docs/omniforcing.md, section 6.
The multi-step weights of --init learn to work without masks (`bidirectional`, the teacher). From
it comes a few-step network without masks by DMD (`bidirectional_dmd`, stage I), from that one under
block-causal masks by regression on its velocities (`causal_ode`, stage II), and that one learns on
its own rollouts under the teacher's score (`self_forcing`, stage III). OUT has a run's folder for
each (lab.training.train); how many steps each takes is in the config.
With --base, for a config with adapters, the teacher is LTX-2 as it comes: there is no first stage,
and one set of adapters goes through all three (lab.training.adapters).
One process or many under torchrun; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import command
from . import train

TEACHER = "bidirectional"
CHAIN = {
    TEACHER: (None, None),
    "bidirectional_dmd": (TEACHER, TEACHER),
    "causal_ode": ("bidirectional_dmd", "bidirectional_dmd"),
    "self_forcing": ("causal_ode", TEACHER),
}
"""Each stage, which one it starts from, and which one is its teacher."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.omniforcing", __doc__)
    p.add_argument("--config", type=Path, default=train.CONFIGS / "omniforcing.json")
    begin = p.add_mutually_exclusive_group(required=True)
    begin.add_argument("--init", type=Path, help="run or model file")
    begin.add_argument("--base", type=Path, help="LTX-2 checkpoint, for a config with adapters")
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--teacher", type=Path, help="run folder of one that is trained already")
    p.add_argument("--rate", type=float, default=1.0, help="times the config's learning rates")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Every stage, until its steps are taken."""
    folders = {stage: args.out / stage for stage in CHAIN}
    folders[TEACHER] = args.teacher or folders[TEACHER]
    for stage, (init, teacher) in CHAIN.items():
        if stage == TEACHER and (args.teacher or args.base):
            continue
        recipe = train.read_settings(args.config, stage, "mutual")["recipe"]
        line = ["--stage", stage, "--config", args.config, "--latents", *args.latents]
        line += ["--steps", recipe["steps"], "--learning-rate", args.rate * recipe["learning_rate"]]
        line += ["--seed", args.seed, "--threads", args.threads]
        line += ["--log-every", 10, "--out", folders[stage]]
        if args.base:
            line += ["--base", args.base]
        # The base is where its adapters start, and the first and the last stage's teacher.
        if init and not (args.base and init == TEACHER):
            line += ["--init", folders[init]]
        elif args.init:
            line += ["--init", args.init]
        if teacher and not (args.base and teacher == TEACHER):
            line += ["--teacher", folders[teacher]]
        train.Run(train.parser().parse_args([str(part) for part in line])).train()


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
