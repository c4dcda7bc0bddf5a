"""Between two nodes a stream's keys and values wait in the host's memory, not on the graphics card.

A host keeps what is on its wires for as long as the graph is open and does not count it as memory
in use. For LTX-2 a second of keys and values is over a gigabyte; on the card they would be in the
way of every decoder and every other model. Two states that share blocks go on sharing them.
"""

from __future__ import annotations

from dataclasses import replace

from ..networks.kv_cache import RollingCache
from .state import StreamState


def parked(state: StreamState, before: StreamState) -> StreamState:
    """The same state with its keys and values in the host's memory.

    Args:
        before: what `state` went on from; blocks that it holds are not copied again.
    """
    return replace(
        state,
        cache=_on_host(state.cache, before.cache),
        unguided=_on_host(state.unguided, before.unguided),
    )


def _on_host(cache: RollingCache | None, before: RollingCache | None) -> RollingCache | None:
    if cache is None:
        return None
    held = {} if before is None else dict(zip(before.indices, before.blocks, strict=True))
    blocks = (held.get(i, block) for i, block in zip(cache.indices, cache.blocks, strict=True))
    return replace(
        cache,
        blocks=tuple(type(block)(*((k.cpu(), v.cpu()) for k, v in block)) for block in blocks),
    )
