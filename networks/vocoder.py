"""Harmonic-plus-noise synthesiser: a few control values per 10 ms become a waveform, with no
learned weights.

Idea: one pitch drives a stack of sines whose loudness is read from a spectral envelope, and fixed
band-passed noise supplies the rest. Everything that a cut could disturb (phase, position in the
noise, the last control frame) is a value in `VocoderState`, so a stream that is cut anywhere sounds
exactly like the whole.

Letters: b batch, f control frames (100 Hz), n samples inside a frame (160), h harmonics, k harmonic
bands, m noise bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TABLE_LENGTH = 1 << 16
_TABLE_SEED = 20260
_GROUP = 16
_FRAMES_PER_SLICE = 100  # one second of sines at once bounds the memory of long decodes


@dataclass(frozen=True)
class VocoderConfig:
    """Rates and band counts of the synthesiser; frequencies in Hz."""

    sample_rate: int = 16000
    hop: int = 160
    harmonic_bands: int = 64
    noise_bands: int = 16
    f0_min: float = 50.0
    f0_max: float = 1200.0


class Controls(NamedTuple):
    """What the synthesiser plays: f0 (b, f) in Hz; harmonics (b, f, k) and noise (b, f, m) in log
    amplitude.
    """

    f0: Tensor
    harmonics: Tensor
    noise: Tensor


class VocoderState(NamedTuple):
    """Everything a stream remembers: the last control frame; phase (b,) in cycles, float64 on the
    CPU; samples made so far.
    """

    last: Controls
    phase: Tensor
    sample: int


def hz_to_mel(frequency: Tensor) -> Tensor:
    """Mel scale (HTK form) of a frequency in Hz, any shape."""
    return 2595.0 * torch.log10(1.0 + frequency / 700.0)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of `hz_to_mel`."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


def noise_table(bands: int, sample_rate: int) -> Tensor:
    """Return (m, 65536) band-passed noise of unit RMS per band, periodic, the same on every
    machine.
    """
    generator = torch.Generator().manual_seed(_TABLE_SEED)
    white = torch.randn(TABLE_LENGTH, generator=generator, dtype=torch.float64)
    spectrum = torch.fft.rfft(white)
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[0], dtype=torch.float64)
    top = hz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64))
    position = hz_to_mel(frequency) / top * bands - 0.5
    centre = torch.arange(bands, dtype=torch.float64)[:, None]
    # The outer bands also take what lies beyond their centres; sqrt makes neighbours add up in
    # power.
    share = (1.0 - (position.clamp(0, bands - 1) - centre).abs()).clamp(min=0.0).sqrt()
    table = torch.fft.irfft(spectrum * share, n=TABLE_LENGTH)
    return (table / table.square().mean(-1, keepdim=True).sqrt()).float()


class HarmonicNoiseVocoder(nn.Module):
    """Synthesise sound from `Controls`, continuing from a `VocoderState`."""

    table: Tensor

    def __init__(self, config: VocoderConfig = VocoderConfig()) -> None:
        super().__init__()
        self.config = config
        table = noise_table(config.noise_bands, config.sample_rate)
        self.register_buffer("table", table, persistent=False)

    def forward(
        self, controls: Controls, state: VocoderState | None = None
    ) -> tuple[Tensor, VocoderState]:
        """Play f frames: `(b, f*160)` samples and the state after them.

        Inside a frame every control runs linearly from the previous frame's value to this frame's,
        which it reaches at the last sample; the first frame of a stream holds its own value.
        Gradients flow to the amplitudes, not to the pitch. Raises ValueError for controls whose
        shapes do not agree.
        """
        self._check(controls)
        b, f = controls.f0.shape
        if state is None:
            first = Controls(*(value[:, :1] for value in controls))
            state = VocoderState(first, torch.from_numpy(np.zeros(b)), 0)
        f0, harmonics, noise = (
            torch.cat([old.to(new), new], dim=1)
            for old, new in zip(state.last, controls, strict=True)
        )
        phase, end_phase = self._phase(f0.detach(), state.phase)
        amplitude = self._harmonic_amplitudes(f0.detach(), harmonics)
        gain = noise.exp()
        pieces = []
        for start in range(0, f, _FRAMES_PER_SLICE):
            stop = min(f, start + _FRAMES_PER_SLICE)
            piece = self._harmonics(phase[:, start:stop], amplitude[:, start : stop + 1])
            hiss = self._noise(state.sample + start * self.config.hop, stop - start)
            pieces.append(piece + self._ramp(hiss @ _ends(gain[:, start : stop + 1])))
        last = Controls(*(value[:, -1:].detach() for value in controls))
        sample = state.sample + f * self.config.hop
        return torch.cat(pieces, dim=1), VocoderState(last, end_phase, sample)

    def _check(self, controls: Controls) -> None:
        b, f = controls.f0.shape
        expected = ((b, f, self.config.harmonic_bands), (b, f, self.config.noise_bands))
        found = (tuple(controls.harmonics.shape), tuple(controls.noise.shape))
        if found != expected or f == 0:
            raise ValueError(
                f"vocoder controls for f0 of shape {(b, f)}: found harmonics and noise {found}, "
                f"expected {expected} and at least one frame; build them with "
                "AudioCodec.decode_controls."
            )

    def _phase(self, f0: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Cycles (b, f, n) modulo 1 as float32, and the phase (b,) after the last sample.

        Hours of sound need float64 here, which not every device has (Apple's), so this is reckoned
        by the host.
        """
        hop, rate = self.config.hop, self.config.sample_rate
        pitch = f0.float().cpu().numpy().astype(np.float64)
        if not (np.isfinite(pitch) & (pitch > 0)).all():
            raise ValueError(
                "vocoder: a pitch is not a frequency above 0, so the latents or the memory that it "
                "was read from are damaged; go on from an older state, or start a new stream"
            )
        begin = np.array(start.tolist())[:, None]
        before, after = pitch[:, :-1, None], pitch[:, 1:, None]
        i = np.arange(1, hop + 1, dtype=np.float64)
        # The running sum of a linear ramp, in closed form: no error builds up inside a frame.
        inside = before * i + (after - before) * (i * (i + 1) / (2 * hop))
        inside = inside / rate
        ends = begin + inside[..., -1].cumsum(axis=1)
        starts = np.concatenate([begin, ends[:, :-1]], axis=1)
        phase = np.remainder(starts[..., None] + inside, 1.0).astype(np.float32)
        return torch.from_numpy(phase).to(f0.device), torch.from_numpy(
            np.remainder(ends[:, -1], 1.0)
        )

    def _harmonic_amplitudes(self, f0: Tensor, envelope: Tensor) -> Tensor:
        """Read the log envelope (b, f, k) at every multiple of f0 (b, f): amplitudes (b, f, h)."""
        nyquist = self.config.sample_rate / 2
        count = max(1, math.ceil(nyquist / max(float(f0.min()), self.config.f0_min)))
        h = torch.arange(1, count + 1, device=f0.device, dtype=f0.dtype)
        frequency = f0[..., None] * h
        top = hz_to_mel(torch.tensor(nyquist, device=f0.device, dtype=f0.dtype))
        position = hz_to_mel(frequency.clamp(max=nyquist)) / top * (self.config.harmonic_bands - 1)
        low = position.floor().clamp(max=self.config.harmonic_bands - 2)
        weight = position - low
        index = low.long()
        log_amplitude = torch.lerp(
            envelope.gather(-1, index), envelope.gather(-1, index + 1), weight
        )
        return log_amplitude.exp() * (frequency < nyquist)

    def _harmonics(self, phase: Tensor, amplitude: Tensor) -> Tensor:
        """Sum the harmonics of phase (b, f, n) under amplitudes (b, f+1, h) that run linearly in a
        frame.

        Harmonic h = 16 g + r is split by sin(x + y) = sin x cos y + cos x sin y into 16 sines for r
        and one per group g, so that the (b, f, n, h) table of all sines is never formed.
        """
        ends = F.pad(_ends(amplitude), (0, 0, 0, -amplitude.shape[-1] % _GROUP))
        ends = rearrange(ends, "b f (g r) e -> b f r (g e)", r=_GROUP)
        groups = ends.shape[-1] // 2
        r = torch.arange(1, _GROUP + 1, device=phase.device, dtype=phase.dtype)
        g = torch.arange(groups, device=phase.device, dtype=phase.dtype) * _GROUP
        inner = (phase[..., None] * r).frac() * (2 * math.pi)
        outer = (phase[..., None] * g).frac() * (2 * math.pi)
        sine = rearrange(torch.sin(inner) @ ends, "b f n (g e) -> b f n g e", e=2)
        cosine = rearrange(torch.cos(inner) @ ends, "b f n (g e) -> b f n g e", e=2)
        total = torch.cos(outer)[..., None] * sine + torch.sin(outer)[..., None] * cosine
        return self._ramp(total.sum(dim=-2))

    def _noise(self, sample: int, frames: int) -> Tensor:
        index = torch.arange(frames * self.config.hop, device=self.table.device)
        index = (index + sample % TABLE_LENGTH) % TABLE_LENGTH
        return rearrange(self.table[:, index], "m (f n) -> 1 f n m", f=frames)

    def _ramp(self, ends: Tensor) -> Tensor:
        """Join (b, f, n, 2), the sound at the frame's first level and its slope, into (b, f*n)."""
        level, slope = ends.unbind(-1)
        hop = self.config.hop
        ramp = torch.arange(1, hop + 1, device=level.device, dtype=level.dtype) / hop
        return rearrange(level + slope * ramp, "b f n -> b (f n)")


def _ends(amplitude: Tensor) -> Tensor:
    """Amplitudes (b, f+1, c) -> value before each frame and rise inside it, (b, f, c, 2)."""
    before = amplitude[:, :-1]
    return torch.stack([before, amplitude[:, 1:] - before], dim=-1)
