"""ComfyUI's softmax attention as this pack's kernel.

b batch, a heads, n query tokens, m key tokens, d head dim.
Which kernel ComfyUI uses depends on how it was started, so it is looked up when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import Tensor

from ..networks.attention import AttentionKernel, sdpa


def attention_kernel(
    device: torch.device, options: Mapping[str, object] | None = None, alone: bool = True
) -> AttentionKernel:
    """PyTorch's attention on a CPU, and on a graphics card the one that ComfyUI was started with.

    Cancel is looked for every time, so a step that takes minutes can be left.
    On a CPU ComfyUI's own choice is slower than PyTorch's and saves memory that is not short there.

    Args:
        options: a MODEL's own, in which another node may have named a kernel.
        alone: False where other processes wait for what this one finds: then Cancel is looked for
            between two steps only.
    """
    kernel = partial(comfy_attention, options=dict(options or {}))
    named = "optimized_attention_override" in (options or {})
    if comfy.model_management.is_device_cpu(device) and not named:
        kernel = sdpa
    if not alone:
        return kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return kernel(q, k, v, mask)

    return attend


def comfy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Mapping[str, object] | None = None,
) -> Tensor:
    """The kernel that ComfyUI was started with (Sage, xFormers, ...); (b, a, n, d) as `sdpa`."""
    if mask is not None:
        # Not every kernel of ComfyUI's reads booleans as PyTorch does; all of them add numbers to
        # the scores.
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
            ~mask, float("-inf")
        )
    return comfy.ldm.modules.attention.optimized_attention(
        q,
        k,
        v,
        heads=q.shape[1],
        mask=mask,
        skip_reshape=True,
        skip_output_reshape=True,
        transformer_options=options or {},
    )
