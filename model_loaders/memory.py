"""How much memory a stream needs besides the weights, so that a host can make room for it first."""

from __future__ import annotations

from ..networks.config import TransformerConfig

# The allocator's slack and what the small model's decoders use; measured generously.
WORKING_BYTES = 256 * 1024 * 1024
# Vectors of the stream's width that a layer holds per token at once, the feed-forward's four-fold
# ones included.
_ACTIVATIONS = 16


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
) -> int:
    """Bytes of keys and values for a window and the prompt, and of one block's activations.

    Args:
        window: blocks kept besides the prefix.
        height, width: latent grid.
        element_size: bytes per number.
        guided: a second set for the empty prompt.
        text_tokens: length of the prompt's embedding.
    """
    layout = config.layout
    video = layout.video_latents(window + 2) * height * width
    audio = layout.audio_latents(window + 2) + config.num_audio_sink_tokens
    own = video * config.video_dim + audio * config.audio_dim
    crossing = (video + audio) * config.audio_dim
    # Keys and values, in the cache and rotated for the open block.
    branches = 2 if guided else 1
    kept = 2 * 2 * branches * config.num_layers * (own + crossing)
    block = max(layout.video_first, layout.video_next) * height * width
    active = _ACTIVATIONS * (block * config.video_dim + layout.audio_next * config.audio_dim)
    text = 2 * branches * config.num_layers * text_tokens * (config.video_dim + config.audio_dim)
    return element_size * (batch * (kept + active) + text) + WORKING_BYTES


def frame_bytes(clips: int, frames: int, height: int, width: int) -> int:
    """Bytes of pictures as ComfyUI's IMAGE has them: three float32 a pixel."""
    return clips * frames * height * width * 3 * 4
