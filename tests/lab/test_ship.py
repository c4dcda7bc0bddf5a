"""lab.training.ship: a run becomes a model file, alone or as the mean of two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from mutual_forcing.lab.training import ship
from mutual_forcing.lab.training.system import System
from mutual_forcing.model_loaders.bundle import load_bundle
from mutual_forcing.tests.tiny import TRANSFORMER, save_tiny
from mutual_forcing.tests.tiny_training import awake
from safetensors.torch import save_file

with torch.random.fork_rng(devices=[]):
    WEIGHTS = awake(System(TRANSFORMER)).state_dict()


def write_run(folder: Path, factor: float) -> Path:
    """A run folder of the tiny network, all weights times `factor`."""
    folder.mkdir()
    weights = {name: value * factor for name, value in WEIGHTS.items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps({"transformer": TRANSFORMER.to_dict()}))
    return folder


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_or_the_mean_of_two_becomes_a_model_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaged: bool
) -> None:
    codecs, out = save_tiny(tmp_path / "codecs.safetensors"), tmp_path / "out" / "m.safetensors"
    words = ["ship", "--run", write_run(tmp_path / "a", 1.0), "--codecs", codecs, codecs]
    words += ["--default-mode", "few", "--window", 2, "--out", out]
    if averaged:
        words += ["--average-with", write_run(tmp_path / "b", 2.0)]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    ship.main()
    found = load_bundle(out)
    assert (found.stream.default_mode, found.stream.window) == ("few", 2)
    factor = 1.5 if averaged else 1.0
    for part in ("transformer", "text_encoder"):
        for name, value in getattr(found, part).state_dict().items():
            # A model file holds 16 bits a weight.
            expected = factor * WEIGHTS[f"{part}.{name}"]
            assert torch.allclose(value.float(), expected, rtol=1e-2, atol=1e-3), name


def test_the_mean_of_unlike_networks_is_refused(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "a", 1.0), tmp_path / "other"
    other.mkdir()
    save_file({"transformer.x": torch.zeros(2)}, other / "weights.safetensors")
    with pytest.raises(ValueError, match="hold different networks, first at t"):
        ship.averaged(run, other)
