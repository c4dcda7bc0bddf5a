"""Trains each kind of stage a little for test_many_processes.py, called or run by processes.

    RANK=0 WORLD_SIZE=2 ... python many_processes.py FOLDER

FOLDER holds latents and a config, and in "over" the same for adapters over base.safetensors; every
stage's log and weights go to FOLDER/<processes>/<stage and method>.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

STAGES = (
    ("unimodal", "mutual"),
    ("joint", "mutual"),
    ("bidirectional", "mutual"),
    ("mutual", "mutual"),
    ("bidirectional_dmd", "mutual"),
    ("causal_ode", "mutual"),
    ("self_forcing", "mutual"),
)


def train_all(folder: Path) -> None:
    """Three steps of every stage, with a stop after the first where there are two modes; those of
    OmniForcing with adapters as well."""
    from mutual_forcing.lab.training import omniforcing, train
    from mutual_forcing.lab.training.stages import TAUGHT

    world = os.environ.get("WORLD_SIZE", "1")
    for stage, method in STAGES:
        options = ["--stage", stage, "--method", method, "--config", f"{folder}/config.json"]
        options += ["--latents", f"{folder}/latents", "--steps", "3", "--log-every", "1"]
        options += ["--out", f"{folder}/{world}/{stage} {method}"]
        if stage in TAUGHT:
            options += ["--teacher", f"{folder}/{world}/bidirectional mutual"]
        args = train.parser().parse_args(options)
        if stage == "mutual":
            first = train.Run(args)
            first.log.add(first.advance(first.progress), 0.0)
            first.log.line(first.step, 0.0)
            first.save()
        train.Run(args).train()
    over = folder / "over"
    words = ["--config", over / "config.json", "--base", over / "base.safetensors"]
    words += ["--latents", over / "latents", "--out", folder / world / "over"]
    omniforcing.work(omniforcing.parser().parse_args([str(word) for word in words]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import launch

    launch.register()
    train_all(Path(sys.argv[1]))
    import torch.distributed

    torch.distributed.destroy_process_group()
