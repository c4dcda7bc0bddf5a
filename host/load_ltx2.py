"""LTX-2's files to a MODEL and its VAEs, made by ComfyUI's own loading code.

ComfyUI builds the network, keeps its weights (16 bit, 8 bit, packed, offloaded, with LoRAs) and its
connectors; the causal pass is ours (`transformer_view.py`). What is peculiar to a causal checkpoint
travels with the MODEL.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..model_loaders.containers import REMEDY, Checkpoint
from ..model_loaders.eight_bits import FLOAT8, INT8, LAYERS, Format, in_eight_bits
from ..model_loaders.generator import (
    STEP_SIZE,
    Generator,
    assemble,
    load_part,
    part_of_generator,
)
from ..model_loaders.identity import CONNECTORS, SINKS, Preset
from ..model_loaders.keymap import CAUSAL_MARK
from ..networks.checked import some
from ..networks.few_step import FEW_STEP, attach
from ..networks.fp8 import FORMAT
from ..networks.memory_branch import attach_branch, attach_encoders, is_memory
from ..networks.timestep import TimestepEmbedder
from ..samplers.side_ranks import ONE, SideRanks
from ..samplers.tensor_file import TensorFileError
from .kinds import ltx2_model
from .leaves import adapted_layers_are_leaves
from .room import has_room, usual_stream
from .shared_out import along, shares, side_ranks
from .stream_model import ATTACHMENT

logger = logging.getLogger("mutualforcing")

Weights = Literal["as in the file", "int8", "fp8", "fp8, fast"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
# Keys of the base file and what ComfyUI's VAE calls them.
_VIDEO_VAE = {"vae.": ""}
_AUDIO_VAE = {"audio_vae.": "autoencoder.", "vocoder.": "vocoder."}


def load_generator(
    path: Path,
    base: Path | None,
    weights: Weights = "as in the file",
    preset: Preset | None = None,
    ema: bool = False,
    *,
    vae: object = None,
    audio_vae: object = None,
    devices: str = ONE,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of a causal checkpoint.

    Args:
        vae, audio_vae: its own, for nodes that no other is connected to.
        devices: that share it (`devices_named`).

    Raises:
        TensorFileError: see `assemble`; weights in 8 bits, which several devices can't share.
        ValueError: devices that can't share it.
    """
    several = shares(devices)
    if several and weights != WEIGHTS[0]:
        raise ValueError(
            f"weights are {weights!r}, and several devices share them as they are in the file: "
            f"choose {WEIGHTS[0]!r}, or one device"
        )
    generator = assemble(path, base, preset=preset, ema=ema, normalise=_normalised)
    ranks, config = None, generator.config
    if several:
        patcher, ranks = _shared_out(
            generator, path, partial(load_part, path, base, preset=preset, ema=ema), devices
        )
        config = replace(config, rope_type="split")
    else:
        patcher = hosted(generator, weights, str(path))
    _check_connectors(path, patcher.model.diffusion_model, generator)
    known = ltx2_model(
        config,
        generator.model_id,
        title=path.stem,
        vae=vae,
        audio_vae=audio_vae,
        connected=generator.connected,
        remarks=generator.remarks,
        ranks=ranks,
    )
    patcher.set_attachments(ATTACHMENT, known)
    if ranks is not None:
        along(ranks, patcher)
    return patcher


def _shared_out(
    generator: Generator, path: Path, load: Callable[..., nn.Module], devices: str
) -> tuple[comfy.model_patcher.ModelPatcher, SideRanks]:
    """ComfyUI's network with its own connectors and, in place of all else, this process's part of
    ours; and the others, which begin to load theirs.

    ComfyUI's layers look for Cancel in each product, while other ranks wait for what it gives.
    """
    later = re.compile(r"transformer_blocks\.[1-9]")
    tensors = {name: x for name, x in generator.tensors.items() if not later.match(name)}
    header = generator.header | {"num_layers": 1}
    one = replace(generator, tensors=tensors, additions={}, header=header)
    patcher = hosted(one, WEIGHTS[0], str(path), whole=True)
    dtype = patcher.model.get_dtype_inference()
    ranks = side_ranks(devices, partial(load, dtype=dtype))
    own = part_of_generator(generator, path, dtype, patcher.offload_device, ranks.part)
    module = patcher.model.diffusion_model
    for name, one in (*own.named_children(), *own.named_parameters(recurse=False)):
        setattr(module, name, one)
    module.part = own.part
    adapted_layers_are_leaves(module)
    patcher.size = 0  # to be counted again
    return patcher, ranks


def hosted(
    generator: Generator, weights: Weights, what: str, *, whole: bool | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A network as ComfyUI loads it.

    Args:
        what: for messages.
        whole: as one, which can then be carried out in every way, where ComfyUI would bring weights
            as they are needed. None: if the card has room for it beside a stream.

    Raises:
        TensorFileError: ComfyUI does not know it.
    """
    metadata = {"config": json.dumps({"transformer": generator.header})}
    device = comfy.model_management.get_torch_device()
    # ComfyUI takes the tensors out of the dictionary that it is given.
    tensors = dict(generator.tensors)
    fast = weights == "fp8, fast"
    formats = eight_bit_formats(weights, tensors, device)
    if formats:
        tensors = in_eight_bits(tensors, formats, products=fast, device=device)
    if whole is None:
        # 32 bits are computed in 16 on a card.
        everything = (*tensors.values(), *generator.additions.values())
        held = sum(value.numel() * min(value.itemsize, 2) for value in everything)
        whole = has_room(held, stream_bytes_of(generator), device)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        tensors, metadata=metadata, disable_dynamic=whole
    )
    if patcher is None:
        raise TensorFileError(
            f"ComfyUI did not recognise {what} as LTX-2; update ComfyUI, or choose another file"
        )
    _finish(patcher.model.diffusion_model, generator, patcher.model.get_dtype_inference())
    if fast:
        _round_tokens(patcher.model.diffusion_model)
    known = ltx2_model(generator.config, generator.model_id, title=what)
    patcher.set_attachments(ATTACHMENT, known)
    return patcher


def stream_bytes_of(generator: Generator) -> int:
    """What a stream of the model's usual size needs beside the weights."""
    usual = ltx2_model(generator.config, generator.model_id)
    return usual_stream(generator.config, usual.defaults, usual.text_tokens)


def eight_bit_formats(
    weights: Weights, tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[Format, ...]:
    """What the layers' weights are rounded to, whichever is nearer to each matrix; none where they
    have eight bits or fewer already, or the device cannot hold such.

    Older templates come with fp8, and Apple's devices cannot even hold it.
    """
    layers = (value for name, value in tensors.items() if name.startswith(LAYERS))
    if weights == WEIGHTS[0] or any(value.itemsize < 2 for value in layers):
        return ()
    formats = (INT8, FLOAT8) if weights == "int8" else (FLOAT8,)
    if comfy.model_management.supports_cast(device, FORMAT):
        return formats
    if weights != "int8":
        logger.warning("%s has no fp8: the weights stay as they are; choose int8", device)
    return formats[:-1]


def _round_tokens(module: nn.Module) -> None:
    """Have the layers' products scale the tokens as they scale the weights.

    ComfyUI's own rounds tokens as they are, with a scale of 1.
    """
    for linear in module.transformer_blocks.modules():
        if getattr(linear, "layout_type", None) is not None and not linear._full_precision_mm:
            linear.forward = partial(_with_tokens_scaled, linear, linear.forward)


def _with_tokens_scaled(linear: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    if linear.weight_function or linear.bias_function:  # a LoRA that is added on the way
        return forward(x)
    rows = x.reshape(-1, x.shape[-1])
    tokens = QuantizedTensor.from_float(rows, linear.layout_type, scale="recalculate")
    return forward(tokens).reshape(*x.shape[:-1], -1)


def _normalised(tensors: dict[str, Tensor], prefix: str, metadata: Mapping[str, str]) -> dict:
    return comfy.utils.convert_old_quants(tensors, prefix, metadata=dict(metadata))[0]


def _check_connectors(path: Path, module: nn.Module, generator: Generator) -> None:
    """ComfyUI only logs what is missing or too much; the transformer was checked before."""
    if not generator.connected:
        return
    wanted, found = (
        {name for name in names if name.startswith(CONNECTORS)}
        for names in (dict(module.named_parameters()), generator.tensors)
    )
    if wanted - found:
        raise TensorFileError(
            f"{path} and its base file lack {some(sorted(wanted - found))}; choose LTX-2's own "
            "file as base"
        )
    layers = {name.rpartition(".")[0] for name in wanted}
    strange = sorted(name for name in found - wanted if name.rpartition(".")[0] not in layers)
    if strange:
        raise TensorFileError(
            f"{path} or its base file has weights that this model has no place for: "
            f"{some(strange)}; {REMEDY}"
        )


def _finish(module: nn.Module, generator: Generator, dtype: torch.dtype) -> None:
    """What ComfyUI's network lacks or has otherwise: additions, and the norms' epsilon."""
    for name, part in module.transformer_blocks.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            part.eps = generator.config.norm_eps
    for name, value in generator.additions.items():
        if name == SINKS:
            module.register_parameter(name, nn.Parameter(value.to(dtype), requires_grad=False))
    if generator.config.few_step_rank:
        rank, device = generator.config.few_step_rank, torch.device("cpu")
        attach(module, rank, comfy.ops.manual_cast, dtype, device)
        held = {name: value for name, value in generator.additions.items() if FEW_STEP in name}
        _fill(module, held)
        adapted_layers_are_leaves(module)
    memory = {name: value for name, value in generator.additions.items() if is_memory(name)}
    if memory:
        rest = generator.config, comfy.ops.manual_cast, dtype, torch.device("cpu")
        attach_encoders(module, *rest)
        for index, block in enumerate(module.transformer_blocks):
            if generator.config.remembers(index):
                attach_branch(block, *rest)
        _fill(module, memory)
        for name, parameter in module.named_parameters():
            if is_memory(name):
                parameter.requires_grad_(False)
    places = {name.partition(STEP_SIZE)[0] for name in generator.additions if STEP_SIZE in name}
    for place in places:
        prefix = f"{place}{STEP_SIZE}"
        held = {
            name.removeprefix(prefix): value
            for name, value in generator.additions.items()
            if name.startswith(prefix)
        }
        width = held["linear_2.bias"].shape[0]
        embedder = TimestepEmbedder(width, comfy.ops.manual_cast, dtype, torch.device("cpu"))
        embedder.load_state_dict(held)
        module.get_submodule(place).step_size_embedder = embedder
    module.requires_grad_(False)
    # ComfyUI's saving nodes write no header of ours: how it is run goes along as a tensor.
    module.register_buffer(CAUSAL_MARK, generator.mark)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the layers that they are named by, one layer after the other.

    ComfyUI's layers of 8 bits lose their weight when the whole network is loaded a second time.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, _, own = name.rpartition(".")
        layers.setdefault(layer, {})[own] = value
    for layer, held in layers.items():
        module.get_submodule(layer).load_state_dict(held)


def load_vaes(path: Path) -> tuple[comfy.sd.VAE | None, comfy.sd.VAE | None]:
    """The VAEs for pictures and for sound out of LTX-2's own file, as ComfyUI loads them; None
    for one that is not in it.
    """
    return _vae(path, _VIDEO_VAE), _vae(path, _AUDIO_VAE)


def _vae(path: Path, names: Mapping[str, str]) -> comfy.sd.VAE | None:
    checkpoint = Checkpoint(path)
    tensors = {
        own + key.removeprefix(prefix): checkpoint.tensor(key, keep=True)
        for key in checkpoint.shapes
        for prefix, own in names.items()
        if key.startswith(prefix)
    }
    if not tensors:
        return None
    vae = comfy.sd.VAE(sd=tensors, metadata=checkpoint.metadata)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (_vae_again, (path, names))
    return vae


def _vae_again(
    path: Path, names: Mapping[str, str], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """For ComfyUI's Select VAE Device, which loads a VAE once more for another card."""
    return _vae(path, names).patcher
