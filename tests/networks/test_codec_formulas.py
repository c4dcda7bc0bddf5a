"""The codecs' arithmetic by hand: what the synthesiser plays, and how latents are normalised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mutual_forcing.networks.audio_codec import SoundFeatures
from mutual_forcing.networks.causal_conv import Stream, TemporalConv, TemporalDown, TemporalUp
from mutual_forcing.networks.video_codec import VideoCodec
from mutual_forcing.networks.vocoder import (
    Controls,
    HarmonicNoiseVocoder,
    hz_to_mel,
    mel_to_hz,
    noise_table,
)
from mutual_forcing.tests.tiny import AUDIO, VIDEO

SILENT = -60.0


def controls(f0: list[float], harmonics: list[float], noise: list[float]) -> Controls:
    """One value a frame for all bands."""
    rows = (torch.tensor(values)[None] for values in (f0, harmonics, noise))
    pitch, loud, hiss = rows
    return Controls(pitch, loud[..., None].expand(-1, -1, 64), hiss[..., None].expand(-1, -1, 16))


def test_a_constant_pitch_is_a_sum_of_sines() -> None:
    """20 harmonics of 400 Hz below 8 kHz (the 20th is left out), each of amplitude 0.05."""
    sound, state = HarmonicNoiseVocoder()(controls([400.0] * 3, [math.log(0.05)] * 3, [SILENT] * 3))
    n = np.arange(1, 481)
    expected = sum(0.05 * np.sin(2 * np.pi * 400 * h * n / 16000) for h in range(1, 20))
    assert np.allclose(sound[0].numpy(), expected, atol=1e-4)
    assert state.sample == 480 and state.phase.item() == pytest.approx(0.0, abs=1e-6)


def test_pitch_and_loudness_run_linearly_to_each_frames_value() -> None:
    """From 3000 to 4000 Hz and from amplitude 0.1 to 0.3 within the second frame."""
    sound, _ = HarmonicNoiseVocoder()(
        controls([3000.0, 4000.0], [math.log(0.1), math.log(0.3)], [SILENT] * 2)
    )
    i = np.arange(1, 161)
    f0 = np.concatenate((np.full(160, 3000.0), 3000 + 1000 * i / 160))
    phase = 2 * np.pi * np.cumsum(f0) / 16000
    # The second harmonic of 4000 Hz would be at 8 kHz and falls silent on the way.
    loud = [0.1 + 0.2 * i / 160, 0.1 * (1 - i / 160)]
    expected = sum(
        np.concatenate((np.full(160, 0.1), loud[h])) * np.sin((h + 1) * phase) for h in (0, 1)
    )
    assert np.allclose(sound[0].numpy(), expected, atol=1e-4)


def test_noise_has_the_loudness_of_its_bands() -> None:
    """16 bands of mean power 1 each, at gain 0.1, read from the table's begin."""
    sound, _ = HarmonicNoiseVocoder()(controls([100.0] * 4, [SILENT] * 4, [math.log(0.1)] * 4))
    expected = 0.1 * noise_table(16, 16000)[:, :640].sum(0)
    assert torch.allclose(sound[0], expected, atol=1e-5)
    assert noise_table(16, 16000).square().mean(-1).tolist() == pytest.approx([1.0] * 16, rel=1e-4)


def test_the_mel_scale() -> None:
    """2595 log10(1 + f / 700): 1000 Hz are about 1000 mel."""
    assert hz_to_mel(torch.tensor(1000.0)).item() == pytest.approx(2595 * math.log10(1 + 1 / 0.7))
    assert mel_to_hz(torch.tensor(2595.0)).item() == pytest.approx(6300.0)


def test_the_encoder_hears_level_and_pitch_of_a_sine() -> None:
    """A sine of 500 Hz: its level at bin 20 of 25 Hz, and its autocorrelation."""
    wave = 0.2 * torch.sin(2 * math.pi * 500 * torch.arange(1600) / 16000)[None]
    features = SoundFeatures(AUDIO)(wave)[0, :, -1]
    level = features[: AUDIO.window // 2 + 1]
    assert level.argmax().item() == 20
    assert level[20].item() == pytest.approx((math.log(0.2 + 1e-5) + 6) / 3, abs=1e-3)
    # Twelve pitches from 50 to 1200 Hz: of those near a divisor of 500 Hz the product is largest.
    pitches = 50 * 24 ** (np.arange(12) / 11)
    spectrum = np.zeros(321)
    spectrum[19:22] = 0.1, 0.2, 0.1
    spectrum += 1e-5
    turns = np.cos(2 * np.pi * np.arange(321)[:, None] / 640 * 16000 / pitches)
    expected = 2 * (spectrum @ turns) / spectrum.sum()
    assert np.allclose(features[321:333].numpy(), expected, atol=0.02)


def test_video_latents_are_normalised_by_channel_and_folded_two_by_two() -> None:
    """Channel 4 c + 2 y + x is channel c at row 2 h + y, column 2 w + x of the finer grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = VideoCodec(VIDEO).eval().requires_grad_(False)
        codec.latent_mean.normal_()
        codec.latent_std.uniform_(0.5, 2.0)
        video = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    raw = codec.encode_moments(video)[0]
    found = codec.encode(video)
    assert found.shape == (1, 16, 2, 2, 2) and raw.shape == (1, 4, 2, 4, 4)
    for c, y, x, h, w in ((0, 0, 0, 0, 0), (2, 1, 0, 1, 0), (3, 0, 1, 0, 1)):
        expected = (raw[0, c, 1, 2 * h + y, 2 * w + x] - codec.latent_mean[c]) / codec.latent_std[c]
        assert found[0, 4 * c + 2 * y + x, 1, h, w].item() == pytest.approx(
            expected.item(), abs=1e-5
        )
    assert torch.allclose(codec.decode(found)[0], codec.decode_raw(raw)[0], atol=1e-5)


def taught(layer: torch.nn.Module, *weights: float) -> torch.nn.Module:
    """One channel in; these are the weights of what is seen."""
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor(weights).reshape(layer.linear.weight.shape))
        layer.linear.bias.zero_()
    return layer


def test_time_is_mixed_towards_the_past_only() -> None:
    """Frames 1, 2, 3, 4, 5, read as hundreds, tens and ones."""
    x = torch.arange(1.0, 6.0).reshape(1, 5, 1, 1, 1)
    layer = taught(TemporalConv(1, 1), 100.0, 10.0, 1.0)
    assert layer(x, Stream()).flatten().tolist() == [111, 112, 123, 234, 345]
    layer = taught(TemporalDown(1, 1), 100.0, 10.0, 1.0)
    assert layer(x).flatten().tolist() == [111, 123, 345]
    layer = taught(TemporalUp(1, 1), 10.0, 1.0)
    assert layer(x, Stream()).flatten().tolist() == [1, 20, 2, 30, 3, 40, 4, 50, 5]
    assert layer(x, Stream(())).flatten().tolist() == [10, 1, 20, 2, 30, 3, 40, 4, 50, 5]
