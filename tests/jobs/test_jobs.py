"""Many clips: the same bits whoever makes them and however often they are interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mutual_forcing.jobs.manifest import Manifest
from mutual_forcing.jobs.pools import InTurn, Lost, OnRay
from mutual_forcing.jobs.request import Job, read_jobs
from mutual_forcing.jobs.run import MOST_LOSSES, run
from mutual_forcing.jobs.storage import Storage
from mutual_forcing.jobs.worker import Refused, Worker
from mutual_forcing.tests.tiny import save_tiny

SCHEDULE = "0: red ball\n2 reread 2: red bell\n4 blend 2: face says low"
LONG = Job(name="long", schedule=SCHEDULE, seconds=6, seed=5, mode="few", state_out=True)
IMPOSSIBLE = Job(name="impossible", prompt="xyzzy")


class Killed(BaseException):
    """As if the process were gone."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def worker(model: Path, out: object) -> Worker:
    return Worker(model, str(out), path="eager", every=0.0)


def killed_at(second: float) -> Callable[[float, float], None]:
    def report(made: float, wanted: float) -> None:
        if made > second:
            raise Killed

    return report


def in_turn(jobs: list[Job], model: Path, out: Path) -> tuple[int, bool]:
    made = worker(model, out)
    manifest = Manifest(made.storage, jobs, made.bundle.model_id)
    return run(jobs, manifest, lambda: InTurn(made))


def files(out: Path) -> dict[str, bytes]:
    made = (path for path in out.glob("*") if path.is_file() and path.suffix != ".json")
    return {path.name: path.read_bytes() for path in made}


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken")
    assert in_turn([LONG], model, out) == (0, True)
    made = {path.name: path.read_bytes() for path in out.glob("long.*")}
    assert set(made) == {"long.mp4", "long.state"}
    return made


@pytest.mark.parametrize("damaged", [False, True])
def test_a_clip_that_was_left_twice_has_the_same_bits(
    damaged: bool, model: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    """Also where the last state that it left is cut short: the one before it serves."""
    for second in (2, 4):
        with pytest.raises(Killed):
            worker(model, tmp_path).run(LONG, killed_at(second))
        states = sorted((tmp_path / ".making" / "long").glob("state-*"))
        assert len(states) == 2 and not list(tmp_path.glob("*.mp4"))
        if damaged:
            states[-1].write_bytes(states[-1].read_bytes()[:5000])
    said = worker(model, tmp_path).run(LONG)
    assert said["went on from block"] == (3 if damaged else 4)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("long.*")} == unbroken
    assert not (tmp_path / ".making" / "long").exists()


def test_a_job_is_the_clip_that_the_shell_makes(
    generate: ModuleType, model: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    asked = ["--schedule", SCHEDULE, "--seconds", "6", "--seed", "5", "--mode", "few"]
    state = tmp_path / "one.state"
    asked += ["--path", "eager", "--state-out", str(state), "--drop-history"]
    out = ["-o", str(tmp_path / "one.mp4"), "--model", str(model)]
    assert generate.main([*asked, *out]) == 0
    assert state.read_bytes() == unbroken["long.state"]


def test_one_that_goes_on_from_a_stream_goes_on_from_its_checkpoint(
    model: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    state = tmp_path / "before.state"
    state.write_bytes(unbroken["long.state"])
    more = Job(name="more", state_in=state, seconds=3, mode="few")
    whole = worker(model, tmp_path / "a").run(more)
    with pytest.raises(Killed):
        worker(model, tmp_path / "b").run(more, killed_at(2))
    again = worker(model, tmp_path / "b").run(more)
    assert again["went on from block"] == whole["went on from block"] + 2
    clips = [(tmp_path / folder / "more.mp4").read_bytes() for folder in "ab"]
    assert clips[0] == clips[1]


def test_any_address_of_fsspec_will_do(model: Path, unbroken: dict[str, bytes]) -> None:
    out = f"memory://{uuid.uuid4().hex}/clips"
    with pytest.raises(Killed):
        worker(model, out).run(LONG, killed_at(4))
    assert worker(model, out).run(LONG)["went on from block"] == 4
    storage = Storage(out)
    for name, content in unbroken.items():
        with storage.reading(name) as path:
            assert path.read_bytes() == content
    assert storage.names(".making") == []
    with pytest.raises(ValueError, match="nowhere://x cannot be opened"):
        Storage("nowhere://x")


class Dying(OnRay):
    """Kills the worker of a job with -9 as soon as it has made a block more, twice."""

    left = 2
    before = 0.0

    def _making(self) -> dict[str, tuple[str, float, float]]:
        now = super()._making()
        name, made, _ = now.get("long", ("", 0.0, 0.0))
        if self.left and made > self.before + 1:
            self.left, self.before = self.left - 1, made
            os.kill(int(name.rpartition("/")[2]), signal.SIGKILL)
        return now


def test_workers_on_ray_that_are_killed_lose_and_double_nothing(
    model: Path, tmp_path: Path
) -> None:
    short = [Job(name=f"{n}", prompt="red ball", seconds=1, seed=n, mode="few") for n in range(10)]
    # Long enough to be met twice, however fast the machine.
    long = LONG.model_copy(update={"seconds": 20.0})
    jobs = [*short, long, IMPOSSIBLE]
    assert in_turn(jobs, model, tmp_path / "turn") == (1, True)

    out = tmp_path / "ray"
    settings = {"model": model, "address": str(out), "path": "eager", "every": 0.0}
    manifest = Manifest(Storage(str(out)), jobs, worker(model, out).bundle.model_id)
    pool = Dying(settings, None, 2)
    assert run(jobs, manifest, lambda: pool) == (1, True)
    assert not pool.left
    assert files(out) == files(tmp_path / "turn") and len(list(out.glob("*.mp4"))) == 11

    told = json.loads((out / "manifest.json").read_text())["jobs"]
    by_name = {entry["name"]: entry for entry in told}
    assert len(told) == len(by_name) == 12
    assert by_name["long"]["workers lost"] == 2 and by_name["long"]["went on from block"] > 1
    assert by_name["impossible"]["status"] == "refused"
    assert "xyzzy" in by_name["impossible"]["reason"]

    written = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert in_turn(jobs, model, out) == (1, True)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")} == written


class Losing(InTurn):
    """Its worker is gone at every job."""

    def finished(self, tell: object) -> Iterator[tuple[Job, Exception]]:
        job, self._job = self._job, None
        yield job, Lost("it is gone")


def test_a_job_that_kills_its_workers_is_given_up(model: Path, tmp_path: Path) -> None:
    made = worker(model, tmp_path)
    manifest = Manifest(made.storage, [LONG], made.bundle.model_id)
    assert run([LONG], manifest, lambda: Losing(made)) == (1, True)
    assert f"the {MOST_LOSSES + 1}th time" in manifest.entries["long"]["reason"]


def test_ctrl_c_finishes_what_is_made_and_the_next_run_the_rest(
    model: Path, tmp_path: Path
) -> None:
    jobs = [Job(name=f"{n}", prompt="red ball", seconds=2 + n, mode="few") for n in range(2)]
    made = worker(model, tmp_path)

    class Stopped(InTurn):
        def finished(self, tell: object) -> object:
            os.kill(os.getpid(), signal.SIGINT)
            return super().finished(tell)

    manifest = Manifest(made.storage, jobs, made.bundle.model_id)
    assert run(jobs, manifest, lambda: Stopped(made)) == (0, False)
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["1.mp4"]  # the longer one
    assert in_turn(jobs, model, tmp_path) == (0, True)
    assert len(list(tmp_path.glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"name": "a", "prompt": "red"}', "{"], "line 2 is no job"),
        (['{"name": "../a", "prompt": "red"}'], "line 1 is no job (name"),
        (['{"name": "a", "promt": "red"}'], "line 1 is no job (promt"),
        (['{"name": "a", "seconds": 1e300}'], "line 1 is no job (seconds"),
        (['{"name": "a", "seconds": NaN}'], "line 1 is no job (seconds"),
        (['{"name": "a"}', "", '{"name": "A"}'], "line 3 has the name 'A' again"),
        (["", ""], "has 0 jobs"),
    ],
)
def test_files_of_jobs_that_are_none(lines: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(said)):
        read_jobs(path)


def test_what_lies_there_is_not_taken_for_another_clip(model: Path, tmp_path: Path) -> None:
    job = Job(name="clip", prompt="red ball", seconds=2, mode="few")
    assert in_turn([job], model, tmp_path) == (0, True)
    other = job.model_copy(update={"prompt": "red drum"})
    with pytest.raises(ValueError, match="has a clip of another prompt"):
        in_turn([other], model, tmp_path)
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        in_turn([job], model, tmp_path)
    with pytest.raises(Refused, match="expected a prompt or a schedule"):
        worker(model, tmp_path).run(Job(name="none"))


def test_the_shell_makes_a_file_of_jobs(
    generate: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"name": "a", "prompt": "red ball", "seconds": 2, "mode": "few"}\n')
    words = ["--jobs", str(path), "--out", str(tmp_path / "clips"), "--model", str(model)]
    assert generate.main(words) == 0
    assert (tmp_path / "clips" / "a.mp4").stat().st_size > 1000
    assert generate.main([*words, "--seed", "4"]) == 2
    assert "found seed as well" in capsys.readouterr().err
