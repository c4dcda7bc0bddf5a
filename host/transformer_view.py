"""A transformer that ComfyUI loaded, as this pack's functions want it: by LTX-2's names.

b batch, n tokens, a heads, d head dim, r rotation pairs per head (d/2).
Its weights stay as they are in the file. ComfyUI may hold them in eight bits, packed, offloaded or
with a LoRA's difference on top, and a LoRA's rows are numbered as the file's are; permuting them
would break all of that. So for a checkpoint with interleaved positions it is the normalised queries
and keys that are put in split order, on the fly: the same rotation (docs/omniforcing.md, section 0,
point 3), at the price of copying them. Nothing here reads a weight; modules are called, and bare
tables are asked for when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn

from ..model_loaders.keymap import ROTATED, rotated_heads
from ..networks.attention import AttentionKernel
from ..networks.config import TransformerConfig


class TransformerView:
    """A module of the host's with a config and an attention kernel of ours.

    Args:
        module: has LTX-2's submodules and parameters.
        config: how to run it; the layout of its positions is that of its weights.
        kernel: softmax attention.
    """

    def __init__(
        self, module: nn.Module, config: TransformerConfig, kernel: AttentionKernel
    ) -> None:
        self._module = module
        self.config, self.kernel = config, kernel
        self.transformer_blocks: list[nn.Module | _Replacing] = list(module.transformer_blocks)
        if config.rope_type == "interleaved":
            self.transformer_blocks = [
                _Replacing(
                    block,
                    {
                        name: _in_split_order(getattr(block, name), rotated_heads(name, config))
                        for name in ROTATED
                    },
                )
                for block in module.transformer_blocks
            ]

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class _Replacing:
    """A module with some of its parts replaced."""

    def __init__(self, module: nn.Module, replaced: dict[str, object]) -> None:
        self._module = module
        self.__dict__ |= replaced

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


def _in_split_order(attention: nn.Module, heads: int) -> _Replacing:
    def ordered(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        def normalise(x: Tensor) -> Tensor:
            return rearrange(norm(x), "b n (a r two) -> b n (a two r)", a=heads, two=2)

        return normalise

    return _Replacing(
        attention, {"q_norm": ordered(attention.q_norm), "k_norm": ordered(attention.k_norm)}
    )
