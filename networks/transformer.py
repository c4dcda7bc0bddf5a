"""The dual-stream causal transformer: LTX-2's block, its parameters under LTX-2's names.

b batch, n tokens of one stream, m text tokens, c channels, g groups of tokens with one sigma.
One class for every size (architecture.md, decision 1). The functions address submodules by name, so they
also run over another module tree with the same names. Two ways to run it lie beside this file and agree:
`full_sequence.py` (everything under masks, for training) and `kv_cache.py` (block after block).
Order of operations and tables: omniforcing.md, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import (
    Attention,
    AttentionKernel,
    KeyPattern,
    KeyValueStore,
    attend,
    keys_values,
    sdpa,
)
from .config import TransformerConfig
from .modulation import AdaLNSingle, Modulation, StreamModulation
from .rope import StreamTables, rotate


class TextProjection(nn.Module):
    """Caption embedding to a stream's width: Linear, tanh-GELU, Linear."""

    def __init__(
        self, caption_dim: int, dim: int, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(caption_dim, dim, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(dim, dim, dtype=dtype, device=device)


class GeluProjection(nn.Module):
    """First half of the feed-forward, nested as in LTX-2's keys (`net.0.proj`)."""

    def __init__(
        self, dim: int, hidden: int, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        self.proj = operations.Linear(dim, hidden, dtype=dtype, device=device)


class FeedForward(nn.Module):
    """Linear to four times the width, tanh-GELU, Linear back."""

    def __init__(self, dim: int, operations: object, dtype: object, device: object) -> None:
        super().__init__()
        hidden = 4 * dim
        self.net = nn.ModuleList(
            [
                GeluProjection(dim, hidden, operations, dtype, device),
                nn.Identity(),
                operations.Linear(hidden, dim, dtype=dtype, device=device),
            ]
        )


class AVBlock(nn.Module):
    """One layer of both streams; `run_block` gives the order in which its parts act."""

    def __init__(
        self, config: TransformerConfig, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        video, audio = config.video_dim, config.audio_dim
        video_heads = (config.num_attention_heads, config.attention_head_dim)
        audio_heads = (config.audio_num_attention_heads, config.audio_attention_head_dim)
        common = {
            "eps": config.norm_eps,
            "operations": operations,
            "dtype": dtype,
            "device": device,
        }
        self.attn1 = Attention(video, video, *video_heads, **common)
        self.audio_attn1 = Attention(audio, audio, *audio_heads, **common)
        self.attn2 = Attention(video, config.cross_attention_dim, *video_heads, **common)
        self.audio_attn2 = Attention(
            audio, config.audio_cross_attention_dim, *audio_heads, **common
        )
        self.audio_to_video_attn = Attention(video, audio, *audio_heads, **common)
        self.video_to_audio_attn = Attention(audio, video, *audio_heads, **common)
        self.ff = FeedForward(video, operations, dtype, device)
        self.audio_ff = FeedForward(audio, operations, dtype, device)
        kwargs = {"dtype": dtype, "device": device}
        self.scale_shift_table = nn.Parameter(torch.zeros(6, video, **kwargs))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(6, audio, **kwargs))
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video, **kwargs))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio, **kwargs))


class CausalAVTransformer(nn.Module):
    """Parameters of the whole network. Velocity of both streams comes out: v = noise - clean.

    Args:
        config: sizes and causality of the checkpoint.
        operations: namespace with `Linear` and `RMSNorm` (torch.nn, or comfy.ops inside ComfyUI).
        dtype, device: of the parameters; device="meta" builds without memory.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        operations: object = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.kernel: AttentionKernel = sdpa
        video, audio = config.video_dim, config.audio_dim
        kwargs = {"dtype": dtype, "device": device}
        self.patchify_proj = operations.Linear(config.in_channels, video, **kwargs)
        self.audio_patchify_proj = operations.Linear(config.audio_in_channels, audio, **kwargs)

        def embedder(dim: int, rows: int) -> AdaLNSingle:
            return AdaLNSingle(dim, rows, config.step_size_embedding, operations, dtype, device)

        self.adaln_single = embedder(video, 6)
        self.audio_adaln_single = embedder(audio, 6)
        self.av_ca_video_scale_shift_adaln_single = embedder(video, 4)
        self.av_ca_audio_scale_shift_adaln_single = embedder(audio, 4)
        self.av_ca_a2v_gate_adaln_single = embedder(video, 1)
        self.av_ca_v2a_gate_adaln_single = embedder(audio, 1)
        self.caption_projection = TextProjection(
            config.caption_channels, video, operations, dtype, device
        )
        self.audio_caption_projection = TextProjection(
            config.caption_channels, audio, operations, dtype, device
        )
        self.transformer_blocks = nn.ModuleList(
            [AVBlock(config, operations, dtype, device) for _ in range(config.num_layers)]
        )
        self.scale_shift_table = nn.Parameter(torch.zeros(2, video, **kwargs))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio, **kwargs))
        self.proj_out = operations.Linear(video, config.out_channels, **kwargs)
        self.audio_proj_out = operations.Linear(audio, config.audio_out_channels, **kwargs)
        if config.num_audio_sink_tokens:
            # Initialised as OmniForcing's first release did: N(0, 0.02^2), after the patch projection.
            self.audio_sink_tokens = nn.Parameter(
                torch.randn(1, config.num_audio_sink_tokens, audio, **kwargs) * 0.02
            )


class TextKeys(NamedTuple):
    """Text keys and values of every layer and both streams, computed once per prompt; each (b, a, m, d)."""

    video: tuple[tuple[Tensor, Tensor], ...]
    audio: tuple[tuple[Tensor, Tensor], ...]

    def rows(self, start: int, stop: int) -> TextKeys:
        """The keys of some entries of the batch."""

        def cut(layers: tuple[tuple[Tensor, Tensor], ...]) -> tuple[tuple[Tensor, Tensor], ...]:
            return tuple((k[start:stop], v[start:stop]) for k, v in layers)

        return TextKeys(cut(self.video), cut(self.audio))


def text_keys(model: nn.Module, video_context: Tensor, audio_context: Tensor) -> TextKeys:
    """Keys and values of caption embeddings (b, m, caption_channels), one embedding per stream."""
    config: TransformerConfig = model.config

    def project(module: nn.Module, context: Tensor) -> Tensor:
        return module.linear_2(F.gelu(module.linear_1(context), approximate="tanh"))

    video = project(model.caption_projection, video_context)
    audio = project(model.audio_caption_projection, audio_context)
    blocks = model.transformer_blocks
    return TextKeys(
        tuple(keys_values(block.attn2, video, config.num_attention_heads) for block in blocks),
        tuple(
            keys_values(block.audio_attn2, audio, config.audio_num_attention_heads)
            for block in blocks
        ),
    )


class Masks(NamedTuple):
    """Who sees whom on the four paths: (n, m) bool with True = visible, a block pattern, or None = all."""

    video: Tensor | KeyPattern | None = None
    audio: Tensor | KeyPattern | None = None
    audio_to_video: Tensor | KeyPattern | None = None
    video_to_audio: Tensor | KeyPattern | None = None


NOTHING_HIDDEN = Masks()


class FreshKeys:
    """The store without a past: keys are rotated and used as they are."""

    def extend(self, path: str, k: Tensor, v: Tensor, rope: object) -> tuple[Tensor, Tensor]:
        """Rotate k and return both."""
        return rotate(k, rope), v


@dataclass(frozen=True)
class Pass:
    """Everything that a pass over the layers needs besides the tokens themselves.

    `video_groups` / `audio_groups` (n,) name each token's row in the modulation; None = all share row 0.
    `stores` holds one key-value store per layer.
    """

    modulation: Modulation
    text: TextKeys
    tables: StreamTables
    stores: tuple[KeyValueStore, ...]
    masks: Masks = NOTHING_HIDDEN
    video_groups: Tensor | None = None
    audio_groups: Tensor | None = None


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def _rows(table: Tensor, values: Tensor, groups: Tensor | None) -> tuple[Tensor, ...]:
    """Table rows (k, c) plus values (b, g, k, c), spread over tokens: k tensors (b, n or 1, c)."""
    rows = table.to(values) + values
    if groups is not None:
        # A product with a one-hot matrix: the same rows, but its backward is one product as well, where that
        # of an index is a slow scatter.
        chosen = F.one_hot(groups, rows.shape[1]).to(rows)
        rows = torch.einsum("ng,bgkc->kbnc", chosen, rows)
        return rows.unbind(dim=0)
    return rows.unbind(dim=2)


def run_block(
    model: nn.Module, index: int, video: Tensor | None, audio: Tensor | None, run: Pass
) -> tuple[Tensor | None, Tensor | None]:
    """One layer over video tokens (b, n, c) and audio tokens (b, n', c'); either stream may be None."""
    config: TransformerConfig = model.config
    block, store, kernel, eps = (
        model.transformer_blocks[index],
        run.stores[index],
        model.kernel,
        config.norm_eps,
    )
    video_heads, audio_heads = config.num_attention_heads, config.audio_num_attention_heads

    def own_and_text(
        x: Tensor,
        stream: StreamModulation,
        table: Tensor,
        groups: Tensor | None,
        path: str,
        heads: int,
        own: nn.Module,
        text: nn.Module,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = _rows(table, stream.own, groups)
        shift, scale, gate = rows[:3]
        rope = getattr(run.tables, path)
        normed = _norm(x, eps) * (1 + scale) + shift
        keys = store.extend(path, *keys_values(own, normed, heads), rope)
        mask = getattr(run.masks, path)
        x = x + gate * attend(
            own, normed, heads, kernel, key_values=keys, query_rope=rope, mask=mask
        )
        text_kv = getattr(run.text, path)[index]
        return x + attend(text, _norm(x, eps), heads, kernel, key_values=text_kv), rows[3:]

    if video is not None:
        video, video_ff = own_and_text(
            video,
            run.modulation.video,
            block.scale_shift_table,
            run.video_groups,
            "video",
            video_heads,
            block.attn1,
            block.attn2,
        )
    if audio is not None:
        audio, audio_ff = own_and_text(
            audio,
            run.modulation.audio,
            block.audio_scale_shift_table,
            run.audio_groups,
            "audio",
            audio_heads,
            block.audio_attn1,
            block.audio_attn2,
        )
    if video is not None and audio is not None:
        video, audio = _cross_modal(block, store, kernel, audio_heads, eps, video, audio, run)
    if video is not None:
        video = _feed_forward(block.ff, video, video_ff, eps)
    if audio is not None:
        audio = _feed_forward(block.audio_ff, audio, audio_ff, eps)
    return video, audio


def _cross_modal(
    block: nn.Module,
    store: KeyValueStore,
    kernel: AttentionKernel,
    heads: int,
    eps: float,
    video: Tensor,
    audio: Tensor,
    run: Pass,
) -> tuple[Tensor, Tensor]:
    """Both directions from the same normalised streams; neither sees the other's update."""
    tables, masks = run.tables, run.masks
    video_table, audio_table = (
        block.scale_shift_table_a2v_ca_video,
        block.scale_shift_table_a2v_ca_audio,
    )
    v_scale_a2v, v_shift_a2v, v_scale_v2a, v_shift_v2a = _rows(
        video_table[:4], run.modulation.video.cross, run.video_groups
    )
    a_scale_a2v, a_shift_a2v, a_scale_v2a, a_shift_v2a = _rows(
        audio_table[:4], run.modulation.audio.cross, run.audio_groups
    )
    (gate_a2v,) = _rows(video_table[4:], run.modulation.video.gate, run.video_groups)
    (gate_v2a,) = _rows(audio_table[4:], run.modulation.audio.gate, run.audio_groups)
    normed_video, normed_audio = _norm(video, eps), _norm(audio, eps)
    a2v, v2a = block.audio_to_video_attn, block.video_to_audio_attn

    audio_kv = store.extend(
        "audio_to_video",
        *keys_values(a2v, normed_audio * (1 + a_scale_a2v) + a_shift_a2v, heads),
        tables.cross_audio,
    )
    from_audio = attend(
        a2v,
        normed_video * (1 + v_scale_a2v) + v_shift_a2v,
        heads,
        kernel,
        key_values=audio_kv,
        query_rope=tables.cross_video,
        mask=masks.audio_to_video,
    )
    video_kv = store.extend(
        "video_to_audio",
        *keys_values(v2a, normed_video * (1 + v_scale_v2a) + v_shift_v2a, heads),
        tables.cross_video,
    )
    from_video = attend(
        v2a,
        normed_audio * (1 + a_scale_v2a) + a_shift_v2a,
        heads,
        kernel,
        key_values=video_kv,
        query_rope=tables.cross_audio,
        mask=masks.video_to_audio,
    )
    return video + from_audio * gate_a2v, audio + from_video * gate_v2a


def _feed_forward(module: nn.Module, x: Tensor, rows: tuple[Tensor, ...], eps: float) -> Tensor:
    shift, scale, gate = rows
    hidden = F.gelu(module.net[0].proj(_norm(x, eps) * (1 + scale) + shift), approximate="tanh")
    return x + gate * module.net[2](hidden)


def _head(
    projection: nn.Module, table: Tensor, embedded: Tensor, groups: Tensor | None, x: Tensor
) -> Tensor:
    """Tokens (b, n, c) to velocity (b, n, channels)."""
    shift, scale = _rows(table, embedded[:, :, None], groups)
    return projection(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift)


def run_layers(
    model: nn.Module, video: Tensor | None, audio: Tensor | None, run: Pass, *, heads: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Patched tokens of both streams through every layer and the heads: velocities (b, n, channels).

    `audio` already has its sink tokens in front where the run holds block 0; the heads see them too, so
    callers cut them off. `heads=False` leaves the heads out: a refresh is run for its keys and values only.
    """
    for index in range(len(model.transformer_blocks)):
        video, audio = run_block(model, index, video, audio, run)
    if not heads:
        return video, audio
    if video is not None:
        video = _head(
            model.proj_out,
            model.scale_shift_table,
            run.modulation.video.embedded,
            run.video_groups,
            video,
        )
    if audio is not None:
        audio = _head(
            model.audio_proj_out,
            model.audio_scale_shift_table,
            run.modulation.audio.embedded,
            run.audio_groups,
            audio,
        )
    return video, audio


def patch_video(model: nn.Module, tokens: Tensor) -> Tensor:
    """Video latent tokens (b, n, in_channels) to (b, n, c)."""
    return model.patchify_proj(tokens)


def patch_audio(model: nn.Module, tokens: Tensor, with_sinks: bool) -> Tensor:
    """Audio latent tokens (b, n, in_channels) to (b, [S+]n, c), sink tokens in front where asked for."""
    tokens = model.audio_patchify_proj(tokens)
    if with_sinks and model.config.num_audio_sink_tokens:
        sinks = model.audio_sink_tokens.to(tokens).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((sinks, tokens), dim=1)
    return tokens
