"""The small audio codec: 16 kHz sound <-> 32 numbers at 25 Hz, causal, decoded by a
harmonic-plus-noise synthesiser.

Idea: latents hold what is heard (pitch, envelope, noise), not the waveform's phase, so a small
generator can model them; the synthesiser (vocoder.py) makes the samples. Latent 0 is the sound's
first 10 ms frame, every later latent is the next four frames. All convolutions look back only, and
decoding is functional: the state is an immutable value, so streaming in any cut equals decoding the
whole.

Letters: b batch, n samples, f audio frames (100 Hz), s audio latents (25 Hz), c channels; f = 4 s -
3, n = 160 f.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Annotated, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from .checked import Positive, Width, build
from .tape import Tape, taped_on
from .vocoder import (
    Controls,
    HarmonicNoiseVocoder,
    VocoderConfig,
    VocoderState,
    hz_to_mel,
    mel_to_hz,
)

LATENT_FRAMES = 4
Dilations = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(max_length=64)]
Blocks = Annotated[int, Field(ge=0, le=64)]
Samples = Annotated[int, Field(ge=2, le=8192)]
Bands = Annotated[int, Field(ge=2, le=1024)]
_AMPLITUDE_SLOPE = 2.3
_TAPES: WeakKeyDictionary[AudioCodec, tuple[tuple[object, ...], Tape]] = WeakKeyDictionary()
"""The tape that each codec's last block was decoded with, and what it reads."""


@dataclass(frozen=True)
class AudioCodecConfig:
    """Sizes of the codec. Rates are fixed by the format: 16 kHz, 160-sample frames, 4 frames per
    latent.
    """

    latent_channels: Width = 32
    channels: Width = 128
    encoder_dilations: Dilations = (1, 2, 4)
    encoder_latent_blocks: Blocks = 1
    decoder_latent_blocks: Blocks = 2
    decoder_dilations: Dilations = (1, 2)
    sample_rate: Annotated[int, Field(ge=1000, le=384000)] = 16000
    hop: Samples = 160
    window: Samples = 640
    pitch_features: Bands = 147
    short_bands: Bands = 24
    f0_bins: Bands = 128
    f0_min: Positive = 50.0
    f0_max: Positive = 1200.0
    harmonic_bands: Bands = 64
    noise_bands: Annotated[int, Field(ge=1, le=128)] = 16

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> AudioCodecConfig:
        """Build from a checkpoint's metadata; raises ValueError for what does not belong there."""
        config = build(cls, values, "audio codec config")
        if not config.f0_min < config.f0_max < config.sample_rate / 2:
            raise ValueError(
                f"audio codec config: pitch goes from {config.f0_min} to {config.f0_max} Hz, "
                "expected it "
                f"to rise, and below half of the sample rate {config.sample_rate}"
            )
        if config.window < config.hop:
            raise ValueError(
                f"audio codec config: window is {config.window}, expected at least a hop of "
                f"{config.hop}"
            )
        return config

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


class AudioDecoderState(NamedTuple):
    """What decoding remembers between calls; never written into, so it can be shared and forked.

    caches: one (b, c, reach) tensor per causal convolution; vocoder: phase, noise position, last
    controls.
    """

    caches: tuple[Tensor, ...]
    vocoder: VocoderState


class _Caches:
    """Hands each convolution its past in call order and collects what it leaves behind."""

    def __init__(self, past: tuple[Tensor, ...] | None) -> None:
        self._past: Iterator[Tensor] | None = None if past is None else iter(past)
        self.left: list[Tensor] = []

    def extend(self, x: Tensor, reach: int) -> Tensor:
        past = x.new_zeros(*x.shape[:-1], reach) if self._past is None else next(self._past).to(x)
        x = torch.cat([past, x], dim=-1)
        self.left.append(x[..., x.shape[-1] - reach :].detach())
        return x


class Conv(nn.Conv1d):
    """A convolution without padding; a few frames go through one product, because setting up a
    convolution takes longer than that."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel,), (dilation,) = self.kernel_size, self.dilation
        reach = (kernel - 1) * dilation
        if x.shape[-1] - reach > LATENT_FRAMES:
            return super().forward(x)
        seen = x.unfold(-1, reach + 1, 1)[..., ::dilation]
        rows = rearrange(seen, "b c f k -> b f (c k)")
        y = F.linear(rows, rearrange(self.weight, "o c k -> o (c k)"), self.bias)
        return rearrange(y, "b f o -> b o f")


class CausalConv(nn.Module):
    """1-D convolution over (b, c, t) that sees the present and `(kernel - 1) * dilation` steps of
    the past.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.reach = (kernel - 1) * dilation
        self.conv = Conv(c_in, c_out, kernel, dilation=dilation)

    def forward(self, x: Tensor, caches: _Caches) -> Tensor:
        return self.conv(caches.extend(x, self.reach))


class ChannelNorm(nn.Module):
    """RMS norm over channels at each time step: it never mixes times, so it is causal by
    construction.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6) * self.scale)


class ResidualBlock(nn.Module):
    """x + mix(silu(conv(silu(norm(x))))), causal."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = CausalConv(channels, channels, 3, dilation)
        self.mix = Conv(channels, channels, 1)

    def forward(self, x: Tensor, caches: _Caches) -> Tensor:
        return x + self.mix(F.silu(self.conv(F.silu(self.norm(x)), caches)))


class SoundFeatures(nn.Module):
    """Wave (b, n) -> (b, features, f): what the encoder hears in windows that end with each frame.

    Log-magnitude STFT (640 samples), an autocorrelation on a log-spaced pitch grid (computed from
    the same spectrum, it makes pitch easy to read) and a short 160-sample mel spectrum (it makes
    onsets sharp).
    """

    window: Tensor
    short_window: Tensor
    autocorrelation: Tensor
    short_mel: Tensor

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        self.config = config
        bins = config.window // 2 + 1
        self.size = bins + config.pitch_features + config.short_bands
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.register_buffer("short_window", torch.hann_window(config.hop), persistent=False)
        low, high = math.log(config.f0_min), math.log(config.f0_max)
        pitch = torch.exp(torch.linspace(low, high, config.pitch_features, dtype=torch.float64))
        k = torch.arange(bins, dtype=torch.float64)[:, None]
        turns = k / config.window * (config.sample_rate / pitch)
        matrix = torch.cos(2 * math.pi * turns)
        self.register_buffer("autocorrelation", matrix.float(), persistent=False)
        self.register_buffer("short_mel", self._mel(), persistent=False)

    def _mel(self) -> Tensor:
        bins, bands = self.config.hop // 2 + 1, self.config.short_bands
        nyquist = self.config.sample_rate / 2
        edges = mel_to_hz(torch.linspace(0, float(hz_to_mel(torch.tensor(nyquist))), bands + 2))
        frequency = torch.linspace(0, nyquist, bins)[:, None]
        # A triangle narrower than a bin would miss every bin: widen it to one bin.
        width = nyquist / (bins - 1)
        rise = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2]).clamp(min=width)
        fall = (edges[2:] - frequency) / (edges[2:] - edges[1:-1]).clamp(min=width)
        return torch.minimum(rise, fall).clamp(min=0.0)

    def forward(self, wave: Tensor) -> Tensor:
        size, hop = self.config.window, self.config.hop
        frames = F.pad(wave, (size - hop, 0)).unfold(-1, size, hop)
        magnitude = torch.fft.rfft(frames * self.window).abs() * (4 / size)
        level = (torch.log(magnitude + 1e-5) + 6) / 3
        compressed = magnitude + 1e-5
        pitch = (compressed @ self.autocorrelation) / compressed.sum(-1, keepdim=True)
        short = torch.fft.rfft(frames[..., size - hop :] * self.short_window).abs() * (4 / hop)
        short = (torch.log(short @ self.short_mel + 1e-5) + 6) / 3
        return rearrange(torch.cat([level, pitch * 2, short], dim=-1), "b f c -> b c f")


class AudioCodec(nn.Module):
    """Encoder, decoder and synthesiser, with the statistics that bring latents to unit scale."""

    latent_mean: Tensor
    latent_std: Tensor
    f0_grid: Tensor

    def __init__(self, config: AudioCodecConfig = AudioCodecConfig()) -> None:
        super().__init__()
        self.config = config
        c, z = config.channels, config.latent_channels
        self.features = SoundFeatures(config)
        self.encoder_in = nn.Conv1d(self.features.size, c, 1)
        self.encoder_blocks = nn.ModuleList(ResidualBlock(c, d) for d in config.encoder_dilations)
        self.down = nn.Conv1d(c, c, LATENT_FRAMES, stride=LATENT_FRAMES)
        self.encoder_latent = nn.ModuleList(
            ResidualBlock(c) for _ in range(config.encoder_latent_blocks)
        )
        self.encoder_norm = ChannelNorm(c)
        self.encoder_out = nn.Conv1d(c, 2 * z, 1)

        self.decoder_in = CausalConv(z, c, 3)
        self.decoder_latent = nn.ModuleList(
            ResidualBlock(c) for _ in range(config.decoder_latent_blocks)
        )
        self.up = Conv(c, LATENT_FRAMES * c, 1)
        self.decoder_blocks = nn.ModuleList(ResidualBlock(c, d) for d in config.decoder_dilations)
        self.decoder_norm = ChannelNorm(c)
        heads = config.f0_bins + config.harmonic_bands + config.noise_bands
        self.heads = Conv(c, heads, 1)
        with torch.no_grad():
            self.heads.weight.mul_(0.3)
            self.heads.bias[config.f0_bins :].fill_(-2.5)  # start quiet: amplitudes of about 0.003
        self.vocoder = HarmonicNoiseVocoder(
            VocoderConfig(
                config.sample_rate, config.hop, config.harmonic_bands, config.noise_bands,
                config.f0_min, config.f0_max,
            )
        )  # fmt: skip
        grid = torch.linspace(math.log(config.f0_min), math.log(config.f0_max), config.f0_bins)
        self.register_buffer("f0_grid", grid, persistent=False)
        self.register_buffer("latent_mean", torch.zeros(z))
        self.register_buffer("latent_std", torch.ones(z))

    def encode(self, wave: Tensor) -> Tensor:
        """Sound (b, n) in [-1, 1] at 16 kHz -> normalised latents (b, s, c); n must be 160 (4 s -
        3).

        Raises ValueError for any other length or shape.
        """
        mean, _ = self.encode_moments(wave)
        return (mean - self.latent_mean) / self.latent_std

    def encode_moments(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation (b, s, c) of the latents, not normalised (for
        training).
        """
        hop = self.config.hop
        if wave.ndim != 2 or wave.shape[1] % hop or (wave.shape[1] // hop) % LATENT_FRAMES != 1:
            raise ValueError(
                f"audio encode: found wave of shape {tuple(wave.shape)}, expected (batch, samples) "
                f"with samples = {hop} * (1 + {LATENT_FRAMES} k); pad or cut the sound (blocks of "
                "a "
                "second: 160 + 16000 K)."
            )
        caches = _Caches(None)
        x = self.encoder_in(self.features(wave.to(self.encoder_in.weight.dtype)))
        for block in self.encoder_blocks:
            x = block(x, caches)
        # Latent 0 ends with frame 0, so three frames of silence stand before it.
        x = self.down(F.pad(x, (LATENT_FRAMES - 1, 0)))
        for block in self.encoder_latent:
            x = block(x, caches)
        mean, log_std = self.encoder_out(self.encoder_norm(x)).chunk(2, dim=1)
        return rearrange(mean, "b c s -> b s c"), rearrange(log_std.clamp(-8, 4), "b c s -> b s c")

    def decode(
        self, latent: Tensor, state: AudioDecoderState | None = None
    ) -> tuple[Tensor, AudioDecoderState]:
        """Normalised latents (b, s, c) -> sound (b, n) and the state after it.

        With state None the stream starts: the first latent gives 160 samples, every other one 640.
        Given the state of the call before, every latent gives 640. Raises ValueError for a wrong
        shape or batch.
        """
        self._check(latent, state)
        raw = latent.to(self.latent_std) * self.latent_std + self.latent_mean
        caches = () if state is None else state.caches
        played = []
        # One latent at a time: the convolutions then round alike in every cut. Pitch is summed up
        # to phase, so rounding that depended on the cut would be heard, growing, in all that
        # follows.
        step, key = self._decode_one, None
        for index, one in enumerate(latents := raw.split(1, dim=1)):
            begins = state is None and index == 0
            if key is None and not begins and len(latents) > 3 and taped_on(raw.device):
                key = self._read_by_a_tape(one, *caches)
                # Nobody else plays it meanwhile.
                held, tape = _TAPES.pop(self, (None, None))
                step = tape if held == key else Tape(step, (one, *caches))
            f0, harmonics, noise, *caches = step(one, *caches)
            played.append((f0, harmonics, noise))
        if key is not None:
            _TAPES[self] = key, step
        controls = Controls(*(torch.cat(values, dim=1) for values in zip(*played, strict=True)))
        wave, vocoder = self.vocoder(controls, None if state is None else state.vocoder)
        return wave, AudioDecoderState(tuple(caches), vocoder)

    def _read_by_a_tape(self, *inputs: Tensor) -> tuple[object, ...]:
        """What has to be as it was for a tape to go on."""
        weights = (weight.data_ptr() for weight in chain(self.parameters(), self.buffers()))
        forms = ((x.shape, x.dtype) for x in inputs)
        return torch.is_inference_mode_enabled(), *forms, *weights

    def _decode_one(self, raw: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        controls, _, left = self.decode_controls(raw, caches or None)
        return *controls, *left

    def decode_controls(
        self, raw: Tensor, caches: tuple[Tensor, ...] | None = None
    ) -> tuple[Controls, Tensor, tuple[Tensor, ...]]:
        """Unnormalised latents (b, s, c) -> controls per frame, pitch logits (b, f, bins), new
        caches.

        caches None starts a stream (4 s - 3 frames), otherwise 4 s frames follow.
        """
        memory = _Caches(caches)
        x = rearrange(raw, "b s c -> b c s").to(self.heads.weight.dtype)
        x = self.decoder_in(x, memory)
        for block in self.decoder_latent:
            x = block(x, memory)
        x = rearrange(self.up(x), "b (r c) s -> b c (s r)", r=LATENT_FRAMES)
        if caches is None:
            x = x[..., LATENT_FRAMES - 1 :]
        for block in self.decoder_blocks:
            x = block(x, memory)
        out = rearrange(self.heads(self.decoder_norm(x)), "b c f -> b f c").float()
        sizes = [self.config.f0_bins, self.config.harmonic_bands, self.config.noise_bands]
        logits, harmonics, noise = out.split(sizes, dim=-1)
        log_f0 = torch.softmax(logits, dim=-1) @ self.f0_grid.float()
        # Straight below, saturating above: silence is easy to reach and no sound exceeds amplitude
        # 1.
        loudness = (_AMPLITUDE_SLOPE * F.logsigmoid(part) for part in (harmonics, noise))
        return Controls(log_f0.exp(), *loudness), logits, tuple(memory.left)

    def _check(self, latent: Tensor, state: AudioDecoderState | None) -> None:
        z = self.config.latent_channels
        if latent.ndim != 3 or latent.shape[2] != z or latent.shape[1] == 0:
            raise ValueError(
                f"audio decode: found latents of shape {tuple(latent.shape)}, expected (batch, "
                f"latents >= 1, {z}); audio latents are laid out (b, s, c)."
            )
        if state is not None and state.vocoder.phase.shape[0] != latent.shape[0]:
            raise ValueError(
                f"audio decode: found a state of batch {state.vocoder.phase.shape[0]} and latents "
                f"of batch {latent.shape[0]}, expected them equal; pass the state of this very "
                "stream."
            )
