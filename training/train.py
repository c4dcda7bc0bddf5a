"""Train the dual-stream transformer: `--stage unimodal` (each stream alone), then `--stage joint`.

    python launch.py training.train --stage unimodal --latents runs/latents --minutes 20 --out runs/unimodal
    torchrun --nproc-per-node 2 launch.py training.train --stage joint --init runs/unimodal ...

Mutual Forcing's two training stages, causal from the start, multi-step mode (mutual_forcing.md, section 2).
Checkpoints are written atomically every few minutes; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
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

from ..networks.config import TransformerConfig
from .flow_matching import Batch, Losses, flow_matching
from .optimiser import MasterWeights
from .system import System, initialise, math_attention

logger = logging.getLogger("mutualforcing")
SAVE_SECONDS = 120


class LatentSet:
    """Encoded clips of one or several folders (training.latents), held in memory."""

    def __init__(self, folders: list[Path]) -> None:
        for folder in folders:
            about = json.loads((folder / "about.json").read_text())
            if about["done"] < about["clips"]:
                raise ValueError(
                    f"{folder} holds {about['done']} of {about['clips']} clips; finish it first"
                )

        def load(name: str) -> Tensor:
            return torch.from_numpy(
                np.concatenate([np.load(folder / f"{name}.npy") for folder in folders])
            )

        self.video, self.audio, self.captions = load("video"), load("audio"), load("captions")

    def __len__(self) -> int:
        return len(self.video)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Random clips, each with one of its captions."""
        index = torch.randint(len(self), (size,), generator=generator)
        variant = torch.randint(self.captions.shape[1], (size,), generator=generator)
        return Batch(
            self.video[index].float(),
            self.audio[index].float(),
            self.captions[index, variant].long(),
        )


def learning_rate(step: int, warmup: int, progress: float) -> float:
    """Linear warm-up in steps, then a cosine to zero over the time that was given."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _atomic(path: Path, write: object) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


class Run:
    """One training run: its folder holds config.json, weights.safetensors (averaged) and resume.pt."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = json.loads(args.config.read_text())
        self.recipe = settings["recipe"]
        if args.learning_rate:
            self.recipe["learning_rate"] = args.learning_rate
        self.config = TransformerConfig.from_dict(settings["transformer"])
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            dist.init_process_group("gloo")
        self.system = System(self.config)
        initialise(self.system, args.seed)
        if self.config.num_layers and not torch.cuda.is_available():
            self.system.transformer.kernel = math_attention
        self.system.to(torch.bfloat16)
        self.weights = MasterWeights(self.system, self.recipe["learning_rate"], self.recipe["ema"])
        self.step, self.seconds = 0, 0.0
        args.out.mkdir(parents=True, exist_ok=True)
        resume = args.out / "resume.pt"
        if resume.exists():
            state = torch.load(resume, weights_only=True)
            self.weights.load_state_dict(state["weights"])
            self.step, self.seconds = state["step"], state["seconds"]
            logger.info("going on from step %d", self.step)
        elif args.init:
            self.weights.start_from(load_file(args.init / "weights.safetensors"))
        self.data = LatentSet(args.latents)

    def losses(self) -> Losses:
        """Losses of this rank's share of the batch; the step and rank fix the draw."""
        number = self.args.seed * 1_000_003 + self.step
        # All ranks take the same length, so that none waits for another.
        common = torch.Generator().manual_seed(number)
        lengths = self.recipe["lengths"]
        shares = torch.tensor([length["share"] for length in lengths])
        length = lengths[int(torch.multinomial(shares, 1, generator=common))]
        generator = torch.Generator().manual_seed(number * 64 + self.rank + 1)
        batch = self.data.batch(length["batch"] // self.world, generator).first(
            length["blocks"], self.config.layout
        )
        names = ("sigma_mean", "sigma_spread", "caption_dropout", "history_noise")
        return flow_matching(
            self.system,
            batch,
            generator,
            coupled=self.args.stage == "joint",
            **{name: self.recipe[name] for name in names},
        )

    def save(self) -> None:
        """Write the averaged weights and the state to go on from; rank 0 only."""
        if self.rank:
            return
        out = self.args.out
        (out / "config.json").write_text(
            json.dumps(
                {
                    "transformer": self.config.to_dict(),
                    "recipe": self.recipe,
                    "stage": self.args.stage,
                }
            )
        )
        state = {"weights": self.weights.state_dict(), "step": self.step, "seconds": self.seconds}
        _atomic(out / "resume.pt", lambda path: torch.save(state, path))
        _atomic(out / "weights.safetensors", lambda path: save_file(self.weights.averaged(), path))

    def train(self) -> None:
        """Steps until the time is used up."""
        budget = self.args.minutes * 60
        saved = last = time.monotonic()
        sums, count = torch.zeros(3), 0
        while self.seconds < budget:
            losses = self.losses()
            (losses.video + losses.audio).backward()
            rate = learning_rate(self.step, self.recipe["warmup_steps"], self.seconds / budget)
            norm = self.weights.step(rate)
            self.step += 1
            elapsed = torch.tensor(time.monotonic() - last)
            last = time.monotonic()
            if self.world > 1:
                # All ranks must agree on when to stop.
                dist.broadcast(elapsed, 0)
            self.seconds += float(elapsed)
            sums += torch.tensor([losses.video.item(), losses.audio.item(), norm])
            count += 1
            if self.step % 25 == 0:
                video, audio, mean_norm = (sums / count).tolist()
                if not self.rank:
                    logger.info(
                        "step %d, %.0f s: video %.4f audio %.4f, gradient %.2f, rate %.2e",
                        self.step, self.seconds, video, audio, mean_norm, rate,
                    )  # fmt: skip
                sums, count = torch.zeros(3), 0
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=("unimodal", "joint"), required=True)
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).parent / "configs" / "small.json"
    )
    parser.add_argument("--latents", type=Path, nargs="+", required=True)
    parser.add_argument("--init", type=Path, help="folder of the run to start from")
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
