"""The two kinds of model: this pack's own, and LTX-2's. Imports nothing of ComfyUI.

b batch, m text tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..model_loaders.bundle import StreamDefaults
from ..networks.config import TransformerConfig
from ..networks.layout import RELEASED_LAYOUT
from .stream_model import CausalModel, Kind

UNPROCESSED = "unprocessed_ltxav_embeds"
"""Core's mark of a prompt that has not been through the connectors."""
LTX2_TEXT_TOKENS = 1024
# 512 x 768 as OmniForcing was trained; with a window of 3 s a block sees 5 s in all, as there.
LTX2_DEFAULTS = StreamDefaults(window=3, height=16, width=24, default_mode="few")
# What sets LTX-2.3 and later apart; their blocks have parts that this network has not.
_LATER = ("cross_attention_adaln", "apply_gated_attention", "caption_proj_before_connector")


def _one_for_both(
    _module: nn.Module, embedding: Tensor, _extras: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    return embedding, embedding


def _through_connectors(
    module: nn.Module, embedding: Tensor, extras: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    unprocessed = bool(extras.get(UNPROCESSED, False))
    video, audio = module.preprocess_text_embeds(embedding, unprocessed=unprocessed).chunk(2, -1)
    return video, audio


OWN = Kind(
    audio_bins=1,
    encoder="connect the clip output of Load Mutual Forcing Model to CLIP Text Encode",
    contexts=_one_for_both,
)
# OmniForcing was trained to predict the clean block and to noise it again.
LTX2 = Kind(
    audio_bins=16,
    encoder="connect the CLIP of Load LTXV Audio Text Encoder (a Gemma 3 12B text encoder and "
    "LTX-2's own file) to CLIP Text Encode",
    contexts=_through_connectors,
    widths=(1, 2),
    few_step_method="renoise",
    any_rate=True,
)


def ltx2_model(
    config: TransformerConfig,
    model_id: str,
    *,
    title: str = "",
    vae: object = None,
    audio_vae: object = None,
) -> CausalModel:
    """What is known of an LTX-2."""
    return CausalModel(
        LTX2,
        config,
        model_id,
        LTX2_DEFAULTS,
        LTX2_TEXT_TOKENS,
        title=title,
        vae=vae,
        audio_vae=audio_vae,
    )


def stock_config(module: nn.Module, unet_config: Mapping[str, object]) -> TransformerConfig:
    """How to run a network that ComfyUI's own loaders made, from what they found in the file.

    What the file does not say is as in OmniForcing's released code, whose files say nothing.

    Args:
        unet_config: what ComfyUI built it with; LTX-2's own header, as far as there is one.

    Raises:
        ValueError: not LTX-2, or a later version of it than this network is.
    """
    if not hasattr(module, "audio_patchify_proj"):
        raise ValueError(
            f"the model is a {type(module).__name__}, expected one that makes streams: connect "
            "Load Mutual Forcing Model, Load OmniForcing Model, or a loader with an LTX-2 file"
        )
    later = [name for name in _LATER if unet_config.get(name)]
    if later:
        raise ValueError(
            f"the model is a later version of LTX-2 than 2.0 (it has {', '.join(later)}), which no "
            "causal checkpoint exists for; load an LTX-2 19B model"
        )
    released = {
        "video_first_block": RELEASED_LAYOUT.video_first,
        "audio_first_block": RELEASED_LAYOUT.audio_first,
        "num_layers": len(module.transformer_blocks),
    }
    return TransformerConfig.from_dict(released | dict(unet_config))
