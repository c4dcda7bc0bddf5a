"""The optimiser: weights of low precision to compute with, float32 ones to learn with, their mean.

Matrices inside the layers are stepped by Muon (orthogonalised momentum), everything else, adapters
too, by AdamW. Under many processes each keeps its rows of all of it (lab.training.parallel).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .parallel import ALONE, Processes, drop_gathered

_MATRIX = re.compile(
    r"\.(to_[qkv]|to_out\.0|net\.\d|net\.0\.proj|to_qkv|to_out|expand|contract)\.weight$"
)
CLIP = 1.0


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return about U V^T of the matrix U S V^T (its SVD), by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-12)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per weight matrix; a matrix entry changes by about 0.2 `lr`.

    It steps as `torch.optim.Muon` does with `adjust_lr_fn="match_rms_adamw"`, for what that one
    lacks. It would orthogonalise each process's rows of a matrix for themselves: here the momenta
    are gathered once, every process does its share of the matrices, and the results are gathered in
    turn. And it always computes in bfloat16, which takes a CPU without such arithmetic 27 times as
    long (286 against 10 ms of processor time for a matrix of 256 x 256). Kernels count as matrices.

    Args:
        parameters: this process's rows of the matrices.
        rows: how many each matrix has as a whole.
    """

    def __init__(
        self, parameters: list[Tensor], rows: list[int], lr: float, processes: Processes = ALONE
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.01, "momentum": 0.95})
        self.rows, self.processes = rows, processes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of the matrices that have a gradient."""
        (group,) = self.param_groups
        momentum, lr = group["momentum"], group["lr"]
        stepped = [
            (p, rows)
            for p, rows in zip(group["params"], self.rows, strict=True)
            if p.grad is not None
        ]
        updates = []
        for p, _ in stepped:
            state = self.state[p]
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(buffer, momentum).flatten(1)
            updates.append(update if p.device.type == "cpu" else update.bfloat16())
        directions = self._directions(updates, [rows for _, rows in stepped])
        for (p, rows), direction in zip(stepped, directions, strict=True):
            p.mul_(1 - lr * group["weight_decay"])
            scale = 0.2 * math.sqrt(max(rows, direction.shape[1]))
            p.add_(direction.view_as(p), alpha=-lr * scale)

    def _directions(self, updates: list[Tensor], rows: list[int]) -> list[Tensor]:
        """This process's rows of every matrix's direction."""
        processes = self.processes
        if processes.world == 1 or not updates:
            return [orthogonalise(update) for update in updates]
        whole = processes.gather(updates, rows)
        # Dealt out from the largest to the smallest, so that all have about the same work.
        order = sorted(range(len(whole)), key=lambda index: (-whole[index].numel(), index))
        hands = [order[rank :: processes.world] for rank in range(processes.world)]
        sizes = [[whole[index].numel() for index in hand] for hand in hands]
        mine = [orthogonalise(whole[index]).flatten() for index in hands[processes.rank]]
        rest = max(map(sum, sizes)) - sum(sizes[processes.rank])
        stacked = processes.everyones(torch.cat((*mine, updates[0].new_zeros(rest))))
        directions = {}
        for flat, hand, size in zip(stacked, hands, sizes, strict=True):
            for index, part in zip(hand, flat[: sum(size)].split(size), strict=True):
                directions[index] = processes.rows(part.view_as(whole[index]))
        return [directions[index] for index in range(len(whole))]


def of_a_layer(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of the transformer is a matrix inside one of its layers."""
    return parameter.ndim == 2 and _MATRIX.search(name) is not None


def _local(value: Tensor) -> Tensor:
    """This process's rows of a split tensor; any other is whole."""
    return value.detach().to_local() if isinstance(value, DTensor) else value.detach()


class MasterWeights:
    """Float32 copies of a module's trained parameters, with optimiser and moving average.

    Args:
        module: with float32 weights to start from; what is trained of it is brought to `dtype`,
            which it computes in. With many processes it is split, too.
        ema: decay of the moving average per step; None: there is none.
        matrix: whether a parameter of a name is stepped by Muon.
    """

    def __init__(
        self,
        module: nn.Module,
        learning_rate: float,
        ema: float | None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        processes: Processes = ALONE,
        matrix: Callable[[str, Tensor], bool] = of_a_layer,
    ) -> None:
        self.module, self.decay, self.processes = module, ema, processes
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.lengths = [len(p) for _, p in trained]
        copies = [p.detach().float().clone() for _, p in trained]
        processes.place(module, dtype)
        self.sources = [p for p in module.parameters() if p.requires_grad]
        # Of many processes' rows the module's own are stepped; a module alone is written back to.
        self.parameters = copies if processes.world == 1 else list(map(_local, self.sources))
        self.average = [] if ema is None else [p.clone() for p in self.parameters]
        places = range(len(self.names))
        matrices = [i for i in places if matrix(self.names[i], self.parameters[i])]
        others = [i for i in places if i not in set(matrices)]
        # Each optimiser with the places of its parameters in the lists above.
        self.optimisers: list[tuple[torch.optim.Optimizer, list[int]]] = []
        if matrices:
            chosen = [self.parameters[i] for i in matrices]
            rows = [self.lengths[i] for i in matrices]
            self.optimisers.append((Muon(chosen, rows, learning_rate, processes), matrices))
        if others:
            chosen = [self.parameters[i] for i in others]
            adam = torch.optim.AdamW(chosen, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
            self.optimisers.append((adam, others))
        self.base_rate = learning_rate

    def step(self, rate: float) -> Tensor:
        """One update at `rate` times the base learning rate; returns the norm before clipping."""
        for source, target in zip(self.sources, self.parameters, strict=True):
            # A parameter of a stream that was not run has no gradient; it must not drift by
            # momentum either.
            grad, source.grad = source.grad, None
            target.grad = None if grad is None else _local(grad).float()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        norm = self.processes.sum(norms.square().sum()).sqrt()
        torch._foreach_mul_(grads, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        drop_gathered(self.module)
        for optimiser, _ in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.base_rate * rate
            optimiser.step()
        for p in self.parameters:
            p.grad = None
        self._write_back()
        if self.decay is not None:
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay)
        return norm

    @torch.no_grad()
    def _write_back(self) -> None:
        if self.processes.world == 1:
            torch._foreach_copy_(self.sources, self.parameters)

    @torch.no_grad()
    def write_average(self, module: nn.Module) -> None:
        """Set the same parameters of another module, placed as this one is, to the average."""
        drop_gathered(module)
        targets = dict(module.named_parameters())
        for name, value in zip(self.names, self.average, strict=True):
            _local(targets[name]).copy_(value)

    def averaged(self) -> dict[str, Tensor]:
        """The moving average by parameter name, whole; all processes must ask for it."""
        return dict(zip(self.names, self.processes.gather(self.average, self.lengths), strict=True))

    def state_dict(self) -> dict[str, object]:
        """Everything that going on needs, whole, on any number of processes; all must call it."""
        gather = self.processes.gather
        optimisers = []
        for optimiser, places in self.optimisers:
            saved = optimiser.state_dict()
            for key in sorted({key for values in saved["state"].values() for key in values}):
                having = [i for i, values in saved["state"].items() if values[key].ndim]
                parts = [saved["state"][i][key] for i in having]
                whole = gather(parts, [self.lengths[places[i]] for i in having])
                saved["state"] |= {
                    i: saved["state"][i] | {key: value}
                    for i, value in zip(having, whole, strict=True)
                }
            optimisers.append(saved)
        return {
            "parameters": gather(self.parameters, self.lengths),
            "average": gather(self.average, self.lengths[: len(self.average)]),
            "optimisers": optimisers,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of `state_dict`; the module is set as well."""
        drop_gathered(self.module)
        rows = self.processes.rows
        for name in ("parameters", "average"):
            for target, source in zip(getattr(self, name), state[name], strict=True):
                target.copy_(rows(source))
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            split = {
                i: {key: rows(value).clone() for key, value in values.items()}
                for i, values in saved["state"].items()
            }
            optimiser.load_state_dict(saved | {"state": split})
        self._write_back()
