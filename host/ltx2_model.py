"""A MODEL of LTX-2 as a maker of streams: prompts, frame rates, samplers.

b batch, m text tokens, c channels.
The MODEL may be this pack's loader's or one of ComfyUI's own; either way its module stays ComfyUI's
and our causal pass runs over it (`hosted.py`). Imports nothing of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from PIL import Image
from torch import Tensor, nn

from ..model_loaders.bundle import StreamDefaults
from ..model_loaders.rate import at_rate, rate_of
from ..networks.attention import AttentionKernel
from ..networks.config import TransformerConfig
from ..networks.layout import RELEASED_LAYOUT, BlockLayout
from ..networks.transformer import TextKeys, text_keys
from ..samplers.clock import Clock
from ..samplers.rollout import Mode, Prompt, SamplerSettings, sampler_settings
from ..samplers.state import BlockLatents
from .conditioning import Conditioning, only_entry
from .hosted import HostedTransformer

AUDIO_BINS, TEXT_TOKENS = 16, 1024
UNPROCESSED = "unprocessed_ltxav_embeds"
"""Core's mark of a prompt that has not been through the connectors."""
_ENCODE = (
    "connect the CLIP of Load LTXV Audio Text Encoder (a Gemma 3 12B text encoder and LTX-2's own "
    "file) to "
    "CLIP Text Encode"
)
# What sets LTX-2.3 and later apart; their blocks have parts that this network has not.
_LATER = ("cross_attention_adaln", "apply_gated_attention", "caption_proj_before_connector")


@dataclass(frozen=True)
class LTX2Model:
    """A MODEL, seen as a `StreamModel`.

    Attributes:
        module: ComfyUI's network.
        config: how to run it causally.
        kernel: softmax attention.
        load: brings the weights to where they compute.
        picture: a small picture of one video latent (1, c, 1, h, w); None where previews are off.
        title: its file's name, where this pack loaded it.
    """

    module: nn.Module = field(repr=False)
    config: TransformerConfig
    model_id: str
    like: Tensor
    kernel: AttentionKernel
    load: Callable[[int], None]
    picture: Callable[[Tensor], Image.Image] | None = None
    audio_bins: int = AUDIO_BINS
    text_tokens: int = TEXT_TOKENS
    title: str = ""

    @property
    def transformer(self) -> HostedTransformer:
        """ComfyUI's network under the functions of `networks`."""
        return HostedTransformer(self.module, self.config, self.kernel)

    @property
    def defaults(self) -> StreamDefaults:
        """512 x 768 as OmniForcing was trained; with a window of 3 s a block sees 5 s, as there."""
        return StreamDefaults(window=3, height=16, width=24, default_mode="few")

    @property
    def clock(self) -> Clock:
        """Blocks, latents and frames; samples as the audio latents count them (16 kHz)."""
        return _clock(self.config, Fraction(self.config.fps))

    def at_rate(self, fps: float | Fraction | None) -> LTX2Model:
        """See `StreamModel`."""
        return self if fps is None else replace(self, config=at_rate(self.config, fps))

    def for_layout(self, layout: BlockLayout) -> LTX2Model:
        """See `StreamModel`."""
        try:
            found = self.at_rate(rate_of(self.config, layout))
        except ValueError:
            return self
        return found if found.config.layout == layout else self

    def sampler(self, mode: Mode, steps: int | None, guidance: float | None) -> SamplerSettings:
        """See `StreamModel`. OmniForcing was trained to predict the clean block and to noise it
        again; a network that is told its step size follows the velocity."""
        renoise = mode == "few" and not self.config.step_size_embedding
        return sampler_settings(mode, steps, guidance, "renoise" if renoise else "euler")

    def make_ready(self, memory_required: int = 0) -> None:
        """See `StreamModel`."""
        self.load(memory_required)

    @torch.no_grad()
    def prompt_of(
        self, positive: Conditioning, negative: Conditioning | None, *, guided: bool
    ) -> Prompt:
        """See `StreamModel`. The connectors run here, once per prompt."""
        wanted = self._keys(positive, "prompt")
        if not guided:
            return Prompt(wanted)
        if negative is None:
            raise ValueError(
                "guidance needs a second prompt to lead away from: connect another CLIP Text "
                "Encode to "
                "'negative' (its text may be empty), or set guidance to 1"
            )
        return Prompt(wanted, self._keys(negative, "negative prompt"))

    def sketches(self, latents: BlockLatents) -> list[Image.Image]:
        """See `StreamModel`."""
        if self.picture is None:
            return []
        return [self.picture(latent) for latent in latents.video[:1].split(1, dim=2)]

    def _keys(self, conditioning: Conditioning, name: str) -> TextKeys:
        embedding, extras = only_entry(conditioning, name)
        width = self.config.caption_channels
        if embedding.ndim != 3 or embedding.shape[-1] not in (width, 2 * width):
            raise ValueError(
                f"the {name} was encoded for another model (embedding {tuple(embedding.shape)}, "
                "expected width "
                f"{width}): {_ENCODE}"
            )
        context = self.module.preprocess_text_embeds(
            embedding.to(self.like), unprocessed=bool(extras.get(UNPROCESSED, False))
        )
        return text_keys(self.transformer, *context.chunk(2, dim=-1))


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
            f"the model is a {type(module).__name__}, expected LTX-2 with sound: connect Load "
            "OmniForcing "
            "Model, or a loader with an LTX-2 file"
        )
    later = [name for name in _LATER if unet_config.get(name)]
    if later:
        raise ValueError(
            f"the model is a later version of LTX-2 than 2.0 (it has {', '.join(later)}), which no "
            "causal "
            "checkpoint exists for; load an LTX-2 19B model"
        )
    released = {
        "video_first_block": RELEASED_LAYOUT.video_first,
        "audio_first_block": RELEASED_LAYOUT.audio_first,
        "num_layers": len(module.transformer_blocks),
    }
    return TransformerConfig.from_dict(released | dict(unet_config))


def stream_clock(layout: BlockLayout) -> Clock:
    """The clock of a stream of LTX-2's latents alone; their layout says the frame rate."""
    config = TransformerConfig()
    return replace(_clock(config, rate_of(config, layout)), layout=layout)


def _clock(config: TransformerConfig, fps: Fraction) -> Clock:
    return Clock(
        config.layout,
        fps,
        config.audio_sampling_rate,
        config.video_time_stride,
        config.audio_time_stride,
        config.audio_hop_length,
    )
