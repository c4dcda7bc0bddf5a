"""Checkpoint keys and RoPE layouts of LTX-2's many files -> this pack's one layout.

Prefixes and containers: docs/omniforcing.md, section 2. Interleaved to split: docs/omniforcing.md,
section 0, point 3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..networks.checked import some
from ..networks.config import TransformerConfig
from ..networks.rope import interleaved_to_split
from ..samplers.tensor_file import TensorFileError

CAUSAL_MARK = "mutual_forcing_causal"
"""A tensor of bytes that says how a causal network is run, in files that a host's saving node
wrote."""
# Where LTX-2's files, ComfyUI's and OmniForcing's keep the transformer; the longer ones come first.
PREFIXES = ("model.diffusion_model.", "model.velocity_model.", "diffusion_model.", "model.", "")
# What else those files hold: other loaders' business.
OTHER_PARTS = (
    "video_embeddings_connector",
    "audio_embeddings_connector",
    "vae",
    "audio_vae",
    "vocoder",
    "text_embedding_projection",
    CAUSAL_MARK,
)
_WRAPPER = "_fsdp_wrapped_module."
_BLOCKS = "transformer_blocks."
# Attentions whose queries and keys RoPE acts on; only the first has the video's heads.
ROTATED = ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn")
_ROTATED = re.compile(
    rf"transformer_blocks\.\d+\.({'|'.join(ROTATED)})\."
    r"(to_[qk](\.(few_step|pictures)\.up)?|q_norm|k_norm)\.(weight|bias)$"
)


@dataclass(frozen=True)
class KeyMap:
    """What the keys of a file mean.

    Attributes:
        prefix: in front of the transformer's keys, wrappers stripped.
        names: key in the network to key in the file.
        left_out: other parts of the file by name, with how many tensors each has.
        unknown: keys of the file that belong nowhere.
    """

    prefix: str
    names: dict[str, str]
    left_out: dict[str, int]
    unknown: list[str]


def map_keys(keys: Iterable[str], what: str, remedy: str) -> KeyMap:
    """Sort the keys of a file.

    Args:
        what: the file, for messages: "the checkpoint /path".
        remedy: the next step, for messages.

    Raises:
        TensorFileError: no transformer of LTX-2 in it, or two keys that mean the same tensor.
    """
    bare = {key: key.replace(_WRAPPER, "") for key in keys}
    counts = {p: sum(name.startswith(p + _BLOCKS) for name in bare.values()) for p in PREFIXES}
    prefix = max(PREFIXES, key=counts.__getitem__)
    if not counts[prefix]:
        example = some([next(iter(bare), "no key at all")])
        raise TensorFileError(
            f"{what} holds no LTX-2 transformer: no key {_BLOCKS}* under any known prefix (found "
            f"{example}, for instance); {remedy}"
        )
    names: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    unknown = []
    for key, name in bare.items():
        ours = name.startswith(prefix)
        own = name.removeprefix(prefix)
        part = own.removeprefix("model.").split(".")[0]
        if part in OTHER_PARTS:
            left_out[part] += 1
        elif not ours:
            unknown.append(key)
        elif own in names:
            twice = " and as ".join(some([same]) for same in (names[own], key))
            raise TensorFileError(f"{what} has {some([own])} twice, as {twice}; {remedy}")
        else:
            names[own] = key
    return KeyMap(prefix, names, dict(left_out), unknown)


def check_shapes(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    remedy: str,
) -> None:
    """Refuse a file whose tensors are not exactly those of the network.

    Args:
        what: the file, for messages.
        expected, found: shapes by the file's own keys.

    Raises:
        TensorFileError: a tensor is missing, has another shape or no place; names three and counts
            the rest.
    """
    misshapen = [
        f"{key} is {found[key]}, expected {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    for problem, keys in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has weights of another shape:", misshapen),
        ("has weights that this model has no place for:", sorted(found.keys() - expected.keys())),
    ):
        if keys:
            raise TensorFileError(f"{what} {problem} {some(keys)}; {remedy}")


def is_rotated(key: str) -> bool:
    """Whether RoPE acts on what this tensor of the network makes."""
    return _ROTATED.match(key) is not None


def to_split(key: str, value: Tensor, config: TransformerConfig) -> Tensor:
    """One tensor of the network in split order."""
    found = _ROTATED.match(key)
    if config.rope_type == "split" or not found:
        return value
    return interleaved_to_split(value, rotated_heads(found.group(1), config))


def rotated_heads(attention: str, config: TransformerConfig) -> int:
    """Heads of one of the `ROTATED` attentions."""
    video = attention == "attn1"
    return config.num_attention_heads if video else config.audio_num_attention_heads


def split_layout(state_dict: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The same weights with every rotated q/k row in split order; split ones as they are."""
    if config.rope_type == "split":
        return state_dict
    return {key: to_split(key, value, config) for key, value in state_dict.items()}
