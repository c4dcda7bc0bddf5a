"""Training a codec of pictures or of sound, in a budget of minutes, also after a kill.

The learning rate falls to zero over the budget, whatever the speed of the machine. What is saved is
the moving average of the weights, with the statistics of the latents measured under it. A file
`<out>.resume` beside the checkpoint lets the same command go on after a kill.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...networks.audio_codec import AudioCodec
from ...networks.video_codec import VideoCodec
from ...samplers.atomic_file import replacing
from .optimiser import MasterWeights
from .train import SAVE_SECONDS, learning_rate

log = logging.getLogger("mutualforcing")

# A channel that carries nothing stays small after normalising, in place of becoming loud noise to
# be learned.
LEAST_STD = 0.1
LOG_STEPS = 50
Codec = VideoCodec | AudioCodec


class Recipe(Protocol):
    """What is one codec's own in its training.

    Attributes:
        kind: its name in a checkpoint, as of `lab.training.latents.load_codec`.
        warmup_steps: of the learning rate.
    """

    kind: str
    warmup_steps: int

    def matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is stepped by Muon."""
        ...

    def loss(
        self, codec: Codec, progress: float, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a random batch, and its parts by name."""
        ...

    def raw_latents(self, codec: Codec) -> Tensor | None:
        """Latents (n, c) before they are normalised; None leaves the statistics as they are."""
        ...

    def quality(self, codec: Codec) -> dict[str, float]:
        """How good a codec is on clips that it is not trained on, as far as a log wants to know."""
        ...


class Run:
    """The state of a run: codec, moving average, optimiser, seconds and steps spent.

    Args:
        codec: what of it requires gradients is trained.

    Raises:
        ValueError: the resume file is of another run.
    """

    def __init__(self, codec: Codec, recipe: Recipe, args: argparse.Namespace) -> None:
        self.codec, self.recipe, self.args = codec, recipe, args
        self.average = deepcopy(codec).requires_grad_(False)
        self.weights = MasterWeights(codec, args.lr, 0.0, dtype=torch.float32, matrix=recipe.matrix)
        self.seconds, self.steps = 0.0, 0
        self.resume_path = args.out.with_name(args.out.name + ".resume")
        if self.resume_path.exists():
            self._resume()
            log.info("going on at step %d, %.0f s", self.steps, self.seconds)
        # Other batches than those of the run that was cut off.
        self.rng = np.random.default_rng([args.seed, self.steps])

    @property
    def progress(self) -> float:
        """Part of the budget spent, 0..1."""
        steps = self.steps / self.args.steps if self.args.steps else 0.0
        return min(1.0, max(self.seconds / (60 * self.args.minutes), steps))

    def step(self) -> dict[str, float]:
        """One update; returns the parts of the loss."""
        loss, parts = self.recipe.loss(self.codec, self.progress, self.rng)
        loss.backward()
        # The first weights leave the average soon, also in a short run.
        self.weights.decay = min(0.998, (2 + self.steps) / (21 + self.steps))
        self.weights.step(learning_rate(self.steps, self.recipe.warmup_steps, self.progress))
        self.steps += 1
        return {name: part.item() for name, part in parts.items()}

    @torch.no_grad()
    def save(self) -> None:
        """Write the averaged checkpoint and, beside it, what going on needs."""
        self.weights.write_average(self.average)
        latents = self.recipe.raw_latents(self.average)
        if latents is not None:
            self.average.latent_mean.copy_(latents.mean(dim=0))
            self.average.latent_std.copy_(latents.std(dim=0).clamp_min(LEAST_STD))
        spent = {"steps": self.steps, "seconds": self.seconds}
        training = spent | {"quality": self.recipe.quality(self.average)}
        config = json.dumps({self.recipe.kind: self.codec.config.to_dict()})
        with replacing(self.args.out) as part:
            tensors = {key: value.contiguous() for key, value in self.average.state_dict().items()}
            save_file(tensors, part, {"config": config, "training": json.dumps(training)})
        with replacing(self.resume_path) as part:
            state = spent | {"config": config, "weights": self.weights.state_dict()}
            torch.save(state, part)
        log.info("checkpoint: %s -> %s", training, self.args.out)

    def _resume(self) -> None:
        advice = "delete it to start anew, or choose another --out"
        if not zipfile.is_zipfile(self.resume_path):  # as torch.save writes
            raise ValueError(f"{self.resume_path} is no resume file of today; {advice}")
        state = torch.load(self.resume_path, weights_only=True)
        expected = json.dumps({self.recipe.kind: self.codec.config.to_dict()})
        if state["config"] != expected:
            raise ValueError(
                f"{self.resume_path}: found a run of {state['config']}, expected {expected}; "
                f"{advice}"
            )
        self.weights.load_state_dict(state["weights"])
        self.steps, self.seconds = state["steps"], state["seconds"]

    def train(self) -> None:
        """Steps until the budget is spent. Making checkpoints takes none of it."""
        saved = time.monotonic()
        while self.progress < 1:
            began = time.monotonic()
            parts = self.step()
            now = time.monotonic()
            self.seconds += now - began
            if self.steps % LOG_STEPS == 0:
                text = " ".join(f"{name} {value:.5f}" for name, value in parts.items())
                log.info("step %d, %.0f s: %s", self.steps, self.seconds, text)
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()


def add_options(
    p: argparse.ArgumentParser, minutes: float, lr: float, kl: float, clips: int
) -> None:
    """The options of a codec's training, with their defaults."""
    p.add_argument("--out", type=Path, required=True, help="checkpoint (.safetensors)")
    p.add_argument("--minutes", type=float, default=minutes, help="time budget of the updates")
    p.add_argument("--steps", type=int, default=0, help="step budget; 0: the time budget alone")
    p.add_argument("--lr", type=float, default=lr)
    p.add_argument("--kl", type=float, default=kl, help="weight of the KL term")
    p.add_argument("--clips", type=int, default=clips, help="clips to render for the pool")
    p.add_argument("--pool", type=Path, help="where the rendered clips lie; default: beside --out")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
