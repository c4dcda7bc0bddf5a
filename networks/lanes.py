"""Audio and video side by side: where the two branches of a pass are issued, and where they wait.

A lane is an order of work. Audio's is small (25 tokens a second) and spends its time on starting
kernels, so on a GPU it runs in a CUDA stream of its own beside the video's. Where one branch reads
what the other has made, both wait (`exchange`); everything else is independent. On a CPU there is
one lane and nothing to wait for; a test watches there that no lane reads what it did not wait for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor


class Lanes(Protocol):
    """Video's work is issued where the caller is, audio's inside `audio()`."""

    def audio(self) -> AbstractContextManager[object]:
        """What is issued inside goes to the audio lane."""
        ...

    def fork(self, *inputs: Tensor | None) -> None:
        """The audio lane may begin, and read these."""
        ...

    def exchange(self, to_video: tuple[Tensor, ...], to_audio: tuple[Tensor, ...]) -> None:
        """Each lane goes on once the other has done its work so far, and may read its tensors."""
        ...

    def join(self, *outputs: Tensor | None) -> None:
        """The caller goes on once the audio lane is done, and may read these."""
        ...


class OneLane:
    """Both branches one after the other."""

    def audio(self) -> AbstractContextManager[object]:
        """Nothing changes."""
        return nullcontext()

    def fork(self, *inputs: Tensor | None) -> None:
        """Nothing to wait for."""

    def exchange(self, to_video: tuple[Tensor, ...], to_audio: tuple[Tensor, ...]) -> None:
        """Nothing to wait for."""

    def join(self, *outputs: Tensor | None) -> None:
        """Nothing to wait for."""


ONE_LANE = OneLane()


class TwoLanes:
    """Audio in a CUDA stream of its own; waits are events on the device, the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self.audio_lane = torch.cuda.Stream(device=device)

    def audio(self) -> AbstractContextManager[object]:
        """Issue on the audio lane."""
        return torch.cuda.stream(self.audio_lane)

    def _callers(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.audio_lane.device)

    def fork(self, *inputs: Tensor | None) -> None:
        """The audio lane waits for what was issued so far."""
        self.audio_lane.wait_stream(self._callers())
        _in_use(self.audio_lane, inputs)

    def exchange(self, to_video: tuple[Tensor, ...], to_audio: tuple[Tensor, ...]) -> None:
        """Each lane waits for what the other was given so far, and for nothing later."""
        video_lane = self._callers()
        video_done, audio_done = video_lane.record_event(), self.audio_lane.record_event()
        video_lane.wait_event(audio_done)
        self.audio_lane.wait_event(video_done)
        _in_use(video_lane, to_video)
        _in_use(self.audio_lane, to_audio)

    def join(self, *outputs: Tensor | None) -> None:
        """The caller's lane waits for the audio lane."""
        callers = self._callers()
        callers.wait_stream(self.audio_lane)
        _in_use(callers, outputs)


def _in_use(lane: torch.cuda.Stream, tensors: tuple[Tensor | None, ...]) -> None:
    """Keep memory of another lane from being handed out again while this one reads it."""
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(lane)
