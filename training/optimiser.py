"""The optimiser: bfloat16 weights to compute with, float32 weights to learn with, and their running mean.

Matrices inside the layers are stepped by Muon (orthogonalised momentum), everything else by AdamW.
"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn

_MATRIX = re.compile(
    r"\.(to_[qkv]|to_out\.0|net\.\d|net\.0\.proj|to_qkv|to_out|expand|contract)\.weight$"
)


class MasterWeights:
    """Float32 copies of a bfloat16 module's parameters, with optimiser and exponential moving average.

    Args:
        module: computes in its own dtype; its values are overwritten after every step.
        ema: decay of the moving average per step.
    """

    def __init__(self, module: nn.Module, learning_rate: float, ema: float) -> None:
        self.module, self.decay = module, ema
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = [p.detach().float().clone() for p in module.parameters()]
        self.average = [p.clone() for p in self.parameters]
        matrices, others = [], []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            (matrices if _MATRIX.search(name) and parameter.ndim == 2 else others).append(parameter)
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_rate = learning_rate

    def step(self, rate: float) -> float:
        """One update at `rate` times the base learning rate; returns the gradients' norm before clipping."""
        grads = []
        for source, target in zip(self.module.parameters(), self.parameters, strict=True):
            # A parameter of a stream that was not run has no gradient; it must not drift by momentum either.
            target.grad = None if source.grad is None else source.grad.float()
            source.grad = None
            if target.grad is not None:
                grads.append(target.grad)
        if dist.is_initialized():
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            offset = 0
            for g in grads:
                g.copy_(flat[offset : offset + g.numel()].view_as(g))
                offset += g.numel()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters if p.grad is not None], 1.0
        )
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.base_rate * rate
            optimiser.step()
        with torch.no_grad():
            for source, master, average in zip(
                self.module.parameters(), self.parameters, self.average, strict=True
            ):
                source.copy_(master)
                average.lerp_(master, 1 - self.decay)
        return float(norm)

    def averaged(self) -> dict[str, Tensor]:
        """The moving average by parameter name."""
        return dict(zip(self.names, self.average, strict=True))

    def state_dict(self) -> dict[str, object]:
        """Everything that going on needs."""
        return {
            "parameters": self.parameters,
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of `state_dict`; the module is set as well."""
        for name in ("parameters", "average"):
            for target, source in zip(getattr(self, name), state[name], strict=True):
                target.copy_(source)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for source, master in zip(self.module.parameters(), self.parameters, strict=True):
            source.copy_(master)

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take up the given weights, by name, with a fresh optimiser."""
        for name, source, master, average in zip(
            self.names, self.module.parameters(), self.parameters, self.average, strict=True
        ):
            master.copy_(weights[name])
            average.copy_(master)
            source.copy_(master)
