"""One process or many under torchrun, and what they have in common.

Every process computes its share of each batch with whole weights and keeps its share of everything
that lives from step to step: float32 weights, gradients, optimiser state and averages are split by
rows (FSDP2, gathered once per step). What is frozen lies whole on every process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None

    @classmethod
    def from_environment(cls) -> Processes:
        """As torchrun says, or a single process; each on a GPU of its own where there are any."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = CPU
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world == 1:
            return cls(device=device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world, device, init_device_mesh(device.type, (world,)))

    def share(self, size: int) -> range:
        """Places in a batch of `size` clips that this process computes.

        Raises:
            ValueError: the batch cannot be split evenly.
        """
        if size % self.world:
            raise ValueError(
                f"found a batch of {size} clips for {self.world} processes, expected a multiple; "
                "change the batch in the recipe's lengths, or the number of processes"
            )
        each = size // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def place(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Make a module compute in `dtype` with what is trained of it; the rest stays as it is.

        With many processes each keeps its rows of the trained parameters in float32, and they may
        be used only within the module's own `forward`, which gathers them.
        """
        if self.world == 1:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
            return
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=False,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            ignored_params={p for p in module.parameters() if not p.requires_grad},
        )

    def rows(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor, as FSDP2 splits them; a number stays whole."""
        if self.world == 1 or not whole.ndim:
            return whole
        each = -(-len(whole) // self.world)
        return whole[self.rank * each : (self.rank + 1) * each]

    def everyones(self, mine: Tensor) -> Tensor:
        """Every process's tensor of one shape, stacked: (processes, ...)."""
        if self.world == 1:
            return mine[None]
        stacked = mine.new_empty(self.world, *mine.shape)
        dist.all_gather_single(stacked.view(-1), mine.contiguous().view(-1))
        return stacked

    def gather(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Whole tensors of `lengths` rows from every process's rows of them, in one exchange."""
        if self.world == 1 or not parts:
            return list(parts)
        filled = []
        for part, length in zip(parts, lengths, strict=True):
            missing = -(-length // self.world) - len(part)
            filled.append(torch.cat((part, part.new_zeros(missing, *part.shape[1:]))).flatten())
        stacked = self.everyones(torch.cat(filled)).split([len(flat) for flat in filled], dim=1)
        return [
            rows.reshape(-1, *part.shape[1:])[:length].contiguous()
            for rows, part, length in zip(stacked, parts, lengths, strict=True)
        ]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def agreed(self, *values: float) -> list[float]:
        """The first process's numbers, for decisions that all must take alike."""
        if self.world == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return told.tolist()


ALONE = Processes()


def drop_gathered(module: nn.Module) -> None:
    """Forget a module's gathered weights: its rows are about to change."""
    if isinstance(module, FSDPModule):
        module.reshard()
