"""The audio codec's identities: streamed = whole, past only, exact lengths; the synthesiser never
drifts.
"""

from __future__ import annotations

import math

import pytest
import torch
from mutual_forcing.networks.audio_codec import AudioCodec, AudioCodecConfig, AudioDecoderState
from mutual_forcing.networks.vocoder import (
    TABLE_LENGTH,
    Controls,
    HarmonicNoiseVocoder,
    VocoderConfig,
    noise_table,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TINY = AudioCodecConfig(latent_channels=4, channels=8, encoder_dilations=(1, 2), pitch_features=12)


@pytest.fixture(scope="module")
def codec() -> AudioCodec:
    torch.manual_seed(0)
    model = AudioCodec(TINY).eval()
    with torch.no_grad():
        # Untrained heads are nearly silent: make them sing, with a pitch that moves.
        model.heads.weight.mul_(20)
        model.latent_mean.uniform_(-1, 1)
        model.latent_std.uniform_(0.5, 2)
    return model


def latents(count: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch, count, TINY.latent_channels, generator=generator)


def stream(
    codec: AudioCodec, z: torch.Tensor, cuts: list[int]
) -> tuple[torch.Tensor, AudioDecoderState]:
    state, pieces = None, []
    for begin, end in zip([0, *cuts], [*cuts, z.shape[1]], strict=True):
        wave, state = codec.decode(z[:, begin:end], state)
        pieces.append(wave)
    return torch.cat(pieces, dim=1), state


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[1], [26], [1, 2, 3], [7, 20, 21], list(range(1, 40))])
def test_decoding_in_any_cut_equals_decoding_the_whole(codec: AudioCodec, cuts: list[int]) -> None:
    z = latents(40)
    whole, end = codec.decode(z)
    cut, cut_end = stream(codec, z, cuts)
    assert whole.abs().max() > 0.05
    # The promise is 1e-4; how far float32 kernels differ by length depends on the machine and its
    # threads.
    torch.testing.assert_close(cut, whole, atol=5e-5, rtol=0)
    torch.testing.assert_close(cut_end.vocoder.phase, end.vocoder.phase, atol=1e-9, rtol=0)
    assert cut_end.vocoder.sample == end.vocoder.sample == whole.shape[1]


@torch.inference_mode()
def test_a_state_can_be_used_twice(codec: AudioCodec) -> None:
    z = latents(20)
    _, state = codec.decode(z[:, :10])
    first, _ = codec.decode(z[:, 10:], state)
    codec.decode(z[:, 5:9], state)
    again, _ = codec.decode(z[:, 10:], state)
    assert torch.equal(first, again)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 26, 51])
def test_lengths(codec: AudioCodec, count: int) -> None:
    frames = 4 * count - 3
    wave, state = codec.decode(latents(count))
    assert wave.shape == (2, 160 * frames)
    assert codec.encode(wave).shape == (2, count, TINY.latent_channels)
    later, _ = codec.decode(latents(count), state)
    assert later.shape == (2, 640 * count)


@torch.inference_mode()
def test_encoding_sees_no_future(codec: AudioCodec) -> None:
    wave = torch.randn(1, 160 * 41) * 0.1
    changed = wave.clone()
    changed[:, 160 * 21 :] = 0.3
    # Frames 0..20 are latents 0..5: 4 * 5 = 20.
    before, after = codec.encode(wave), codec.encode(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])


@torch.inference_mode()
def test_decoding_sees_no_future(codec: AudioCodec) -> None:
    z = latents(12, batch=1)
    changed = z.clone()
    changed[:, 6:] += 1
    kept = 160 * (4 * 5 + 1)
    before, after = codec.decode(z)[0], codec.decode(changed)[0]
    assert torch.equal(before[:, :kept], after[:, :kept])
    assert not torch.allclose(before[:, kept : kept + 640], after[:, kept : kept + 640])


@torch.inference_mode()
def test_encoded_prefix_equals_prefix_of_encoded(codec: AudioCodec) -> None:
    wave = torch.randn(1, 160 * 81) * 0.1
    torch.testing.assert_close(
        codec.encode(wave[:, : 160 * 41]), codec.encode(wave)[:, :11], atol=1e-5, rtol=1e-5
    )


def test_latents_are_normalised_on_the_way_in_and_out(codec: AudioCodec) -> None:
    wave = torch.randn(1, 160 * 5) * 0.1
    mean, _ = codec.encode_moments(wave)
    back = codec.encode(wave) * codec.latent_std + codec.latent_mean
    torch.testing.assert_close(back, mean)


def test_config_survives_json_and_refuses_unknown_fields() -> None:
    values = TINY.to_dict() | {"encoder_dilations": [1, 2]}
    assert AudioCodecConfig.from_dict(values) == TINY
    with pytest.raises(ValueError, match=r"colour.* is unknown"):
        AudioCodecConfig.from_dict({"colour": 1})


def test_errors_say_what_is_wrong(codec: AudioCodec) -> None:
    with pytest.raises(ValueError, match=r"samples = 160 \* \(1 \+ 4 k\)"):
        codec.encode(torch.zeros(1, 16000))
    with pytest.raises(ValueError, match=r"\(b, s, c\)"):
        codec.decode(torch.zeros(1, TINY.latent_channels, 9))
    with pytest.raises(ValueError, match="latents >= 1"):
        codec.decode(torch.zeros(1, 0, TINY.latent_channels))
    _, state = codec.decode(latents(2, batch=2))
    with pytest.raises(ValueError, match="batch 2 and latents of batch 1"):
        codec.decode(latents(2, batch=1), state)
    with pytest.raises(ValueError, match="found harmonics and noise"):
        codec.vocoder(Controls(torch.ones(1, 3), torch.ones(1, 3, 5), torch.ones(1, 3, 16)))


# ------------------------------------------------------------------------------------ synthesiser


def tone(frames: int, f0: float, loudness: float = 0.1, hiss: float = 1e-9) -> Controls:
    """One audible harmonic band around f0: the others are 200 dB down."""
    config = VocoderConfig()
    harmonics = torch.full((1, frames, config.harmonic_bands), math.log(loudness))
    noise = torch.full((1, frames, config.noise_bands), math.log(hiss))
    return Controls(torch.full((1, frames), f0), harmonics, noise)


def test_sixty_seconds_in_chunks_keep_the_phase_of_the_whole() -> None:
    vocoder = HarmonicNoiseVocoder()
    frames, f0 = 6000, 1003.7
    controls = tone(frames, f0, hiss=0.01)
    whole, end = vocoder(controls)
    state, pieces = None, []
    for start in range(0, frames, 37):
        wave, state = vocoder(Controls(*(v[:, start : start + 37] for v in controls)), state)
        pieces.append(wave)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)
    # Against theory too: 60 s of a constant pitch are so many cycles, whoever adds them up.
    cycles = float(torch.tensor(f0)) * 60
    drift = (float(end.phase) - cycles + 0.5) % 1.0 - 0.5
    assert abs(drift) < 1e-6
    assert state.sample == end.sample == 960_000


def test_harmonics_are_sines_at_multiples_of_the_pitch() -> None:
    vocoder = HarmonicNoiseVocoder()
    wave, _ = vocoder(tone(100, 400.0, loudness=0.05))
    n = torch.arange(1, wave.shape[1] + 1, dtype=torch.float64) / 16000
    true = sum(0.05 * torch.sin(2 * math.pi * 400.0 * h * n) for h in range(1, 20))
    torch.testing.assert_close(wave[0].double(), true, atol=1e-4, rtol=0)


def test_nothing_above_nyquist_folds_back() -> None:
    wave, _ = HarmonicNoiseVocoder()(tone(100, 1150.0))
    spectrum = torch.fft.rfft(wave[0] * torch.hann_window(wave.shape[1])).abs()
    strong = (spectrum > spectrum.max() * 0.01).nonzero().flatten()
    pitch = strong * 16000 / wave.shape[1] / 1150.0
    assert (pitch - pitch.round()).abs().max() < 0.01


def test_noise_is_periodic_banded_and_the_same_for_all() -> None:
    table = noise_table(16, 16000)
    assert table.shape == (16, TABLE_LENGTH)
    torch.testing.assert_close(table.square().mean(-1), torch.ones(16))
    assert torch.equal(table, noise_table(16, 16000))
    centre = torch.fft.rfft(table).abs().argmax(-1)
    assert (centre.diff() > 0).all()


def test_training_reaches_amplitudes_and_encoder(codec: AudioCodec) -> None:
    from mutual_forcing.lab.training.audio_losses import loudness_loss, spectral_loss

    wave = torch.randn(1, 160 * 41) * 0.1
    mean, _ = codec.encode_moments(wave)
    controls, _, _ = codec.decode_controls(mean)
    made, _ = codec.vocoder(controls)
    (spectral_loss(made, wave) + loudness_loss(made, wave)).backward()
    grads = [p.grad for n, p in codec.named_parameters() if n.startswith("encoder_in")]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in grads)
    codec.zero_grad()


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's is: whatever is reckoned in it fails."""

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.lift_fresh.default:
            return made  # numpy's own memory, which the host holds
        for value in tree_leaves((args, kwargs, made)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{function} has float64, which this device lacks")
        return made


@torch.no_grad()
def test_sound_is_made_and_read_on_a_device_without_float64(codec: AudioCodec) -> None:
    z = latents(30)
    whole, _ = codec.decode(z)
    with NoFloat64():
        with pytest.raises(TypeError, match="lacks"):
            z.double()
        first, state = codec.decode(z[:, :11])
        rest, _ = codec.decode(z[:, 11:], state)
        codec.encode(whole)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, atol=5e-5, rtol=0)
