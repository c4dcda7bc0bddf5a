"""The cost of training is counted as it says: whole cycles, in turn, a process each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mutual_forcing.lab.bench import training_cost
from mutual_forcing.lab.bench.training_cost import OURS, RIVAL, TEACHER, compared, measure, row, run
from mutual_forcing.lab.training.train import read_settings
from mutual_forcing.tests.tiny_training import SETTINGS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SETTINGS))
    return path


def test_a_round_has_one_update_of_the_rivals_network_and_its_own_steps(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    build = training_cost.build

    def watched(*args: object) -> object:
        made = build(*args)
        step = made.step

        def stepped(*values: object) -> object:
            logged.append(step(*values))
            return logged[-1]

        made.step = stepped
        return made

    monkeypatch.setattr(training_cost, "build", watched)
    for name, expected in ((OURS, 2), (RIVAL, 5)):
        stage, method = training_cost.METHODS[name]
        logged.clear()
        found = measure(read_settings(config, stage, method), stage, 1, 1, 0, 1)
        # Each step of the cycle again, to count.
        assert len(found["seconds"]) == expected == (len(logged) - 1) / 2
        assert sum("matching" in step for step in logged[1:]) == 2
        assert found["GFLOP"] > 0
        assert all(seconds > 0 for seconds in found["seconds"])
        assert found["peak MB"] >= found["peak MB of the method"]


def rounds(*cycles: list[float], peak: float = 100.0) -> list[dict[str, object]]:
    common = {"processor seconds": [1.0], "peak MB": peak, "peak MB of the method": peak / 2}
    common["GFLOP"] = 1.0
    return [common | {"seconds": cycle} for cycle in cycles]


def test_ratios_are_of_means_over_whole_cycles() -> None:
    ours = row(rounds([1.0, 3.0], [2.0, 4.0]), 2)
    assert ours["seconds per step"] == ours["seconds per update of the network"] == 2.5
    assert ours["lowest and highest round"] == [2.0, 3.0]
    rival = row(rounds([5.0] * 5, peak=300.0), 1)
    assert rival["seconds per update of the network"] == 25.0
    ratios = compared({OURS: ours, RIVAL: rival, TEACHER: row(rounds([2.5] * 5), 5)})
    assert ratios["seconds per step"] == 2.0 and ratios["peak MB"] == 3.0
    assert ratios["seconds per step, its teacher trained for as many steps"] == 3.0
    assert ratios["seconds per update of the network"] == 10.0


def test_methods_take_turns_in_processes_of_their_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def finished(command: list[str]) -> str:
        asked.append(
            (command[command.index("--round") + 1], command[command.index("--method") + 1])
        )
        return json.dumps(rounds([1.0, 1.0])[0])

    monkeypatch.setattr(training_cost, "finished", finished)
    options = ["--config", str(config), "--out", str(tmp_path / "cost")]
    args = training_cost.parser().parse_args(options)
    args.given = options
    run(args)
    assert asked == [(r, name) for r in "01" for name in training_cost.METHODS]
    written = json.loads((tmp_path / "cost.json").read_text())
    assert set(written["rows"]) == set(training_cost.METHODS)
    assert written["rival over ours"]["seconds per update of the network"] == 2.0
    assert RIVAL in (tmp_path / "cost.md").read_text()


def test_what_cannot_be_measured_is_refused(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert training_cost.main(["--rounds", "0"]) == 2
    assert "--rounds is 0" in caplog.messages[-1]
    other = tmp_path / "adapters.json"
    other.write_text(json.dumps(SETTINGS | {"adapters": {"mutual": {"rank": 2}}}))
    assert training_cost.main(["--config", str(other), "--method", OURS]) == 2
    assert "lab.training.plan" in caplog.messages[-1]
