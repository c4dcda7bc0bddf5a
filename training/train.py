"""Train the dual-stream transformer: `--stage unimodal`, then `joint`, then `mutual`.

    python launch.py training.train --stage unimodal --latents runs/latents --minutes 20 --out runs/unimodal
    torchrun --nproc-per-node 2 launch.py training.train --stage joint --init runs/unimodal ...

Mutual Forcing's stages, causal from the start (mutual_forcing.md, section 2): each stream alone, both together,
both multi-step; then both modes of the one network (training.mutual_forcing).
Checkpoints are written atomically every few minutes; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model_loaders.bundle import TEXT, TRANSFORMER
from ..networks.config import TransformerConfig
from ..networks.layout import BlockLayout
from .flow_matching import Batch, flow_matching
from .mutual_forcing import MutualRecipe, fake_loss, mutual_losses, prepare
from .optimiser import MasterWeights
from .system import System, initialise, math_attention
from .world.scene import VOCABULARY

logger = logging.getLogger("mutualforcing")
SAVE_SECONDS = 120


class LatentSet:
    """Encoded clips of one or several folders (training.latents), held in memory.

    The folders may hold clips of different lengths: a batch is drawn from those that are long enough.

    Args:
        word_weights: how much more often a clip is drawn whose full caption has a word; 1 for all others.
    """

    def __init__(
        self, folders: list[Path], layout: BlockLayout, word_weights: dict[str, float]
    ) -> None:
        self.layout = layout
        self.sets = [_read_set(folder) for folder in folders]
        self.blocks = [layout.blocks(s.video.shape[2], s.audio.shape[1]) for s in self.sets]
        ids = {word: index + 1 for index, word in enumerate(VOCABULARY)}
        self.weights = []
        for found in self.sets:
            weights = torch.ones(len(found.video))
            for word, weight in word_weights.items():
                weights[(found.ids[:, 0] == ids[word]).any(dim=1)] = weight
            self.weights.append(weights)

    def batch(self, size: int, blocks: int, generator: torch.Generator) -> Batch:
        """The first `blocks` blocks of random clips, each clip with one of its captions.

        Raises:
            ValueError: no folder has clips of that length.
        """
        fit = [index for index, found in enumerate(self.blocks) if found >= blocks]
        if not fit:
            raise ValueError(
                f"found clips of at most {max(self.blocks)} blocks, expected some of {blocks}; "
                "encode longer ones (training.latents --seconds)"
            )
        weights = torch.cat([self.weights[index] for index in fit])
        drawn = torch.multinomial(weights, size, replacement=True, generator=generator)
        variants = self.sets[0].ids.shape[1]
        variant = torch.randint(variants, (size,), generator=generator)
        parts, first = [], 0
        for index in fit:
            found, last = self.sets[index], first + len(self.weights[index])
            here = (drawn >= first) & (drawn < last)
            rows = drawn[here] - first
            parts.append(
                Batch(
                    found.video[rows].float(),
                    found.audio[rows].float(),
                    found.ids[rows, variant[here]],
                ).first(blocks, self.layout)
            )
            first = last
        video, audio, ids = (torch.cat(part) for part in zip(*parts, strict=True))
        return Batch(video, audio, ids.long())


def _read_set(folder: Path) -> Batch:
    """A folder of latents; `ids` (k, v, m) has every variant of the captions."""
    about = json.loads((folder / "about.json").read_text())
    if about["done"] < about["clips"]:
        raise ValueError(
            f"{folder} holds {about['done']} of {about['clips']} clips; finish it first"
        )
    return Batch(
        *(torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("video", "audio", "captions"))
    )


def learning_rate(step: int, warmup: int, progress: float) -> float:
    """Linear warm-up in steps, then a cosine to zero over the time that was given."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _atomic(path: Path, write: object) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def starting_weights(path: Path) -> dict[str, Tensor]:
    """Weights by their name in a `System`, from another run's folder or from a model file that was shipped."""
    if path.is_dir():
        return load_file(path / "weights.safetensors")
    parts = {TRANSFORMER: "transformer.", TEXT: "text_encoder."}
    return {
        name + key.removeprefix(prefix): value.float()
        for key, value in load_file(path).items()
        for prefix, name in parts.items()
        if key.startswith(prefix)
    }


class FlowStage:
    """Multi-step mode alone: flow matching on real histories, the streams coupled or not."""

    def __init__(
        self, system: System, weights: MasterWeights, recipe: dict[str, object], coupled: bool
    ) -> None:
        self.system, self.weights, self.coupled = system, weights, coupled
        names = ("sigma_mean", "sigma_spread", "caption_dropout", "history_noise")
        self.settings = {name: recipe[name] for name in names}

    def step(
        self, batch: Batch, generator: torch.Generator, number: int, progress: float, rate: float
    ) -> dict[str, float]:
        """One update; returns what is logged."""
        losses = flow_matching(self.system, batch, generator, coupled=self.coupled, **self.settings)
        (losses.video + losses.audio).backward()
        norm = self.weights.step(rate)
        return {"video": losses.video.item(), "audio": losses.audio.item(), "gradient": norm}

    def state_dict(self) -> dict[str, object]:
        """Nothing beyond the weights."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of `state_dict`."""


class MutualStage:
    """Both modes of one network (training.mutual_forcing), with the teacher and the fake score it needs."""

    def __init__(
        self, system: System, weights: MasterWeights, recipe: MutualRecipe, fake_rate: float
    ) -> None:
        self.system, self.weights, self.recipe = system, weights, recipe
        self.teacher = copy.deepcopy(system).requires_grad_(False)
        self.fake = copy.deepcopy(system) if recipe.matching else None
        self.fake_weights = MasterWeights(self.fake, fake_rate, 0.0) if recipe.matching else None

    def step(
        self, batch: Batch, generator: torch.Generator, number: int, progress: float, rate: float
    ) -> dict[str, float]:
        """One update of the network and, where it had a DMD term, several of the fake score."""
        recipe = self.recipe
        matching = bool(recipe.matching) and number % recipe.matching_every == 0
        prepared = prepare(self.system, batch, recipe, progress, generator)
        losses = mutual_losses(
            self.system, self.teacher, self.fake, prepared, recipe, generator, matching=matching
        )
        total = losses.flow + recipe.shortcut * losses.shortcut + recipe.matching * losses.matching
        total.backward()
        norm = self.weights.step(rate)
        with torch.no_grad():
            for target, source in zip(self.teacher.parameters(), self.weights.average, strict=True):
                target.copy_(source)
        logged = {"flow": losses.flow.item(), "shortcut": losses.shortcut.item(), "gradient": norm}
        if matching:
            logged["matching"] = losses.matching.item()
            for _ in range(recipe.fake_updates):
                loss = fake_loss(self.system, self.fake, prepared, recipe, generator)
                loss.backward()
                self.fake_weights.step(rate)
                logged["fake"] = loss.item()
        return logged

    def state_dict(self) -> dict[str, object]:
        """The fake score with its optimiser; the teacher is the network's average."""
        return {} if self.fake_weights is None else {"fake": self.fake_weights.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of `state_dict`."""
        if self.fake_weights is not None:
            self.fake_weights.load_state_dict(state["fake"])
        for target, source in zip(self.teacher.parameters(), self.weights.average, strict=True):
            target.copy_(source)


class Run:
    """One training run: its folder holds config.json, weights.safetensors (averaged) and resume.pt."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = json.loads(args.config.read_text())
        self.recipe = settings["recipe"]
        if args.learning_rate:
            self.recipe["learning_rate"] = args.learning_rate
        self.config = TransformerConfig.from_dict(settings["transformer"])
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1:
            dist.init_process_group("gloo")
        self.system = System(self.config)
        initialise(self.system, args.seed)
        if not torch.cuda.is_available():
            self.system.transformer.kernel = math_attention
        self.system.to(torch.bfloat16)
        self.weights = MasterWeights(self.system, self.recipe["learning_rate"], self.recipe["ema"])
        self.step, self.seconds = 0, 0.0
        args.out.mkdir(parents=True, exist_ok=True)
        resume = args.out / "resume.pt"
        state = torch.load(resume, weights_only=True) if resume.exists() else None
        if state is not None:
            self.weights.load_state_dict(state["weights"])
            self.step, self.seconds = state["step"], state["seconds"]
            logger.info("going on from step %d", self.step)
        elif args.init:
            self.weights.start_from(starting_weights(args.init))
        # After the weights: the teacher and the fake score of mutual training begin as copies of them.
        self.stage = self._stage(settings)
        if state is not None:
            self.stage.load_state_dict(state.get("stage", {}))
        layout = self.config.layout
        self.data = LatentSet(args.latents, layout, self.recipe.get("word_weights", {}))

    def _stage(self, settings: dict[str, dict[str, object]]) -> FlowStage | MutualStage:
        if self.args.stage != "mutual":
            return FlowStage(self.system, self.weights, self.recipe, self.args.stage == "joint")
        values = dict(settings["mutual"])
        fake_rate = values.pop("fake_learning_rate")
        return MutualStage(self.system, self.weights, MutualRecipe.from_dict(values), fake_rate)

    def draw(self) -> tuple[Batch, torch.Generator]:
        """This rank's share of the batch, and the generator of everything random in the step."""
        number = self.args.seed * 1_000_003 + self.step
        # All ranks take the same length, so that none waits for another.
        common = torch.Generator().manual_seed(number)
        lengths = self.recipe["lengths"]
        shares = torch.tensor([length["share"] for length in lengths])
        length = lengths[int(torch.multinomial(shares, 1, generator=common))]
        generator = torch.Generator().manual_seed(number * 64 + self.rank + 1)
        batch = self.data.batch(length["batch"] // self.world, length["blocks"], generator)
        return batch, generator

    def advance(self, progress: float) -> dict[str, float]:
        """One step; `progress` in 0..1 drives the schedules. Returns what is logged."""
        batch, generator = self.draw()
        rate = learning_rate(self.step, self.recipe["warmup_steps"], progress)
        logged = self.stage.step(batch, generator, self.step, progress, rate)
        self.step += 1
        return logged

    def save(self) -> None:
        """Write the averaged weights and the state to go on from; rank 0 only."""
        if self.rank:
            return
        out = self.args.out
        record = {
            "transformer": self.config.to_dict(),
            "recipe": self.recipe,
            "stage": self.args.stage,
        }
        (out / "config.json").write_text(json.dumps(record))
        state = {
            "weights": self.weights.state_dict(),
            "stage": self.stage.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        _atomic(out / "resume.pt", lambda path: torch.save(state, path))
        _atomic(out / "weights.safetensors", lambda path: save_file(self.weights.averaged(), path))

    def train(self) -> None:
        """Steps until the time is used up."""
        budget = self.args.minutes * 60
        saved = last = time.monotonic()
        sums: dict[str, list[float]] = {}
        while self.seconds < budget:
            for name, value in self.advance(self.seconds / budget).items():
                sums.setdefault(name, []).append(value)
            elapsed = torch.tensor(time.monotonic() - last)
            last = time.monotonic()
            if self.world > 1:
                # All ranks must agree on when to stop.
                dist.broadcast(elapsed, 0)
            self.seconds += float(elapsed)
            if self.step % 25 == 0:
                if not self.rank:
                    means = " ".join(
                        f"{name} {np.mean(values):.4f}" for name, values in sums.items()
                    )
                    logger.info("step %d, %.0f s: %s", self.step, self.seconds, means)
                sums = {}
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=("unimodal", "joint", "mutual"), required=True)
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).parent / "configs" / "small.json"
    )
    parser.add_argument("--latents", type=Path, nargs="+", required=True)
    parser.add_argument("--init", type=Path, help="run folder or model file to start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    Run(args).train()


if __name__ == "__main__":
    main()
