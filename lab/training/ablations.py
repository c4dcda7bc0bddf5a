"""Each point of the few-step recipe on and off: short runs over several training seeds, one table.

    python launch.py lab.training.ablations --init runs/joint --steps 100 --seeds 3 \
        --latents runs/plain runs/transcripts --held-out runs/held_out --out runs/ablations

A variant is the config with the changes that configs/ablations.json names for it. All start from
the same multi-step weights and take the same steps on the same draws. OUT/rows has the numbers of
each run; what is there is not made again, so a killed table goes on. Columns: the error of
ShortCut (lab.metrics.shortcut) at guidance w over the first interval of four and over all, the flow
error of multi-step mode, and attributes and syllables right of clips in four steps. A limit is that
of a mean over training seeds (Student's t, 95 %).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...networks.config import TransformerConfig
from ...samplers.rollout import sampler_settings
from .. import command
from ..metrics.claims import Estimate
from ..metrics.clips import generate, held_out
from ..metrics.compare import cell
from ..metrics.score import judge, summary
from ..metrics.shortcut import (
    HeldOutClips,
    audio_share_of,
    flow_errors,
    open_run,
    shortcut_errors,
)
from ..metrics.syllables import Probe, generated, speech_prompts, told_by
from ..report import publish, table, write_json
from . import ship, train

log = logging.getLogger("mutualforcing")
VARIANTS = train.CONFIGS / "ablations.json"
# Digits of each column; less is better in all but the last two.
COLUMNS = {
    "w 3, prefix, video": 3,
    "w 3, prefix, audio": 3,
    "w 3, all, video": 3,
    "w 3, all, audio": 3,
    "w 1, prefix, video": 4,
    "w 1, prefix, audio": 4,
    "flow, video": 4,
    "flow, audio": 4,
    "attributes": 3,
    "syllables": 3,
}


def merged(values: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """Values with some of them changed, objects within objects too."""
    both = {
        key: merged(values[key], change)
        for key, change in changes.items()
        if isinstance(change, Mapping) and isinstance(values.get(key), Mapping)
    }
    return {**values, **changes, **both}


class Ablations:
    """The runs of a table and what they are measured with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.changes = json.loads(VARIANTS.read_text())
        settings = train.read_settings(args.config, "mutual", "mutual")
        self.settings = {key: value for key, value in settings.items() if key != "stages"}
        self.probe: Probe | None = None
        config = TransformerConfig.from_dict(self.settings["transformer"])
        self.init = train.untaught(args.init, config, args.out / "init")

    def row(self, name: str, seed: int) -> dict[str, float]:
        """The numbers of one run, trained and measured unless they are there."""
        path = self.args.out / "rows" / f"{name.replace(' ', '_')}_{seed}.json"
        if not path.exists():
            run = self.args.out / path.stem
            self._train(name, seed, run)
            path.parent.mkdir(exist_ok=True)
            write_json(path, self._errors(run) | self._heard_and_seen(run))
        found = json.loads(path.read_text())
        log.info("%s, seed %d: %s", name, seed, found)
        return found

    def _train(self, name: str, seed: int, run: Path) -> None:
        args = self.args
        run.mkdir(parents=True, exist_ok=True)
        config = run / "settings.json"
        write_json(config, merged(self.settings, self.changes[name]))
        line = ["--stage", "mutual", "--config", config, "--init", self.init, "--out", run]
        line += ["--latents", *args.latents, "--steps", args.steps, "--seed", seed]
        if args.learning_rate:
            line += ["--learning-rate", args.learning_rate]
        train.Run(train.parser().parse_args([str(part) for part in line])).train()

    def _errors(self, run: Path) -> dict[str, float]:
        system = open_run(run)
        clips = HeldOutClips.read(
            self.args.held_out, system.transformer.config, self.args.held_out_clips
        )
        share = audio_share_of(run)
        strong, weak = (
            torch.stack(shortcut_errors(system, clips, w, audio_share=share)) for w in (3.0, 1.0)
        )
        flow = torch.stack(flow_errors(system, clips)).mean(dim=(0, 1))
        numbers = strong[0, 0], strong.mean(dim=(0, 1)), weak[0, 0], flow
        return dict(zip(COLUMNS, torch.cat(numbers).tolist(), strict=False))

    @torch.no_grad()
    def _heard_and_seen(self, run: Path) -> dict[str, float]:
        """Attributes right and syllables read at their times, of clips in four steps."""
        model, codecs = run / "model.safetensors", self.args.codecs
        line = ["--run", run, "--codecs", codecs, codecs, "--out", model]
        ship.work(ship.parser().parse_args([str(part) for part in line]))
        bundle, sampler = load_bundle(model), sampler_settings("few", 4)
        seconds, count = self.args.seconds, self.args.prompts
        blocks = bundle.clock.blocks_for(seconds)
        clips = generate(bundle, held_out(count), range(count), blocks, sampler)
        seen = summary([judge(clip, bundle.clock) for clip in clips])
        return {"attributes": seen["attributes"], "syllables": self._syllables(bundle, count)}

    def _syllables(self, bundle: Bundle, count: int) -> float:
        seconds = self.args.seconds
        prompts = speech_prompts(0, count)
        clips = generated(bundle, [prompts], seconds, sampler_settings("few", 4), None)
        if self.probe is None:
            self.probe = Probe(bundle, 0)
        shares = []
        for prompt, clip in zip(prompts, clips, strict=True):
            told = told_by(bundle, prompt, seconds)
            rate = 1 / (told[1][0] - told[0][0])
            inside = [event for event in told if event[0] < seconds - 1 / rate]
            shares.append(self.probe.right(clip.audio, inside, rate)[0])
        return float(np.mean(shares))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = list(json.loads(VARIANTS.read_text()))
    p = command.parser("lab.training.ablations", __doc__)
    p.add_argument("--config", type=Path, default=train.CONFIGS / "steered.json")
    p.add_argument(
        "--init", type=Path, required=True, help="run or model file, for its multi-step mode"
    )
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--held-out", type=Path, nargs="+", required=True, help="sets never trained on")
    p.add_argument("--held-out-clips", type=int, default=24)
    p.add_argument("--codecs", type=Path, default=shipped_model_path(), help="model file")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--learning-rate", type=float)
    p.add_argument("--variants", nargs="+", choices=known, default=known)
    p.add_argument("--prompts", type=int, default=8, help="of all kinds, and as many of speech")
    p.add_argument("--seconds", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Train, measure, print and write."""
    ablations = Ablations(args)
    # Seed by seed: what there is after a while is a whole table of fewer seeds.
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in args.variants}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.variants:
            rows[name].append(ablations.row(name, seed))
    lines = []
    for name, found in rows.items():
        estimates = [Estimate(tuple(one[key] for one in found), True) for key in COLUMNS]
        cells = map(cell, estimates, COLUMNS.values())
        lines.append([name, *cells])
    publish(args.out / "ablations", {"rows": rows}, table(["", *COLUMNS], lines))


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
