"""The codecs' recipes: zero loss for the right answer; a run that was cut off goes on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.lab.training import audio_codec, video_codec
from mutual_forcing.lab.training.audio_codec import (
    CROP_FRAMES,
    HOP,
    AudioPool,
    AudioRecipe,
    load_pool,
)
from mutual_forcing.lab.training.audio_losses import (
    band_loudness_loss,
    loudness_loss,
    pitch_loss,
    spectral_loss,
)
from mutual_forcing.lab.training.codec import Run
from mutual_forcing.lab.training.latents import load_codec
from mutual_forcing.networks.audio_codec import AudioCodec, AudioCodecConfig
from mutual_forcing.networks.video_codec import VideoCodec, VideoCodecConfig
from safetensors.torch import save_file

TINY = AudioCodecConfig(latent_channels=4, channels=8, encoder_dilations=(1,), pitch_features=12)


@pytest.fixture(scope="module")
def pool() -> AudioPool:
    rng = np.random.default_rng(0)
    n = np.arange(CROP_FRAMES * HOP)
    f0 = rng.uniform(100, 400, 3)
    sound = 8000 * np.sin(2 * np.pi * f0[:, None] * n / 16000)
    pitch = np.repeat(f0[:, None], CROP_FRAMES, axis=1).astype(np.float32)
    return AudioPool(sound.astype(np.int16), pitch, np.array(["bell", "speech", "ball"]))


def test_losses_vanish_for_the_right_answer_only() -> None:
    wave = 0.1 * torch.randn(2, 3200)
    for loss in (spectral_loss, loudness_loss, band_loudness_loss):
        assert float(loss(wave, wave)) == pytest.approx(0, abs=1e-6)
        assert float(loss(0.5 * wave, wave)) > 0.1
    grid = torch.linspace(4, 7, 128)
    true = torch.full((1, 5), 220.0)
    right = -0.5 * ((grid - true.log()[..., None]) / (grid[1] - grid[0])).square()
    weight = torch.ones(1, 5)
    assert float(pitch_loss(right, true.log(), true, weight, grid)) == pytest.approx(0, abs=1e-3)
    assert float(pitch_loss(right.roll(20, -1), true.log() + 0.5, true, weight, grid)) > 1
    silent = torch.zeros(1, 5)
    assert float(pitch_loss(right.roll(20, -1), true.log() + 0.5, silent, weight, grid)) == 0


def _audio(pool: AudioPool) -> tuple[AudioCodec, AudioRecipe]:
    return AudioCodec(TINY), AudioRecipe(pool, 1e-3, batch=2)


def _video(fixed_encoder: bool = False) -> tuple[VideoCodec, video_codec.VideoRecipe]:
    clips = np.random.default_rng(0).integers(0, 255, (3, 49, 64, 64, 3), np.uint8)
    codec = VideoCodec(VideoCodecConfig(4, 8, 8, 8))
    codec.encoder.requires_grad_(not fixed_encoder)
    return codec, video_codec.VideoRecipe(clips, 5e-4, bf16=False, fixed_encoder=fixed_encoder)


@pytest.mark.parametrize("kind", ["audio_codec", "video_codec"])
def test_a_run_that_was_cut_off_goes_on(kind: str, pool: AudioPool, tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path / "codec", minutes=1.0, steps=2, lr=1e-3, seed=0)

    def run() -> Run:
        torch.manual_seed(0)
        return Run(*(_audio(pool) if kind == "audio_codec" else _video()), args)

    one = run()
    one.train()
    assert one.steps == 2 and one.progress == 1
    other = run()
    assert other.steps == 2 and other.seconds == one.seconds
    one.rng = np.random.default_rng([0, 2])
    for each in (one, other):
        torch.manual_seed(1)
        assert all(np.isfinite(value) for value in each.step().values())
    for average, weights in zip(one.weights.average, other.weights.average, strict=True):
        assert torch.equal(average, weights)
    for name, value in one.codec.state_dict().items():
        assert torch.equal(value, other.codec.state_dict()[name]), name
    loaded = load_codec(args.out, kind)
    assert loaded.config == one.codec.config
    # The statistics are those of the weights that were saved.
    raw = one.recipe.raw_latents(loaded)
    assert torch.allclose(loaded.latent_mean, raw.mean(0), atol=1e-5)
    assert torch.allclose(loaded.latent_std, raw.std(0).clamp_min(0.1), atol=1e-5)
    with pytest.raises(ValueError, match="found a run of"):
        Run(AudioCodec(AudioCodecConfig(channels=16)), AudioRecipe(pool, 0.0, 2), args)
    one.resume_path.write_bytes(b"safetensors of yesterday")
    with pytest.raises(ValueError, match="no resume file of today"):
        run()


def test_what_is_fixed_stays_as_it_is(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path / "codec", minutes=1.0, steps=1, lr=1e-3, seed=0)
    codec, recipe = _video(fixed_encoder=True)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    Run(codec, recipe, args).train()
    after = load_codec(args.out, "video_codec").state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("decoder" not in name), name


def test_both_recipes_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (audio_codec, video_codec):
        out = tmp_path / module.__name__
        options = ["--out", str(out), "--steps", "1", "--clips", "2"]
        options += ["--no-bf16"] if module is video_codec else ["--batch", "2"]
        monkeypatch.setattr(sys, "argv", ["", *options])
        module.main()
        assert load_codec(out, module.__name__.rpartition(".")[2]).latent_std.min() >= 0.1


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="no config of a audio_codec"):
        load_codec(path, "audio_codec")


def test_the_pool_is_rendered_once_and_tells_the_true_pitch(tmp_path: Path) -> None:
    base = tmp_path / "pool"
    pool = load_pool(base, clips=4, seconds=1, seed=3)
    before = (tmp_path / "pool.sound.npy").stat().st_mtime_ns
    again = load_pool(base, clips=4, seconds=1, seed=3)
    assert (tmp_path / "pool.sound.npy").stat().st_mtime_ns == before
    assert np.array_equal(pool.sound, again.sound) and pool.f0.shape == (4, 101)
    sound, f0 = again.crops(np.random.default_rng(0), 3, 41)
    assert sound.shape == (3, 41 * HOP) and f0.shape == (3, 41) and sound.abs().max() <= 1
    with pytest.raises(ValueError, match="at least 102"):
        again.crops(np.random.default_rng(0), 1, 102)
