"""ComfyUI's CLIP and CONDITIONING wires, as this model gives and takes them.

b batch, m text tokens, c channels. Imports nothing of ComfyUI.
CLIP Text Encode asks a CLIP for `tokenize` and `encode_from_tokens_scheduled`; nothing more is
needed for an object to be one. CONDITIONING is a list of pairs: a tensor (b, m, c) and a dict of
extras.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model_loaders.bundle import Bundle
from ..networks.transformer import TextKeys, text_keys
from ..samplers.rollout import Prompt

Conditioning = list[list[object]]
TEXT = "mutual_forcing_text"


class StreamClip:
    """What the loader puts on its CLIP wire: encodes prompts, on ComfyUI's own nodes.

    Args:
        bundle: the model.
        make_ready: called before encoding; brings the model to where it computes.
    """

    def __init__(self, bundle: Bundle, make_ready: Callable[[], None]) -> None:
        self._bundle, self._make_ready = bundle, make_ready

    def tokenize(self, text: str, **_options: object) -> str:
        """The prompt itself: words become ids when it is encoded."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_options: object) -> Conditioning:
        """CONDITIONING of one prompt, with its text, so that one that says nothing can be told."""
        self._make_ready()
        return [[self._bundle.embed(tokens).float().cpu(), {"pooled_output": None, TEXT: tokens}]]


@torch.no_grad()
def prompt_of(
    bundle: Bundle,
    positive: Conditioning,
    negative: Conditioning | None,
    *,
    guided: bool,
    like: Tensor,
) -> Prompt:
    """Text keys of CONDITIONING wires.

    Args:
        negative: what to steer away from; None means the empty prompt.
        guided: whether guidance will ask for the second prompt at all.
        like: tensor with the device and dtype to compute in.

    Raises:
        ValueError: an empty prompt, one that another model encoded, or several on one wire.
    """
    wanted, text = _embedding(positive, "prompt", bundle)
    if text is not None:
        bundle.check_prompt(text)
    transcripts = (None if text is None else bundle.transcript_of(text),)

    def keys(embedding: Tensor) -> TextKeys:
        return text_keys(bundle.transformer, embedding.to(like), embedding.to(like))

    if not guided:
        return Prompt(keys(wanted), transcripts=transcripts)
    unwanted = (
        bundle.embed("") if negative is None else _embedding(negative, "negative prompt", bundle)[0]
    )
    return Prompt(keys(wanted), keys(unwanted), transcripts)


def _embedding(conditioning: Conditioning, name: str, bundle: Bundle) -> tuple[Tensor, str | None]:
    embedding, extras = only_entry(conditioning, name)
    width = bundle.transformer.config.caption_channels
    if embedding.ndim != 3 or embedding.shape[-1] != width:
        raise ValueError(
            f"the {name} was encoded for another model (embedding {tuple(embedding.shape)}, "
            "expected width "
            f"{width}): connect the clip output of Load Mutual Forcing Model to CLIP Text Encode"
        )
    return embedding, extras.get(TEXT)


def only_entry(conditioning: Conditioning, name: str) -> tuple[Tensor, dict[str, object]]:
    """Embedding and extras of a wire that carries one prompt.

    Raises:
        ValueError: it carries none or several.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"the {name} wire carries {len(conditioning)} prompts, expected one: connect one CLIP "
            "Text "
            "Encode and write everything there"
        )
    embedding, extras = conditioning[0]
    return embedding, extras


def frame_rate_of(conditioning: Conditioning) -> float | None:
    """The frame rate that ComfyUI's LTXVConditioning wrote onto a wire, if it was used."""
    return next(
        (extras["frame_rate"] for _, extras in conditioning if "frame_rate" in extras), None
    )
