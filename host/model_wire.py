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
from .page import stop_if_asked
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

    ranks = about.ranks
    if ranks is not None:
        check_whole(wire)

    def load(memory_required: int = 0, beside: Sequence[object] = ()) -> None:
        patchers = [wire, *beside]
        # Sums over ranks read weights where they lie.
        whole = {"memory_required": memory_required, "force_full_load": ranks is not None}
        comfy.model_management.load_models_gpu(patchers, **whole)
        if ranks is not None:
            ranks.ready(stop_if_asked)

    def picture(latent: Tensor) -> Image.Image:
        return previewer.decode_latent_to_preview(latent)

    return StreamModel(
        module,
        about,
        torch.empty(0, device=device, dtype=dtype),
        attention_kernel(device, options, alone=ranks is None),
        load,
        None if previewer is None else picture,
    )


def check_whole(wire: object) -> None:
    """Refuse what only a whole model can have.

    Raises:
        ValueError: a LoRA, or another change of its weights.
    """
    cast = "manual_cast_dtype" in wire.object_patches
    if wire.patches or wire.weight_wrapper_patches or cast:
        raise ValueError(
            "a LoRA, or another precision, changes a whole model, and this one is shared out to "
            "several devices: choose 'one' under devices in its loader, or save the model with the "
            "LoRA in it (Save Model) and load that"
        )


def known_of(wire: object) -> CausalModel | None:
    """What a loader of this pack left on a MODEL; None for anything else."""
    read = getattr(wire, "get_attachment", None)
    return None if read is None else read(ATTACHMENT)
