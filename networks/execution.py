"""How a pass is carried out on a machine, and what the passes over one stream share.

Every way gives the same numbers: `compiled` fuses the arithmetic between the products, `lanes`
runs audio beside video, `graph` records a pass once and replays it (its thousands of kernels are
then started by the GPU itself). What repeats is the shape of a block once the window is full.

On a CPU a small network's passes are recorded likewise (`tape.py`), by themselves.

Tests run on a CPU, with stand-ins that check what is waited for and that replay over the same
memory; `make parity` runs all of them on a GPU as well.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checked import reason_of
from .config import TransformerConfig
from .kept_keys import Carrier
from .kernels import PLAIN, Kernels, compiled_kernels
from .lanes import ONE_LANE, Lanes, TwoLanes
from .rope import ModalityTables, RopeTable, block_tables
from .tape import Nested, Still, Tape
from .tensor_parallel import part_of
from .triton_kernels import TRITON, triton

logger = logging.getLogger("mutualforcing")

Tensors = tuple[Tensor, ...]
WAYS = ("compiled", "lanes", "graph")
_OLD_NAMES = {"streams": "lanes"}
PATHS = ("eager", *WAYS, "+".join(WAYS))
AUTOMATIC = "automatic"
CHOICES = (AUTOMATIC, *PATHS)
"""What users are offered; `Execution.named` takes every other mixture as well."""


def _unwatched(_stage: str) -> AbstractContextManager[object]:
    return nullcontext()


TAPED_AGAIN = 8
"""Passes before one is noted again that reads in other places, such as those of two prompts while
one passes into the other: that takes longer than to carry it out, and soon is over."""


@dataclass(frozen=True)
class Execution:
    """How passes are carried out; all off is called eager.

    Attributes:
        automatic: as is fastest where the passes run (`chosen`), whatever the others say.
        compiled: fuse the arithmetic between matrix products: kernels in Triton on a GPU,
            torch.compile on a CPU.
        lanes: audio beside video, in a CUDA stream of its own; changes nothing on a CPU.
        graph: replay passes as CUDA graphs once the window is full.
        laid_out: put the past together once a block, not in every pass, for two more copies of it.
        taped: replay passes on a CPU as tapes once the window is full; their past is laid out.
        merged: a block's refresh and the first step of the next one as one pass.
        watch: entered with a stage's name ("open", "denoise", "refresh", "refresh and denoise")
            around its work, to measure it.
    """

    automatic: bool = False
    compiled: bool = False
    lanes: bool = False
    graph: bool = False
    laid_out: bool = False
    taped: bool = False
    merged: bool = True
    watch: Callable[[str], AbstractContextManager[object]] = _unwatched

    @classmethod
    def named(cls, name: str) -> Execution:
        """ "automatic", "eager", "compiled", "lanes", "graph", or several of the last three joined
        by "+".

        Lanes were called "streams" once, and may be still.

        Raises:
            ValueError: another name.
        """
        if name == AUTOMATIC:
            return cls(automatic=True)
        ways = () if name == "eager" else [_OLD_NAMES.get(way, way) for way in name.split("+")]
        if not set(ways) <= set(WAYS):
            raise ValueError(
                f"execution path is {name!r}, expected '{AUTOMATIC}', 'eager' or some of "
                f"{', '.join(WAYS)}, joined by '+'"
            )
        return cls(**dict.fromkeys(ways, True))

    @property
    def name(self) -> str:
        """What `named` makes this of."""
        ways = "+".join(way for way in WAYS if getattr(self, way))
        return AUTOMATIC if self.automatic else ways or "eager"

    def chosen(self, model: nn.Module, device: torch.device, needed: int | None = 0) -> Execution:
        """What is carried out over a model on a device: itself, unless it is automatic.

        `needed` are the bytes of a stream whose past is laid out for graphs, beside the weights;
        None where it cannot be.

        On a CPU plain passes are the fastest, because nothing is won by starting less. On CUDA
        everything that can be had: kernels are fused where they can be compiled, lanes and graphs
        need weights that stay where they are, and graphs room for a past that does as well.
        """
        if not self.automatic:
            return self
        whole = replace(self, automatic=False)
        if device.type != "cuda":
            return whole
        still = replace(whole, graph=True).unfit(model, device) is None
        graph = still and needed is not None and needed <= (free_bytes(device) if needed else 0)
        compiled = replace(whole, compiled=True).unfit(model, device) is None and _compiles(device)
        return replace(whole, compiled=compiled, lanes=still, graph=graph)

    def unavailable(self, device: torch.device) -> str | None:
        """Why this cannot run on a device, or None if it can."""
        if self.graph and device.type != "cuda":
            return f"graphs are CUDA's, and the device is {device.type}"
        if self.compiled and device.type == "cuda" and triton is None:
            return "fused kernels need triton on a GPU, which is not installed"
        if self.compiled and device.type == "cpu":
            compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
            if not any(filter(shutil.which, filter(None, compilers))):
                return "torch.compile needs a C++ compiler on a CPU, and none is on the PATH"
            if not Path(sysconfig.get_path("include"), "Python.h").is_file():
                return "torch.compile needs Python's headers on a CPU (package python3-dev)"
        return None

    def unfit(self, model: nn.Module, device: torch.device) -> str | None:
        """Why this cannot run over a model on a device that could, or None if it can."""
        part = part_of(model)
        if part is not None and (self.graph or self.lanes):
            return (
                "several processes share this model, and what its video and sound have to tell "
                "them goes in one message, so neither lanes nor graphs can be had"
            )
        if part is not None and self.compiled and part.has_none_of_some:
            return "fused kernels need some heads of every kind on each process"
        # "cuda" is a card without a number, and tensors on it have one.
        if self.graph and any(
            found.type != device.type or device.index not in (None, found.index)
            for found in {weight.device for weight in model.parameters()}
        ):
            return (
                "graphs are recorded over weights that stay where they are, and part of this model "
                f"is not on {device} (what holds it brings it there when it is needed)"
            )
        return None


EAGER = Execution()


@cache
def _compiles(device: torch.device) -> bool:
    """Whether fused kernels can be made on a GPU, found out with one of them."""
    if Execution(compiled=True).unavailable(device):
        return False
    row = torch.zeros(1, 1, 16, device=device)
    try:
        _fused_kernels(device).modulate(row, row, row, 1.0)
    except Exception as error:  # what a compiler lacks it says in many ways
        logger.warning("no kernel can be compiled for %s: %s", device, reason_of(error))
        return False
    return True


def free_bytes(device: torch.device) -> int:
    """Memory of a card that nobody uses, PyTorch's own reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def device_named(name: str) -> torch.device:
    """A device that passes can run on: "cpu", "cuda", "cuda:1", "mps" or "xpu".

    Raises:
        ValueError: no such name, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    count = {
        "cpu": lambda: 1,
        "cuda": lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": lambda: int(torch.backends.mps.is_available()),
        "xpu": lambda: torch.xpu.device_count(),
    }.get(device.type)
    if count is None:
        raise ValueError(f"the device is {name[:40]!r}, expected cpu, cuda, cuda:1, mps or xpu")
    if (device.index or 0) >= count():
        kind = "CUDA GPU" if device.type == "cuda" else f"{device.type} device"
        raise ValueError(
            f"the device is {name} and this machine has {'no such' if count() else 'no'} {kind}; "
            "leave it out to run on the CPU"
        )
    return device


def cores() -> int:
    """Cores of the CPU that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """In the body torch computes in one thread. How many there are changes the last bits too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_device(x: Tensor, like: Tensor) -> Tensor:
    """On its way to the device of `like`, in its own dtype; the host does not wait for it."""
    if like.device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(like.device, non_blocking=True)


def _fused_kernels(device: torch.device) -> Kernels:
    return compiled_kernels() if device.type == "cpu" or triton is None else TRITON


def attention_order(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Inside it torch's attention asks cuDNN first from Hopper on, where PyTorch's own flash
    attention is one for the generation before."""
    order = "set_priority" in signature(sdpa_kernel).parameters  # since PyTorch 2.6
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0) or not order:
        return nullcontext
    kinds = "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"
    backends = [getattr(SDPBackend, kind) for kind in kinds]
    return partial(sdpa_kernel, backends, set_priority=True)


def _placed(like: Tensor, x: Tensor) -> Tensor:
    return to_device(x.to(like.dtype), like)


class Workspace:
    """What the passes over one stream share: memory that is used again, a lane, graphs.

    One block may be open in it at a time.

    Raises:
        ValueError: this way of running cannot be had on the device.
    """

    def __init__(self, execution: Execution, device: torch.device) -> None:
        reason = execution.unavailable(device)
        if reason:
            raise ValueError(f"{reason}; choose another execution path, 'eager' runs everywhere")
        two = execution.lanes and device.type == "cuda"
        self.kernels: Kernels = _fused_kernels(device) if execution.compiled else PLAIN
        self.lanes: Lanes = TwoLanes(device) if two else ONE_LANE
        self.watch = execution.watch
        self._attention = attention_order(device)
        self.keeps_still = execution.graph or execution.taped
        """Whether what a pass reads must lie in the same memory each time."""
        self.lays_out = execution.graph or execution.laid_out
        self.taped = execution.taped and not execution.graph
        """Whether passes that repeat are tapes."""
        self._prompts = Still(), Still()
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._tables: tuple[int, ModalityTables] | None = None
        self._of_block: dict[int, ModalityTables] = {}
        self._joined: dict[tuple[int, ...], list[Tensor]] = {}
        self._device, self._carrier = device, None
        self._refused = False
        self._warm: dict[str, tuple[tuple[object, ...], int]] = {}
        self._were_taped: set[tuple[str, int]] = set()
        self._passes: dict[tuple[str, int], tuple[tuple[object, ...], _Recorded | Tape]] = {}
        # What passes make on the way is nobody's once they are done, so they share its memory.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def buffers(self, name: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the keys and values of one attention; the same room again while it fits."""
        held = self._buffers.get(name)
        if held is None or held[0].shape != shape:
            # The old ones go first: there may not be room for both.
            self._buffers.pop(name, None)
            del held
            self._buffers[name] = like.new_empty(shape), like.new_empty(shape)
        return self._buffers[name]

    def brought(self, name: str, place: str) -> tuple[Tensor, Tensor]:
        """The room for one attention's first place, with what lies at another one of its places."""
        own = self.buffers(f"{name}0", self._buffers[place][0].shape, self._buffers[place][0])
        for one, other in zip(own, self._buffers[place], strict=True):
            one.copy_(other)
        return own

    def carrier(self, layers: int) -> Carrier:
        """What brings keys and values from the host's memory, where they are kept there."""
        if self._carrier is None:
            self._carrier = Carrier(self._device, layers)
        return self._carrier

    def tables(
        self, config: TransformerConfig, blocks: int, height: int, width: int, like: Tensor
    ) -> ModalityTables:
        """RoPE tables of `blocks` blocks where they are needed; the last ones are kept."""
        if self._tables is None or self._tables[0] != blocks:
            self._tables = None  # the old ones go first
            made = block_tables(config, range(blocks), height, width, partial(_placed, like))
            self._tables = blocks, made
        return self._tables[1]

    def tables_at(
        self,
        config: TransformerConfig,
        blocks: tuple[int, ...],
        height: int,
        width: int,
        like: Tensor,
        place: int = 0,
    ) -> ModalityTables:
        """RoPE tables of blocks that stand at their own seconds, one after the other.

        Those of as many tokens are laid into the same memory, one for each `place`, which a
        recorded pass reads.
        """

        def one(block: int) -> ModalityTables:
            blocks = range(block, block + 1)
            return block_tables(config, blocks, height, width, partial(_placed, like))

        held = self._of_block
        self._of_block = {block: held[block] if block in held else one(block) for block in blocks}
        joined = [
            torch.cat(parts, dim=1)
            for tables in zip(*self._of_block.values(), strict=True)
            for parts in zip(*tables, strict=True)
        ]
        held_here = self._joined.setdefault((place, *joined[0].shape), joined)
        for own, given in zip(held_here, joined, strict=True):
            own.copy_(given)
        pairs = zip(held_here[::2], held_here[1::2], strict=True)
        return ModalityTables(*(RopeTable(cos, sin) for cos, sin in pairs))

    def still(self, texts: tuple[Nested, ...]) -> tuple[Nested, ...]:
        """The prompts of a pass where it reads them: in the same memory each time, if it is a tape,
        so that it goes on with another prompt."""
        if not self.taped:
            return texts
        *before, last = texts
        own = self._prompts[-1].of(last)
        return *(own if one is last else self._prompts[0].of(one) for one in before), own

    def run(
        self,
        name: str,
        place: int,
        repeats: bool,
        reads: tuple[object, ...],
        function: Callable[..., Tensors],
        *inputs: Tensor,
    ) -> Tensors:
        """function(*inputs), recorded and replayed where that is asked for.

        Args:
            name: of what the function does; one name has one shape while `repeats` is true.
            place: which of the places it reads the past in.
            repeats: the same will be asked for again.
            reads: what the function reads besides its inputs, this workspace and the weights; kept,
                and a pass that reads something else is recorded anew.
        """
        with self._attention():
            if not (self.keeps_still and repeats) or self._refused:
                return function(*inputs)
            known, recorded = self._passes.get((name, place), ((), None))
            if not _same(known, reads):
                before, times = self._warm.get(name, ((), 0))
                times = times + 1 if _same(before, reads) else 0
                self._warm[name] = reads, times
                # The first time warms up: compiles kernels and sets up libraries, which cannot be
                # recorded in a graph.
                again = TAPED_AGAIN if (name, place) in self._were_taped else 0
                if times < (again if self.taped else 1):
                    return function(*inputs)
                del recorded
                self._passes.pop((name, place), None)  # there may not be room for both
                try:
                    if self.taped:
                        recorded = Tape(function, inputs)
                        self._were_taped.add((name, place))
                    else:
                        recorded = _Recorded(function, inputs, self._pool)
                except RuntimeError as error:  # a host's network may wait for the card on the way
                    logger.warning("passes are not recorded: %s", reason_of(error))
                    self._refused = True
                    return function(*inputs)
                self._passes[name, place] = reads, recorded
            return recorded(*inputs)


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return list(map(id, one)) == list(map(id, other))


class _Recorded:
    """A pass as a CUDA graph: it always reads and writes the memory that it was recorded with.

    Inputs are copied in and outputs out. What it reads besides lies still: weights, text keys, RoPE
    tables and the workspace's keys and values. What it makes on the way has memory of its own, or
    of a pool for recordings that are replayed one after the other, on either lane.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        inputs: Tensors,
        pool: tuple[int, int] | None,
    ) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        device = self.inputs[0].device
        lane = torch.cuda.Stream(device)
        # Another thread may decode meanwhile; what it does is not part of this.
        mode = {"stream": lane, "pool": pool, "capture_error_mode": "thread_local"}
        recording = torch.cuda.graph(self.graph, **mode)
        with torch.cuda.device(device), recording:
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensors:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)
