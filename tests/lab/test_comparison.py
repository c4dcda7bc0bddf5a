"""lab.training.comparison: every method of configs/methods.json is trained and shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from mutual_forcing.lab.metrics.candidates import candidate_of
from mutual_forcing.lab.training import comparison
from mutual_forcing.lab.training.omniforcing import CHAIN
from mutual_forcing.lab.training.train import CONFIGS

METHODS = list(json.loads((CONFIGS / "methods.json").read_text()))


def test_every_method_has_rows_that_can_be_read() -> None:
    for method in (*METHODS, comparison.OMNIFORCING):
        for row in comparison.rows_of(method):
            assert candidate_of(row).name == method
    known = {*METHODS, comparison.OMNIFORCING}
    assert set(comparison.RIVALS) < known and set(comparison.ROWS) < known


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def launch(module: str, *args: object) -> None:
        words = tuple(map(str, args))
        calls.append((module, *words))
        out = Path(words[words.index("--out") + 1])
        if module == "lab.training.ship":
            out.parent.mkdir(exist_ok=True)
            out.touch()
        runs = {"lab.training.train": [out]}
        runs["lab.training.omniforcing"] = [out / stage for stage in CHAIN]
        for run in runs.get(module, []):
            run.mkdir(parents=True)
            line = {"step": 10, "seconds": 5.0, "peak MB": 100}
            stage = run.name if module == "lab.training.omniforcing" else "mutual"
            record = {"stage": stage, "method": "mutual", "mutual": {"matching_every": 3}}
            (run / "log.jsonl").write_text(json.dumps(line) + "\n")
            (run / "config.json").write_text(json.dumps(record))

    monkeypatch.setattr(comparison, "launched", launch)
    return calls


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    words = ["comparison", "--init", "joint", "--latents", "a", "b", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", words)
    return comparison.main()


def _after(call: tuple[str, ...], option: str) -> str:
    return call[call.index(option) + 1]


def test_teacher_comes_before_the_rival_and_nothing_is_done_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: list[tuple[str, ...]]
) -> None:
    _run(monkeypatch, tmp_path, "--minutes", "7")
    trained = [call for call in launched if call[0] == "lab.training.train"]
    outs = [Path(_after(call, "--out")).name for call in trained]
    assert sorted(outs) == sorted([*(f"{method}_0" for method in METHODS), "bidirectional"])
    assert outs[0] == "bidirectional"
    rival = trained[outs.index("dmd_self_forcing_0")]
    assert _after(rival, "--teacher") == str(tmp_path / "bidirectional")
    # The same weights to start from, data, seed and budget for all.
    for option in ("--init", "--latents", "--seed", "--config", "--minutes"):
        assert len({_after(call, option) for call in trained}) == 1
    launched.clear()
    _run(monkeypatch, tmp_path, "--minutes", "7")
    assert [call[0] for call in launched] == ["lab.metrics.compare", "lab.metrics.horizon"]


def test_a_few_methods_alone_are_not_held_to_claims(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: list[tuple[str, ...]]
) -> None:
    _run(monkeypatch, tmp_path, "--methods", "shortcut_only", "dmd_only", "--minutes", "7")
    compare = next(call for call in launched if call[0] == "lab.metrics.compare")
    assert "--claims" not in compare and "shortcut_only:few:4" in compare
    launched.clear()
    # By steps, of which this config has none.
    assert _run(monkeypatch, tmp_path / "other") == 2 and not launched


def test_three_stages_and_three_trainings_beside_held_out_combinations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: list[tuple[str, ...]]
) -> None:
    found = {"syllables": 0.5, "switched": 0.75, "kept": 1.0}
    monkeypatch.setattr(comparison, "steered", lambda *_: found)
    monkeypatch.setattr(comparison.train, "untaught", lambda init, config, out: out)
    config = str(CONFIGS / "omniforcing.json")
    more = ["--config", config, "--methods", "mutual", "omniforcing", "--trainings", "2"]
    _run(monkeypatch, tmp_path, *more, "--seed", "4")
    trained = [Path(_after(call, "--out")).name for call in launched if ".training." in call[0]]
    # Those with a teacher take longest.
    longest_first = ["omniforcing_4", "omniforcing_5", "mutual_4", "mutual_5"]
    assert trained[:5] == ["bidirectional", *longest_first]
    for call in launched[1:5]:
        assert _after(call, "--init") == str(tmp_path / "init")
        own = call[0] == "lab.training.omniforcing"
        assert own == ("--teacher" in call) != ("--steps" in call)
    quality, held_out = (call for call in launched if call[0] == "lab.metrics.compare")
    files = ",".join(f"{tmp_path}/models/omniforcing_{seed}.safetensors" for seed in (4, 5))
    assert f"omniforcing={files}" in quality and "omniforcing:few:4:renoise" in quality
    assert (
        "--combinations" not in quality and _after(held_out, "--combinations") == "ball,red,green"
    )
    cost = json.loads((tmp_path / "cost.json").read_text())["rows"]
    updates = {name: [one["updates"] for one in ones] for name, ones in cost.items()}
    assert updates == {
        "the teacher, once for all": [10],
        "mutual": [10, 10],
        "omniforcing: bidirectional_dmd": [4, 4],
        "omniforcing: causal_ode": [10, 10],
        "omniforcing: self_forcing": [4, 4],
    }
    assert "| 0.500 ± 0.000 |" in (tmp_path / "steered" / "table.md").read_text()
