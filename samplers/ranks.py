"""A stream that several processes make together, started by torchrun or by whoever wants them.

Every rank runs the same rollout: it draws the same noise and takes the same steps, with a part of
every layer (`networks/tensor_parallel.py`). So nothing has to be told but when to stop, and who
holds which keys: a state that leaves a rollout has those of all heads, on rank 0, and is an
ordinary state, which goes on on any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..networks.config import TransformerConfig
from ..networks.kept_keys import BlockKeys
from ..networks.kv_cache import RollingCache
from ..networks.tensor_parallel import Part, RankLostError, Shares
from .state import StreamState

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another: the first may decode, write, and read a file meanwhile."""
_ENDING = timedelta(seconds=10)
_ENDED = "the first process has ended by itself"


def _place() -> tuple[int, int]:
    """This process's number, and of how many, as torchrun's environment says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is by itself, or the one that speaks and writes for all."""
    rank, world = _place()
    return world == 1 or rank == 0


@dataclass(frozen=True)
class Ranks:
    """The processes of a stream, and which of them this is.

    Attributes:
        device: where this one computes.
        store: where they find each other.
        control: over which they agree, on the host's side; None for the group itself.
    """

    rank: int
    world: int
    device: torch.device
    store: Any
    control: Any = None

    @classmethod
    def joined(cls, device: torch.device) -> Ranks | None:
        """As torchrun's environment says; None for a process by itself.

        Args:
            device: "cuda" for a card each, in the order of the ranks.

        Raises:
            ValueError: more ranks than cards, a device that can't be had in several processes, or
                no way to reach the others.
        """
        rank, world = _place()
        if world == 1:
            return None
        if not dist.is_available() or device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"found {world} processes on {device.type}, expected them on cpu or cuda, with a "
                "PyTorch that has torch.distributed"
            )
        if device.index is not None:
            raise ValueError(
                f"found {world} processes on {device}, expected 'cuda': each takes a card of its "
                "own"
            )
        if device.type == "cuda":
            local, cards = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
            if local >= cards:
                raise ValueError(
                    f"found {local + 1} processes or more and {cards} cards, expected a card for "
                    "each: start as many as there are cards (--nproc-per-node)"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
            backend = "nccl" if device.type == "cuda" else "gloo"
            them = {"store": store, "rank": rank, "world_size": world, "timeout": PATIENCE}
            dist.init_process_group(backend, **them)
            # A card's messages are waited for by the card; to agree the host has to.
            control = dist.new_group(backend="gloo") if device.type == "cuda" else None
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(
                f"process {rank} of {world} cannot reach the others ({reason}); start them with "
                "torchrun"
            ) from error
        return cls(rank, world, device, store, control)

    def part(self, config: TransformerConfig, weights: Sequence[float] | None = None) -> Part:
        """What this process holds of a network.

        Args:
            weights: of the ranks, in proportion to which heads are shared out; None: alike.

        Raises:
            ValueError: not a weight for each rank.
        """
        weights = weights or (1.0,) * self.world
        if len(weights) != self.world:
            raise ValueError(
                f"found {len(weights)} shares for {self.world} processes, expected one for each"
            )
        return Part(config, Shares.of(config, weights), self.rank, self.device)

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank; to be asked on all of them at the same point.

        Raises:
            RankLostError: another rank does not answer.
        """
        told = torch.tensor([int(mine)])
        try:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        except RuntimeError as error:
            raise RankLostError from error
        return bool(told.item())

    def end(self) -> None:
        """Let the others know that the first process has said and written all that it will."""
        with suppress(RuntimeError):
            self.store.set(_ENDED, "")

    def first_has_ended(self) -> bool:
        """Whether it has, or will in a moment; no, if it was killed."""
        try:
            self.store.wait([_ENDED], _ENDING)
        except RuntimeError:  # never, or who kept that is gone as well
            return False
        return True


def part_of_cache(part: Part, cache: RollingCache) -> RollingCache:
    """A rank's heads of the keys and values of all."""
    return replace(cache, blocks=tuple(map(part.scattered, cache.blocks)))


class WholeStates:
    """Makes ordinary states of those inside a rollout on a rank; to be called by all ranks alike.

    On the first rank the keys and values of all heads are in the computer's memory, each block's
    fetched once. The others' states keep the rank's own: that process goes on from them, and they
    are for nobody else.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self._fetched: list[tuple[BlockKeys, BlockKeys]] = []

    def __call__(self, state: StreamState) -> StreamState:
        """The same state whole.

        Raises:
            RankLostError: another rank does not answer.
        """
        fetched = []

        def whole(cache: RollingCache | None) -> RollingCache | None:
            if cache is None:
                return None
            blocks = []
            for block in cache.blocks:
                known = next((made for own, made in self._fetched if own is block), None)
                blocks.append(self.part.gathered(block) if known is None else known)
                fetched.append((block, blocks[-1]))
            return replace(cache, blocks=tuple(blocks))

        made = replace(state, cache=whole(state.cache), unguided=whole(state.unguided))
        self._fetched = fetched
        return made
