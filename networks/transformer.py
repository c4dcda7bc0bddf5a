"""The dual-stream causal transformer: LTX-2's block, its parameters under LTX-2's names.

b batch, n tokens of one modality, m text tokens, c channels, g groups of tokens with one sigma.
One class for every size (docs/architecture.md, decision 1). The functions address submodules by
name, so they also run over another module tree with the same names. One layer is in `layer.py`. Two
ways to run them all lie beside this file and agree: `full_sequence.py` (everything under masks, for
training) and `kv_cache.py` (block after block).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention, AttentionKernel, keys_values, sdpa
from .config import TransformerConfig
from .few_step import adapted, attach
from .layer import Pass, Text, TextContexts, TextKeys, run_layer
from .memory_branch import attach_branch, attach_encoders
from .picture_track import PictureTrack, attach_sight
from .tensor_parallel import Part, Projection, part_of, projected
from .timestep import AdaLNSingle


class TextProjection(nn.Module):
    """Caption embedding to a modality's width: Linear, tanh-GELU, Linear."""

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


class TranscriptProjection(nn.Module):
    """Timed transcript to the audio stream's width: Linear, SiLU, Linear.

    Without biases, so that a transcript of which nothing is known adds nothing.
    """

    def __init__(
        self, channels: int, dim: int, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        kwargs = {"bias": False, "dtype": dtype, "device": device}
        self.linear_1 = operations.Linear(channels, 2 * dim, **kwargs)
        self.linear_2 = operations.Linear(2 * dim, dim, **kwargs)


class AVBlock(nn.Module):
    """One layer of both modalities; `run_layer` gives the order in which its parts act."""

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
            "gated": config.apply_gated_attention,
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
        rows = config.table_rows
        self.scale_shift_table = nn.Parameter(torch.zeros(rows, video, **kwargs))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(rows, audio, **kwargs))
        if config.cross_attention_adaln:
            text, heard = config.cross_attention_dim, config.audio_cross_attention_dim
            self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, text, **kwargs))
            self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, heard, **kwargs))
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video, **kwargs))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio, **kwargs))


class CausalAVTransformer(nn.Module):
    """Parameters of the whole network. Velocity of both modalities comes out: v = noise - clean.

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
        # What this process holds of the network, where several share it.
        self.part: Part | None = None
        # Whether training spends a second forward pass of each layer to save the memory of its
        # activations.
        self.recompute = False
        video, audio = config.video_dim, config.audio_dim
        kwargs = {"dtype": dtype, "device": device}
        self.patchify_proj = operations.Linear(config.in_channels, video, **kwargs)
        self.audio_patchify_proj = operations.Linear(config.audio_in_channels, audio, **kwargs)

        def embedder(dim: int, count: int, told: bool = config.step_size_embedding) -> AdaLNSingle:
            return AdaLNSingle(dim, count, told, operations, dtype, device)

        self.adaln_single = embedder(video, config.table_rows)
        self.audio_adaln_single = embedder(audio, config.table_rows)
        self.av_ca_video_scale_shift_adaln_single = embedder(video, 4)
        self.av_ca_audio_scale_shift_adaln_single = embedder(audio, 4)
        self.av_ca_a2v_gate_adaln_single = embedder(video, 1)
        self.av_ca_v2a_gate_adaln_single = embedder(audio, 1)
        if config.cross_attention_adaln:
            self.prompt_adaln_single = embedder(config.cross_attention_dim, 2, False)
            self.audio_prompt_adaln_single = embedder(config.audio_cross_attention_dim, 2, False)
        if not config.caption_proj_before_connector:
            self.caption_projection = TextProjection(
                config.caption_channels, video, operations, dtype, device
            )
            self.audio_caption_projection = TextProjection(
                config.caption_channels, audio, operations, dtype, device
            )
        self.transformer_blocks = nn.ModuleList(
            [AVBlock(config, operations, dtype, device) for _ in range(config.num_layers)]
        )
        if config.memory_interval:
            attach_encoders(self, config, operations, dtype, device)
        for index, block in enumerate(self.transformer_blocks):
            if config.remembers(index):
                attach_branch(block, config, operations, dtype, device)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, video, **kwargs))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio, **kwargs))
        self.proj_out = operations.Linear(video, config.out_channels, **kwargs)
        self.audio_proj_out = operations.Linear(audio, config.audio_out_channels, **kwargs)
        if config.transcript_channels:
            self.audio_transcript_proj = TranscriptProjection(
                config.transcript_channels, audio, operations, dtype, device
            )
        if config.picture_track_channels:
            self.picture_track = PictureTrack(config, operations, dtype, device)
            attach_sight(self, config.picture_track_rank, operations, dtype, device)
        if config.few_step_rank:
            attach(self, config.few_step_rank, operations, dtype, device)
        if config.num_audio_sink_tokens:
            # Initialised as OmniForcing's first release did: N(0, 0.02^2), after the patch
            # projection.
            self.audio_sink_tokens = nn.Parameter(
                torch.empty(1, config.num_audio_sink_tokens, audio, **kwargs)
            )
            nn.init.normal_(self.audio_sink_tokens, std=0.02)


def text_keys(model: nn.Module, video_context: Tensor, audio_context: Tensor) -> Text:
    """What a pass attends to of caption embeddings (b, m, caption_channels), one per modality.

    The embeddings of a network that projects captions before its connectors have the widths of its
    text attentions. One that modulates the text with the noise level gets it as it is.
    """
    config: TransformerConfig = model.config

    def project(module: nn.Module, context: Tensor) -> Tensor:
        return module.linear_2(F.gelu(module.linear_1(context), approximate="tanh"))

    video, audio = video_context, audio_context
    if not config.caption_proj_before_connector:
        video = project(model.caption_projection, video_context)
        audio = project(model.audio_caption_projection, audio_context)
    if config.cross_attention_adaln:
        return TextContexts(video, audio)
    blocks, part = model.transformer_blocks, part_of(model)
    if part is not None:
        return _shared_text_keys(part, blocks, video, audio)
    return TextKeys(
        tuple(keys_values(block.attn2, video, config.num_attention_heads) for block in blocks),
        tuple(
            keys_values(block.audio_attn2, audio, config.audio_num_attention_heads)
            for block in blocks
        ),
    )


def _shared_text_keys(part: Part, blocks: nn.ModuleList, video: Tensor, audio: Tensor) -> TextKeys:
    """The same of a rank's heads: one message for all layers of both modalities."""
    asked = []
    for kind, name, context in (("video", "attn2", video), ("audio", "audio_attn2", audio)):
        for block in blocks:
            module = getattr(block, name)
            asked.append(Projection(module.to_k, context, kind, module.k_norm))
            asked.append(Projection(module.to_v, context, kind))
    (made,) = part.together(projected(part, None, *asked))
    pairs = tuple(zip(made[::2], made[1::2], strict=True))
    return TextKeys(pairs[: len(blocks)], pairs[len(blocks) :])


def _head(
    projection: nn.Module, modulation: tuple[Tensor, Tensor, Tensor | None], x: Tensor
) -> Tensor:
    """Tokens (b, n, c) to velocity (b, n, channels)."""
    scale, shift, factors = modulation
    x = torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=1e-6), scale)
    return adapted(projection, x, factors)


def run_layers(
    model: nn.Module,
    video: Tensor | None,
    audio: Tensor | None,
    run: Pass,
    *,
    recompute: bool = False,
    latter: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Patched tokens of both modalities through layers and heads: velocities (b, n, channels).

    `audio` already has its sink tokens in front where the run holds block 0; the heads see them
    too, so callers cut them off. `recompute` keeps only the layers' inputs for the backward pass,
    which then runs every layer once more; the stores must not mind. `latter` asks for the second
    half of the batch alone; of the first only the keys and values are made that stores get.
    """
    layer = run_layer
    if recompute and torch.is_grad_enabled():
        layer = partial(checkpoint, run_layer, use_reentrant=False)
    run.lanes.fork(audio)
    last = len(model.transformer_blocks) - 1
    for index in range(last + 1):
        video, audio = layer(model, index, video, audio, run, latter=latter and index == last)
    modulation = run.modulation.head
    if latter:
        modulation = modulation.latter()
    if audio is not None:
        with run.lanes.audio():
            audio = _head(model.audio_proj_out, modulation.audio, audio)
    if video is not None:
        video = _head(model.proj_out, modulation.video, video)
    run.lanes.join(audio)
    return video, audio


def write_keys(model: nn.Module, video: Tensor, audio: Tensor, run: Pass) -> None:
    """The same for the keys and values that stores get: no heads, half a last layer."""
    run.lanes.fork(audio)
    last = len(model.transformer_blocks) - 1
    for index in range(last):
        video, audio = run_layer(model, index, video, audio, run)
    run_layer(model, last, video, audio, run, keys_only=True)
    run.lanes.join()


def patch_video(model: nn.Module, tokens: Tensor) -> Tensor:
    """Video latent tokens (b, n, in_channels) to (b, n, c)."""
    return model.patchify_proj(tokens)


def with_seen(track: Tensor | None, seen: Tensor, config: TransformerConfig) -> Tensor:
    """A timed transcript (b, n, transcript_channels), or none, and behind it what given pictures
    show (b, n, t)."""
    if track is None:
        track = seen.new_zeros(*seen.shape[:2], config.transcript_channels)
    return torch.cat((track.to(seen), seen), dim=2)


def patch_audio(
    model: nn.Module, tokens: Tensor, with_sinks: bool, track: Tensor | None = None
) -> Tensor:
    """Audio latents (b, n, in_channels) to tokens (b, [S+]n, c), sinks in front if asked for.

    Args:
        track: timed transcript of each, (b, n, transcript_channels), or that and what is seen
            (`with_seen`); None: they are told nothing.
    """
    tokens = model.audio_patchify_proj(tokens)
    if track is not None:
        units = model.config.transcript_channels
        transcript, seen = track[..., :units].to(tokens), track[..., units:].to(tokens)
        if units:
            projection = model.audio_transcript_proj
            tokens = tokens + projection.linear_2(F.silu(projection.linear_1(transcript)))
        if seen.shape[-1]:
            tokens = tokens + model.picture_track.proj_out(seen)
    if with_sinks and model.config.num_audio_sink_tokens:
        sinks = model.audio_sink_tokens.to(tokens).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((sinks, tokens), dim=1)
    return tokens
