"""How far few-step mode is from multi-step mode, interval by interval, on held-out latents.

    python launch.py lab.metrics.shortcut --run runs/mutual --latents runs/held_out

RUN is a folder of lab.training.train; the latents are clips that it never saw
(lab.training.latents with another seed). For every interval of a few-step grid: the squared error
of few-step mode's velocity against multi-step mode's displacement over it divided by its length, at
several guidances (video's; audio's follows as the recipe says), of the prefix and of the second
after it. Beside it multi-step mode's flow
error, which training few-step mode must not raise. Histories are the true ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...networks.config import TransformerConfig
from ...samplers.sigmas import few_step_sigmas
from .. import command
from ..report import table
from ..training.data import Asked, LatentSet
from ..training.distillation import guided_teacher, shortcut_target
from ..training.draws import Draws
from ..training.flow_matching import flow_target
from ..training.pair import Pair, block_count, by_block, noised, velocity
from ..training.system import Parts, System, placed
from ..training.train import load_starting, starting_weights

log = logging.getLogger("mutualforcing")
FLOW_LEVELS = (1.0, 0.9, 0.7, 0.4)
SUBSTEPS = 4


@dataclass(frozen=True)
class HeldOutClips:
    """Held-out latents with what is asked for them, and the noise that all errors share."""

    clean: Pair
    noise: Pair
    asked: Asked

    @classmethod
    def read(cls, folders: list[Path], config: TransformerConfig, clips: int) -> HeldOutClips:
        """The prefix and the second after it of some clips."""
        data, draws = LatentSet(folders, config, {}), Draws(0, 0, range(clips))
        batch = data.batch(clips, 2, range(clips), draws)
        clean = Pair(batch.video, batch.audio)
        return cls(clean, clean.noise(draws), batch.asked)


def errors(found: Pair, target: Pair, system: Parts) -> Tensor:
    """Mean squared errors, (block, modality): the prefix, then the second after it."""
    difference = Pair(*(a - b for a, b in zip(found, target, strict=True)))
    blocks = by_block(difference, system.transformer.config.layout)
    return torch.tensor([[float(part.square().mean()) for part in block] for block in blocks])


@torch.no_grad()
def shortcut_errors(
    system: Parts, clips: HeldOutClips, guidance: float, steps: int = 4, audio_share: float = 1.0
) -> list[Tensor]:
    """Of each interval of a grid, (block, modality).

    Args:
        guidance: of video, which few-step mode is told.
        audio_share: audio's guidance above 1 over video's, as few-step mode was trained.
    """
    layout = system.transformer.config.layout
    clean, noise, asked = clips.clean, clips.noise, clips.asked
    teacher = guided_teacher(system, asked, (guidance, 1 + audio_share * (guidance - 1)))
    told = system.told(asked)._replace(guidance=guidance)
    found = []
    for begin, finish in pairwise(few_step_sigmas(steps)):
        start, end = (
            torch.full((len(clean.video), block_count(clean, layout)), level)
            for level in (begin, finish)
        )
        x = noised(clean, noise, start, layout)
        target = shortcut_target(teacher, clean, x, start, end, SUBSTEPS, layout)
        out = velocity(system.transformer, clean, x, start, told, start - end)
        found.append(errors(out, target, system))
    return found


@torch.no_grad()
def flow_errors(system: Parts, clips: HeldOutClips) -> list[Tensor]:
    """Of multi-step mode at each of FLOW_LEVELS, (block, modality)."""
    layout = system.transformer.config.layout
    clean, noise, told = clips.clean, clips.noise, system.told(clips.asked)
    found = []
    for level in FLOW_LEVELS:
        sigma = torch.full((len(clean.video), block_count(clean, layout)), level)
        x = noised(clean, noise, sigma, layout)
        out = velocity(system.transformer, clean, x, sigma, told)
        found.append(errors(out, flow_target(clean, noise), system))
    return found


def open_run(run: Path) -> System:
    """The network of a run's folder, with its averaged weights."""
    config = json.loads((run / "config.json").read_text())["transformer"]
    system = System(TransformerConfig.from_dict(config))
    load_starting(system, starting_weights(run))
    return placed(system, {}, torch.device("cpu")).eval()


def audio_share_of(run: Path) -> float:
    """Audio's guidance above 1 over video's in the recipe of a run; 1 where it names none."""
    video, audio = json.loads((run / "config.json").read_text())["mutual"].get("guidance", (3, 3))
    return (audio - 1) / (video - 1) if video > 1 else 1.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.shortcut", __doc__)
    p.add_argument("--run", type=Path, required=True, help="folder of lab.training.train")
    p.add_argument("--latents", type=Path, nargs="+", required=True, help="held-out sets")
    p.add_argument("--clips", type=int, default=40)
    p.add_argument("--steps", type=int, default=4, help="of the grid")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    return p


def lines(levels: Mapping[str, Tensor]) -> list[str]:
    """A table of errors by name."""
    heads = ["", "prefix, video", "prefix, audio", "then, video", "then, audio"]
    return table(heads, [[name, *found.flatten().tolist()] for name, found in levels.items()])


def work(args: argparse.Namespace) -> None:
    """Measure and print."""
    system, share = open_run(args.run), audio_share_of(args.run)
    clips = HeldOutClips.read(args.latents, system.transformer.config, args.clips)
    grid, found = few_step_sigmas(args.steps), {}
    for guidance in args.guidance:
        of_intervals = shortcut_errors(system, clips, guidance, args.steps, share)
        for (begin, finish), error in zip(pairwise(grid), of_intervals, strict=True):
            found[f"guidance {guidance:g}, {begin:.3f} to {finish:.3f}"] = error
    flow = {
        f"flow at {level}": error
        for level, error in zip(FLOW_LEVELS, flow_errors(system, clips), strict=True)
    }
    log.info("%s", "\n".join(lines(found | flow)))
    first = [found[f"guidance {w:g}, {grid[0]:.3f} to {grid[1]:.3f}"][0] for w in args.guidance]
    parts = [
        f"guidance {w:g} {error[0]:.3f} {error[1]:.3f}"
        for w, error in zip(args.guidance, first, strict=True)
    ]
    mean = torch.stack(list(flow.values())).mean(dim=(0, 1))
    log.info("first interval, prefix: %s; flow %.4f %.4f", ", ".join(parts), *mean.tolist())


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
