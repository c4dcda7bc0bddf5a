"""The seam to ComfyUI's LTX-2: its loading code makes a MODEL, and any MODEL makes streams.

ComfyUI builds the network, keeps its weights (16 bit, 8 bit, packed, offloaded, with LoRAs) and its
connectors; the causal pass is ours (`hosted.py`). What is peculiar to a causal checkpoint travels
with the MODEL as an attachment, which its clones (a LoRA loader's, for instance) keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from PIL import Image
from torch import Tensor, nn

from ..model_loaders.catalog import list_bases, list_ltx2
from ..model_loaders.containers import REMEDY, Checkpoint
from ..model_loaders.generator import CONNECTORS, QUANTISED, STEP_SIZE, Generator, assemble
from ..model_loaders.ltx2 import SINKS, Preset
from ..networks.checked import some
from ..networks.config import TransformerConfig
from ..networks.timestep import TimestepEmbedder
from ..samplers.tensor_file import TensorFileError
from .comfy import FOLDER, HostModel, attention_kernel, files_in_model_folders
from .ltx2_model import LTX2Model, stock_config
from .stream_model import StreamModel

logger = logging.getLogger("mutualforcing")

ATTACHMENT = "mutual_forcing"
Weights = Literal["as in the file", "fp8", "fp8, fast"]
_OPTIONS: dict[Weights, dict[str, object]] = {
    "as in the file": {},
    "fp8": {"dtype": torch.float8_e4m3fn},
    "fp8, fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
}
WEIGHTS: tuple[Weights, ...] = tuple(_OPTIONS)
_VIDEO_VAE = "vae."


@dataclass(frozen=True)
class _Causal:
    """What our loader knows of a MODEL and ComfyUI does not."""

    config: TransformerConfig
    model_id: str
    title: str = ""


def generator_files() -> dict[str, Path]:
    """Names and places of LTX-2 checkpoints in ComfyUI's model folders."""
    own = map(Path, folder_paths.get_folder_paths(FOLDER))
    return list_ltx2(files_in_model_folders(), own_folders=own)


def base_files() -> dict[str, Path]:
    """Names and paths of files that hold LTX-2's connectors."""
    return list_bases(files_in_model_folders())


def load_generator(
    path: Path,
    base: Path | None,
    weights: Weights = "as in the file",
    preset: Preset | None = None,
    ema: bool = False,
) -> object:
    """A MODEL (ModelPatcher) of a causal checkpoint.

    Raises:
        TensorFileError: see `assemble`.
    """
    generator = assemble(path, base, preset=preset, ema=ema, normalise=_normalised)
    metadata = {"config": json.dumps({"transformer": generator.header})}
    # ComfyUI takes the tensors out of the dictionary that it is given.
    tensors = dict(generator.tensors)
    packed = any(name.endswith(QUANTISED) for name in tensors)
    options = {} if packed else dict(_OPTIONS[weights])
    patcher = comfy.sd.load_diffusion_model_state_dict(
        tensors, model_options=options, metadata=metadata
    )
    if patcher is None:
        raise TensorFileError(
            f"ComfyUI did not recognise {path} as LTX-2; update ComfyUI, or choose another file"
        )
    module = patcher.model.diffusion_model
    _check_connectors(path, module, generator)
    _finish(module, generator, patcher.model.get_dtype_inference())
    patcher.set_attachments(ATTACHMENT, _Causal(generator.config, generator.model_id, path.stem))
    return patcher


def _normalised(tensors: dict[str, Tensor], prefix: str, metadata: Mapping[str, str]) -> dict:
    return comfy.utils.convert_old_quants(tensors, prefix, metadata=dict(metadata))[0]


def _check_connectors(path: Path, module: nn.Module, generator: Generator) -> None:
    """ComfyUI only logs what is missing or too much; the transformer was checked before."""
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
        module.get_submodule(place).step_size_embedder = embedder.requires_grad_(False)


def load_video_vae(path: Path) -> object | None:
    """The VAE for pictures out of LTX-2's own file, as ComfyUI's loader gives it, or None."""
    checkpoint = Checkpoint(path)
    tensors = {
        key.removeprefix(_VIDEO_VAE): checkpoint.tensor(key, keep=True)
        for key in checkpoint.shapes
        if key.startswith(_VIDEO_VAE)
    }
    if not tensors:
        logger.warning("%s has no video VAE in it: use Load VAE for one", path)
        return None
    vae = comfy.sd.VAE(sd=tensors, metadata=checkpoint.metadata)
    vae.throw_exception_if_invalid()
    return vae


def sample_rate_of(audio_vae: object) -> int:
    """Samples a second that a VAE for sound makes.

    Raises:
        ValueError: it is one for pictures.
    """
    rate = getattr(getattr(audio_vae, "first_stage_model", None), "output_sample_rate", None)
    if rate is None:
        raise ValueError(
            "'audio_vae' is not a VAE for sound: connect Load LTXV Audio VAE, with LTX-2's own file"
        )
    return int(rate)


def decode_audio(audio_vae: object, latents: Tensor) -> Tensor:
    """Latents (b, 8, s, 16) to sound (b, channels, n), as ComfyUI's own node does it."""
    return audio_vae.decode(latents).movedim(-1, 1)


def stream_model(wire: object) -> StreamModel:
    """What is on a model wire, MF_MODEL or MODEL, as a maker of streams.

    Raises:
        ValueError: a MODEL that is not LTX-2.
    """
    if isinstance(wire, HostModel):
        return wire
    base = wire.model
    module = getattr(base, "diffusion_model", base)
    known = wire.get_attachment(ATTACHMENT)
    if known is None:
        config = stock_config(module, base.model_config.unet_config)
        described = json.dumps(config.to_dict(), sort_keys=True).encode()
        known = _Causal(config, hashlib.blake2b(described, digest_size=8).hexdigest())
    device = wire.load_device
    # As core computes with it; another node may have asked for another precision.
    dtype = wire.get_model_object("manual_cast_dtype") or base.get_dtype()
    options = wire.model_options.get("transformer_options", {})
    previewer = latent_preview.get_previewer(device, base.latent_format)

    def load(memory_required: int) -> None:
        comfy.model_management.load_models_gpu([wire], memory_required=memory_required)

    def picture(latent: Tensor) -> Image.Image:
        return previewer.decode_latent_to_preview(latent)

    return LTX2Model(
        module,
        known.config,
        known.model_id,
        torch.empty(0, device=device, dtype=dtype),
        attention_kernel("automatic", device, options),
        load,
        None if previewer is None else picture,
        title=known.title,
    )
