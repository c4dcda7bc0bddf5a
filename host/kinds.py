"""The two kinds of model: this pack's own, and LTX-2's. Imports nothing of ComfyUI.

b batch, m text tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..model_loaders.bundle import StreamDefaults
from ..model_loaders.identity import Identity, of_network
from ..model_loaders.ltx2 import PRESETS
from ..networks.config import TransformerConfig
from ..networks.layout import RELEASED_LAYOUT
from ..samplers.side_ranks import SideRanks
from ..samplers.sigmas import TAOMATE as TAOMATE_ENTRIES
from .conditioning import UNPROCESSED
from .stream_model import CausalModel, Kind

# Parts of a block that versions after LTX-2.3 do without, by the host's names.
_LATER = ("ff_bias", "audio_ff_bias", "use_prompt_adaln_single")
LTX2_TEXT_TOKENS = 1024
# 512 x 768 as OmniForcing was trained; with a window of 3 s a block sees 5 s in all, as there.
LTX2_DEFAULTS = StreamDefaults(window=3, height=16, width=24, default_mode="few")
# TaoMate keeps block 0 and the last two, at the same size.
TAOMATE_DEFAULTS = StreamDefaults(window=2, height=16, width=24, default_mode="few")


def _caption(config: TransformerConfig) -> tuple[int, ...]:
    return (config.caption_channels,)


def _caption_or_both(config: TransformerConfig) -> tuple[int, ...]:
    """As the text encoder makes it, or as the connectors have."""
    return config.caption_channels, 2 * config.caption_channels


def _both_at_once(config: TransformerConfig) -> tuple[int, ...]:
    """LTX-2.3's text encoder projects to the widths of both text attentions."""
    return (config.cross_attention_dim + config.audio_cross_attention_dim,)


def _one_for_both(
    _module: nn.Module, embedding: Tensor, _extras: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    return embedding, embedding


def _connected(module: nn.Module, embedding: Tensor, extras: Mapping[str, object]) -> Tensor:
    unprocessed = bool(extras.get(UNPROCESSED, False))
    return module.preprocess_text_embeds(embedding, unprocessed=unprocessed)


def _through_connectors(
    module: nn.Module, embedding: Tensor, extras: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    video, audio = _connected(module, embedding, extras).chunk(2, -1)
    return video, audio


def _through_wide_connectors(
    module: nn.Module, embedding: Tensor, extras: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    both = _connected(module, embedding, extras)
    return both.tensor_split((module.cross_attention_dim,), dim=-1)


OWN = Kind(
    audio_bins=1,
    encoder="connect the clip output of Load Mutual Forcing Model to CLIP Text Encode",
    contexts=_one_for_both,
    widths=_caption,
)
# OmniForcing was trained to predict the clean block and to noise it again.
LTX2 = Kind(
    audio_bins=16,
    encoder="connect the CLIP of Load LTXV Audio Text Encoder (a Gemma 3 12B text encoder and "
    "LTX-2's own file) to CLIP Text Encode",
    contexts=_through_connectors,
    widths=_caption_or_both,
    few_step_method="renoise",
    any_rate=True,
    least=2,
)
LTX23 = replace(
    LTX2,
    encoder="connect the CLIP of Load LTXV Audio Text Encoder (a Gemma 3 12B text encoder and "
    "LTX-2.3's own file) to CLIP Text Encode",
    contexts=_through_wide_connectors,
    widths=_both_at_once,
)
TAOMATE = replace(LTX23, few_step_entries=TAOMATE_ENTRIES)


def ltx2_model(
    config: TransformerConfig,
    model_id: str,
    *,
    title: str = "",
    vae: object = None,
    audio_vae: object = None,
    connected: bool = True,
    remarks: tuple[str, ...] = (),
    ranks: SideRanks | None = None,
) -> CausalModel:
    """What is known of an LTX-2."""
    kind, defaults = LTX2, LTX2_DEFAULTS
    if config.memory_interval:
        kind, defaults = TAOMATE, TAOMATE_DEFAULTS
    elif config.caption_proj_before_connector:
        kind = LTX23
    return CausalModel(
        kind,
        config,
        model_id,
        defaults,
        LTX2_TEXT_TOKENS,
        title=title,
        vae=vae,
        audio_vae=audio_vae,
        connected=connected,
        remarks=remarks,
        ranks=ranks,
    )


def stock_identity(unet_config: Mapping[str, object]) -> Identity:
    """What a network is that ComfyUI's own loaders made; arguments as for `stock_config`."""
    said = PRESETS["ltx2_base"].keys() & unet_config.keys()
    return of_network({name: unet_config[name] for name in said})


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
    # LTX-2.3's blocks are known; these are what a later one's are told by.
    later = [name for name in _LATER if not unet_config.get(name, True)]
    if later:
        raise ValueError(
            f"the model is a later version of LTX-2 than 2.3 (it has no {', no '.join(later)}), "
            "which no causal checkpoint exists for; load an LTX-2 19B or LTX-2.3 model"
        )
    released = {
        "video_first_block": RELEASED_LAYOUT.video_first,
        "audio_first_block": RELEASED_LAYOUT.audio_first,
        "num_layers": len(module.transformer_blocks),
    }
    return TransformerConfig.from_dict(released | dict(unet_config))
