"""What the codecs are trained for, worked out by hand or by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mutual_forcing.lab.training.audio_codec import losses
from mutual_forcing.lab.training.audio_losses import (
    band_loudness_loss,
    frame_loudness,
    kl_loss,
    loudness_loss,
    magnitudes,
    pitch_loss,
    spectral_loss,
)
from mutual_forcing.lab.training.video_codec import VideoRecipe, motion_weight, reconstruction_loss

MADE, TRUE = (
    0.2 * np.random.default_rng(seed).standard_normal(6400).astype(np.float32) for seed in (1, 2)
)


def spectrogram(wave: np.ndarray, size: int) -> np.ndarray:
    """Hann windows at a quarter of their size, the ends mirrored; a sine shows its amplitude."""
    padded = np.pad(wave.astype(np.float64), size // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    starts = range(0, len(padded) - size + 1, size // 4)
    found = np.abs([np.fft.rfft(padded[s : s + size] * window) for s in starts]).T
    return np.sqrt(found**2 + 1e-9) * 4 / size


def test_a_sine_shows_its_amplitude_at_its_frequency() -> None:
    wave = 0.3 * torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 16000)[None]
    found = magnitudes(wave, 512)[0, :, 30]
    assert found.argmax().item() == 32  # 1000 Hz of 31.25 Hz a bin
    assert found.max().item() == pytest.approx(0.3, rel=1e-3)


def test_the_spectral_loss_by_numpy() -> None:
    """A quarter of the distance in log magnitude and the relative one, mean of three sizes."""
    total = 0.0
    for size in (2048, 512, 128):
        a, b = spectrogram(MADE, size), spectrogram(TRUE, size)
        logarithmic = np.abs(np.log(a + 1e-4) - np.log(b + 1e-4)).mean()
        total += 0.25 * logarithmic + np.abs(a - b).sum() / (b.sum() + 1e-6 * b.size)
    found = spectral_loss(torch.from_numpy(MADE)[None], torch.from_numpy(TRUE)[None])
    assert found.item() == pytest.approx(total / 3, rel=1e-4)


def test_loudness_is_compared_every_5_ms() -> None:
    """Sound of level 0.1 and 0.4 against silence and 0.2, 80 samples each."""

    def of(*levels: float) -> torch.Tensor:
        return torch.tensor(levels).repeat_interleave(80)[None]

    def log(level: float) -> float:
        return math.log(math.sqrt(level**2 + 1e-6) + 2e-3)

    expected = (abs(log(0.1) - log(0.0)) + abs(log(0.4) - log(0.2))) / 2
    assert loudness_loss(of(0.1, 0.4), of(0.0, 0.2)).item() == pytest.approx(expected, rel=1e-4)
    assert frame_loudness(of(0.1, 0.1, 0.3, 0.5)).tolist() == [
        pytest.approx([0.1, math.sqrt((0.09 + 0.25) / 2)], rel=1e-5)
    ]


def test_bands_are_compared_in_8_ms_and_1_khz() -> None:
    levels = []
    for wave in (MADE, TRUE):
        power = spectrogram(wave, 128)[1:] ** 2
        levels.append(np.log(np.sqrt(power.reshape(8, 8, -1).mean(1)) + 3e-4))
    found = band_loudness_loss(torch.from_numpy(MADE)[None], torch.from_numpy(TRUE)[None])
    assert found.item() == pytest.approx(np.abs(levels[0] - levels[1]).mean(), rel=1e-4)


def test_the_pitch_loss_by_hand() -> None:
    """Of three frames one is unvoiced; of the others the second is three times as loud."""
    grid = torch.linspace(4.0, 7.0, 31)
    true = torch.tensor([[100.0, 0.0, 200.0]])
    log_f0 = torch.tensor([[math.log(200.0), 9.0, math.log(200.0)]])
    logits = torch.zeros(1, 3, 31)
    loudness = torch.tensor([[0.1, 5.0, 0.3]])
    total = 0.0
    for share, f0, octaves in ((0.25, 100.0, 1.0), (0.75, 200.0, 0.0)):
        distance = (np.linspace(4.0, 7.0, 31) - math.log(f0)) / 0.1
        wanted = np.exp(-0.5 * distance**2)
        wanted /= wanted.sum()
        # Divergence of the wanted distribution from an even one.
        divergence = (wanted * np.log((wanted + 1e-9) * 31)).sum()
        total += share * (0.2 * divergence + 4.0 * octaves)
    found = pitch_loss(logits, log_f0, true, loudness, grid)
    assert found.item() == pytest.approx(total, rel=1e-3)


def test_the_divergence_from_the_unit_normal() -> None:
    """(m^2 + s^2 - 1 - 2 log s) / 2 nats, mean over numbers: m = 1, s = 2 and m = 0, s = 1."""
    found = kl_loss(torch.tensor([1.0, 0.0]), torch.tensor([math.log(2.0), 0.0]))
    assert found.item() == pytest.approx((1 + 4 - 1 - 2 * math.log(2)) / 2 / 2)


def test_pixels_that_move_count_more() -> None:
    """One of 7 x 7 pixels changes in the second of three frames, and back in the third.

    It counts 1 + 3 wherever it is, and with its neighbours 4 more in the frames where it changes.
    """
    video = torch.zeros(1, 3, 3, 7, 7)
    video[:, 1, 1, 3, 3] = 0.5
    expected = torch.ones(1, 1, 3, 7, 7)
    expected[..., 3, 3] += 3
    expected[:, :, 1:, 2:5, 2:5] += 4
    assert torch.allclose(motion_weight(video), expected / expected.mean())


def test_the_reconstruction_loss_by_hand() -> None:
    """Of 2 x 2 x 2 pixels two beside each other are wrong, by 0.4 and 0.1, in one channel.

    An edge has the weight of the pixel that lies further on; there are 12 in each direction.
    """
    output = torch.zeros(1, 3, 2, 2, 2)
    output[0, 0, 0, 0] = torch.tensor([0.4, 0.1])
    weight = torch.ones(1, 1, 2, 2, 2)
    weight[0, 0, 0, 0, 0] = 2.0
    own = (2 * (0.4 + 0.5 * 0.16) + 0.1 + 0.5 * 0.01) / 24
    edges = 0.3 * ((0.4 + 0.1) + (0.4 + 0.1) + (0.4 - 0.1)) / 12
    found = reconstruction_loss(output, torch.zeros_like(output), weight)
    assert found.item() == pytest.approx(own + edges)


class CaughtError(Exception):
    """What a decoder was given."""


class Moments:
    """A codec whose latents have mean 3 and standard deviation 2."""

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def encode_moments(self, wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((20_000,), 3.0), torch.full((20_000,), self.spread)

    def decode_raw(self, raw: torch.Tensor) -> None:
        raise CaughtError(raw)

    decode_controls = decode_raw


def test_a_decoder_learns_on_draws_from_the_encoders_distribution() -> None:
    """Pictures' encoder tells the logarithm of the variance, sound's that of the deviation."""
    clips = np.zeros((2, 25, 32, 32, 3), np.uint8)
    recipe = VideoRecipe(clips, 1.0, bf16=False, fixed_encoder=False)
    rng = np.random.default_rng(0)
    with pytest.raises(CaughtError) as pictures, torch.random.fork_rng(devices=[]):
        recipe.loss(Moments(math.log(4.0)), 0.0, rng)
    with pytest.raises(CaughtError) as sound, torch.random.fork_rng(devices=[]):
        losses(Moments(math.log(2.0)), torch.zeros(1, 1600), torch.zeros(1, 10), rng, 1.0)
    for caught in (pictures, sound):
        (raw,) = caught.value.args
        assert raw.mean().item() == pytest.approx(3.0, abs=0.06)
        assert raw.std().item() == pytest.approx(2.0, abs=0.05)
