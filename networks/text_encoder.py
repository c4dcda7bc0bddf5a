"""The small model's text encoder: a closed vocabulary of words and two transformer layers.

b batch, m tokens (always `length`), c channels, a heads, d head dim.
It takes the place that Gemma 3 has for LTX-2. As there, every caption fills a fixed number of
places: those that no word needs hold learned vectors of their own, so no attention mask is needed
anywhere. The empty prompt is all such places and stands for "anything" in classifier-free guidance.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from .checked import Count, Width, build
from .execution import one_thread

logger = logging.getLogger("mutualforcing")

PAD = 0
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes, and the words that it knows in the order of their ids (from 1; 0 is empty)."""

    vocabulary: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=65536)]
    dim: Width = 128
    layers: Count = 2
    heads: Count = 4
    length: Annotated[int, Field(ge=1, le=4096)] = 32

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self) | {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> TextEncoderConfig:
        """Build from JSON.

        Raises:
            ValueError: no vocabulary, a value of the wrong type or out of range, or heads that do
            not
                divide the width.
        """
        if not values.get("vocabulary"):
            raise ValueError("text encoder config: vocabulary is empty, expected a list of words")
        config = build(cls, values, "text encoder config")
        if config.dim % config.heads:
            raise ValueError(
                f"text encoder config: dim {config.dim} is not a multiple of heads {config.heads}"
            )
        return config


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm_feed_forward = nn.RMSNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.to_qkv(self.norm_attention(x)),
            "b m (three a d) -> three b a m d",
            three=3,
            a=self.heads,
        )
        out = F.scaled_dot_product_attention(q, k, v)
        x = x + self.to_out(rearrange(out, "b a m d -> b m (a d)"))
        return x + self.contract(F.gelu(self.expand(self.norm_feed_forward(x))))


class TextEncoder(nn.Module):
    """Captions to embeddings for both modalities."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.ids = {word: index + 1 for index, word in enumerate(config.vocabulary)}
        self.word = nn.Embedding(len(config.vocabulary) + 1, config.dim)
        self.place = nn.Parameter(torch.empty(config.length, config.dim))
        nn.init.normal_(self.place, std=0.5)
        self.layers = nn.ModuleList(_Layer(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Ids of the words that it knows, filled up with empty places to the fixed length.

        Unknown words are left out, and words beyond the fixed length too; both are logged, because
        a prompt that half works without a word said about it would puzzle whoever wrote it.
        """
        for remark in self.remarks(text):
            logger.warning("%s", remark)
        words = _WORD.findall(text.lower())
        ids = [self.ids[word] for word in words if word in self.ids][: self.config.length]
        return (*ids, *[PAD] * (self.config.length - len(ids)))

    def remarks(self, text: str) -> tuple[str, ...]:
        """What of a prompt is not used, a sentence each."""
        words = _WORD.findall(text.lower())
        unknown = [word for word in dict.fromkeys(words) if word not in self.ids]
        known = sum(word in self.ids for word in words)
        remarks = []
        if unknown:
            remarks.append(f"words that this model does not know are ignored: {', '.join(unknown)}")
        if known > self.config.length:
            remarks.append(
                f"the prompt has {known} words, only the first {self.config.length} are used"
            )
        return tuple(remarks)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, m) to embeddings (b, m, c)."""
        x = self.word(ids) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (b, m, c) of prompts; '' is the unconditional one."""
        return self.encode_ids([self.tokenize(text) for text in texts])

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """The same of what `tokenize` makes; the same bits, whatever else computes meanwhile."""
        with one_thread():
            return self(torch.tensor(ids, device=self.place.device))
