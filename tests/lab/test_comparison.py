"""lab.training.comparison: every method of configs/methods.json is trained and shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from mutual_forcing.lab.metrics.candidates import candidate_of
from mutual_forcing.lab.training import comparison
from mutual_forcing.lab.training.train import CONFIGS

METHODS = list(json.loads((CONFIGS / "methods.json").read_text()))


def test_every_method_has_rows_that_can_be_read() -> None:
    for method in METHODS:
        for row in comparison.rows_of(method):
            assert candidate_of(row).name == method
    assert set(comparison.RIVALS) < set(METHODS) and set(comparison.ROWS) < set(METHODS)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def launch(module: str, *args: object) -> None:
        words = tuple(map(str, args))
        calls.append((module, *words))
        out = Path(words[words.index("--out") + 1])
        (out if module == "lab.training.train" else out.parent).mkdir(parents=True, exist_ok=True)
        if module == "lab.training.ship":
            out.touch()

    monkeypatch.setattr(comparison, "launched", launch)
    return calls


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    words = ["comparison", "--init", "joint", "--latents", "a", "b", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", words)
    comparison.main()


def test_teacher_comes_before_the_rival_and_nothing_is_done_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: list[tuple[str, ...]]
) -> None:
    _run(monkeypatch, tmp_path)
    trained = [call for call in launched if call[0] == "lab.training.train"]
    outs = [Path(call[call.index("--out") + 1]).name for call in trained]
    assert sorted(outs) == sorted([*METHODS, "bidirectional"])
    assert outs.index("bidirectional") < outs.index("dmd_self_forcing")
    rival = trained[outs.index("dmd_self_forcing")]
    assert rival[rival.index("--teacher") + 1] == str(tmp_path / "bidirectional")
    # The same weights to start from, data, seed and budget for all.
    shared = {tuple(call[call.index("--init") : call.index("--out")]) for call in trained}
    assert len(shared) == 1
    launched.clear()
    _run(monkeypatch, tmp_path)
    assert [call[0] for call in launched] == ["lab.metrics.compare", "lab.metrics.horizon"]


def test_a_few_methods_alone_are_not_held_to_claims(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: list[tuple[str, ...]]
) -> None:
    _run(monkeypatch, tmp_path, "--methods", "shortcut_only", "dmd_only")
    compare = next(call for call in launched if call[0] == "lab.metrics.compare")
    assert "--claims" not in compare and "shortcut_only:few:4" in compare
