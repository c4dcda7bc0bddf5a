"""Train the dual-stream transformer: `--stage unimodal`, then `joint`, then `mutual`.

    python launch.py lab.training.train --stage unimodal --latents runs/latents --minutes 20 \
        --out runs/unimodal
    torchrun --nproc-per-node 2 launch.py lab.training.train --stage joint --init runs/unimodal ...
    ... --stage mutual --init runs/joint --samples-every 200 \
        --codecs models/mutual_forcing_small.safetensors

Mutual Forcing's stages, causal from the start (docs/mutual_forcing.md, section 2): each stream
alone, both together, both multi-step; then both modes of the one network
(lab.training.mutual_forcing). `--method` makes of the last stage one of the methods that it is
compared with (configs/methods.json); the rival among them wants a teacher: `--stage bidirectional`,
then `--teacher`. OmniForcing's stages have one each as well (lab.training.omniforcing runs all).
One process, or many under torchrun, on CPUs or GPUs, take the same steps. Checkpoints are written
atomically every few minutes; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...model_loaders.bundle import TEXT, TRANSFORMER, StreamDefaults
from ...model_loaders.ltx2 import load_transformer
from ...networks.config import TransformerConfig
from ...networks.memory_branch import is_memory
from ...samplers.atomic_file import replacing
from .. import command
from ..report import write_json
from .adapters import AdapterSettings, adapt, load_trained, without_sinks
from .attention_forms import alter
from .data import Batch, LatentSet
from .draws import Draws
from .monitor import RunLog, SampleSheets
from .parallel import Processes
from .stages import STAGES, Logged, Trained, build_stage, wants_teacher
from .system import (
    EmbeddedSystem,
    Parts,
    System,
    initialise,
    of_few_step,
    placed,
    rest_step_size,
    twin,
)

logger = logging.getLogger("mutualforcing")
CONFIGS = Path(__file__).parent / "configs"
SAVE_SECONDS = 120
DROPPED = (".few_step.", ".audio_sink_tokens", ".picture_track.", ".pictures.")
ADDITIONS = (".audio_transcript_proj.", *DROPPED)


def read_settings(config: Path, stage: str, method: str) -> dict[str, dict[str, object]]:
    """A config file for one stage and method.

    Sections that it lacks are those of the file beside it that it names under "like", and so on.
    What its section "stages" says of the stage changes "recipe", and under "transformer" and
    "mutual" these; what configs/methods.json says of the method changes "mutual", and of the
    history the "history" in it. Of "adapters", which has those of each stage, the stage's are
    taken.

    Raises:
        ValueError: no such method.
    """
    settings = json.loads(config.read_text())
    while "like" in settings:
        settings = json.loads((config.parent / settings.pop("like")).read_text()) | settings
    methods = json.loads((CONFIGS / "methods.json").read_text())
    if method not in methods:
        raise ValueError(f"found method {method!r}, expected one of {', '.join(methods)}")
    own = dict(settings.get("stages", {}).get(stage, {}))
    mutual = settings.get("mutual", {})
    for changes in (own.pop("mutual", {}), methods[method]):
        if "history" in changes:
            changes = changes | {"history": mutual.get("history", {}) | changes["history"]}
        mutual = mutual | changes
    if "adapters" in settings:
        settings = settings | {"adapters": settings["adapters"][stage]}
    return settings | {
        "transformer": settings["transformer"] | own.pop("transformer", {}),
        "recipe": settings["recipe"] | own,
        "mutual": mutual,
    }


def learning_rate(step: int, warmup: int, progress: float) -> float:
    """Linear warm-up in steps, then a cosine to zero over the budget that was given."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * min(1.0, progress)))


def starting_weights(path: Path) -> dict[str, Tensor]:
    """Weights by their name in a `System`, from a run's folder or from a shipped model file."""
    if path.is_dir():
        return load_file(path / "weights.safetensors")
    parts = {TRANSFORMER: "transformer.", TEXT: "text_encoder."}
    return {
        name + key.removeprefix(prefix): value.float()
        for key, value in load_file(path).items()
        for prefix, name in parts.items()
        if key.startswith(prefix)
    }


def load_starting(system: System, weights: Mapping[str, Tensor]) -> None:
    """Set a system to the weights of another one, which may lack additions: transcript, adapters,
    sinks, a memory branch.

    A system without adapters takes the weights of one with them: its multi-step mode, that is. One
    without sinks takes all others.

    Raises:
        RuntimeError: other weights are missing, or there are some that it does not have.
    """
    fresh = system.state_dict()
    here, there = (any(".few_step." in name for name in names) for names in (fresh, weights))
    kept = {
        name: value
        for name, value in weights.items()
        if name in fresh or not any(part in name for part in DROPPED)
    }
    added = {
        name: fresh[name]
        for name in fresh
        if is_memory(name) or any(part in name for part in ADDITIONS)
    }
    system.load_state_dict(added | kept)
    if here != there:
        rest_step_size(system, folded=here)


def untaught(init: Path, config: TransformerConfig, folder: Path) -> Path:
    """A folder with a run's or a model file's weights, in which few-step mode has learned nothing.

    It is made once; returns `folder`.
    """
    path = folder / "weights.safetensors"
    if not path.exists():
        fresh = System(config)
        initialise(fresh, 0)
        own = {name: value for name, value in fresh.state_dict().items() if of_few_step(name)}
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(starting_weights(init) | own, part)
    return folder


class Run:
    """One training run: config.json, weights.safetensors (averaged) and resume.pt in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = read_settings(args.config, args.stage, args.method)
        self.recipe = settings["recipe"]
        if args.learning_rate:
            self.recipe["learning_rate"] = args.learning_rate
        self.settings = settings
        self.processes = Processes.from_environment()
        # One frozen base under the adapters of all systems, or none.
        self.base = self._base() if "adapters" in settings else None
        self.config = TransformerConfig.from_dict(settings["transformer"])
        if self.base is not None:
            self.config = self.base.transformer.config
        args.out.mkdir(parents=True, exist_ok=True)
        trained = Trained.from_recipe(self.recipe, self.processes)
        teacher = None
        if args.teacher:
            told = json.loads((args.teacher / "config.json").read_text())["transformer"]
            teacher = self._system(args.teacher, TransformerConfig.from_dict(told))
        elif self.base is not None and wants_teacher(args.stage, settings["mutual"]):
            teacher = self._system(None, self.base_config)
        system = self._system(args.init, self.config)
        if "attention" in settings:
            alter(system, settings["attention"])
        self.stage = build_stage(args.stage, system, settings, trained, teacher)
        self.step, self.seconds = 0, 0.0
        resume = args.out / "resume.pt"
        state = torch.load(resume, weights_only=True) if resume.exists() else None
        if state is not None:
            self.step, self.seconds = state["step"], state["seconds"]
        log = args.out / "log.jsonl"
        self.log = RunLog(log, args.log_every, self.step, self.processes)
        if state is not None:
            self.stage.weights.load_state_dict(state["weights"])
            self.stage.load_state_dict(state.get("stage", {}))
            if "log" in state:
                self.log.load_state_dict(state["log"])
            logger.info("going on from step %d", self.step)
        self.sheets = self._sheets(StreamDefaults(**settings["stream"]))
        weights = self.recipe.get("word_weights", {})
        self.data = LatentSet(args.latents, self.config, weights, settings.get("held_out", ()))

    def _base(self) -> EmbeddedSystem:
        """The frozen network of --base with fresh adapters."""
        args, settings = self.args, self.settings
        if args.base is None:
            raise ValueError(f"{args.config} has adapters; name the network under them with --base")
        model = load_transformer(args.base, device=self.processes.device).transformer
        found = model.config.to_dict()
        other = {k: found[k] for k, v in settings["transformer"].items() if found[k] != v}
        if other:
            raise ValueError(
                f"{args.base} has {other}, expected what the section 'transformer' of "
                f"{args.config} "
                "says; correct that, or give another file"
            )
        self.base_config = model.config
        torch.manual_seed(args.seed)
        adapt(model, AdapterSettings(**settings["adapters"]))
        return EmbeddedSystem(model, torch.from_numpy(np.load(args.latents[0] / "empty.npy")))

    def _system(self, weights: Path | None, config: TransformerConfig) -> Parts:
        """A system with fresh weights, or with those of another run or model file.

        Fresh adapters change nothing: they are the base itself.
        """
        if self.base is not None:
            system = twin(self.base)
            if system.transformer.config.num_audio_sink_tokens > config.num_audio_sink_tokens:
                without_sinks(system.transformer)
            if weights is not None:
                load_trained(system, starting_weights(weights))
        else:
            system = System(config)
            initialise(system, self.args.seed)
            if weights is not None:
                load_starting(system, starting_weights(weights))
        return placed(system, self.recipe, self.processes.device)

    def _sheets(self, stream: StreamDefaults) -> SampleSheets | None:
        args, stage = self.args, self.stage
        if not args.samples_every or self.processes.rank:
            return None
        if not args.codecs:
            raise ValueError("--samples-every needs decoders; name a model file with --codecs")
        if stage.mode is None:
            raise ValueError(f"stage {args.stage} makes no clips; leave out --samples-every")
        codecs = args.codecs[0], args.codecs[-1]
        if self.base is not None:
            raise ValueError(
                f"{args.config} trains adapters, whose clips need LTX-2's own decoders, which are "
                "ComfyUI's; leave out --samples-every"
            )
        device = self.processes.device
        out = args.out / "samples"
        return SampleSheets(out, self.config, codecs, stream, stage.mode, stage.method, device)

    def draw(self) -> tuple[Batch, Draws]:
        """This process's share of the batch, and everything random in the step."""
        args, processes = self.args, self.processes
        lengths = self.recipe["lengths"]
        # What the length is decides how many clips there are, so it is drawn before all else.
        shares = torch.tensor([length["share"] for length in lengths])
        length = lengths[int(Draws(args.seed, self.step, ()).weighted(shares, 1))]
        share = processes.share(length["batch"])
        draws = Draws(args.seed, self.step, share, processes.device)
        skipped = length.get("skipped", 0)
        batch = self.data.batch(
            length["batch"],
            length["blocks"],
            share,
            draws,
            skipped=skipped,
            sets=length.get("sets"),
        )
        return batch.to(processes.device), draws

    def advance(self, progress: float) -> Logged:
        """One step; `progress` in 0..1 drives the schedules. Returns what is logged."""
        batch, draws = self.draw()
        rate = learning_rate(self.step, self.recipe["warmup_steps"], progress)
        logged = self.stage.step(batch, draws, self.step, progress, rate)
        self.step += 1
        return logged

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights; with those that are not trained, unless they are a base's own."""
        average = self.stage.weights.averaged()
        if self.base is not None:
            return average
        frozen = self.stage.system.named_parameters()
        return {name: p.detach().float() for name, p in frozen if not p.requires_grad} | average

    def save(self) -> None:
        """Write the averaged weights and the state to go on from; all processes must ask for it."""
        state = {
            "weights": self.stage.weights.state_dict(),
            "stage": self.stage.state_dict(),
            "log": self.log.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        average = self.averaged()
        if not self.processes.rank:
            self._write(state, average)
        # What follows may read the files on any process: all wait for the first one's word.
        self.processes.agreed(0.0)

    def _write(self, state: Mapping[str, object], average: Mapping[str, Tensor]) -> None:
        out = self.args.out
        record = {
            "transformer": self.config.to_dict(),
            "recipe": self.recipe,
            "stage": self.args.stage,
            "method": self.args.method,
            "mutual": self.settings["mutual"],
        }
        if self.base is not None:
            record["adapters"] = self.settings["adapters"]
        write_json(out / "config.json", record)
        with replacing(out / "resume.pt") as part:
            torch.save(state, part)
        with replacing(out / "weights.safetensors") as part:
            save_file(average, part)

    @property
    def progress(self) -> float:
        """How much of the budget, steps or minutes, is used up: 0 to 1 and beyond."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def _clock(self) -> float:
        """Seconds of work: on a CPU without those of other programs, so that budgets are equal."""
        if self.processes.device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize()
        return time.monotonic()

    def train(self) -> None:
        """Steps until the budget is used up; sample sheets and checkpoints take none of it."""
        saved = time.monotonic()
        while self.progress < 1:
            began = self._clock()
            logged = self.advance(self.progress)
            # All processes must agree on when to stop.
            elapsed, due = self.processes.agreed(self._clock() - began, time.monotonic() - saved)
            self.seconds += elapsed
            self.log.add(logged, elapsed)
            self.log.line(self.step, self.seconds)
            if self.args.samples_every and self.step % self.args.samples_every == 0:
                average = self.averaged()
                if self.sheets is not None:
                    self.log.write(self.sheets.write(average, self.step))
            if due > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.train", __doc__)
    p.add_argument("--stage", choices=STAGES, required=True)
    p.add_argument("--method", default="mutual", help="of stage mutual, from configs/methods.json")
    p.add_argument("--config", type=Path, default=CONFIGS / "small.json")
    p.add_argument("--latents", type=Path, nargs="+", required=True)
    p.add_argument("--base", type=Path, help="LTX-2 checkpoint, for a config with adapters")
    p.add_argument("--init", type=Path, help="run folder or model file to start from")
    p.add_argument(
        "--teacher",
        type=Path,
        help="run folder of a network without masks; with --base, by default the base itself",
    )
    p.add_argument("--out", type=Path, required=True)
    budget = p.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="budget in time, on a CPU of its own work")
    budget.add_argument("--steps", type=int, help="budget in steps: the same numbers anywhere")
    p.add_argument("--learning-rate", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--log-every", type=int, default=25, help="steps per line of log.jsonl")
    p.add_argument("--samples-every", type=int, default=0, help="steps per sample sheet; 0: none")
    p.add_argument(
        "--codecs",
        type=Path,
        nargs="+",
        help="model file, or video and audio codec, for the sheets",
    )
    return p


def main() -> int:
    """Command line."""
    return command.run(parser(), lambda args: Run(args).train(), timed=True)


if __name__ == "__main__":
    sys.exit(main())
