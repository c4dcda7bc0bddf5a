"""The timed transcript: what is to be spoken while, told to every audio latent.

n events, s audio latents, c channels.
Mutual Forcing's streaming transcript (arXiv:2604.25819) on one clock with the sound: each latent is
told the unit (a syllable, say) that is due at its middle, how long ago that began, when the next
one does and which one that is. Where nothing is known, all channels are 0 and the network adds
nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .checked import build

# Seconds of one turn of the clocks' hands; times are told up to FARTHEST, half the slowest turn.
PERIODS = (2.0, 1.0, 0.5, 0.25)
FARTHEST = 1.0
REST, UNKNOWN = -1, -2
# Units in a second: more than anybody speaks, and few enough to count them out.
FASTEST = 50.0
Rate = Annotated[float, Field(gt=0, le=FASTEST)]


@dataclass(frozen=True)
class TranscriptConfig:
    """The units that a model can be told.

    Attributes:
        vocabulary: the units in the order of their channels; anything else is a rest.
        rates: words of a prompt that say how many units are spoken in a second.
        rate: units per second where no word says it.
    """

    vocabulary: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=8192)]
    rates: dict[str, Rate] = field(default_factory=dict)
    rate: Rate = 3.0

    @property
    def channels(self) -> int:
        """Numbers per audio latent."""
        return transcript_channels(len(self.vocabulary))

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self) | {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> TranscriptConfig:
        """Build from JSON.

        Raises:
            ValueError: no unit, or a value of the wrong type or out of range.
        """
        if not values.get("vocabulary"):
            raise ValueError("transcript config: vocabulary is empty, expected a list of units")
        return build(cls, values, "transcript config")


def transcript_channels(units: int) -> int:
    """Channels of the track for a vocabulary of so many units."""
    return 1 + 2 * units + 4 * len(PERIODS)


def units_told(channels: int) -> int:
    """Units of the vocabulary of a track with so many channels."""
    return (channels - 1 - 4 * len(PERIODS)) // 2


def latent_times(start: int, stop: int, first: float, step: float) -> Tensor:
    """Seconds of the middle of audio latents; latent 0 lasts `first`, all others `step`."""
    at = torch.arange(start, stop, dtype=torch.float64)
    return torch.where(at == 0, first / 2, first + (at - 0.5) * step)


def transcript_track(onsets: Tensor, units: Tensor, times: Tensor, vocabulary: int) -> Tensor:
    """Channels (s, c) float32 of audio latents whose middles are at `times` (s).

    Args:
        onsets: (n) rising seconds; `units` (n) their numbers, or `REST`, or `UNKNOWN`.
    """
    place = torch.searchsorted(onsets, times, right=True)
    padded = torch.cat((units.new_tensor([UNKNOWN]), units, units.new_tensor([UNKNOWN])))
    far = times.new_full((1,), math.inf)
    moments = torch.cat((-far, onsets, far))
    due, following = padded[place], padded[place + 1]

    def one_hot(unit: Tensor) -> Tensor:
        return F.one_hot(unit.clamp(min=REST) + 1, vocabulary + 1)[:, 1:].float()

    def hands(seconds: Tensor) -> Tensor:
        turns = seconds.clamp(max=FARTHEST)[:, None] / torch.tensor(PERIODS, dtype=times.dtype)
        angles = 2 * math.pi * turns
        return torch.cat((angles.sin(), angles.cos()), dim=1).float()

    since, until = hands(times - moments[place]), hands(moments[place + 1] - times)
    known = (due != UNKNOWN).float()[:, None]
    return known * torch.cat(
        (torch.ones_like(known), one_hot(due), one_hot(following), since, until), dim=1
    )
