"""Audio and video side by side: where the two branches of a pass are issued, and where they wait.

A lane is an order of work. Audio's is small (25 tokens a second) and spends its time on starting
kernels, so on a GPU it runs on a stream of its own beside the video's. Where one branch reads what
the other has made, both wait (`exchange`); everything else is independent. On a CPU there is one
lane and nothing to wait for. `TwoStreams` itself has not run on a GPU yet; a test watches on a CPU
that no lane reads what it did not wait for.
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


class TwoStreams:
    """Audio on a CUDA stream of its own; waits are events on the device, the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device=device)

    def audio(self) -> AbstractContextManager[object]:
        """Issue on the audio stream."""
        return torch.cuda.stream(self.side)

    def _main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.side.device)

    def fork(self, *inputs: Tensor | None) -> None:
        """The audio stream waits for what was issued so far."""
        self.side.wait_stream(self._main())
        _in_use(self.side, inputs)

    def exchange(self, to_video: tuple[Tensor, ...], to_audio: tuple[Tensor, ...]) -> None:
        """Each stream waits for what the other was given so far, and for nothing later."""
        main = self._main()
        made_video, made_audio = main.record_event(), self.side.record_event()
        main.wait_event(made_audio)
        self.side.wait_event(made_video)
        _in_use(main, to_video)
        _in_use(self.side, to_audio)

    def join(self, *outputs: Tensor | None) -> None:
        """The caller's stream waits for the audio stream."""
        main = self._main()
        main.wait_stream(self.side)
        _in_use(main, outputs)


def _in_use(stream: torch.cuda.Stream, tensors: tuple[Tensor | None, ...]) -> None:
    """Keep memory that another lane allocated from being reused while this one reads it."""
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)
