"""Makes ComfyUI see layers that it passes over.

It patches and moves modules with parameters, but not those with others below them
(`comfy.model_patcher.ModelPatcher._load_list`). A linear layer with an adapter below it is
such a one, so a LoRA would change nothing in it and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

from torch import nn

from ..networks.few_step import ADAPTERS


def _own(
    self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    del recurse  # the adapter's are found at the adapter
    return nn.Module.named_parameters(self, prefix, False, remove_duplicate)


def adapted_layers_are_leaves(model: nn.Module) -> None:
    """Layers with adapters name their own parameters alone; all are still found from the top."""
    for module in model.modules():
        if any(hasattr(module, name) for name in ADAPTERS):
            module.named_parameters = MethodType(_own, module)
