"""Processes that share one stream, forked from this one: they have all that it has imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from mutual_forcing.samplers.ranks import Ranks


def started(count: int, work: Callable[[int], int | None]) -> list[multiprocessing.Process]:
    """`work` of each rank's number, whose result is its exit status, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}

    def run(rank: int) -> None:
        os.environ.update(told | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        status = work(rank)
        if dist.is_initialized() and not status:
            dist.destroy_process_group()
        os._exit(status or 0)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def on_ranks(count: int, work: Callable[[Ranks], None]) -> None:
    """Run it on so many ranks, and see that none fails."""

    def joined(_rank: int) -> None:
        work(Ranks.joined(torch.device("cpu")))

    processes = started(count, joined)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * count
