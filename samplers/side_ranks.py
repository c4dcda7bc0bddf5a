"""Ranks 1, 2, ... of a stream in processes beside this one, for a host that torchrun can't start.

This process is rank 0. What it makes of a rollout the others make along (`rank_process.py`), each
with its part of every layer. They are told by pipes of their own: so a host may wait between two
blocks for as long as it likes, and a process whose pipe is closed ends, however this one ended.
They find each other by a file, and talk over the loopback interface where there is one of a usual
name.
"""

from __future__ import annotations

import io
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..networks.config import TransformerConfig
from ..networks.execution import device_named
from ..networks.layer import Text
from ..networks.tensor_parallel import Part, RankLostError, Shares
from ..networks.transformer import text_keys
from .clock import Clock
from .model import StreamModel
from .ranks import PATIENCE, part_of_cache
from .rollout import BeginAgain, NonFiniteBlockError, SamplerSettings, rollout
from .schedule import Line, Prompt, Schedule
from .speech import Transcript
from .state import BlockLatents, StreamState

Look = Callable[[], None]
ONE = "one"
"""What stands for a whole model in this process."""
PROMPT, UNGUIDED = "prompt", "unguided"
READY = "ready"
_LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"
_LOOPBACK = ("lo", "lo0")
_NAMED_BY = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_TO_END = 2.0
"""Seconds that a process has to end by itself."""
_RUNNING: weakref.WeakSet[SideRanks] = weakref.WeakSet()
"""At most one: they have PyTorch's process group, of which a process has one."""


class Load(Protocol):
    """Reads one rank's part of a network onto its device; it goes through a pipe."""

    def __call__(
        self, *, part: Callable[[TransformerConfig], Part], device: torch.device
    ) -> nn.Module: ...


class Started(NamedTuple):
    """The first message to a rank: what it is."""

    load: Load
    rank: int
    devices: tuple[str, ...]
    store: str


class Asked(NamedTuple):
    """A rollout begins.

    Attributes:
        state: with the keys of the rank's own heads.
        options: of `rollout`.
    """

    state: StreamState
    sampler: SamplerSettings
    config: TransformerConfig
    model_id: str
    dtype: torch.dtype
    options: Mapping[str, object]


class Due(NamedTuple):
    """What to follow in the next block."""

    line: Line | None


class Contexts(NamedTuple):
    """Caption embeddings to make text keys of, of a prompt or of the one to lead away from."""

    name: str
    video: Tensor
    audio: Tensor


class Read(NamedTuple):
    """A text was read: the prompt is that of the last contexts; None where it can't be had."""

    transcripts: tuple[Transcript | None, ...] | None
    guided: bool = False


class Go(NamedTuple):
    """Take the next step."""


class Again(NamedTuple):
    """Begin the block anew."""


class Over(NamedTuple):
    """The rollout has ended, for whatever reason."""


class Place(NamedTuple):
    """Where the weights are to lie."""

    device: str


def devices_named(text: str, first: torch.device) -> tuple[torch.device, ...]:
    """The devices that somebody wrote for one model.

    Args:
        text: "one", "all" cards, or names with commas between them: "cuda:0, cuda:1".
        first: this process's own.

    Raises:
        ValueError: one that is not there, or they can't share a model.
    """
    text = text.strip().lower()
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if text in ("", ONE):
        return (first,)
    if text == "all":
        return (first, *(card for card in cards if card != first)) if first in cards else (first,)
    found = tuple(device_named(name.strip()) for name in text.split(","))
    if found == (first,):
        return found
    apart = len(set(found)) == len(found) and set(found) <= set(cards)
    if found[0] != first or not (apart or {device.type for device in found} == {"cpu"}):
        raise ValueError(
            f"devices are {', '.join(map(str, found))}, expected {first} first, which is "
            "ComfyUI's own, and then other cards, each once, as in 'cuda:0, cuda:1'"
        )
    if not dist.is_available():
        raise ValueError("this PyTorch has no torch.distributed: choose one device")
    return found


def join(rank: int, devices: Sequence[str], store: str) -> torch.device:
    """Make a process one of the ranks; where it computes.

    Raises:
        RuntimeError: it does not reach the others.
    """
    device = torch.device(devices[rank])
    options = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device  # connects at once
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(store, len(devices)),
        rank=rank,
        world_size=len(devices),
        timeout=PATIENCE,
        **options,
    )
    return device


def part_of_rank(config: TransformerConfig, rank: int, devices: Sequence[str]) -> Part:
    """What a rank holds of a network: heads are shared out alike."""
    shares = Shares.of(config, (1.0,) * len(devices))
    return Part(config, shares, rank, torch.device(devices[rank]))


@dataclass
class _Processes:
    """Ranks that run, until they are ended.

    Attributes:
        replies: (rank, what it says: nothing if it has its part, else why not).
    """

    started: list[subprocess.Popen]
    folder: tempfile.TemporaryDirectory
    replies: queue.Queue = field(default_factory=queue.Queue)
    joined: bool = False
    placed: bool = True

    def hear(self, rank: int, process: subprocess.Popen) -> None:
        """Wait for what one says, and for its end; a card would wait for it for ever."""
        self.replies.put((rank, process.stdout.read().decode(errors="replace")))
        process.wait()
        if self.joined and dist.is_initialized() and dist.get_backend() == "nccl":
            with suppress(RuntimeError):
                dist.group.WORLD.abort()

    def tell(self, message: bytes, rank: int | None = None) -> None:
        """To one, or to all.

        Raises:
            RankLostError: one is gone.
        """
        chosen = self.started if rank is None else [self.started[rank - 1]]
        try:
            for process in chosen:
                process.stdin.write(message)
                process.stdin.flush()
        except OSError as error:
            raise RankLostError from error

    def end(self) -> None:
        """End them all, and leave nothing behind."""
        if self.joined:
            self.joined = False
            with suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group()
        for process in self.started:
            with suppress(OSError):
                process.stdin.close()
        for process in self.started:
            try:
                process.wait(_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.folder.cleanup()


class SideRanks:
    """The other ranks of one model. They are started when they are needed, and again if they died;
    those of another model end then. They end with this object, and with this process.

    Args:
        devices: of all ranks, this process's first.
        load: reads a part of the model in the others.
    """

    def __init__(self, devices: Sequence[torch.device], load: Load) -> None:
        self.devices = tuple(map(str, devices))
        self.load = load
        self._processes: _Processes | None = None
        self._end: Callable[[], None] = lambda: None
        # Which rollout is going on, and whether it is where the others wait to be told.
        self._turn: object | None = None
        self._rests = True

    def part(self, config: TransformerConfig) -> Part:
        """What this process holds of the model."""
        return part_of_rank(config, 0, self.devices)

    def start(self) -> None:
        """Begin to start the others, unless they run.

        Raises:
            ValueError: something else has PyTorch's process group.
        """
        running = self._processes
        if running is not None and all(process.poll() is None for process in running.started):
            return
        self.end()
        for other in tuple(_RUNNING):
            other.end()
        if dist.is_initialized():
            raise ValueError(
                "something else in this process uses torch.distributed, which a process can do "
                "once: choose one device, or start ComfyUI without that"
            )
        command = [sys.executable, str(_LAUNCH), "samplers.rank_process", _package()]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = os.environ | _on_loopback()
        folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        processes = self._processes = _Processes([], folder)
        self._end = weakref.finalize(self, processes.end)
        _RUNNING.add(self)
        for rank in range(1, len(self.devices)):
            process = subprocess.Popen(command, env=environment, **pipes)
            processes.started.append(process)
            threading.Thread(target=processes.hear, args=(rank, process), daemon=True).start()
            store = str(Path(folder.name) / "store")
            with suppress(RankLostError):  # it says why itself
                processes.tell(_packed(Started(self.load, rank, self.devices, store)), rank)

    def ready(self, look: Look = lambda: None) -> None:
        """Have the others started, with their parts where they compute.

        Args:
            look: called a few times a second; what it raises ends the wait, and them.

        Raises:
            ValueError: one could not be started, or could not load its part.
        """
        self.start()
        processes = self._processes
        if not processes.joined:
            try:
                self._await(processes, look)
            except BaseException:
                self.end()
                raise
        elif not processes.placed:
            for rank, device in enumerate(self.devices):
                if rank:
                    processes.tell(_packed(Place(device)), rank)
        processes.placed = True

    def _await(self, processes: _Processes, look: Look) -> None:
        waiting = len(processes.started)
        while waiting:
            look()
            with suppress(queue.Empty):
                rank, said = processes.replies.get(timeout=0.2)
                said = said.rpartition("\n")[-1]  # after what a library may have printed
                if said != READY:
                    reason = said or "it ended; ComfyUI's log may say why"
                    raise ValueError(
                        f"the process for {self.devices[rank]} did not come up ({reason}): choose "
                        "other devices, or one"
                    )
                waiting -= 1
        before = {name: os.environ.get(name) for name in _NAMED_BY}
        os.environ.update(_on_loopback())
        try:
            processes.tell(_packed(Go()))
            join(0, self.devices, str(Path(processes.folder.name) / "store"))
            processes.joined = True
        except RuntimeError as error:
            raise ValueError(
                f"the processes of this model do not reach each other ({str(error)[:200]})"
            ) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def park(self) -> None:
        """Have the others' parts in the computer's memory until they are needed again."""
        processes = self._processes
        if processes is not None and processes.joined and processes.placed:
            processes.placed = False
            with suppress(RankLostError):  # whoever needs them is told
                processes.tell(_packed(Place("cpu")))

    def end(self) -> None:
        """End the others."""
        self._end()
        _RUNNING.discard(self)
        self._processes, self._turn, self._rests = None, None, True

    def text_keys(self, model: nn.Module, name: str, video: Tensor, audio: Tensor) -> Text:
        """As `networks.transformer.text_keys`, on all ranks; while a schedule of a rollout reads a
        text.

        Args:
            name: whose: `PROMPT` or `UNGUIDED`.

        Raises:
            RankLostError: another rank is gone.
        """
        self._tell(Contexts(name, video.cpu(), audio.cpu()))
        self._rests = False
        keys = text_keys(model, video, audio)
        self._rests = True
        return keys

    def rollout(
        self,
        model: StreamModel,
        prompt: Schedule,
        state: StreamState,
        blocks: int | None,
        sampler: SamplerSettings,
        *,
        on_step: Callable[..., None] | None = None,
        on_rebuild: Callable[..., None] | None = None,
        settle: Callable[[StreamState], StreamState] | None = None,
        **options: object,
    ) -> Iterator[tuple[BlockLatents, StreamState]]:
        """As `rollout`, on all ranks. What ends it between two steps, or between two blocks, ends
        it for all, and they wait for the next one; what ends it elsewhere ends the other ranks.

        Args:
            prompt: its texts must be read by way of `text_keys`, in each rollout anew.

        Raises:
            ValueError, NonFiniteBlockError, RankLostError: as `rollout`.
        """
        if self._processes is None or not self._processes.joined:
            raise RankLostError
        if self._turn is not None:  # nobody has closed the last one yet
            self._over(self._turn)
        turn = self._turn = object()
        config, dtype = model.transformer.config, model.like.dtype
        told = self._for_others(state, guided=sampler.guidance != 1)
        asked = Asked(told, sampler, config, model.model_id, dtype, options)
        try:
            for rank in range(1, len(self.devices)):
                other = part_of_rank(config, rank, self.devices)
                own = replace(
                    told,
                    cache=told.cache and part_of_cache(other, told.cache),
                    unguided=told.unguided and part_of_cache(other, told.unguided),
                )
                self._processes.tell(_packed(asked._replace(state=own)), rank)
            made = rollout(
                model,
                _Led(prompt, self),
                state,
                blocks,
                sampler,
                on_step=partial(self._go, on_step),
                on_rebuild=partial(self._go, on_rebuild),
                settle=settle,
                **options,
            )
        except RankLostError:
            self.end()
            raise
        except BaseException:
            self._rests = True
            self._over(turn)
            raise
        return self._each(made, turn)

    def _each(self, made: Iterator, turn: object) -> Iterator[tuple[BlockLatents, StreamState]]:
        try:
            for item in made:
                if any(process.poll() is not None for process in self._processes.started):
                    raise RankLostError
                self._rests = True
                yield item
        except (ValueError, NonFiniteBlockError):  # alike on all
            self._rests = True
            raise
        finally:
            self._over(turn)

    def _for_others(self, state: StreamState, guided: bool) -> StreamState:
        """What another rank needs of a state."""
        state = replace(state, memory=None)
        if not guided:
            state = replace(state, unguided=None)
        caches = (state.cache, state.unguided)[: 1 + guided]
        if any(cache is None or cache.next_block + 1 < state.next_block for cache in caches):
            return state  # keys are made again from the beginning on
        return state.trimmed(decoding=False)

    def _go(self, call: Callable[..., None] | None, *told: object) -> None:
        """At a step: what raises here ends it for all at the same place."""
        self._rests = True
        if call is not None:
            try:
                call(*told)
            except BeginAgain:
                self._tell(Again())
                raise
        self._tell(Go())
        self._rests = False

    def _tell(self, message: NamedTuple) -> None:
        if self._processes is None:
            raise RankLostError
        self._processes.tell(_packed(message))

    def _over(self, turn: object) -> None:
        """End a rollout for the others: where they wait, or they with it."""
        if turn is not self._turn:
            return
        self._turn = None
        if not self._rests:
            self.end()
            return
        try:
            self._tell(Over())
        except RankLostError:
            self.end()


class _Led:
    """A schedule whose lines and texts the other ranks are told as they become due."""

    def __init__(self, schedule: Schedule, ranks: SideRanks) -> None:
        self._schedule, self._ranks = schedule, ranks

    @property
    def clock(self) -> Clock:
        return self._schedule.clock

    def heard(self, block: int) -> None:
        self._schedule.heard(block)
        self._ranks._tell(Due(self._schedule.due(block)))
        self._ranks._rests = False

    def due(self, block: int) -> Line | None:
        return self._schedule.due(block)

    def encode(self, texts: tuple[str, ...]) -> Prompt | None:
        ranks = self._ranks
        ranks._rests = True
        prompt = self._schedule.encode(texts)
        read = Read(None)
        if prompt is not None:
            read = Read(prompt.transcripts, prompt.unguided is not None)
        ranks._tell(read)
        ranks._rests = False
        return prompt


class _Packer(pickle.Pickler):
    """Tensors without the rest of the memory that they are views of: files of a whole stream."""

    def reducer_override(self, value: object) -> object:
        """See pickle."""
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
            return value.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _packed(message: object) -> bytes:
    content = io.BytesIO()
    _Packer(content, pickle.HIGHEST_PROTOCOL).dump(message)
    return content.getvalue()


def _package() -> str:
    """What this pack is called here: a host names it by its folder."""
    return __package__.rpartition(".")[0]


def _on_loopback() -> dict[str, str]:
    """Environment in which processes that talk to each other are not reached from elsewhere."""
    names = {name for _, name in socket.if_nameindex()}
    found = next((name for name in _LOOPBACK if name in names), None)
    return {} if found is None else dict.fromkeys(_NAMED_BY, found)
