"""The same numbers as the public reference, on its own fixture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders import parity
from safetensors.torch import save_file

DATA = Path(__file__).parents[1] / "data"
FIXTURE, LATER = DATA / "ltx2_causal_golden.safetensors", DATA / "ltx23_golden.safetensors"


def names(*runs: str) -> list[str]:
    return [f"{run}.{stream}" for run in runs for stream in ("video", "audio")]


NAMES = names("causal", "bidirectional", "rollout")
LATER_NAMES = names(
    "bidirectional", "masked", "cached", "cached_memory", "rollout.plain", "rollout.full"
)


def lines_of(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("file", "expected"), [(FIXTURE, NAMES), (LATER, LATER_NAMES)])
@pytest.mark.parametrize(("path", "suffix"), [("eager", ""), ("lanes", "@lanes")])
def test_every_quantity_is_within_the_limit(
    path: str, suffix: str, file: Path, expected: list[str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["parity", str(file), "--path", path])
    assert parity.main() == 0
    lines = lines_of(capsys)
    assert [name for name, _ in lines] == [f"{name}{suffix}" for name in expected]
    assert all(float(error) < 1e-4 for _, error in lines)


def test_without_a_path_all_that_can_run_follow_the_plain_lines(monkeypatch, capsys) -> None:
    monkeypatch.setattr(parity, "PATHS", ("eager", "lanes", "graph"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["parity", str(FIXTURE)])
    assert parity.main() == 0
    out, err = capsys.readouterr()
    names = [line.split()[0] for line in out.splitlines()]
    assert names == NAMES + [f"{name}@lanes" for name in NAMES]
    assert "graph left out: graphs are CUDA's" in err


def test_a_path_that_was_asked_for_and_cannot_run_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for path, said in (("graph", "graphs are CUDA's"), ("fast", "execution path is 'fast'")):
        monkeypatch.setattr(sys, "argv", ["parity", str(FIXTURE), "--path", path])
        assert parity.main() == 2
        assert said in capsys.readouterr().err


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
    other = str(tmp_path / "other.safetensors")
    monkeypatch.setattr(sys, "argv", ["parity", other, "--path", "eager"])
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
