"""A transformer that ComfyUI loaded, as this pack's functions want it: by LTX-2's names.

b batch, n tokens, a heads, d head dim, r rotation pairs per head (d/2).
Its weights stay as they are in the file. ComfyUI may hold them in eight bits, packed, offloaded or
with a LoRA's difference on top, and a LoRA's rows are numbered as the file's are; permuting them
would break all of that. So for a checkpoint with interleaved positions it is the normalised queries
and keys that are put in split order, on the fly: the same rotation (docs/omniforcing.md, section 0,
point 3), in the kernel that normalises and rotates them, or at the price of copying them where the
norm's weight has to be brought. No other weight is read; modules are called, and bare tables are
asked for when they are needed.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from ..model_loaders.keymap import ROTATED, rotated_heads
from ..networks.attention import AttentionKernel
from ..networks.config import TransformerConfig
from ..networks.tensor_parallel import over_some_heads, part_of

# Where ComfyUI keeps what changes a weight while it is brought.
_PATCHES = ("weight_function", "weight_lowvram_function")


class TransformerView:
    """A module of the host's with a config and an attention kernel of ours.

    Args:
        hosted: has LTX-2's submodules and parameters.
        config: how to run it; the layout of its positions is that of its weights.
        kernel: softmax attention.
    """

    def __init__(
        self, hosted: nn.Module, config: TransformerConfig, kernel: AttentionKernel
    ) -> None:
        self.hosted = hosted
        self.config, self.kernel = config, kernel
        if part_of(hosted) is not None:  # its rows are in split order
            self.kernel = over_some_heads(kernel)
            self.transformer_blocks = hosted.transformer_blocks
            return
        self.transformer_blocks = [
            _Replacing(
                block,
                {
                    name: _in_split_order(getattr(block, name), rotated_heads(name, config), config)
                    for name in ROTATED
                },
            )
            for block in hosted.transformer_blocks
        ]

    def over(self, hosted: nn.Module) -> TransformerView:
        """The same of another module."""
        return TransformerView(hosted, self.config, self.kernel)

    def __getattr__(self, name: str) -> object:
        return getattr(self.hosted, name)


class _Replacing:
    """A module with some of its parts replaced."""

    def __init__(self, module: nn.Module, replaced: dict[str, object]) -> None:
        self._module = module
        self.__dict__ |= replaced

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class _Norm:
    """A norm of the host's whose result is in split order (`HostedNorm`)."""

    def __init__(self, norm: nn.Module, heads: int, interleaved: bool) -> None:
        self._norm, self._heads, self.interleaved = norm, heads, interleaved

    @property
    def eps(self) -> float:
        """What is added to the mean square."""
        return self._norm.eps

    def weight_for(self, x: Tensor) -> Tensor | None:
        """The weight, if it lies beside x as it is multiplied; None: what the host does with it
        (bringing, casting, patching it) happens in its module's call."""
        norm, weight = self._norm, self._norm.weight
        patched = any(getattr(norm, name, None) for name in _PATCHES)
        if patched or weight.dtype != x.dtype or weight.device != x.device:
            return None
        return weight

    def __call__(self, x: Tensor) -> Tensor:
        """x (b, n, c) normalised over its whole width."""
        x = self._norm(x)
        if not self.interleaved:
            return x
        return rearrange(x, "b n (a r two) -> b n (a two r)", a=self._heads, two=2)


def _in_split_order(attention: nn.Module, heads: int, config: TransformerConfig) -> _Replacing:
    interleaved = config.rope_type == "interleaved"
    names = ("q_norm", "k_norm")
    return _Replacing(
        attention, {name: _Norm(getattr(attention, name), heads, interleaved) for name in names}
    )
