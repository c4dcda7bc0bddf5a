"""How a pass is carried out on a machine, and what the passes over one stream share.

Every way gives the same numbers: `compiled` fuses the arithmetic between the products, `streams` runs audio
beside video, `graph` records a pass once and replays it (its thousands of kernels are then started by the GPU
itself). What repeats is the shape of a block once the window is full.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from .config import TransformerConfig
from .kernels import PLAIN, Kernels, compiled_kernels
from .lanes import ONE_LANE, Lanes, TwoStreams
from .rope import StreamTables, stream_tables

Tensors = tuple[Tensor, ...]
WAYS = ("compiled", "streams", "graph")


def _unwatched(_stage: str) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Execution:
    """How passes are carried out; all off is called eager.

    Attributes:
        compiled: fuse the arithmetic between matrix products with torch.compile.
        streams: audio on a CUDA stream of its own; changes nothing on a CPU.
        graph: replay passes as CUDA graphs once the window is full.
        watch: entered with a stage's name ("open", "denoise", "refresh") around its work, to measure it.
    """

    compiled: bool = False
    streams: bool = False
    graph: bool = False
    watch: Callable[[str], AbstractContextManager[object]] = _unwatched

    @classmethod
    def named(cls, name: str) -> Execution:
        """ "eager", "compiled", "streams", "graph", or several of the last three joined by "+".

        Raises:
            ValueError: another name.
        """
        ways = () if name == "eager" else tuple(name.split("+"))
        if not set(ways) <= set(WAYS):
            raise ValueError(
                f"execution path is {name!r}, expected 'eager' or some of {', '.join(WAYS)}, joined by '+'"
            )
        return cls(**dict.fromkeys(ways, True))

    def unavailable(self, device: torch.device) -> str | None:
        """Why this cannot run on a device, or None if it can."""
        if self.graph and device.type != "cuda":
            return f"graphs are CUDA's, and the device is {device.type}"
        if self.compiled and device.type == "cuda" and find_spec("triton") is None:
            return "torch.compile needs triton on a GPU, which is not installed"
        compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
        if (
            self.compiled
            and device.type == "cpu"
            and not any(filter(shutil.which, filter(None, compilers)))
        ):
            return "torch.compile needs a C++ compiler on a CPU, and none is on the PATH"
        return None


EAGER = Execution()


class Workspace:
    """What the passes over one stream share: memory that is used again, a second lane, recorded passes.

    One block may be open in it at a time.

    Raises:
        ValueError: this way of running cannot be had on the device.
    """

    def __init__(self, execution: Execution, device: torch.device) -> None:
        reason = execution.unavailable(device)
        if reason:
            raise ValueError(f"{reason}; choose another execution path, 'eager' runs everywhere")
        two = execution.streams and device.type == "cuda"
        self.kernels: Kernels = compiled_kernels() if execution.compiled else PLAIN
        self.lanes: Lanes = TwoStreams(device) if two else ONE_LANE
        self.watch = execution.watch
        self._records = execution.graph
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._tables: tuple[int, StreamTables] | None = None
        self._passes: dict[object, _Recorded | None] = {}

    def buffers(self, path: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the keys and values of one attention path; the same room again while it fits."""
        found = self._buffers.get(path)
        if found is None or found[0].shape != shape:
            # The old ones go first: there may not be room for both.
            self._buffers.pop(path, None)
            del found
            self._buffers[path] = like.new_empty(shape), like.new_empty(shape)
        return self._buffers[path]

    def tables(
        self, config: TransformerConfig, blocks: int, height: int, width: int, like: Tensor
    ) -> StreamTables:
        """RoPE tables of `blocks` blocks where they are needed; the last ones are kept."""
        if self._tables is None or self._tables[0] != blocks:
            whole = stream_tables(config, blocks, height, width)
            self._tables = blocks, StreamTables(*(table.to(like) for table in whole))
        return self._tables[1]

    def run(
        self,
        name: str,
        repeats: bool,
        reads: object,
        function: Callable[..., Tensors],
        *inputs: Tensor,
    ) -> Tensors:
        """function(*inputs), recorded and replayed where that is asked for.

        Args:
            name: of what the function does; one name has one shape while `repeats` is true.
            repeats: the same will be asked for again.
            reads: what the function reads besides its inputs, this workspace and the weights; kept, and a
                pass that reads something else is another pass.
        """
        if not (self._records and repeats):
            return function(*inputs)
        key = name, id(reads)
        if key not in self._passes:
            # The first time warms up: compiles kernels and sets up libraries, which cannot be recorded.
            self._passes[key] = None
            return function(*inputs)
        recorded = self._passes[key]
        if recorded is None:
            recorded = self._passes[key] = _Recorded(function, inputs, reads)
        return recorded(inputs)


class _Recorded:
    """A pass as a CUDA graph: it always reads and writes the memory that it was recorded with."""

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors, reads: object) -> None:
        self.reads = reads
        self.inputs = tuple(x.clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        # Another thread may decode meanwhile; what it does is not part of this.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def __call__(self, inputs: Tensors) -> Tensors:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)
