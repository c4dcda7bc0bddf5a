"""What one training step does, per stage: multi-step alone, both modes, OmniForcing's three.

Every stage owns what it trains and the optimiser of it, takes one step at a time, and can be
stopped and gone on with. `build_stage` chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...networks.picture_track import SIGHT_DTYPE, is_sight
from ...samplers.rollout import Method, Mode
from .causal_ode import ode_loss
from .data import Asked, Batch
from .distillation import Pair
from .draws import Draws
from .flow_matching import flow_matching, whole_clip_matching
from .mutual_forcing import (
    MutualRecipe,
    distribution_loss,
    draw_level,
    fake_loss,
    flow_loss,
    made_sample,
    prepare,
    shortcut_loss,
)
from .optimiser import MasterWeights
from .pair import block_count
from .parallel import Processes
from .pictures import HISTORIES, sound_of_pictures, sound_read
from .self_forcing import Rollout, exit_rollout, rollout_matching, whole_rollout
from .system import Parts, only_few_step, twin, without_some

Logged = dict[str, Tensor]
TAUGHT = ("bidirectional_dmd", "causal_ode", "self_forcing")
"""OmniForcing's three stages; each has another network for a teacher."""
STAGES = ("unimodal", "joint", "mutual", "reading", "pictures", "bidirectional", *TAUGHT)


class Stage(Protocol):
    """One kind of training step.

    Attributes:
        weights: of the network that is trained for.
        mode, method: how clips are sampled from it; mode None if it cannot make any alone.
    """

    weights: MasterWeights
    mode: Mode | None
    method: Method

    def step(self, batch: Batch, draws: Draws, number: int, progress: float, rate: float) -> Logged:
        """One update; `progress` in 0..1 and `rate` drive the schedules. Returns what is logged."""
        ...

    def state_dict(self) -> dict[str, object]:
        """What going on needs beyond `weights`; all processes must ask for it."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`; `weights` are back already."""
        ...


@dataclass(frozen=True)
class Trained:
    """How weights are trained.

    Attributes:
        dtype: that they compute in.
        ema: decay of the moving average per step.
    """

    learning_rate: float
    ema: float
    dtype: torch.dtype
    processes: Processes

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, object], processes: Processes) -> Trained:
        """As the section "recipe" of a config file says; in bfloat16 where it says nothing."""
        dtype = getattr(torch, recipe.get("dtype", "bfloat16"))
        return cls(recipe["learning_rate"], recipe["ema"], dtype, processes)

    def weights(self, system: Parts) -> MasterWeights:
        """Optimiser and moving average of a system."""
        return MasterWeights(
            system, self.learning_rate, self.ema, dtype=self.dtype, processes=self.processes
        )

    def online(self, system: Parts, learning_rate: float) -> MasterWeights:
        """Optimiser of a fake score, of which no average is wanted."""
        return MasterWeights(
            system, learning_rate, None, dtype=self.dtype, processes=self.processes
        )

    def fixed(self, system: Parts) -> Parts:
        """A system that is only asked."""
        self.processes.place(system, self.dtype)
        return system.requires_grad_(False)


class FlowStage:
    """Multi-step mode alone: flow matching on real histories, or with the masks off."""

    method: Method = "euler"

    def __init__(
        self, system: Parts, trained: Trained, recipe: Mapping[str, object], stage: str
    ) -> None:
        self.system, self.stage = system, stage
        self.weights = trained.weights(system)
        names = ["sigma_mean", "sigma_spread", "caption_dropout", "track_dropout"]
        if stage != "bidirectional":
            names += ["history_noise", "given"]
        self.settings = {name: recipe[name] for name in names if name in recipe}
        self.mode: Mode | None = "multi" if stage == "joint" else None

    def step(self, batch: Batch, draws: Draws, number: int, progress: float, rate: float) -> Logged:
        """One update."""

        def losses() -> Pair:
            if self.stage == "bidirectional":
                return whole_clip_matching(self.system, batch, draws, **self.settings)
            coupled = self.stage == "joint"
            return flow_matching(self.system, batch, draws, coupled=coupled, **self.settings)

        found = self.system(losses)
        (found.video + found.audio).backward()
        norm = self.weights.step(rate)
        return {"video": found.video.detach(), "audio": found.audio.detach(), "gradient": norm}

    def state_dict(self) -> dict[str, object]:
        """Nothing beyond the weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""


class PictureStage:
    """What acts for given pictures alone; every other stream stays as it is, bit for bit. The track
    learns to read first (stage "reading"), then with the adapters for the sound ("pictures").

    It learns with its matrices rounded to the 8 bits that they are shipped in.
    """

    mode: Mode | None = None
    method: Method = "euler"

    def __init__(
        self, system: Parts, trained: Trained, recipe: Mapping[str, object], reads: bool
    ) -> None:
        if not system.transformer.config.picture_track_channels:
            raise ValueError(
                "the network has no picture track, expected picture_track_channels, _hidden and "
                "_rank under 'transformer' in the config (configs/pictures.json)"
            )
        if trained.processes.world > 1:
            raise ValueError(
                f"found {trained.processes.world} processes, expected one for what given pictures "
                "are read with: split weights can't be rounded for a step, and its histories take "
                "sounds from all over the batch"
            )
        self.system, self.reads = system, reads
        for name, parameter in system.named_parameters():
            parameter.requires_grad_(is_sight(name))
        self.rounded = [p for p in system.parameters() if p.requires_grad and p.ndim > 1]
        # Like few-step mode's adapters it computes as the layers do that it speaks to.
        dtype = system.transformer.proj_out.weight.dtype
        self.weights = replace(trained, dtype=dtype).weights(system)
        names = ("sigma_mean", "sigma_spread", "caption_dropout", "histories")
        self.settings = {} if reads else {name: recipe[name] for name in names}
        unknown = sorted(set(self.settings.get("histories", ())) - set(HISTORIES))
        if unknown:
            raise ValueError(
                f"histories has {', '.join(unknown)}, expected shares of {', '.join(HISTORIES)}"
            )

    def step(self, batch: Batch, draws: Draws, number: int, progress: float, rate: float) -> Logged:
        """One update."""
        exact = [p.detach().clone() for p in self.rounded]
        for p, value in zip(self.rounded, exact, strict=True):
            p.data.copy_(value.to(SIGHT_DTYPE))
        args = self.system, batch
        if self.reads:
            loss = self.system(sound_read, *args)
        else:
            loss = self.system(lambda: sound_of_pictures(*args, draws, **self.settings))
        loss.backward()
        for p, value in zip(self.rounded, exact, strict=True):
            p.data.copy_(value)
        norm = self.weights.step(rate)
        return {"audio": loss.detach(), "gradient": norm}

    def state_dict(self) -> dict[str, object]:
        """Nothing beyond the weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""


class MutualStage:
    """Both modes of one network (lab.training.mutual_forcing), with teacher and fake score.

    With few-step adapters few-step mode alone learns, in them: the teacher is the same network with
    them at rest. Nothing learns from flow but a memory branch, if there is one, which both modes
    have; or all but the adapters, if the recipe says so.
    """

    mode: Mode | None = "few"
    method: Method = "euler"

    def __init__(
        self, system: Parts, trained: Trained, recipe: MutualRecipe, fake_rate: float
    ) -> None:
        self.system, self.recipe = system, recipe
        config = system.transformer.config
        self.apart = bool(config.few_step_rank)
        self.backbone = self.apart and recipe.backbone
        if self.backbone and trained.processes.world > 1:
            raise ValueError(
                f"found {trained.processes.world} processes, expected one: what has a gradient "
                "changes within a step where 'backbone' is on, and split weights can't do that"
            )
        self.flows = not self.apart or bool(config.memory_interval) or self.backbone
        self.teacher = self.fake = self.fake_weights = None
        if self.apart:
            if not self.backbone:
                only_few_step(system)
            self.teacher = system
            # Adapters compute as the layers do that they lie beside.
            trained = replace(trained, dtype=system.transformer.proj_out.weight.dtype)
        elif recipe.shortcut or recipe.matching:
            self.teacher = trained.fixed(twin(system))
        else:
            # Nothing of few-step mode is trained.
            self.mode = "multi"
        if recipe.matching:
            self.fake = twin(system)
            self.fake_weights = trained.online(self.fake, fake_rate)
        self.weights = trained.weights(system)

    def step(self, batch: Batch, draws: Draws, number: int, progress: float, rate: float) -> Logged:
        """One update of the network and, where it had a DMD term, several of the fake score."""
        system, recipe = self.system, self.recipe
        due = bool(recipe.matching) and number % recipe.matching_every == 0
        matching = due and number >= recipe.fake_warmup
        shown, taught = system(prepare, system, batch, recipe, progress, draws)
        logged: Logged = {}
        # Backward term by term: only one of them has its activations in memory at a time.
        if self.flows:
            if self.backbone:
                system.requires_grad_(True)
            loss = system(flow_loss, system, shown, recipe, draws)
            (recipe.flow * loss).backward()
            logged["flow"] = loss.detach()
            if self.backbone:
                only_few_step(system)
        if recipe.shortcut:
            loss = system(shortcut_loss, system, self.teacher, taught, recipe)
            (recipe.shortcut * loss).backward()
            logged["shortcut"] = loss.detach()
        if matching:
            scores = self.teacher, self.fake
            loss, sample = system(distribution_loss, system, *scores, taught, recipe)
            (recipe.matching * loss).backward()
            logged["matching"] = loss.detach()
        elif due:
            with torch.no_grad():
                sample = system(made_sample, system, taught, recipe, 0)
        if logged:
            logged["gradient"] = self.weights.step(rate)
        if self.teacher is not None and not self.apart:
            self.weights.write_average(self.teacher)
        if due:
            blocks = block_count(sample, system.transformer.config.layout)
            for _ in range(recipe.fake_updates):
                level = draw_level(blocks, recipe, taught.draws)
                made = sample, taught.asked, level, taught.draws
                loss = self.fake(fake_loss, self.fake, taught.history, *made)
                loss.backward()
                logged["fake gradient"] = self.fake_weights.step(rate)
                logged["fake"] = loss.detach()
        return logged

    def state_dict(self) -> dict[str, object]:
        """The fake score with its optimiser; the teacher is the network's average, or itself."""
        return {} if self.fake_weights is None else {"fake": self.fake_weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""
        if self.fake_weights is not None:
            self.fake_weights.load_state_dict(state["fake"])
        if self.teacher is not None and not self.apart:
            self.weights.write_average(self.teacher)


def prompted(system: Parts, batch: Batch, recipe: MutualRecipe, draws: Draws) -> tuple[Pair, Asked]:
    """All that a stage without real data uses of it: the shape of its clips, and what is asked."""
    asked = without_some(system, batch.asked, recipe.caption_dropout, draws, recipe.track_dropout)
    return Pair(batch.video, batch.audio), asked


class RegressionStage:
    """OmniForcing's stage II (lab.training.causal_ode): the teacher's velocities, under masks."""

    mode: Mode | None = "few"
    method: Method = "renoise"

    def __init__(
        self, system: Parts, teacher: Parts, trained: Trained, recipe: MutualRecipe
    ) -> None:
        self.system, self.recipe = system, recipe
        self.teacher = trained.fixed(teacher)
        self.weights = trained.weights(system)

    def step(self, batch: Batch, draws: Draws, number: int, progress: float, rate: float) -> Logged:
        """One update."""
        asked = prompted(self.system, batch, self.recipe, draws)
        loss = self.system(ode_loss, self.system, self.teacher, *asked, self.recipe, draws)
        loss.backward()
        return {"regression": loss.detach(), "gradient": self.weights.step(rate)}

    def state_dict(self) -> dict[str, object]:
        """Nothing beyond the weights; the teacher never changes."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""


class SelfForcingStage:
    """DMD on own rollouts (lab.training.self_forcing), OmniForcing's stages I and III.

    The fake score is updated in every step, the network every few.
    """

    method: Method = "renoise"

    def __init__(
        self,
        system: Parts,
        teacher: Parts,
        trained: Trained,
        recipe: MutualRecipe,
        fake_rate: float,
        rollout: Rollout = exit_rollout,
    ) -> None:
        self.system, self.recipe, self.rollout = system, recipe, rollout
        # A network without masks makes no stream.
        self.mode: Mode | None = "few" if rollout is exit_rollout else None
        self.fake = twin(teacher)
        self.fake_weights = trained.online(self.fake, fake_rate)
        self.teacher = trained.fixed(teacher)
        self.weights = trained.weights(system)

    def step(self, batch: Batch, draws: Draws, number: int, progress: float, rate: float) -> Logged:
        """An update of the fake score and, on the same rollout every few steps, of the network."""
        system, recipe = self.system, self.recipe
        asked = prompted(system, batch, recipe, draws)
        logged = {}
        if number % recipe.matching_every == 0:
            scores = self.teacher, self.fake
            made = *asked, recipe, draws, self.rollout
            loss, sample = system(rollout_matching, system, *scores, *made)
            loss.backward()
            logged = {"matching": loss.detach(), "gradient": self.weights.step(rate)}
        else:
            with torch.no_grad():
                sample = system(self.rollout, system, *asked, recipe, draws)
        level = draw_level(1, recipe, draws)
        level = level.expand(-1, block_count(sample, system.transformer.config.layout))
        loss = self.fake(fake_loss, self.fake, None, sample, asked[1], level, draws)
        loss.backward()
        return logged | {"fake gradient": self.fake_weights.step(rate), "fake": loss.detach()}

    def state_dict(self) -> dict[str, object]:
        """The fake score with its optimiser; the teacher never changes."""
        return {"fake": self.fake_weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""
        self.fake_weights.load_state_dict(state["fake"])


def wants_teacher(stage: str, mutual: Mapping[str, object]) -> bool:
    """Whether a stage has another network for a teacher; `mutual` is a config file's section."""
    return stage in TAUGHT or (stage == "mutual" and mutual.get("teacher") == "bidirectional")


def build_stage(
    stage: str,
    system: Parts,
    settings: Mapping[str, Mapping[str, object]],
    trained: Trained,
    teacher: Parts | None = None,
) -> Stage:
    """The stage of a name, over a system with float32 weights that it will place.

    Args:
        settings: of a config file; "mutual" with the method's changes already in.
        teacher: without masks, for OmniForcing's stages and the method that has one.

    Raises:
        ValueError: one of these without a teacher; a network with a memory, in any stage but Mutual
            Forcing's.
    """
    recipe = settings.get("mutual", {})
    if system.transformer.config.keeps_memory and (
        stage != "mutual" or wants_teacher(stage, recipe)
    ):
        raise ValueError(
            f"the network keeps a memory and the stage is {stage}, expected stage mutual with the "
            "network as its own teacher: nothing else trains a memory"
        )
    if stage in ("reading", "pictures"):
        return PictureStage(system, trained, settings["recipe"], stage == "reading")
    if stage not in ("mutual", *TAUGHT):
        return FlowStage(system, trained, settings["recipe"], stage)
    values = dict(settings["mutual"])
    fake_rate = values.pop("fake_learning_rate")
    recipe = MutualRecipe.from_dict(values)
    if stage == "mutual" and recipe.teacher == "self":
        return MutualStage(system, trained, recipe, fake_rate)
    if teacher is None:
        raise ValueError(
            "this stage has a bidirectional teacher and found none; train one with "
            "--stage bidirectional and name its folder with --teacher"
        )
    if stage == "causal_ode":
        return RegressionStage(system, teacher, trained, recipe)
    rollout = whole_rollout if stage == "bidirectional_dmd" else exit_rollout
    return SelfForcingStage(system, teacher, trained, recipe, fake_rate, rollout)
