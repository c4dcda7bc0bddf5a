"""In ComfyUI's Python (inside_comfyui_ltx2.py): films to a checkpoint, killed twice on the way.

The models are what shrunken_ltx2.py wrote; of two more, trained.safetensors (Mutual Forcing) and
omniforcing.safetensors in diffusion_models, the loader node makes clips (test_comfyui_ltx2).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from mutual_forcing.host.encoders import LTX2Encoders, model_file
from mutual_forcing.lab.training import adapters, ltx2_latents, omniforcing, train
from mutual_forcing.tests import shrunken_gemma  # noqa: F401 - makes Gemma as small as its file

BASE = "checkpoints/ltx-2-19b-dev-fp8.safetensors"
GEMMA = "text_encoders/gemma_3_12B_it_fp4_mixed.safetensors"
CAPTIONS = "waves roll onto a quiet shore", "a smith strikes a glowing blade"
WIDTH, HEIGHT, SECONDS = 96, 64, 2


def film(path: Path, caption: str, seconds: float, *, sound: bool = True) -> None:
    """Noise that gets brighter, a tone in the left ear alone, and the caption beside it."""
    generator = np.random.default_rng(0)
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width, video.height = 128, 96
        if sound:
            audio = out.add_stream("pcm_s16le", rate=16000, layout="stereo")
        for index in range(round(24 * seconds)):
            picture = generator.integers(0, 100 + index, (96, 128, 3), dtype=np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(video.encode(None))
        if sound:
            tone = 9000 * np.sin(np.arange(round(16000 * seconds)) / 9)
            wave = np.stack([tone, 0 * tone], axis=1).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(wave, "s16", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    path.with_suffix(".txt").write_text(caption)


def killed(work: Callable[[], None]) -> None:
    """Do it in a process that must not live to its end."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def at_call(number: int, function: Callable) -> Callable:
    """The function, whose process is killed at a later call."""
    calls = []

    def wrapped(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return wrapped


def films_to_latents(models: Path, folder: Path) -> Path:
    """Encoded in one go and with a kill: the same bytes."""
    films = folder / "films"
    films.mkdir(parents=True)
    film(films / "a.mov", CAPTIONS[0], 4.2)
    (films / "b.mp4").write_bytes(b"no film" * 99)
    (films / "b.txt").write_text(CAPTIONS[0])
    film(films / "c.mp4", CAPTIONS[1], 2.2, sound=False)
    film(films / "d.mp4", CAPTIONS[1], 1.0)
    base, gemma = models / BASE, models / GEMMA
    assert model_file(str(gemma), "text_encoders") == gemma
    encoders = LTX2Encoders(base, gemma)
    given = ["--source", str(films), "--base", base.name, "--text-encoder", gemma.name]
    given += ["--seconds", str(SECONDS), "--size", str(WIDTH), str(HEIGHT), "--out"]

    def encode(name: str) -> ltx2_latents.LatentFolder:
        args = ltx2_latents.parser().parse_args([*given, str(folder / name)])
        return ltx2_latents.encode_films(args, encoders)

    whole = encode("whole")
    assert [Path(name).name for name in whole.left_out] == ["b.mp4", "d.mp4"]
    assert "unreadable" in str(whole.left_out) and "too short" in str(whole.left_out)
    assert len(whole.silent) == 1 and "c.mp4, clip 1" in whole.silent[0]
    pictures = encoders.pictures
    encoders.pictures = at_call(2, pictures)
    killed(lambda: encode("broken"))
    encoders.pictures = pictures
    encode("broken")
    encode("broken")  # nothing is left to do
    for name in ("video", "audio", "captions", "empty"):
        one, other = (folder / made / f"{name}.npy" for made in ("whole", "broken"))
        assert one.read_bytes() == other.read_bytes(), name
    video, audio, captions = (np.load(folder / "whole" / f"{x}.npy") for x in ltx2_latents.ARRAYS)
    assert video.shape == (3, 128, 7, 2, 3) and audio.shape == (3, 51, 128)
    assert captions.shape == (3, 1, 1024, 2, 32) and np.isfinite(video).all()
    assert np.array_equal(captions[0], captions[1]) and not np.array_equal(captions[1], captions[2])
    # What is read of the left ear alone is not the silence of the film without sound.
    assert abs(audio[0] - audio[2]).max() > 0.1 and not np.array_equal(video[0], video[1])
    return folder / "broken"


def trained(models: Path, folder: Path, stage: str, base: Path, name: str, steps: int) -> Path:
    """The checkpoint of a run; the run is killed in its second step, if it has one."""

    def run(out: str) -> train.Run:
        given = ["--stage", stage, "--config", f"{folder}/config.json", "--base", str(base)]
        given += [
            "--latents",
            f"{folder}/broken",
            "--steps",
            str(steps),
            "--out",
            str(folder / out),
        ]
        return train.Run(train.parser().parse_args(given))

    def cut_short() -> None:
        made = run(f"{stage}_broken")
        made.advance = at_call(2, made.advance)
        made.train()

    if steps > 1:
        killed(cut_short)
    made = run(f"{stage}_broken")
    assert made.step == steps - 1
    made.train()
    if steps > 1:
        run(f"{stage}_whole").train()
        weights = (folder / f"{stage}_{way}/weights.safetensors" for way in ("whole", "broken"))
        assert len({path.read_bytes() for path in weights}) == 1
    return checkpoint(models, folder / f"{stage}_broken", base, name)


def checkpoint(models: Path, run: Path, base: Path, name: str) -> Path:
    """The checkpoint of a run."""
    path = models / "diffusion_models" / name
    args = ["--run", run, "--base", base, "--out", path]
    adapters.work(adapters.parser().parse_args([str(part) for part in args]))
    return path


def three_stages(models: Path, folder: Path) -> None:
    """OmniForcing's, killed in the second step of the first and of the last one: the same bytes."""
    full = json.loads((train.CONFIGS / "ltx2_19b_omniforcing.json").read_text())
    config = {
        "like": "config.json",
        "adapters": {stage: one | {"rank": 2} for stage, one in full["adapters"].items()},
        "stages": {stage: one | {"steps": 2} for stage, one in full["stages"].items()},
    }
    (folder / "omniforcing.json").write_text(json.dumps(config))
    base = models / BASE

    def train_all(out: str, last_step: int | None = None) -> None:
        words = ["--config", folder / "omniforcing.json", "--base", base]
        words += ["--latents", folder / "broken", "--out", folder / out]
        if last_step is not None:
            train.Run.advance = at_call(last_step, train.Run.advance)
        omniforcing.work(omniforcing.parser().parse_args([str(word) for word in words]))

    killed(lambda: train_all("stages_broken", 2))
    killed(lambda: train_all("stages_broken", 1 + 2 + 2))
    train_all("stages_broken")
    train_all("stages_whole")
    for stage in config["stages"]:
        weights = (folder / f"stages_{x}/{stage}/weights.safetensors" for x in ("whole", "broken"))
        assert len({path.read_bytes() for path in weights}) == 1, stage
    checkpoint(models, folder / "stages_broken/self_forcing", base, "omniforcing.safetensors")


def films_to_checkpoint(models: Path, folder: Path) -> None:
    """Films, latents, Mutual Forcing's stages and OmniForcing's, a checkpoint of each."""
    torch.set_num_threads(1)
    films_to_latents(models, folder)
    config = json.loads((train.CONFIGS / "ltx2_19b.json").read_text())
    lengths = [{"blocks": 2, "batch": 1, "share": 1.0}]
    recipe = {"lengths": lengths, "dtype": "float32", "warmup_steps": 1, "learning_rate": 0.01}
    for stage in config["adapters"].values():
        stage["rank"] = 2
    config |= {
        "transformer": {"num_layers": 2},
        "stream": config["stream"] | {"height": 2, "width": 3},
        "recipe": config["recipe"] | recipe,
        "mutual": config["mutual"] | {"fake_warmup": 0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    train.SAVE_SECONDS = -1
    joint = trained(models, folder, "joint", models / BASE, "joint.safetensors", steps=2)
    trained(models, folder, "mutual", joint, "trained.safetensors", steps=1)
    joint.unlink()
    three_stages(models, folder)
