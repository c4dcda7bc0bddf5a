"""From what is on a MODEL wire to a maker of streams."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import comfy.model_management
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from .attention import attention_kernel
from .kinds import ltx2_model, stock_config, stock_identity
from .stream_model import ATTACHMENT, CausalModel, StreamModel


def stream_model(wire: object) -> StreamModel:
    """What is on a MODEL wire (a ModelPatcher) as a maker of streams.

    Raises:
        ValueError: a MODEL that makes no streams.
    """
    base = wire.model
    module = getattr(base, "diffusion_model", base)
    about = known_of(wire)
    if about is None:
        config = stock_config(module, base.model_config.unet_config)
        described = json.dumps(config.to_dict(), sort_keys=True).encode()
        remarks = stock_identity(base.model_config.unet_config).remarks("the model", "file")
        model_id = hashlib.blake2b(described, digest_size=8).hexdigest()
        about = ltx2_model(config, model_id, remarks=tuple(remarks))
    device = wire.load_device
    # As core computes with it; another node may have asked for another precision.
    dtype = wire.get_model_object("manual_cast_dtype") or base.get_dtype()
    options = wire.model_options.get("transformer_options", {})
    previewer = latent_preview.get_previewer(device, base.latent_format)

    def load(memory_required: int = 0, beside: Sequence[object] = ()) -> None:
        patchers = [wire, *beside]
        comfy.model_management.load_models_gpu(patchers, memory_required=memory_required)

    def picture(latent: Tensor) -> Image.Image:
        return previewer.decode_latent_to_preview(latent)

    return StreamModel(
        module,
        about,
        torch.empty(0, device=device, dtype=dtype),
        attention_kernel(device, options),
        load,
        None if previewer is None else picture,
    )


def known_of(wire: object) -> CausalModel | None:
    """What a loader of this pack left on a MODEL; None for anything else."""
    read = getattr(wire, "get_attachment", None)
    return None if read is None else read(ATTACHMENT)
