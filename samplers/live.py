"""Pictures and sound of every block as soon as it is made, for a stream that may have begun long before."""

from __future__ import annotations

from collections.abc import Iterator

from .decode import DecodedBlock, StreamDecoder
from .state import BlockLatents, StreamState


def decoded_live(
    made: Iterator[tuple[BlockLatents, StreamState]], decoder: StreamDecoder, before: StreamState
) -> Iterator[tuple[DecodedBlock, StreamState]]:
    """Decode what a rollout yields, block by block, without a seam to what came before it.

    Args:
        made: a rollout that goes on from `before`.
    """
    memory = decoder.remember(before, before.next_block)
    for latents, state in made:
        decoded, memory = decoder.decode(latents, memory)
        yield decoded, state
