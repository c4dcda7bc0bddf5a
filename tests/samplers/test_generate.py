"""The command: a prompt in, a clip out, and every way to stop or fail keeps what was made."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mutual_forcing.launch as launch
import pytest
import torch
from mutual_forcing.samplers import clip_writer
from mutual_forcing.samplers import rollout as engine
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.samplers.test_clip_writer import playable
from mutual_forcing.tests.tiny import save_tiny
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    sys.modules.setdefault("launch", launch)  # beside the script, when it is started as one
    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_ctrl_c_keeps_what_was_made(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, before = engine.OpenBlock.velocity, signal.getsignal(signal.SIGINT)
    passes = []

    def velocity(self: engine.OpenBlock, *arguments: object) -> object:
        passes.append(1)
        if len(passes) == 7:  # the first step of block 3
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *arguments)

    monkeypatch.setattr(engine.OpenBlock, "velocity", velocity)
    words = ("--seconds", "9", "--contact-sheet", "sheet.png", "--state-out", "s.state")
    assert run(*words) == 130
    captured = capsys.readouterr()
    assert "stopped by Ctrl-C; what was finished is kept" in captured.err
    assert "clip.mp4: 2.04 s" in captured.out and len(passes) == 7
    assert playable(tmp_path / "clip.mp4")[0] == 49
    assert load_state(tmp_path / "s.state").next_block == 3
    assert (tmp_path / "sheet.png").exists() and signal.getsignal(signal.SIGINT) is before


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
        ("--guidance", "3"): "choose mode 'multi'",
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
        ("--state-in", "s.state", "--window", "3"): "leave --window out",
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
