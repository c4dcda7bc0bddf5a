"""LTX-2's own encoders, as ComfyUI loads them: films and captions to what training reads.

F H W pixel frames and size, n samples, b batch, c channels, f h w video latent grid, s audio
latents, m text tokens. For `lab.training.ltx2_latents`, in ComfyUI's process.
"""

from __future__ import annotations

import json
from pathlib import Path

import comfy.ldm.lightricks.av_model
import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from ..model_loaders.containers import Checkpoint
from ..model_loaders.identity import CONNECTORS
from ..networks.checked import some
from ..networks.layout import RELEASED_LAYOUT
from ..samplers.encode import as_long
from .conditioning import encoder_of
from .encoding import audio_latents
from .kinds import LTX2, LTX2_TEXT_TOKENS
from .load_ltx2 import load_vaes

_TRANSFORMER = "model.diffusion_model."


def model_file(name: str, folder: str) -> Path:
    """A file by its path, or by its name in one of ComfyUI's model folders.

    Raises:
        ValueError: it is in neither.
    """
    if Path(name).is_file():
        return Path(name)
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        places = ", ".join(folder_paths.get_folder_paths(folder))
        raise ValueError(
            f"found no file {name}, neither there nor in {places}: name one of ComfyUI's "
            f"models/{folder}, or give a path"
        )
    return Path(found)


class LTX2Encoders:
    """Both VAEs, text encoder and connectors.

    Args:
        base: LTX-2's own file, with the VAEs and the connectors.
        text_encoder: Gemma's.

    Raises:
        ValueError: the base lacks some of them, or is of a version that reads captions otherwise.
        TensorFileError: a file cannot be read.
    """

    def __init__(self, base: Path, text_encoder: Path) -> None:
        self.connectors = _connectors(base)
        self.vae, self.audio_vae = load_vaes(base)
        if self.vae is None or self.audio_vae is None:
            raise ValueError(
                f"{base} lacks a VAE, expected those for pictures and for sound in it: give "
                "LTX-2's own file"
            )
        clip = comfy.sd.load_clip(
            ckpt_paths=[str(text_encoder), str(base)], clip_type=comfy.sd.CLIPType.LTXV
        )
        self._encode = encoder_of(clip)

    @torch.no_grad()
    def pictures(self, video: NDArray[np.uint8]) -> Tensor:
        """Frames (F, H, W, 3) to normalised latents (c, f, h, w) on the CPU."""
        return self.vae.encode(torch.from_numpy(video).float() / 255)[0].float().cpu()

    @torch.no_grad()
    def sound(self, wave: NDArray[np.float32], blocks: int) -> Tensor:
        """Two channels (2, n) at 16 kHz to the normalised latents (s, c) of a number of blocks."""
        latents = audio_latents(self.audio_vae, torch.from_numpy(wave)[None])
        return as_long(latents, RELEASED_LAYOUT.audio_latents(blocks))[0].float().cpu()

    @torch.no_grad()
    def caption(self, text: str) -> Tensor:
        """What Gemma and the connectors make of a text: (m, 2, c), for video and for audio.

        Raises:
            ValueError: it is longer than the network learned to read.
        """
        ((embedding, extras),) = self._encode(text)
        if embedding.shape[1] > LTX2_TEXT_TOKENS:
            raise ValueError(
                f"its caption has {embedding.shape[1]} tokens, expected at most {LTX2_TEXT_TOKENS}"
            )
        device = comfy.model_management.get_torch_device()
        module = self.connectors.to(device)
        embedding = embedding.to(device, next(module.parameters()).dtype)
        contexts = LTX2.contexts(module, embedding, extras)
        module.to("cpu")
        return rearrange(list(contexts), "two 1 m c -> m two c").float().cpu()


def _connectors(base: Path) -> nn.Module:
    """ComfyUI's network of a file without its layers: what prepares a prompt is left.

    Raises:
        ValueError: the file has no connectors, or is LTX-2.3's, whose captions have two widths.
    """
    checkpoint = Checkpoint(base)
    header = json.loads(checkpoint.metadata.get("config", "{}")).get("transformer", {})
    names = [key for key in checkpoint.shapes if key.startswith(_TRANSFORMER)]
    wanted = [key for key in names if key.removeprefix(_TRANSFORMER).startswith(CONNECTORS)]
    if not header or not wanted or header.get("caption_proj_before_connector"):
        raise ValueError(
            f"{base} is {checkpoint.identity.kind.name}, expected LTX-2 19B's own file with its "
            "header and connectors: give ltx-2-19b-dev.safetensors or its fp8 version as base"
        )
    dtype = checkpoint.dtypes[wanted[0]]
    module = comfy.ldm.lightricks.av_model.LTXAVModel(
        **header | {"num_layers": 0},
        dtype=dtype if dtype.itemsize > 1 else torch.bfloat16,
        device="cpu",
        operations=comfy.ops.manual_cast,
    )
    tensors = {key.removeprefix(_TRANSFORMER): checkpoint.tensor(key, keep=True) for key in wanted}
    own = {name for name in module.state_dict() if name.startswith(CONNECTORS)}
    if strange := own ^ set(tensors):
        raise ValueError(
            f"{base} lacks weights of the connectors, or has others ({some(sorted(strange))}): "
            "give LTX-2's own file"
        )
    module.load_state_dict(tensors, strict=False)
    return module.eval().requires_grad_(False)
