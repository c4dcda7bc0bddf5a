"""Modules without numbers, to be filled from a file.

A new torch module draws random weights. Where a file replaces them at once that is work for nothing
(for the shipped model most of its loading, of which drawing without memory, on the meta device, is
the largest part: PyTorch imports its compiler for it), and memory of a size that nobody has checked
yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.overrides import TorchFunctionMode


class BlankWeights(TorchFunctionMode):
    """While active, parameters of new modules have a shape and no memory (meta device).

    Nothing draws or fills them, so nobody's random numbers change. Buffers that a module computes
    are made as usual. `load_state_dict(..., assign=True)` puts a file's tensors in their place.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            return func(*args, **kwargs | {"device": "meta"})
        # PyTorch marks by the underscore what writes into its first argument.
        target = args[0] if args else kwargs.get("tensor")
        is_blank = isinstance(target, torch.Tensor) and target.is_meta
        if (
            func is not torch.Tensor.requires_grad_
            and is_blank
            and func.__name__.endswith("_")
            and not func.__name__.endswith("__")
        ):
            return target
        return func(*args, **kwargs)
