"""ComfyUI's CLIP and CONDITIONING wires, as this model gives and takes them. Imports nothing of ComfyUI.

b batch, m text tokens, c channels.
CLIP Text Encode asks a CLIP for `tokenize` and `encode_from_tokens_scheduled`; nothing more is needed for an
object to be one. CONDITIONING is a list of pairs: a tensor (b, m, c) and a dict of extras.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..networks.transformer import text_keys
from ..samplers.rollout import Prompt

Conditioning = list[list[object]]
WORDS = "mutual_forcing_words"


class Encoder(Protocol):
    """The text encoder of a bundle."""

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Word ids, filled up with 0."""
        ...

    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings (b, m, c)."""
        ...


class StreamClip:
    """What the loader puts on its CLIP wire: encodes prompts for this model, on ComfyUI's own nodes.

    Args:
        encoder: the bundle's text encoder.
        make_ready: called before encoding; brings the model to where it computes.
    """

    def __init__(self, encoder: Encoder, make_ready: Callable[[], None]) -> None:
        self._encoder, self._make_ready = encoder, make_ready

    def tokenize(self, text: str, **_options: object) -> str:
        """The prompt itself: words become ids when it is encoded."""
        return text

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens: str, **_options: object) -> Conditioning:
        """CONDITIONING of one prompt; it also tells how many of its words the model knows."""
        self._make_ready()
        words = sum(token != 0 for token in self._encoder.tokenize(tokens))
        embedding = self._encoder.encode([tokens]).float().cpu()
        return [[embedding, {"pooled_output": None, WORDS: words}]]


@torch.no_grad()
def prompt_of(
    transformer: nn.Module,
    encoder: Encoder,
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
    width = transformer.config.caption_channels
    wanted, words = _single(positive, "prompt", width)
    if words == 0:
        raise ValueError(
            "the prompt says nothing that this model knows: write in CLIP Text Encode what should be "
            "seen and heard, in the words that the model card lists"
        )
    keys = text_keys(transformer, wanted.to(like), wanted.to(like))
    if not guided:
        return Prompt(keys)
    unwanted = (
        encoder.encode([""]) if negative is None else _single(negative, "negative prompt", width)[0]
    )
    return Prompt(keys, text_keys(transformer, unwanted.to(like), unwanted.to(like)))


def _single(conditioning: Conditioning, name: str, width: int) -> tuple[Tensor, int | None]:
    if len(conditioning) != 1:
        raise ValueError(
            f"the {name} wire carries {len(conditioning)} prompts, expected one: connect one CLIP "
            "Text Encode and write everything there"
        )
    embedding, extras = conditioning[0]
    if embedding.ndim != 3 or embedding.shape[-1] != width:
        raise ValueError(
            f"the {name} was encoded for another model (embedding {tuple(embedding.shape)}, expected "
            f"width {width}): connect the clip output of Load Mutual Forcing Model to CLIP Text Encode"
        )
    return embedding, extras.get(WORDS)
