"""The audio recipe: losses are zero for the right answer, a run that was cut off goes on, files
load again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.lab.training.audio_codec import CROP_FRAMES, Trainer, load_codec
from mutual_forcing.lab.training.audio_losses import (
    band_loudness_loss,
    loudness_loss,
    pitch_loss,
    spectral_loss,
)
from mutual_forcing.lab.training.audio_pool import HOP, AudioPool, load_pool
from mutual_forcing.networks.audio_codec import AudioCodecConfig
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


def test_a_run_that_was_cut_off_goes_on(pool: AudioPool, tmp_path: Path) -> None:
    out = tmp_path / "codec.safetensors"
    torch.manual_seed(0)
    trainer = Trainer(TINY, 1e-3, 60.0, 1e-3)
    rng = np.random.default_rng(0)
    parts = trainer.step(*pool.crops(rng, 2, CROP_FRAMES), rng)
    assert all(np.isfinite(value) for value in parts.values())
    trainer.save(out, pool)
    other = Trainer(TINY, 1e-3, 60.0, 1e-3)
    other.resume(out)
    for one in (trainer, other):
        torch.manual_seed(1)
        rng = np.random.default_rng(1)
        one.step(*pool.crops(rng, 2, CROP_FRAMES), rng)
    for (name, a), b in zip(
        trainer.codec.state_dict().items(), other.codec.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    loaded = load_codec(out)
    assert loaded.config == TINY
    sound, _ = pool.crops(rng, 3, CROP_FRAMES)
    assert torch.isfinite(loaded.decode(loaded.encode(sound))[0]).all()
    with pytest.raises(ValueError, match="found a run of"):
        Trainer(AudioCodecConfig(channels=16), 1e-3, 60.0, 1e-3).resume(out)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="no audio codec config"):
        load_codec(path)


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
