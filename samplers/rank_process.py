"""One rank in a process of its own: follows what the first one tells it, until that is gone.

Started by `side_ranks.py`, with the name that the pack has in the first process: messages name
classes by it.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import BinaryIO, TypeVar

import torch
from torch import nn

from ..networks.checked import reason_of
from ..networks.layer import Text
from ..networks.tensor_parallel import RankLostError
from ..networks.transformer import text_keys
from .clock import Clock
from .model import BareModel
from .rollout import BeginAgain, NonFiniteBlockError, rollout
from .schedule import Line, Prompt
from .side_ranks import (
    PROMPT,
    READY,
    UNGUIDED,
    Again,
    Asked,
    Contexts,
    Due,
    Go,
    Over,
    Place,
    Read,
    Started,
    join,
    part_of_rank,
)
from .state import StreamState

logger = logging.getLogger("mutualforcing")

Message = TypeVar("Message")
_HERE = __package__.rpartition(".")[0]


class _Ended(Exception):  # noqa: N818 - nothing went wrong
    """The first process has ended the rollout."""


class _Messages(pickle.Unpickler):
    """What the parent sends, by this process's name of the pack. Nobody else has the pipe."""

    def __init__(self, pipe: BinaryIO, package: str) -> None:
        super().__init__(pipe)
        self._package = f"{package}."

    def find_class(self, module: str, name: str) -> object:
        if module.startswith(self._package):
            module = f"{_HERE}.{module.removeprefix(self._package)}"
        return super().find_class(module, name)


class Inbox:
    """What the first process tells. The process ends when there is nobody to tell it anything, in
    whatever it is then; it may be waiting for a card."""

    def __init__(self, pipe: BinaryIO, package: str) -> None:
        self._queue: queue.Queue[object] = queue.Queue()
        self._pipe, self._package = pipe, package
        self.module: nn.Module | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        status = 1
        try:
            while True:
                self._queue.put(_Messages(self._pipe, self._package).load())
        except EOFError:
            status = 0
        except Exception:
            logger.exception("what the first process tells cannot be read")
        finally:
            os._exit(status)

    def next(self) -> object:
        """The next message that is not about where the weights are, which is done here."""
        while True:
            message = self._queue.get()
            if not isinstance(message, Place):
                return message
            self.module.to(message.device)
            if message.device == "cpu" and torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # else the card stays as full as it was

    def expected(self, kind: type[Message]) -> Message:
        """The next message, which is of this kind unless the rollout is over."""
        message = self.next()
        if not isinstance(message, kind):
            raise _Ended
        return message

    def go(self, *_told: object) -> None:
        """Wait until the next step may be taken."""
        message = self.next()
        if isinstance(message, Again):
            raise BeginAgain
        if not isinstance(message, Go):
            raise _Ended


class _Followed:
    """The first process's schedule, as far as it is due."""

    def __init__(self, inbox: Inbox, clock: Clock, device: torch.device) -> None:
        self.clock, self._inbox, self._device = clock, inbox, device
        self._texts: dict[str, Text] = {}
        self._line: Line | None = None

    def heard(self, _block: int) -> None:
        self._line = self._inbox.expected(Due).line

    def due(self, _block: int) -> Line | None:
        return self._line

    def encode(self, texts: tuple[str, ...]) -> Prompt | None:
        while isinstance(message := self._inbox.next(), Contexts):
            contexts = (x.to(self._device) for x in (message.video, message.audio))
            self._texts[message.name] = text_keys(self._inbox.module, *contexts)
        if not isinstance(message, Read):
            raise _Ended
        if message.transcripts is None:
            return None
        unguided = self._texts[UNGUIDED] if message.guided else None
        return Prompt(self._texts[PROMPT], unguided, message.transcripts, texts)


def follow(inbox: Inbox, asked: Asked, device: torch.device) -> None:
    """Take a rollout's steps along with the first process, until it is over."""
    inbox.module.config = asked.config
    model = BareModel(
        inbox.module, asked.model_id, torch.empty(0, device=device, dtype=asked.dtype)
    )
    schedule = _Followed(inbox, Clock.of(asked.config), device)
    with torch.no_grad():
        for _ in rollout(
            model,
            schedule,
            asked.state,
            None,
            asked.sampler,
            on_step=inbox.go,
            on_rebuild=inbox.go,
            settle=partial(StreamState.trimmed, decoding=False),
            **asked.options,
        ):
            pass


def main(package: str) -> None:
    """Load the part, say so, and follow."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the first process
    said = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the host's log
    inbox = Inbox(sys.stdin.buffer, package)
    started = inbox.expected(Started)
    rank, devices = started.rank, started.devices
    device = torch.device(devices[rank])
    torch.set_num_threads(1)
    try:
        inbox.module = started.load(
            part=partial(part_of_rank, rank=rank, devices=devices), device=device
        )
        reply = READY
    except (RuntimeError, ValueError, OSError) as error:
        reply = reason_of(error)
    os.write(said, reply.encode())
    os.close(said)
    inbox.go()
    join(rank, devices, started.store)
    try:
        while True:
            _take_part(inbox, device)
    except RankLostError:
        pass  # the first process has ended, or says why
    except Exception:
        logger.exception("rank %d ends", rank)
    os._exit(1)  # at once: the others wait for what this one gives, and an orderly end may not come


def _take_part(inbox: Inbox, device: torch.device) -> None:
    """In the next rollout; nothing of it is left on the device."""
    message = inbox.next()
    if isinstance(message, Asked):
        # The first process knows, or has found the same.
        with suppress(_Ended, ValueError, NonFiniteBlockError):
            follow(inbox, message, device)
    elif not isinstance(message, Over):
        raise RuntimeError(f"found {type(message).__name__} between two rollouts")


if __name__ == "__main__":
    main(sys.argv[1])
