"""Pictures and sound of every block as soon as it is made, whenever its stream began.

While one block is decoded, shown and written, the next is denoised (`ahead`): in a thread and, on a
GPU, on a stream of its own, so that neither waits for the other.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from .decode import DecodedBlock, StreamDecoder
from .state import BlockLatents, StreamState

Item = TypeVar("Item")


def decoded_live(
    made: Iterator[tuple[BlockLatents, StreamState]],
    decoder: StreamDecoder,
    before: StreamState,
    *,
    overlap: bool | None = None,
) -> Iterator[tuple[DecodedBlock, StreamState]]:
    """Decode what a rollout yields, block by block, without a seam to what came before it.

    Args:
        made: a rollout that goes on from `before`.
        overlap: denoise the next block while this one is decoded and used. The blocks are the same;
            an error of either side comes after all blocks that were finished before it. By default
            where it pays: on a GPU; on a CPU both want the same cores.
    """
    memory = decoder.remember(before, before.next_block)
    device = next(decoder.video_codec.parameters()).device
    if overlap is None:
        overlap = device.type == "cuda"
    for latents, state in ahead(made, device) if overlap else made:
        decoded, memory = decoder.decode(latents, memory)
        yield decoded, state


def ahead(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """The same items in order, each made while the one before it is in use, none earlier.

    What raises while an item is made is raised where that item would have come. Closing this waits
    for the item that is being made.

    Args:
        device: where items are made; on a GPU they get a stream of their own there.
    """
    end = object()
    # A thread begins without any of its maker's settings, torch's among them.
    context, inference = contextvars.copy_context(), torch.is_inference_mode_enabled()
    lane = _side_stream(device)

    def following() -> object:
        with torch.inference_mode(inference), lane:
            return next(items, end)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout") as thread:
        item = thread.submit(context.run, following)
        while True:
            made = item.result()
            if made is end:
                return
            item = thread.submit(context.run, following)
            yield made


def _side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Where the items' work goes; it begins after everything that the caller has started."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device=device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
