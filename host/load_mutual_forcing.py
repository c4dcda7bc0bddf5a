"""A file of this pack's own to a MODEL, a CLIP, a VAE, and a VAE for sound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ..model_loaders.bundle import TRANSFORMER, Bundle, load_bundle, load_part, packed_header
from ..samplers.side_ranks import ONE
from . import streams
from .codecs import CodecVAE, audio_vae, video_vae
from .kinds import OWN
from .leaves import adapted_layers_are_leaves
from .room import has_room, patcher_for, usual_stream
from .shared_out import along, side_ranks
from .stream_model import ATTACHMENT, CausalModel
from .text_encoder import clip_of

Precision = Literal["automatic", "float32", "bfloat16", "float16"]
Attention = Literal["automatic", "PyTorch"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)


@dataclass(frozen=True)
class LoadedModel:
    """What the loader's four outputs carry."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: CodecVAE
    audio_vae: CodecVAE


class _EagerOperations(comfy.ops.disable_weight_init):
    """ComfyUI's operations, with weights that exist (on the meta device) before the file is read.

    Where ComfyUI manages memory dynamically its own Linear has no weight until it is loaded, and a
    model file could not be checked against it. It is left out for classes that bring their own
    loading.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        """ComfyUI's Linear, loaded as torch.nn's."""

        def _load_from_state_dict(self, *arguments: object) -> None:
            nn.Linear._load_from_state_dict(self, *arguments)


class _Config(comfy.supported_models_base.BASE):
    """What ComfyUI keeps of an architecture."""

    unet_config: ClassVar[dict[str, object]] = {"image_model": "mutual_forcing"}
    unet_extra_config: ClassVar[dict[str, object]] = {}


class MutualForcing(comfy.model_base.BaseModel):
    """The network in ComfyUI's care, under `diffusion_model` as all of them are."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        config = _Config(_Config.unet_config)
        config.latent_format = comfy.latent_formats.LatentFormat()
        config.latent_format.latent_channels = bundle.transformer.config.in_channels
        config.latent_format.latent_dimensions = 3
        super().__init__(
            config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=lambda **_options: bundle.transformer,
        )
        adapted_layers_are_leaves(self.diffusion_model)
        # A tuple: the other parts have patchers of their own and must not be moved with this one.
        self._beside = (bundle.text_encoder, bundle.video_codec, bundle.audio_codec)
        self._header = packed_header(bundle)

    def get_dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(self.diffusion_model.parameters()).dtype

    def apply_model(self, *_arguments: object, **_options: object) -> Tensor:
        """Refuse ComfyUI's own samplers, which know no stream.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "this model makes a stream, second by second, which this sampler cannot: use Generate "
            "Clip or Sample Chunk"
        )

    def state_dict_for_saving(
        self,
        unet_state_dict: dict[str, Tensor],
        clip_state_dict: dict[str, Tensor] | None = None,
        vae_state_dict: dict[str, Tensor] | None = None,
        **_others: object,
    ) -> dict[str, Tensor]:
        """A whole model file, for Save Model and Save Checkpoint: our loader reads it again."""
        saved = {f"{TRANSFORMER}{name}": value for name, value in unet_state_dict.items()}
        for prefix, module in zip(
            ("text_encoder.", "video_codec.", "audio_codec."), self._beside, strict=True
        ):
            saved |= {f"{prefix}{name}": value for name, value in module.state_dict().items()}
        return saved | (clip_state_dict or {}) | (vae_state_dict or {}) | self._header


def load_mutual_forcing(
    path: Path, precision: Precision, attention: Attention, devices: str = ONE
) -> LoadedModel:
    """Load a model file and hand its memory to ComfyUI.

    Args:
        devices: that share the network (`devices_named`).

    Raises:
        TensorFileError: see `load_bundle`.
        ValueError: devices that can't share it.
    """
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    dtype = _dtype(precision, load_device)
    ranks = side_ranks(devices, partial(load_part, path, dtype=dtype))
    bundle = load_bundle(
        path,
        dtype=dtype,
        device=offload_device,
        # ComfyUI's look for Cancel in each product, while other ranks wait for what it gives.
        operations=_EagerOperations if ranks is None else nn,
        part=ranks and ranks.part,
    )
    weights = sum(p.numel() * p.itemsize for p in bundle.transformer.parameters())
    text_tokens = bundle.text_encoder.config.length
    stream = usual_stream(bundle.transformer.config, bundle.stream, text_tokens)
    whole = ranks is not None or has_room(weights, stream, load_device)
    patcher = patcher_for(whole)(
        MutualForcing(bundle, offload_device),
        load_device=load_device,
        offload_device=offload_device,
    )
    if attention == "PyTorch":
        options = patcher.model_options["transformer_options"]
        options["optimized_attention_override"] = _pytorch_attention
    vaes = video_vae(bundle.video_codec), audio_vae(bundle.audio_codec)
    for which, vae in enumerate(vaes):
        vae.patcher.cached_patcher_init = (_vae_again, (path, which))
    clip = clip_of(bundle)
    clip.patcher.cached_patcher_init = (_clip_again, (path,))
    known = CausalModel(
        OWN,
        # In memory its rows are in split order, whatever the file had.
        replace(bundle.transformer.config, rope_type="split"),
        bundle.model_id,
        bundle.stream,
        text_tokens,
        title=bundle.title,
        fixed_length=True,
        empty=bundle.embed(""),
        vae=vaes[0],
        audio_vae=vaes[1],
        clip=clip,
        ranks=ranks,
    )
    if ranks is not None:
        along(ranks, patcher)
    patcher.set_attachments(ATTACHMENT, known)
    streams.remember(known)
    return LoadedModel(patcher, clip, *vaes)


def _clip_again(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """For ComfyUI's Select CLIP Device, which loads a text encoder once more for another card."""
    device = comfy.model_management.text_encoder_offload_device()
    return clip_of(load_bundle(path, device=device)).patcher


def _vae_again(
    path: Path, which: int, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """For ComfyUI's Select VAE Device, which loads a VAE once more for another card."""
    bundle = load_bundle(path, device=comfy.model_management.vae_offload_device())
    vae = audio_vae(bundle.audio_codec) if which else video_vae(bundle.video_codec)
    return vae.patcher


def _pytorch_attention(_chosen: object, *arguments: object, **options: object) -> Tensor:
    return comfy.ldm.modules.attention.attention_pytorch(*arguments, **options)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "automatic":
        half = comfy.model_management.should_use_bf16(device)
        return torch.bfloat16 if half else torch.float32
    return getattr(torch, precision)
