"""What the audio codec is trained for: right pitch, right spectrum at several resolutions, sharp
loudness.

Letters: b batch, n samples, f audio frames (100 Hz).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-4
_WINDOWS = (2048, 512, 128)


@functools.cache
def _hann(size: int, device: torch.device) -> Tensor:
    return torch.hann_window(size, device=device)


def magnitudes(wave: Tensor, size: int) -> Tensor:
    """STFT magnitude (b, bins, t) with hop size/4, scaled so that a sine of amplitude a shows a
    peak of a.
    """
    spectrum = torch.stft(
        wave, size, size // 4, window=_hann(size, wave.device), center=True, return_complex=True
    )
    # The small constant keeps the gradient of the absolute value finite in silence.
    power = spectrum.real.square() + spectrum.imag.square() + 1e-9
    return power.sqrt() * (4 / size)


def spectral_loss(made: Tensor, true: Tensor) -> Tensor:
    """Mean over resolutions of the L1 distance in log magnitude plus a relative L1 distance in
    magnitude.
    """
    total = made.new_zeros(())
    for size in _WINDOWS:
        a, b = magnitudes(made, size), magnitudes(true, size)
        logarithmic = (torch.log(a + FLOOR) - torch.log(b + FLOOR)).abs().mean()
        linear = (a - b).abs().sum() / (b.sum() + 1e-2 * b.numel() * FLOOR)
        total = total + 0.25 * logarithmic + linear
    return total / len(_WINDOWS)


def loudness_loss(made: Tensor, true: Tensor, hop: int = 80) -> Tensor:
    """L1 distance of log RMS per 5 ms: places onsets in time."""
    a = torch.log((made.unfold(-1, hop, hop).square().mean(-1) + 1e-6).sqrt() + 2e-3)
    b = torch.log((true.unfold(-1, hop, hop).square().mean(-1) + 1e-6).sqrt() + 2e-3)
    return (a - b).abs().mean()


def band_loudness_loss(made: Tensor, true: Tensor, bands: int = 8) -> Tensor:
    """L1 distance of log level in 8 ms windows and 1 kHz bands: hears the bursts of consonants.

    Single bins of noise differ by chance; their sum over a band says whether the noise is right.
    """
    levels = []
    for wave in (made, true):
        power = magnitudes(wave, 128)[:, 1:].square()
        power = power.unflatten(1, (bands, -1)).mean(2)
        levels.append(torch.log(power.sqrt() + 3e-4))
    return (levels[0] - levels[1]).abs().mean()


def frame_loudness(wave: Tensor, hop: int = 160) -> Tensor:
    """RMS per audio frame, (b, f)."""
    return wave.unfold(-1, hop, hop).square().mean(-1).sqrt()


def pitch_loss(
    logits: Tensor, log_f0: Tensor, true: Tensor, weight: Tensor, grid: Tensor
) -> Tensor:
    """Pitch as a distribution and as a number, where the sound is voiced.

    logits (b, f, bins); log_f0 predicted and true f0 in Hz (0: unvoiced) (b, f); weight (b, f) is
    the loudness; grid (bins,) log Hz of the bins. Unvoiced or silent frames count for nothing.
    """
    weight = weight * (true > 0)
    weight = weight / (weight.sum() + 1e-6)
    target = torch.log(true.clamp(min=1.0))
    step = grid[1] - grid[0]
    distance = (grid - target[..., None]) / step
    wanted = torch.softmax(-0.5 * distance.square(), dim=-1)
    # Entropy of the target subtracted: zero when right.
    cross = -(wanted * F.log_softmax(logits, dim=-1)).sum(-1) + (
        wanted * (wanted + 1e-9).log()
    ).sum(-1)
    octaves = (log_f0 - target).abs() / 0.6931
    return (weight * (0.2 * cross + 4.0 * octaves)).sum()


def kl_loss(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL divergence from the unit normal in nats, averaged over all latent numbers."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).mean()
