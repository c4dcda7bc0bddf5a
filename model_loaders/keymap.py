"""Checkpoint keys and RoPE layouts of LTX-2's many files -> this pack's one layout.

Sources: omniforcing.md, section 2 (prefixes, containers) and section 0, point 3 (interleaved to split).
"""

from __future__ import annotations

import re

from torch import Tensor

from ..networks.config import TransformerConfig
from ..networks.rope import interleaved_to_split

_ROTATED = re.compile(
    r"transformer_blocks\.\d+\.(attn1|audio_attn1|audio_to_video_attn|video_to_audio_attn)\."
    r"(to_q|to_k|q_norm|k_norm)\.(weight|bias)$"
)


def split_layout(state_dict: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The same weights with every rotated q/k row in split order; a split checkpoint is returned as it is."""
    if config.rope_type == "split":
        return state_dict

    def convert(key: str, value: Tensor) -> Tensor:
        found = _ROTATED.match(key)
        if not found:
            return value
        video = found.group(1) == "attn1"
        heads = config.num_attention_heads if video else config.audio_num_attention_heads
        return interleaved_to_split(value, heads)

    return {key: convert(key, value) for key, value in state_dict.items()}
