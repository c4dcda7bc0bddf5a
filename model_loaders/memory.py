"""How much memory a stream needs besides the weights, so that a host can make room for it first."""

from __future__ import annotations

from ..networks.allocated import allocated_bytes
from ..networks.config import TransformerConfig
from ..networks.kept_keys import AS_COMPUTED, Kept

# The allocator's slack and what the small model's decoders use; measured generously.
WORKING_BYTES = 256 * 1024 * 1024


def stream_bytes(
    config: TransformerConfig,
    window: int,
    height: int,
    width: int,
    *,
    batch: int = 1,
    element_size: int = 4,
    guided: bool = True,
    text_tokens: int = 0,
    laid_out: bool = False,
    kept: Kept = AS_COMPUTED,
    on_cpu: bool = False,
) -> int:
    """The most bytes that a stream has at once: `allocated_bytes` and some slack."""
    return WORKING_BYTES + allocated_bytes(
        config,
        window,
        height,
        width,
        batch=batch,
        element_size=element_size,
        branches=1 + guided,
        text_tokens=text_tokens,
        laid_out=laid_out,
        kept=kept,
        on_cpu=on_cpu,
    )


def frame_bytes(clips: int, frames: int, height: int, width: int) -> int:
    """Bytes of pictures as ComfyUI's IMAGE has them: three float32 a pixel."""
    return clips * frames * height * width * 3 * 4
