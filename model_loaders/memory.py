"""How much memory a stream needs besides the weights, so that a host can make room for it first."""

from __future__ import annotations

from ..networks.config import TransformerConfig

# Activations of one block, the decoders and the allocator's slack; measured generously for the small model.
WORKING_BYTES = 256 * 1024 * 1024


def stream_bytes(
    config: TransformerConfig,
    window: int,
    height: int,
    width: int,
    *,
    batch: int = 1,
    element_size: int = 4,
) -> int:
    """Bytes of keys and values for a window of blocks, with and without prompt, plus working memory.

    Args:
        window: blocks kept besides the prefix.
        height, width: latent grid.
        element_size: bytes per number.
    """
    layout = config.layout
    video = layout.video_latents(window + 2) * height * width
    audio = layout.audio_latents(window + 2) + config.num_audio_sink_tokens
    own = video * config.video_dim + audio * config.audio_dim
    crossing = (video + audio) * config.audio_dim
    # Keys and values; the cache itself and the rotated copy of the open block; guided and unguided.
    return 2 * 2 * 2 * batch * element_size * config.num_layers * (own + crossing) + WORKING_BYTES
