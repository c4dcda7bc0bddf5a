"""Whether a card has room for a network beside its stream, so that it can be loaded whole.

Where ComfyUI manages memory by itself it brings weights as they are needed, and what is carried out
over weights that come and go cannot be recorded.
"""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import torch

from ..model_loaders.bundle import StreamDefaults
from ..model_loaders.memory import stream_bytes
from ..networks.config import TransformerConfig


def usual_stream(config: TransformerConfig, usual: StreamDefaults, text_tokens: int) -> int:
    """Bytes of a stream as it is unless told otherwise, in 16 bits."""
    size = usual.window, usual.height, usual.width
    return stream_bytes(config, *size, element_size=2, guided=False, text_tokens=text_tokens)


def has_room(weights: int, stream: int, device: torch.device) -> bool:
    """Whether so many bytes fit on a device that nothing else is on."""
    spare = comfy.model_management.minimum_inference_memory()
    return weights + stream + spare <= comfy.model_management.get_total_memory(device)


def patcher_for(whole: bool) -> type[comfy.model_patcher.ModelPatcher]:
    """What holds a network: the one that loads it whole where there is room, or ComfyUI's choice,
    which it makes at its start."""
    return comfy.model_patcher.ModelPatcher if whole else comfy.model_patcher.CoreModelPatcher
