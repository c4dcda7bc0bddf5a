"""What every command does alike: paths that cannot be written, terminals that break, signals."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mutual_forcing import shell

ROOT = Path(__file__).resolve().parents[1]


def refused(outputs: dict[str, Path], inputs: dict[str, Path] | None = None) -> str:
    with pytest.raises(ValueError, match=r"choose|expected") as caught:
        shell.check_outputs(outputs, inputs or {})
    return str(caught.value)


def test_one_output_destroys_no_input_and_no_other_output(tmp_path: Path) -> None:
    model, link = tmp_path / "model", tmp_path / "link"
    model.write_bytes(b"model")
    link.symlink_to(model)
    hard = tmp_path / "hard"
    os.link(model, hard)
    for path in (model, link, hard, tmp_path / "x" / ".." / "model"):
        assert "--out and --model are both" in refused({"--out": path}, {"--model": model})
    new = tmp_path / "new"
    assert "both" in refused({"--output": new, "--state-out": new})
    assert "lies under the file" in refused({"--output": new, "--state-out": new / "state"})
    # A stream that goes on in place is what people want.
    shell.check_outputs({"--state-out": model}, {"--state-in": model})
    assert model.read_bytes() == b"model"


def test_what_cannot_be_written_is_known_and_nothing_is_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    before = set(tmp_path.rglob("*"))
    long = tmp_path / ("x" * 256), tmp_path / ("y" * 300) / "z"
    for path in (circle, circle / "under", tmp_path, file / "under", *long):
        message = refused({"--out": path})
        assert message.startswith("--out") and len(message) < 250
    if Path("/dev/null").is_char_device():
        for path in ("/dev/null", "/missing/../dev/null"):
            assert "not an ordinary file" in refused({"--out": Path(path)})
    shell.check_outputs({"--out": tmp_path / "a" / "b" / "c", "--new": tmp_path / ("x" * 255)}, {})
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused({"--out": tmp_path / "x"})


def test_arguments_are_refused_in_one_printable_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = shell.Parser(prog="it")
    parser.add_argument("--threads", type=shell.threads)
    parser.add_argument("--device", type=shell.device)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=shell.Output(".mp4"))
    long = "9" * 5000
    for words in (
        *(("--threads", text) for text in ("-1", "0", "100000", "x", long)),
        *(("--device", text) for text in ("foo", "", "cuda:-1", "cuda:99", "meta", "x" * 300)),
        ("--seed", "\x1b[31m"),
        ("--seed", long),
        ("--out", str(tmp_path / "x.webm")),
        ("--what",),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("it: ") and error.count("\n") == 1
        assert len(error) < 500 and "\x1b" not in error
    assert parser.parse_args(["--threads", "1", "--device", "cpu"]) == argparse.Namespace(
        threads=1, device="cpu", seed=None, out=None
    )


class Broken:
    """A terminal that is gone."""

    def write(self, *text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = fileno = write


@pytest.mark.parametrize("terminal", [Broken(), None])
def test_a_broken_terminal_costs_nothing(
    terminal: Broken | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    with shell.progress(total=3) as bar:
        for _ in range(3):
            bar.set_description("x")
            bar.update(1)
            bar.refresh()
    shell.tell("text", sys.stderr)


@pytest.mark.parametrize(
    "redirection", ["2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | head -0"]
)
def test_the_exit_status_is_that_of_the_work(redirection: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launch; launch.register();"
        "from mutual_forcing import shell; shell.hold_standard_streams(); import os;"
        "file = os.open(os.devnull, os.O_RDONLY); assert file > 2;"
        "bar = shell.progress(range(3), mininterval=0); list(bar);"
        "shell.tell('done\\n', sys.stdout); shell.tell('done\\n', sys.stderr); sys.exit(5)"
    )
    command = f"set -o pipefail; {sys.executable} -c {program!r} {redirection}"
    assert subprocess.run(["bash", "-c", command], check=False, timeout=120).returncode == 5


def test_signals_are_noted_and_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with shell.stoppable() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # some programs send both, at once
        assert stop and stop.name == "SIGTERM" and stop.status == 143
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(shell.time, "monotonic", lambda: next(times))
    with shell.stoppable() as stop:
        stop.note(signal.SIGINT, None)
        stop.note(signal.SIGINT, None)  # the same one, sent twice
        assert stop.name == "Ctrl-C" and stop.status == 130
        with pytest.raises(KeyboardInterrupt):
            stop.note(signal.SIGINT, None)
