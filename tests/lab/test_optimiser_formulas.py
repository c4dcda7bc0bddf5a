"""Weights, their moving average, the schedule and one step of the method, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from mutual_forcing.lab.training.adapters import AdaptedLinear, AdapterSettings
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.history import HistoryMix
from mutual_forcing.lab.training.mutual_forcing import (
    MutualRecipe,
    distribution_loss,
    flow_loss,
    prepare,
    shortcut_loss,
)
from mutual_forcing.lab.training.optimiser import MasterWeights
from mutual_forcing.lab.training.parallel import ALONE
from mutual_forcing.lab.training.stages import MutualStage, Trained
from mutual_forcing.lab.training.system import twin
from mutual_forcing.lab.training.train import learning_rate
from mutual_forcing.tests.known_network import known_system
from mutual_forcing.tests.lab.test_formulas import PROMPT, Fixed, clip
from torch import nn


class Vector(nn.Module):
    """Two numbers that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0]))


def adamw(gradients: list[tuple[float, float]], rates: list[float]) -> list[float]:
    """AdamW (arXiv 1711.05101) with betas 0.9 and 0.98 and no decay, gradients cut to norm 1."""
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.hypot(*gradient)
        for i in range(2):
            g = gradient[i] / max(1.0, norm)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.98 * v[i] + 0.02 * g * g
            corrected = m[i] / (1 - 0.9**step), v[i] / (1 - 0.98**step)
            x[i] -= rate * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
    return x


def test_vectors_are_stepped_by_adamw_and_cut_to_norm_one() -> None:
    gradients, rates = [(3.0, 4.0), (0.3, -0.1), (-6.0, 8.0)], [1.0, 0.5, 0.25]
    module = Vector()
    weights = MasterWeights(module, 0.01, 0.9, dtype=torch.float32)
    for gradient, rate in zip(gradients, rates, strict=True):
        module.x.grad = torch.tensor(gradient)
        norm = weights.step(rate)
        assert norm.item() == pytest.approx(math.hypot(*gradient))
    expected = adamw(gradients, [0.01 * rate for rate in rates])
    assert module.x.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_moving_average_forgets_by_its_decay_in_every_step() -> None:
    """After n steps: 0.9^n of the first weights and 0.1 * 0.9^(n-i) of those after step i."""
    module = Vector()
    weights = MasterWeights(module, 0.1, 0.9, dtype=torch.float32)
    seen = [module.x.detach().clone()]
    for step in range(4):
        module.x.grad = torch.tensor([1.0, float(step)])
        weights.step(1.0)
        seen.append(module.x.detach().clone())
    expected = 0.9**4 * seen[0] + sum(0.1 * 0.9 ** (4 - i) * seen[i] for i in range(1, 5))
    assert torch.allclose(weights.averaged()["x"], expected, atol=1e-6)
    other = Vector()
    weights.write_average(other)
    assert torch.allclose(other.x, expected, atol=1e-6)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    assert learning_rate(0, 4, 0.0) == pytest.approx(0.25)
    assert learning_rate(3, 4, 0.0) == learning_rate(9, 4, 0.0) == 1.0
    assert learning_rate(9, 4, 0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert learning_rate(9, 4, 0.5) == pytest.approx(0.5)
    assert learning_rate(9, 4, 1.0) == learning_rate(9, 4, 2.0) == pytest.approx(0.0)


def test_an_adapter_adds_its_share_of_two_products() -> None:
    """y = W x + (alpha / rank) up(down(x)): 3 x + 6 / 2 * (2 * x) for the numbers here."""
    base = nn.Linear(1, 1, bias=False)
    adapted = AdaptedLinear(base, AdapterSettings(rank=2, alpha=6.0, modules=""))
    with torch.no_grad():
        base.weight.fill_(3.0)
        adapted.down.copy_(torch.tensor([[1.0], [0.5]]))
        adapted.up.copy_(torch.tensor([[1.0, 2.0]]))
    assert adapted(torch.tensor([[10.0]])).item() == pytest.approx(30 + 3 * 20)
    assert adapted.merged().item() == pytest.approx(3 + 3 * 2)
    fresh = AdaptedLinear(nn.Linear(4, 3), AdapterSettings(rank=2, alpha=6.0, modules=""))
    x = torch.ones(1, 4)
    assert torch.equal(fresh(x), fresh.base(x))


RECIPE = MutualRecipe(
    flow=2.0,
    shortcut=0.5,
    matching=0.25,
    steps=(4,),
    matching_every=2,
    fake_updates=3,
    fake_warmup=0,
    caption_dropout=0.0,
    window=2,
    history=HistoryMix((0.0, 0.0), (0.0, 0.0)),
)


def test_one_step_of_the_method() -> None:
    """Weighted losses in one gradient; then average and fake score follow."""
    clean = clip()
    batch = Batch(clean.video, clean.audio, PROMPT)
    system = known_system(empty=0.5)
    teacher = fake = twin(system)
    apart = known_system(empty=0.5)
    shown, taught = prepare(apart, batch, RECIPE, 0.5, Fixed())
    loss = (
        2.0 * flow_loss(apart, shown, RECIPE, Fixed())
        + 0.5 * shortcut_loss(apart, teacher, taught, RECIPE)
        + 0.25 * distribution_loss(apart, teacher, fake, taught, RECIPE).loss
    )
    loss.backward()
    squares = [p.grad.square().sum() for p in apart.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt().item()

    trained = Trained(1e-3, 0.9, torch.float64, ALONE)
    stage = MutualStage(system, trained, RECIPE, fake_rate=1e-3)
    before = system.transformer.proj_out.bias.detach().clone()
    logged = stage.step(batch, Fixed(), 0, 0.5, 1.0)
    assert logged["gradient"].item() == pytest.approx(norm, rel=1e-3)
    after = system.transformer.proj_out.bias.detach()
    assert not torch.equal(before, after)
    found = stage.teacher.transformer.proj_out.bias
    assert torch.allclose(found, 0.9 * before + 0.1 * after, atol=1e-9)
    assert all(not p.requires_grad for p in stage.teacher.parameters())
    steps = {
        state["step"].item()
        for optimiser, _ in stage.fake_weights.optimisers
        for state in optimiser.state.values()
        if "step" in state
    }
    assert steps == {3}
    assert {"flow", "shortcut", "matching", "fake"} <= logged.keys()
    assert "matching" not in stage.step(batch, Fixed(), 1, 0.5, 1.0)
    assert "matching" in stage.step(batch, Fixed(), 2, 0.5, 1.0)
