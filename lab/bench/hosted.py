"""The network that users have: ComfyUI's module tree of LTX-2 under our pass, in its memory modes.

It runs in ComfyUI's own Python (`lab.comfyui`), and asks for the host's rooms only then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...model_loaders.generator import Generator, header_of, is_addition
from ...networks.attention import sdpa
from ...samplers.model import BareModel, StreamModel
from .setups import Setup

if TYPE_CHECKING:
    from .measure import HostMode


def hosted_model(
    setup: Setup, dtype: torch.dtype, device: torch.device, mode: HostMode, weights: str
) -> StreamModel:
    """A network with random weights as ComfyUI holds it, ready to run.

    Its positions are interleaved, unless it is LTX-2.3.

    Args:
        weights: an option of Load OmniForcing Model.
    """
    later = setup.config.cross_attention_adaln
    config = replace(setup.config, rope_type="split" if later else "interleaved")
    if mode == "view":
        from ...host.transformer_view import TransformerView

        own = setup.model(dtype, device)
        view = TransformerView(own, config, sdpa)
        return BareModel(view, setup.name, next(own.parameters()).new_empty(0))
    from ...host import load_ltx2
    from ...host.model_wire import stream_model

    tensors = setup.model(dtype, torch.device("cpu")).state_dict()
    additions = {name: tensors.pop(name) for name in list(tensors) if is_addition(name)}
    header = header_of(config) | {"connector_num_layers": 0}
    generator = Generator(tensors, additions, config, header, setup.name, ())
    whole = {"dynamic": False, "whole": True}.get(mode)
    patcher = load_ltx2.hosted(generator, weights, setup.name, whole=whole)
    patcher.set_model_compute_dtype(dtype)
    made = stream_model(patcher)
    made.load(load_ltx2.stream_bytes_of(generator))
    if mode == "low":
        patcher.detach()
        patcher.load(patcher.load_device, lowvram_model_memory=1)
    return made
