"""What a stream is told to say: a transcript of any length that may change while it runs.

s audio latents, c channels.
The network sees a track on one clock with the sound (`networks/transcript.py`). Here the units of a
transcript get their times: one after the other at its rate, in a loop or once. Kept keys and values
contain what was said, so the place in the transcript belongs to the stream's state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..networks.config import TransformerConfig
from ..networks.transcript import (
    REST,
    UNKNOWN,
    Rate,
    latent_times,
    transcript_track,
    units_told,
)

_PREFIX = 2
"""Units that a stream's first frame may be read again with: the one in it, and when it ends."""


class Transcript(NamedTuple):
    """Numbers of the units to be spoken (`REST` for a pause), how many in a second, and whether
    they begin again at the end; after the end of one that doesn't there are rests.
    """

    units: Annotated[tuple[int, ...], Field(min_length=1)]
    rate: Rate
    loop: bool = True


class Unit(NamedTuple):
    """Seconds of the stream at which a unit begins, and its number."""

    onset: Annotated[float, Field(allow_inf_nan=False)]
    number: int


@dataclass(frozen=True)
class Speech:
    """What one clip has been told so far.

    Attributes:
        said: every unit with its time, up to the one after the last block.
        transcript: that they are from.
        place: of the next unit in it.
    """

    said: tuple[Unit, ...] = ()
    transcript: Transcript | None = None
    place: int = 0

    def going_on(self, transcript: Transcript | None, begin: float, end: float) -> Speech:
        """The same with the units of a block from second `begin` to `end`, and the one after it.

        A new transcript begins when the unit that sounds is over; the same units at another rate go
        on where they were.
        """
        speech = self
        if transcript != self.transcript:
            past = [unit for unit in self.said if unit.onset < begin]
            due = next((unit.onset for unit in self.said if unit.onset >= begin), begin)
            old = self.transcript
            going = None not in (old, transcript) and old.units == transcript.units
            place = (self.place - (len(self.said) - len(past))) if going else 0
            if transcript is None:
                past.append(Unit(begin, UNKNOWN))
            speech = Speech(tuple(past), transcript, place)
        else:
            due = None
        if transcript is None:
            return speech
        said, place = list(speech.said), speech.place
        while not said or said[-1].onset <= end or due is not None:
            onset = said[-1].onset + 1 / transcript.rate if due is None else due
            over = not transcript.loop and place >= len(transcript.units)
            number = REST if over else transcript.units[place % len(transcript.units)]
            said.append(Unit(onset, number))
            place, due = place + 1, None
        return replace(speech, said=tuple(said), place=place)

    def until(self, end: float) -> Speech:
        """The same as it was after a block that ended at second `end`."""
        kept = 1 + next((i for i, unit in enumerate(self.said) if unit.onset > end), len(self.said))
        place = self.place - len(self.said[kept:])
        if place < 0:  # another transcript was told then
            return Speech(self.said[:kept])
        return replace(self, said=self.said[:kept], place=place)

    def since(self, begin: float) -> Speech:
        """The same without the units that were over before second `begin`, but for the prefix's."""
        first = sum(unit.onset <= begin for unit in self.said) - 1
        return replace(self, said=self.said[:_PREFIX] + self.said[max(_PREFIX, first) :])


def check_speeches(speeches: tuple[Speech, ...], clips: int, channels: int) -> None:
    """Refuse what a network with so many channels of transcript cannot have been told.

    Raises:
        ValueError: another number of speeches than clips, or a unit that it does not have.
    """
    if not speeches:
        return
    units = units_told(channels) if channels else 0
    numbers = [unit.number for speech in speeches for unit in speech.said]
    for speech in speeches:
        numbers += () if speech.transcript is None else speech.transcript.units
    if len(speeches) != clips or not all(UNKNOWN <= number < units for number in numbers):
        raise ValueError(
            f"stream state has {len(speeches)} transcripts with units up to "
            f"{max(numbers, default=0)}, expected {clips} with units below {units}: load the model "
            "that made it, or start a new stream"
        )


def block_seconds(config: TransformerConfig, block: int) -> tuple[float, float]:
    """When the sound of a block begins and ends."""
    frame = config.audio_hop_length / config.audio_sampling_rate
    start, stop = config.layout.audio_span(block)

    def edge(latent: int) -> float:
        return frame * max(0, 1 + config.audio_time_stride * (latent - 1))

    return edge(start), edge(stop)


def block_track(config: TransformerConfig, speeches: tuple[Speech, ...], block: int) -> Tensor:
    """Timed transcript (b, s, c) of a block, one clip for each speech."""
    frame = config.audio_hop_length / config.audio_sampling_rate
    step = config.audio_time_stride * frame
    times = latent_times(*config.layout.audio_span(block), frame, step)
    units = units_told(config.transcript_channels)
    tracks = []
    for speech in speeches:
        onsets = torch.tensor([unit.onset for unit in speech.said], dtype=torch.float64)
        numbers = torch.tensor([unit.number for unit in speech.said], dtype=torch.long)
        tracks.append(transcript_track(onsets, numbers, times, units))
    return torch.stack(tracks)
