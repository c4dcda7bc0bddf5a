"""Identities of the Mutual Forcing recipe, on a network that is built in a moment."""

from __future__ import annotations

import itertools

import pytest
import torch
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.samplers.sigmas import few_step_sigmas
from mutual_forcing.training import distillation
from mutual_forcing.training.distillation import (
    Guided,
    Pair,
    few_step_sample,
    matching_loss,
    shortcut_target,
)
from mutual_forcing.training.flow_matching import Batch
from mutual_forcing.training.history import HistoryMix, few_step_history
from mutual_forcing.training.mutual_forcing import MutualRecipe, fake_loss, mutual_losses, prepare
from mutual_forcing.training.system import System, initialise

CONFIG = TransformerConfig(
    num_layers=1, num_attention_heads=2, attention_head_dim=12, audio_num_attention_heads=2,
    audio_attention_head_dim=8, in_channels=6, out_channels=6, audio_in_channels=5, audio_out_channels=5,
    cross_attention_dim=24, audio_cross_attention_dim=16, caption_channels=16, rope_type="split",
    num_audio_sink_tokens=2, step_size_embedding=True,
)  # fmt: skip
BLOCKS, CLIPS = 3, 2


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture
def system() -> System:
    with torch.random.fork_rng(devices=[]):
        made = System(CONFIG)
        initialise(made, 0)
        with torch.no_grad():
            # Fresh weights give zero velocity; wake everything up, the mode embedding included.
            for parameter in made.transformer.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return made


@pytest.fixture
def batch() -> Batch:
    layout = CONFIG.layout
    return Batch(
        torch.randn(CLIPS, 6, layout.video_latents(BLOCKS), 1, 1, generator=seeded(1)),
        torch.randn(CLIPS, layout.audio_latents(BLOCKS), 5, generator=seeded(2)),
        torch.randint(1, 9, (CLIPS, 32), generator=seeded(3)),
    )


def test_a_real_history_is_the_clip_and_a_resampled_one_departs_from_it(
    system: System, batch: Batch
) -> None:
    text = system.text(batch.ids)
    arguments = {"steps": 4, "window": 2}
    same = few_step_history(
        system.transformer, text, *batch[:2], start_step=4, generator=seeded(), **arguments
    )
    assert same[0] is batch.video and same[1] is batch.audio
    distances = []
    for start in (3, 0):
        video, audio = few_step_history(
            system.transformer, text, *batch[:2], start_step=start, generator=seeded(), **arguments
        )
        assert video.shape == batch.video.shape and audio.shape == batch.audio.shape
        assert not video.requires_grad
        distances.append(float((video - batch.video).square().mean()))
    assert 0 < distances[0] < distances[1]


def test_history_mix_gives_its_shares() -> None:
    mix = HistoryMix(real=(1.0, 0.0), rollout=(0.0, 1.0))
    assert {mix.start_step(4, 0.0, seeded(i)) for i in range(20)} == {4}
    assert {mix.start_step(4, 1.0, seeded(i)) for i in range(20)} == {0}
    with pytest.raises(ValueError, match="at most 1 together"):
        HistoryMix(real=(0.8, 0.8), rollout=(0.3, 0.3))


def test_the_target_of_a_straight_teacher_is_its_velocity(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    slope = Pair(batch.video * 0.3, batch.audio * -0.2)
    monkeypatch.setattr(distillation, "velocity", lambda *a, **k: slope)
    teacher = Guided(None, None, None, 3.0, 2.0)
    start, end = torch.full((CLIPS, BLOCKS), 0.9), torch.full((CLIPS, BLOCKS), 0.4)
    target = shortcut_target(teacher, None, Pair(*batch[:2]), start, end, 3, CONFIG.layout)
    for found, expected in zip(target, slope, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("gradient_step", [0, 3])
def test_a_sample_has_the_value_of_the_whole_path(
    system: System, batch: Batch, gradient_step: int
) -> None:
    text, history, noise = (
        system.text(batch.ids),
        Pair(*batch[:2]),
        Pair(*(t + 1 for t in batch[:2])),
    )
    sample = few_step_sample(system.transformer, history, noise, text, 4, gradient_step)
    x, grid = noise, few_step_sigmas(4)
    with torch.no_grad():
        for sigma, following in itertools.pairwise(grid):
            level = torch.full((CLIPS, BLOCKS), sigma)
            d = torch.full_like(level, sigma - following)
            u = distillation.velocity(system.transformer, history, x, level, text, d)
            x = Pair(*(a - (sigma - following) * b for a, b in zip(x, u, strict=True)))
    assert torch.allclose(sample.video, x.video, atol=1e-6) and torch.allclose(
        sample.audio, x.audio, atol=1e-6
    )
    sample.video.sum().backward()
    assert system.transformer.proj_out.weight.grad.abs().sum() > 0


def test_matching_pulls_a_sample_from_the_fake_score_to_the_real_one() -> None:
    sample = Pair(torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 2, requires_grad=True))
    real, fake = Pair(torch.ones(1, 4), torch.ones(1, 2)), Pair(-torch.ones(1, 4), torch.ones(1, 2))
    sum(matching_loss(sample, real, fake)).backward()
    assert torch.allclose(sample.video.grad, torch.full((1, 4), -2.0 / 4))
    assert torch.equal(sample.audio.grad, torch.zeros(1, 2))


def test_every_loss_reaches_the_network_and_none_the_teacher(system: System, batch: Batch) -> None:
    teacher, fake = System(CONFIG), System(CONFIG)
    teacher.load_state_dict(system.state_dict())
    fake.load_state_dict(system.state_dict())
    recipe = MutualRecipe(history=HistoryMix((0.0, 0.0), (1.0, 1.0)), window=2)
    prepared = prepare(system, batch, recipe, 0.5, seeded())
    losses = mutual_losses(system, teacher, fake, prepared, recipe, seeded(), matching=True)
    for loss in losses:
        system.zero_grad()
        loss.backward(retain_graph=True)
        assert torch.isfinite(loss) and loss > 0
        assert system.transformer.proj_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for model in (teacher, fake) for p in model.parameters())
    system.zero_grad()
    fake_loss(system, fake, prepared, recipe, seeded()).backward()
    assert fake.transformer.proj_out.weight.grad.abs().sum() > 0
    assert system.transformer.proj_out.weight.grad is None


def test_a_half_that_is_switched_off_costs_nothing(system: System, batch: Batch) -> None:
    recipe = MutualRecipe(shortcut=0.0, matching=0.0, window=2)
    prepared = prepare(system, batch, recipe, 0.0, seeded())
    losses = mutual_losses(system, None, None, prepared, recipe, seeded(), matching=True)
    assert losses.flow > 0 and losses.shortcut == 0 and losses.matching == 0


def test_recipes_are_read_from_json() -> None:
    recipe = MutualRecipe.from_dict({"steps": [4], "history": {"real": [1, 1], "rollout": [0, 0]}})
    assert recipe.steps == (4,) and recipe.history.real == (1, 1)
    with pytest.raises(TypeError, match="shortcat"):
        MutualRecipe.from_dict({"shortcat": 1.0})
