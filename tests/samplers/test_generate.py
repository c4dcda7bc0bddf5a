"""The command: a prompt in, a clip out, and every way to stop or fail keeps what was made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import av
import pytest
import torch
from mutual_forcing.networks.layout import PAPER_LAYOUT
from mutual_forcing.samplers import clip_writer
from mutual_forcing.samplers import rollout as engine
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.schedule import written
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.samplers.test_clip_writer import playable
from mutual_forcing.tests.tiny import save_tiny
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    model = save_tiny(tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, prompt: str = "a red ball") -> int:
        return generate.main(
            [prompt, "--model", str(model), "--steps", "2", "--mode", "few", *words]
        )

    return call


def test_a_prompt_becomes_a_clip(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--seconds", "3", "-o", "out/a.mp4", "--contact-sheet", "sheet.png")
    assert run(*words, "--state-out", "s.state") == 0
    out = capsys.readouterr().out
    assert "out/a.mp4: 3.04 s of video with sound" in out
    assert "first chunk" in out and "times real time" in out and "after 4 blocks" in out
    assert playable(tmp_path / "out/a.mp4")[0] == 73
    assert load_state(tmp_path / "s.state").next_block == 4
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 600


def test_a_schedule_is_followed_and_lies_in_clip_and_stream(
    generate: ModuleType,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ("--model", str(tmp_path / "model.safetensors"), "--steps", "1", "--mode", "few")

    def plain(*words: str) -> int:
        return generate.main([*words, *model])

    story = "0: red ball\n1.5 reread 1: bell\n"
    (tmp_path / "story.txt").write_text(story)
    made = ("--seconds", "3", "--state-out", "s.state")
    assert plain("--schedule", "story.txt", *made) == 0
    state = load_state(tmp_path / "s.state")
    assert written(state.schedule) == story
    with av.open("clip.mp4") as file:
        assert file.metadata[clip_writer.SCHEDULE].strip() == story.strip()
    # A stream goes on with its last prompt, unless it is given another.
    assert plain("--state-in", "s.state", "--seconds", "1", "--state-out", "t.state") == 0
    assert load_state(tmp_path / "t.state").schedule == state.schedule
    for words, message in {
        ("--schedule", "none.txt"): "'none.txt', which is no file",
        ("--schedule", "0: red\n5 bell"): "line 2 of the schedule is '5 bell'",
        ("--schedule", "0: red\n5: xyzzy"): "line 2: the prompt 'xyzzy' has no word",
        (): "found no prompt",
        ("red", "--schedule", story): "found a prompt and a schedule",
    }.items():
        assert plain(*words) == 2
        assert message in capsys.readouterr().err


def test_going_on_from_a_saved_stream_is_the_same_clip(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--seconds", "4", "--seed", "5", "--state-out", "whole.state") == 0
    # Another execution path is the same clip.
    first = ("--seconds", "2", "--seed", "5", "--state-out", "first.state")
    assert run(*first, "--path", "streams") == 0
    words = ("--seconds", "2", "-o", "then.mp4", "--state-in", "first.state")
    assert run(*words, "--state-out", "both.state") == 0
    whole, both = load_state(tmp_path / "whole.state"), load_state(tmp_path / "both.state")
    assert len(whole.latents) == len(both.latents) == 5
    assert all(
        torch.equal(a.video, b.video) for a, b in zip(whole.latents, both.latents, strict=True)
    )
    assert playable(tmp_path / "then.mp4")[0] == 48
    assert run(*words, "--seed", "6", "--state-out", "fork.state") == 0
    fork = load_state(tmp_path / "fork.state")
    assert torch.equal(fork.latents[2].video, whole.latents[2].video)
    assert not torch.equal(fork.latents[3].video, whole.latents[3].video)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_what_was_made_is_kept_when_a_signal_stops_it(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    name: str,
) -> None:
    plain, before = engine.OpenBlock.velocity, signal.getsignal(number)
    passes = []

    def velocity(self: engine.OpenBlock, *arguments: object) -> object:
        passes.append(1)
        if len(passes) == 7:  # the first step of block 3
            os.kill(os.getpid(), number)
        return plain(self, *arguments)

    monkeypatch.setattr(engine.OpenBlock, "velocity", velocity)
    words = ("--seconds", "9", "--contact-sheet", "sheet.png", "--state-out", "s.state")
    assert run(*words) == 128 + number
    captured = capsys.readouterr()
    assert f"stopped by {name}; what was finished is kept" in captured.err
    assert "clip.mp4: 2.04 s" in captured.out and len(passes) == 7
    assert playable(tmp_path / "clip.mp4")[0] == 49
    assert load_state(tmp_path / "s.state").next_block == 3
    assert (tmp_path / "sheet.png").exists() and signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_kill_9_leaves_a_whole_state_and_a_clip_that_plays(tmp_path: Path, blocks: int) -> None:
    model, state = save_tiny(tmp_path / "model.safetensors"), tmp_path / "s.state"
    words = ["--model", model, "--steps", "2", "--seconds", "3600", "--state-out", state]
    command = [sys.executable, ROOT / "generate.py", "a red ball", *words]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while not state.exists() or load_state(state).next_block < blocks:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    made = load_state(state).next_block
    frames, samples = playable(tmp_path / "clip.mp4")
    clock = Clock(PAPER_LAYOUT)
    assert made >= blocks
    assert frames >= max(1, clock.frames(made) - 24)
    assert samples >= max(160, clock.samples(made) - 16000)
    # Its lock went with it.
    words = ["--model", model, "--steps", "2", "--seconds", "1", "--state-in", state]
    subprocess.run(list(map(str, [*command[:3], *words])), cwd=tmp_path, check=True)
    assert playable(tmp_path / "clip.mp4")[0] == 24


def test_the_state_is_saved_all_along(
    generate: ModuleType, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(x / 2 for x in range(100_000))
    saved = []
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(generate, "save_state", lambda path, state: saved.append(state.next_block))
    assert run("--seconds", "6", "--state-out", "s.state") == 0
    assert saved[0] == 1 and max(b - a for a, b in pairwise(saved)) <= 3 and saved[-1] == 7


def test_the_stream_that_is_gone_on_from_stays_whole_until_the_end(
    generate: ModuleType,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tmp_path / "s.state"
    assert run("--seconds", "2", "--state-out", "s.state") == 0
    before, plain, along = state.read_bytes(), generate.save_state, []

    def save(path: Path, value: StreamState) -> None:
        along.append((path.name, state.read_bytes() == before))
        plain(path, value)

    monkeypatch.setattr(generate, "SAVED_EVERY", 0)
    monkeypatch.setattr(generate, "save_state", save)
    assert run("--seconds", "2", "--state-in", "s.state", "--state-out", "s.state") == 0
    assert along == [("s.unfinished.state", True)] * 2 + [("s.state", True)]
    assert load_state(state).next_block == 5 and load_state(state).dropped == 0
    assert not (tmp_path / "s.unfinished.state").exists()


def test_a_full_disk_is_told_and_the_rest_is_kept(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, room = clip_writer._File.write, [40_000]

    def write(self: clip_writer._File, data: bytes) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            self.error = OSError(28, "No space left on device")
            raise self.error
        return plain(self, data)

    monkeypatch.setattr(clip_writer._File, "write", write)
    assert run("--seconds", "8", "--state-out", "s.state") == 1
    captured = capsys.readouterr()
    assert "the disk is full: the clip" in captured.err and "Traceback" not in captured.err
    assert load_state(tmp_path / "s.state").next_block >= 2


def test_nan_is_named_and_the_blocks_before_are_kept(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = engine.noise_of

    def noise_of(seeds: tuple[int, ...]) -> Callable[..., torch.Tensor]:
        source = plain(seeds)
        return lambda block, *rest: source(block, *rest) * (torch.nan if block == 2 else 1)

    monkeypatch.setattr(engine, "noise_of", noise_of)
    assert run("--seconds", "5") == 1
    assert "block 2 has NaN" in capsys.readouterr().err
    assert playable(tmp_path / "clip.mp4")[0] == 25


def test_mistakes_are_told_before_any_work(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "clip.mp4").write_bytes(b"an older clip")
    assert run("--seconds", "1", "-o", "x.mp4", "--state-out", "s.state") == 0
    capsys.readouterr()
    for words, message in {
        ("--seconds", "0"): "length is 0.0 seconds",
        ("--seconds", "nan"): "length is nan seconds",
        ("--steps", "99"): "asked for 99 steps, expected 1 to 40",
        ("--guidance", "3"): "found guidance 3 for few-step mode",
        ("--seed", str(10**25)): "a seed is 10000000000000000000000000, expected",
        ("--window", "0"): "window is 0",
        ("--path", "fast"): "execution path is 'fast'",
        ("--path", "graph"): "--path graph: graphs are CUDA's",
        ("--device", "cuda"): "this machine has no CUDA GPU",
        ("--model", "no.safetensors"): "model file no.safetensors is not there",
        ("-o", "clip.webm"): "expected a name that ends in .mp4",
        ("--contact-sheet", "sheet.gif"): "expected a name that ends in .png",
        ("--state-out", "."): "is a folder",
        ("--state-in", "no.state"): "stream state no.state is not there",
        ("--state-in", "model.safetensors"): "not a stream state",
        ("--state-in", "s.state", "--window", "3"): "leave it out",
        ("--seconds", "1e300"): "expected at most 86400",
        ("--seconds", "x"): "invalid float value",
        ("--mode", "multi", "--steps", str(10**12)): "expected 1 to 1000",
        ("--mode", "multi", "--guidance", "inf"): "guidance is inf",
        ("--threads", "-1"): "expected a whole number from 1 to",
        ("--device", "mps:7"): "leave it out to run on the CPU",
        ("--device", ""): "expected cpu, cuda",
        ("--model", "m" * 300): "File name too long",
        ("--state-in", "n" * 300): "File name too long",
        ("--state-out", "model.safetensors"): "--state-out and --model are both",
        ("-o", "s.mp4", "--state-out", "s.mp4"): "are both s.mp4",
        ("--state-out", "clip.mp4/state"): "cannot be written (Not a directory)",
        ("--state-out", "o" * 256): "cannot be written (File name too long)",
    }.items():
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert run(prompt=" ") == 2 and "the prompt is empty" in capsys.readouterr().err
    assert run(prompt="xyz") == 2 and "no word that this model knows" in capsys.readouterr().err
    other = save_tiny(tmp_path / "other.safetensors", seed=1)
    assert run("--state-in", "s.state", "--model", str(other)) == 2
    assert "load the model that made it" in capsys.readouterr().err
    assert (tmp_path / "clip.mp4").read_bytes() == b"an older clip"


def test_the_script_explains_itself(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for word in ("--seconds", "--mode", "--guidance", "--window", "--state-in", "examples:"):
        assert word in result.stdout
