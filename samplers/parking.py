"""Between two nodes a stream's keys and values wait in the host's memory, not on the graphics card.

A host keeps what is on its wires for as long as the graph is open and does not count it as memory
in use. For LTX-2 a second of keys and values is over a gigabyte; on the card they would be in the
way of every decoder and every other model. Two states that share blocks go on sharing them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..networks.kv_cache import RollingCache
from .state import BlockLatents, StreamState

SPOOLED_AT_ONCE = 16
"""Blocks that go to disk together: each file is a mapping of its own, and a system has so many."""


def parked(state: StreamState, before: StreamState) -> StreamState:
    """The same state with its keys and values in the host's memory.

    Args:
        before: what `state` went on from; blocks that it holds are not copied again.
    """
    memory = state.memory
    return replace(
        state,
        cache=_on_host(state.cache, before.cache),
        unguided=_on_host(state.unguided, before.unguided),
        memory=memory and memory._replace(decoders=memory.decoders.to(torch.device("cpu"))),
    )


def spooled(state: StreamState, folder: Path) -> StreamState:
    """The same state with the latents that going on does not need in files in `folder`.

    They are mapped, so they are read when somebody asks for them and take no memory otherwise, and
    the files have no name any more: nothing is left behind, whatever happens. Bit for bit the same.
    Where nothing can be written or mapped they stay in memory.
    """
    first = next((i for i, block in enumerate(state.latents) if not _on_disk(block)), None)
    last = len(state.latents) - state.settings.window - 2
    if first is None or last - first < SPOOLED_AT_ONCE:
        return state
    blocks = state.latents[first:last]
    tensors = [tensor for block in blocks for tensor in block]
    sizes = [tensor.numel() for tensor in tensors]
    try:
        with tempfile.NamedTemporaryFile(prefix=".latents-", dir=folder) as file:
            for tensor in tensors:
                file.write(memoryview(tensor.contiguous().numpy()))
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=sum(sizes), dtype=torch.float32)
    except (OSError, RuntimeError):  # PyTorch's own, where a file cannot be mapped
        return state
    flat = iter(mapped.split(sizes))
    moved = [BlockLatents(*(next(flat).view(x.shape) for x in block)) for block in blocks]
    return replace(state, latents=(*state.latents[:first], *moved, *state.latents[last:]))


def _on_disk(block: BlockLatents) -> bool:
    return block.video.untyped_storage().filename is not None


def _on_host(cache: RollingCache | None, before: RollingCache | None) -> RollingCache | None:
    if cache is None:
        return None
    held = {} if before is None else dict(zip(before.indices, before.blocks, strict=True))
    blocks = (held.get(i, block) for i, block in zip(cache.indices, cache.blocks, strict=True))
    return replace(cache, blocks=tuple(block.map(Tensor.cpu) for block in blocks))
