"""The same numbers as the public reference, on its own fixture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders import parity
from safetensors.torch import save_file

FIXTURE = Path(__file__).parent / "data" / "ltx2_causal_golden.safetensors"
NAMES = [
    f"{run}.{stream}"
    for run in ("causal", "bidirectional", "rollout")
    for stream in ("video", "audio")
]


def test_every_quantity_is_within_the_limit(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["parity", str(FIXTURE)])
    assert parity.main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == NAMES
    assert all(float(error) < 1e-4 for _, error in lines)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, config: tensors["model.proj_out.bias"].add_(0.5),
        lambda tensors, config: config.update(rope_type="split"),
        lambda tensors, config: config.update(av_ca_timestep_scale_multiplier=1000.0),
    ],
)
def test_another_model_is_noticed(tmp_path: Path, monkeypatch, damage) -> None:
    golden = parity.Golden(FIXTURE)
    config = dict(golden.raw)
    damage(golden.tensors, config)
    tensors = {key: value.contiguous() for key, value in golden.tensors.items()}
    save_file(
        tensors, tmp_path / "other.safetensors", {"config": json.dumps({"transformer": config})}
    )
    monkeypatch.setattr(sys, "argv", ["parity", str(tmp_path / "other.safetensors")])
    assert parity.main() == 1


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_file_that_is_no_fixture_is_named(tmp_path: Path, monkeypatch, capsys, content) -> None:
    path = tmp_path / "bad.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["parity", str(path)])
    assert parity.main() == 2
    assert "bad.safetensors" in capsys.readouterr().err
