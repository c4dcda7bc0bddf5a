"""What a rollout needs of a model, whoever loaded it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


class StreamModel(Protocol):
    """A causal audio-video network and what goes with it.

    Attributes:
        transformer: for the functions of `networks`; its `config` has the block layout.
        model_id: fingerprint; a stream goes on only with the model that made it.
        title: what its makers call it; empty where it has no name.
        like: empty tensor with the device and dtype to compute in.
    """

    transformer: nn.Module
    model_id: str
    title: str
    like: Tensor


@dataclass(frozen=True)
class BareModel:
    """A network by itself as a `StreamModel`: in training, in a measurement, in a test."""

    transformer: nn.Module
    model_id: str
    like: Tensor = field(default_factory=lambda: torch.empty(0))
    title: str = ""
