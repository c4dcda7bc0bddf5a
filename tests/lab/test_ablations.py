"""The table of ablations: variants are the recipe with changes, and a run that is done is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.lab.metrics import shortcut
from mutual_forcing.lab.metrics.shortcut import HeldOutClips, flow_errors, shortcut_errors
from mutual_forcing.lab.training import ablations, train
from mutual_forcing.lab.training.mutual_forcing import MutualRecipe
from mutual_forcing.lab.training.pair import Pair
from mutual_forcing.lab.training.system import System
from mutual_forcing.tests.tiny_training import CONFIG, SETTINGS, awake, batch, run, write_latents


def test_every_variant_is_a_recipe_that_differs_in_what_it_names() -> None:
    changes = json.loads(ablations.VARIANTS.read_text())
    settings = train.read_settings(train.CONFIGS / "steered.json", "mutual", "mutual")
    recipes = {}
    for name in changes:
        made = ablations.merged(settings, changes[name])
        values = dict(made["mutual"])
        del values["fake_learning_rate"]
        rank = train.TransformerConfig.from_dict(made["transformer"]).few_step_rank
        recipes[name] = MutualRecipe.from_dict(values), rank
    assert len({repr(recipe) for recipe in recipes.values()}) == len(recipes)
    assert recipes["fully shared"] == (recipes["recipe"][0], 0)
    assert not recipes["recipe"][0].matching and recipes["DMD as well"][0].matching


def test_errors_are_those_of_known_velocities(monkeypatch: pytest.MonkeyPatch) -> None:
    made = awake(System(replace(CONFIG, few_step_rank=2)))
    data = batch()
    clean = Pair(data.video, data.audio)
    clips = HeldOutClips(clean, clean.map(torch.zeros_like), data.asked)
    # A network that moves nothing: the flow of no noise is minus the clip.
    still = clean.map(torch.zeros_like)
    monkeypatch.setattr(shortcut, "velocity", lambda *_args: still)
    for found in flow_errors(made, clips):
        assert found[0, 0] == pytest.approx(data.video[:, :, :1].square().mean().item())
        assert found[1, 1] == pytest.approx(data.audio[:, 1:26].square().mean().item())
    target = Pair(still.video + 2, still.audio - 3)
    monkeypatch.setattr(shortcut, "shortcut_target", lambda *_args: target)
    for found in shortcut_errors(made, clips, 2.0, 4):
        assert torch.allclose(found, torch.tensor([[4.0, 9.0]]).expand(3, 2))


def test_a_run_is_measured_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    write_latents(folder, batch())
    settings = SETTINGS | {"transformer": SETTINGS["transformer"] | {"few_step_rank": 2}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    made = run(folder, "out", "--steps", "2", stage="mutual")
    made.train()
    system = shortcut.open_run(tmp_path / "out")
    clips = HeldOutClips.read([folder], system.transformer.config, 2)
    found = torch.stack(shortcut_errors(system, clips, 3.0, 2))
    assert found.shape == (2, 2, 2) and torch.isfinite(found).all()
    kept = train.starting_weights(tmp_path / "out")
    assert all(torch.equal(system.state_dict()[name], value) for name, value in kept.items())
