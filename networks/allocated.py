"""What the passes over a stream allocate besides the weights, counted from the config alone.

A test holds it against what is allocated in fact, at the sizes of LTX-2 19B and on a CPU. Keys and
values are nearly all of it.
"""

from __future__ import annotations

from .config import TransformerConfig
from .kept_keys import AS_COMPUTED, ON_HOST, Kept
from .kv_cache import key_bytes, most_blocks

# Noise levels whose modulation is held: the refresh's, four steps', and the first step's once more
# beside the refresh's.
_LEVELS = 7
LAID_OUT_BYTES = 2**30


def lays_out(
    config: TransformerConfig,
    window: int,
    height: int,
    width: int,
    *,
    batch: int,
    element_size: int,
    branches: int,
    kept: Kept = AS_COMPUTED,
) -> bool:
    """Whether the past of a stream on a CPU is laid out once a block instead of in every pass.

    That saves time, and is done where two more copies of it are no more than `LAID_OUT_BYTES`.
    Arguments as for `allocated_bytes`.
    """
    blocks = most_blocks(config, window)
    keys = key_bytes(config, blocks, height, width, element_size)
    return kept == AS_COMPUTED and 2 * batch * branches * keys <= LAID_OUT_BYTES


def allocated_bytes(
    config: TransformerConfig,
    window: int,
    height: int,
    width: int,
    *,
    batch: int,
    element_size: int,
    branches: int,
    text_tokens: int,
    laid_out: bool = False,
    kept: Kept = AS_COMPUTED,
    on_cpu: bool = False,
) -> int:
    """Bytes of keys and values for a window and the prompt, and of one pass.

    Args:
        window: blocks kept besides the prefix.
        height, width: latent grid.
        element_size: bytes per number.
        branches: 2 where the empty prompt has keys of its own.
        text_tokens: length of the prompt's embedding.
        laid_out: with two more copies of the past in memory that stays, for recorded passes.
        kept: how and where keys and values wait.
        on_cpu: where it is laid out as well if that takes little (`lays_out`), and where else what
            a layer's are joined in is used again.
    """
    size = {"batch": batch, "element_size": element_size, "branches": branches, "kept": kept}
    laid_out = laid_out or (on_cpu and lays_out(config, window, height, width, **size))
    layout, wide, narrow = config.layout, config.video_dim, config.audio_dim
    blocks = most_blocks(config, window)
    # While a block is read there are its keys too, and nobody has let go of the oldest ones yet.
    keys = key_bytes(config, blocks, height, width, element_size, kept) * (3 if laid_out else 1)
    if kept == ON_HOST:  # those of two layers are here
        past = key_bytes(config, blocks - 1, height, width, element_size)
        keys += 2 * past // config.num_layers
    per_token = 1 if config.cross_attention_adaln else 2 * config.num_layers
    text = per_token * text_tokens * (wide + narrow) * element_size
    seen = layout.video_latents(blocks) * height * width
    heard = layout.audio_latents(blocks) + config.num_audio_sink_tokens
    # Cosines and sines: half as many of each as a token has channels.
    tables = (seen * (wide + narrow) + 2 * heard * narrow) * element_size
    rows = config.table_rows + 5 + 2 * config.cross_attention_adaln
    levels = _LEVELS * config.num_layers * rows * (wide + narrow) * element_size
    return (
        batch * branches * keys
        + branches * (text + tables)
        + levels
        + batch * _pass_bytes(config, seen, heard, height * width, element_size, on_cpu, laid_out)
    )


def _pass_bytes(
    config: TransformerConfig,
    seen: int,
    heard: int,
    grid: int,
    element_size: int,
    on_cpu: bool,
    laid_out: bool,
) -> int:
    """What a pass over two blocks has at once, at the larger one of a layer's two peaks.

    Args:
        seen, heard: tokens that are attended over.
    """
    wide, narrow = config.video_dim, config.audio_dim
    tokens = max(2 * config.layout.video_next, config.layout.video_first) * grid
    # Of each half the joined keys and values, and what a rotation makes on its way; beside them
    # the tokens, the same normalised, and their keys and values.
    attention = (5.5 * seen + 4 * tokens) * wide
    # Four times as wide before and after GELU; beside them what the layer made of the tokens so
    # far, and each half's keys and values for the other modality.
    feed_forward = 15 * tokens * wide + 4 * seen * narrow
    if on_cpu:
        joined = 0 if laid_out else 4 * seen * (wide + narrow) + 8 * heard * narrow
        attention = joined + 4 * tokens * wide
        feed_forward = joined + 17 * tokens * wide  # with what operators make on their way
    return int(max(attention, feed_forward) * element_size)
