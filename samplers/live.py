"""From a prompt to pictures and sound, block by block: the one trip that every clip makes.

While one block is denoised, the one before it is decoded and used (shown, written): in a thread
and, on a GPU, on a stream of its own, so that neither waits for the other.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch

from ..networks.execution import cores
from .decode import DecodedBlock, StreamDecoder
from .model import StreamModel
from .rollout import Prompt, SamplerSettings, rollout
from .state import BlockLatents, Memory, StreamState

Item = TypeVar("Item")
Result = TypeVar("Result")
Use = Callable[[DecodedBlock, StreamState], None]


def live_clip(
    model: StreamModel,
    prompt: Prompt,
    state: StreamState,
    blocks: int,
    sampler: SamplerSettings,
    decoder: StreamDecoder,
    use: Use | None = None,
    *,
    overlap: bool | None = None,
    **options: object,
) -> Iterator[tuple[DecodedBlock, StreamState]]:
    """Generate and decode `blocks` further blocks of a stream: each with the state after it.

    Args:
        use, overlap: as for `decoded_live`.
        options: as for `rollout`, errors likewise.
    """
    made = rollout(model, prompt, state, blocks, sampler, **options)
    return decoded_live(made, decoder, state, use, overlap=overlap)


def decoded_live(
    made: Iterator[tuple[BlockLatents, StreamState]],
    decoder: StreamDecoder,
    before: StreamState,
    use: Use | None = None,
    *,
    overlap: bool | None = None,
) -> Iterator[tuple[DecodedBlock, StreamState]]:
    """Decode what a rollout yields, block by block, without a seam to what came before it.

    Args:
        made: a rollout that goes on from `before`.
        use: called with every block as soon as it is decoded, and the state after it; where work
            overlaps, in the thread that decodes, and before the block is yielded.
        overlap: decode and use a block while the next one is denoised. The blocks are the same; an
            error of either side comes after all blocks that were finished before it. By default
            where it pays: on a GPU, and on a CPU where torch computes in one thread and there is
            another core; several threads on either side would fight over the same ones.
    """
    memory = decoder.remember(before, before.next_block)
    device = next(decoder.video_codec.parameters()).device
    if overlap is None:
        overlap = device.type == "cuda" or (torch.get_num_threads() == 1 and cores() > 1)

    def finish(item: tuple[BlockLatents, StreamState]) -> tuple[DecodedBlock, StreamState]:
        nonlocal memory
        latents, state = item
        decoded, memory = decoder.decode(latents, memory)
        state = replace(state, memory=Memory(state.next_block, memory))
        if use is not None:
            use(decoded, state)
        return decoded, state

    return behind(made, finish, device) if overlap else map(finish, made)


def behind(
    items: Iterator[Item], work: Callable[[Item], Result], device: torch.device
) -> Iterator[Result]:
    """`work` of every item in order, done while the next item is made, and no further behind.

    Items are made in the caller's thread, so that signals and a host's interrupts stop them at
    once. What raises while an item is made is raised after the work of those before it. Closing
    this waits for the work that has begun.

    Args:
        device: where the work runs; on a GPU it gets a stream of its own there.
    """
    end = object()
    # A thread begins without any of its maker's settings, torch's among them.
    context, inference = contextvars.copy_context(), torch.is_inference_mode_enabled()
    lane = _side_stream(device)

    def done(item: Item) -> Result:
        with torch.inference_mode(inference), lane:
            return work(item)

    failed: BaseException | None = None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as thread:
        pending = None
        while True:
            try:
                item = next(items, end)
            except BaseException as error:  # a host's interruption may be any
                failed, item = error, end
            finished = None if pending is None else pending.result()
            first = pending is None
            pending = None if item is end else thread.submit(context.run, done, item)
            if not first:
                yield finished
            if pending is None:
                break
    if failed is not None:
        raise failed


def _side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Where the work goes; it begins after everything that the caller has started."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device=device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
