"""This pack's text encoder as a CLIP of ComfyUI's, for CLIP Text Encode.

b batch, m text tokens, c channels.
"""

from __future__ import annotations

import re

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
from torch import Tensor, nn

from ..model_loaders.bundle import Bundle
from ..networks.text_encoder import TextEncoder
from .conditioning import REFUSAL, REMARKS, TRANSCRIPT, written_on

_TOKENS, _TEXT = "mutual_forcing", "text"
_WEIGHTED = re.compile(r"\(([^()]*):\s*[\d.]+\s*\)")


class _Tokenizer:
    """Words to ids; a prompt's text stays with them."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def tokenize_with_weights(self, text: str, _word_ids: bool = False, **_options: object) -> dict:
        """Ids with a weight of one each.

        Raises:
            ValueError: the prompt weighs some words more than others, which this encoder cannot.
        """
        weighted = _WEIGHTED.search(text)
        if weighted:
            raise ValueError(
                f"the prompt weighs {weighted[1].strip()!r} with {weighted[0]!r}, and this model's "
                f"text encoder knows no weights: write {weighted[1].strip()!r} without brackets "
                "and number"
            )
        return {_TOKENS: [[(i, 1.0) for i in self._encoder.tokenize(text)]], _TEXT: text}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the words lie in the model's config."""
        return {}


class MutualForcingText(nn.Module):
    """What ComfyUI's CLIP calls its `cond_stage_model`. Its keys are those of a model file."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.text_encoder = bundle.text_encoder
        self._refusal, self._transcript = bundle.prompt_refusal, bundle.transcript_of

    def reset_clip_options(self) -> None:
        """Nothing to reset."""

    def set_clip_options(self, options: dict[str, object]) -> None:
        """Take what ComfyUI says about how to encode.

        Raises:
            ValueError: it says to stop at an earlier layer (CLIP Set Last Layer).
        """
        if options.get("layer") is not None:
            raise ValueError(
                "CLIP Set Last Layer does nothing for this model's text encoder: connect the clip "
                "output of Load Mutual Forcing Model straight to CLIP Text Encode"
            )

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None, dict[str, object]]:
        """Embedding (1, m, c), nothing pooled, and why the prompt can't be followed, if so."""
        if _TOKENS not in tokens:
            raise ValueError(
                "this prompt was cut into tokens for another text encoder: use CLIP Text Encode"
            )
        ids = [[index for index, _ in one] for one in tokens[_TOKENS]]
        embedding = self.text_encoder.encode_ids(ids)
        placed = embedding.float().to(comfy.model_management.intermediate_device())
        text = tokens[_TEXT]
        extras = {
            REFUSAL: self._refusal(text),
            REMARKS: self.text_encoder.remarks(text),
            TRANSCRIPT: self._transcript(text),
        }
        return placed, None, extras | written_on(text, placed)


class _Clip(comfy.sd.CLIP):
    """ComfyUI's, which encodes with what its patcher holds.

    Select CLIP Device (ComfyUI 0.33) gives a copy another patcher, and leaves it the module that
    encodes, which lies where it lay.
    """

    @property
    def cond_stage_model(self) -> nn.Module:
        """What encodes."""
        return self.patcher.model

    @cond_stage_model.setter
    def cond_stage_model(self, _module: nn.Module) -> None:
        """ComfyUI sets it in a copy, to the same."""

    def clone(self, disable_dynamic: bool = False) -> _Clip:
        """See ComfyUI's, which makes one of its own."""
        copy = super().clone(disable_dynamic)
        copy.__class__ = _Clip
        return copy


def clip_of(bundle: Bundle) -> comfy.sd.CLIP:
    """A CLIP over a bundle's text encoder."""
    clip = _Clip(no_init=True)
    clip.tokenizer = _Tokenizer(bundle.text_encoder)
    clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds = None, False, None
    clip.tokenizer_options = {}
    # Its layers are torch's own: they are whole on the device, or not there at all.
    clip.patcher = comfy.model_patcher.ModelPatcher(
        MutualForcingText(bundle),
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    clip.patcher.hook_mode, clip.patcher.is_clip = comfy.hooks.EnumHookMode.MinVram, True
    return clip
