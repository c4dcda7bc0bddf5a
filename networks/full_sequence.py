"""The whole sequence in one pass under block-causal masks: training, and the check on the cached path.

b batch, n m tokens, f h w video latent grid, s audio latents, k blocks, g groups of tokens with one sigma.
`causal_forward` is OmniForcing's full-sequence form (section 3.2, equations 3-5). `history_forward` puts a
clean history and one or more noisy copies of every block side by side, so that one pass trains every block
on its own past: a noisy block sees itself and the clean blocks before it (mutual_forcing.md, section 3.5 B).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import TransformerConfig
from .modulation import modulation
from .rope import StreamTables, stream_tables
from .transformer import FreshKeys, Masks, Pass, TextKeys, patch_audio, patch_video, run_layers


@dataclass(frozen=True)
class SequencePlan:
    """Who every token is: its block, its copy (0 = clean), its tables and who sees whom.

    Attributes:
        video_block, audio_block: (n,) block of each token; sinks belong to block 0.
        video_copy, audio_copy: (n,) which copy of the sequence the token belongs to.
        audio_is_sink: (n,) bool.
    """

    blocks: int
    height: int
    width: int
    copies: int
    video_block: Tensor
    video_copy: Tensor
    audio_block: Tensor
    audio_copy: Tensor
    audio_is_sink: Tensor
    tables: StreamTables
    masks: Masks


def _visible(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """(n, m) bool: clean sees clean of its block and before; noisy sees its own block and clean before it."""
    query_block, query_copy = (t[:, None] for t in query)
    key_block, key_copy = (t[None, :] for t in key)
    clean = (query_copy == 0) & (key_copy == 0) & (key_block <= query_block)
    noisy_self = (query_copy > 0) & (key_copy == query_copy) & (key_block == query_block)
    noisy_past = (query_copy > 0) & (key_copy == 0) & (key_block < query_block)
    return clean | noisy_self | noisy_past


@lru_cache(maxsize=32)
def sequence_plan(
    config: TransformerConfig, blocks: int, height: int, width: int, copies: int = 0, causal: bool = True
) -> SequencePlan:
    """Plan of `blocks` blocks and `copies` noisy copies behind them (0: a plain sequence).

    `causal=False` drops all masks (the bidirectional base model).
    """
    layout, sinks = config.layout, config.num_audio_sink_tokens
    video_block = torch.cat(
        [
            torch.full(((stop - start) * height * width,), block)
            for block in range(blocks)
            for start, stop in [layout.video_span(block)]
        ]
    )
    audio_block = torch.cat(
        [
            torch.full((stop - start + (sinks if block == 0 else 0),), block)
            for block in range(blocks)
            for start, stop in [layout.audio_span(block)]
        ]
    )
    is_sink = torch.arange(len(audio_block)) < sinks
    rows = 1 + copies
    video = (video_block.repeat(rows), torch.arange(rows).repeat_interleave(len(video_block)))
    audio = (audio_block.repeat(rows), torch.arange(rows).repeat_interleave(len(audio_block)))
    once = stream_tables(config, blocks, height, width)
    tables = StreamTables(
        *(table.index(torch.arange(table.cos.shape[1]).repeat(rows)) for table in once)
    )
    masks = (
        Masks(
            video=_visible(video, video),
            audio=_visible(audio, audio),
            audio_to_video=_visible(video, audio),
            video_to_audio=_visible(audio, video),
        )
        if causal
        else Masks()
    )
    return SequencePlan(
        blocks, height, width, copies, *video, *audio, is_sink.repeat(rows), tables, masks
    )


def _to(plan: SequencePlan, like: Tensor) -> tuple[StreamTables, Masks]:
    tables = StreamTables(*(t.to(like) for t in plan.tables))
    return tables, Masks(*(None if m is None else m.to(like.device) for m in plan.masks))


def video_tokens(video: Tensor) -> Tensor:
    """(b, c, f, h, w) to (b, n, c)."""
    return rearrange(video, "b c f h w -> b (f h w) c")


def causal_forward(
    model: nn.Module,
    video: Tensor,
    audio: Tensor,
    video_sigma: Tensor,
    audio_sigma: Tensor,
    text: TextKeys,
    *,
    step_size: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Velocities of a whole sequence under the four masks (or none, `causal=False`).

    Args:
        video: (b, c, f, h, w); audio: (b, s, c); lengths must fill whole blocks.
        video_sigma: (b, f) noise level per video latent; audio_sigma: (b, s).
        step_size: (b, 1) d, or None for 0.
    """
    config = model.config
    frames, height, width = video.shape[2:]
    blocks = config.layout.blocks(frames, audio.shape[1])
    plan = sequence_plan(config, blocks, height, width, 0, causal)
    tables, masks = _to(plan, video)
    sinks = config.num_audio_sink_tokens
    audio_groups = (torch.arange(audio.shape[1] + sinks, device=audio.device) - sinks).clamp(min=0)
    run = Pass(
        modulation(model, config, video_sigma, audio_sigma, step_size, video.dtype),
        text,
        tables,
        (FreshKeys(),) * config.num_layers,
        masks,
        torch.arange(frames, device=video.device).repeat_interleave(height * width),
        audio_groups,
    )
    video_out, audio_out = run_layers(
        model, patch_video(model, video_tokens(video)), patch_audio(model, audio, with_sinks=True), run
    )
    video_out = rearrange(video_out, "b (f h w) c -> b c f h w", h=height, w=width)
    return video_out, audio_out[:, sinks:]


def history_forward(
    model: nn.Module,
    clean: tuple[Tensor | None, Tensor | None],
    noisy: tuple[Tensor | None, Tensor | None],
    sigma: Tensor,
    text: TextKeys,
    *,
    step_size: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Velocities of every noisy block, each seeing the clean blocks before it, in one pass.

    Args:
        clean: history, video (b, c, f, h, w) and audio (b, s, c); either stream None to run the other alone.
        noisy: the same blocks with noise, video (b, r, c, f, h, w) and audio (b, r, s, c) for r copies.
        sigma: (b, r, k) noise level of each block in each copy, shared by both streams.
        step_size: (b, r, k) d of each block, or None for 0. The history always has sigma 0 and d 0.

    Returns:
        velocities shaped like `noisy`.
    """
    config = model.config
    layout, sinks = config.layout, config.num_audio_sink_tokens
    batch, copies, blocks = sigma.shape
    height, width = clean[0].shape[3:] if clean[0] is not None else (1, 1)
    plan = sequence_plan(config, blocks, height, width, copies)
    like = clean[0] if clean[0] is not None else clean[1]
    tables, masks = _to(plan, like)
    zero = torch.zeros(batch, 1, device=sigma.device, dtype=sigma.dtype)
    sigmas = torch.cat((zero, rearrange(sigma, "b r k -> b (r k)")), dim=1)
    steps = None
    if step_size is not None:
        steps = torch.cat((zero, rearrange(step_size, "b r k -> b (r k)")), dim=1)

    def groups(block: Tensor, copy: Tensor) -> Tensor:
        return torch.where(copy == 0, 0, 1 + (copy - 1) * blocks + block).to(sigma.device)

    with_video, with_audio = clean[0] is not None, clean[1] is not None
    run = Pass(
        modulation(
            model, config, sigmas if with_video else None, sigmas if with_audio else None, steps, like.dtype
        ),
        text,
        tables,
        (FreshKeys(),) * config.num_layers,
        masks,
        groups(plan.video_block, plan.video_copy),
        groups(plan.audio_block, plan.audio_copy),
    )
    video = audio = None
    if with_video:
        rows = torch.cat((clean[0][:, None], noisy[0]), dim=1)
        video = patch_video(model, rearrange(rows, "b r c f h w -> b (r f h w) c"))
    if with_audio:
        rows = torch.cat((clean[1][:, None], noisy[1]), dim=1)
        tokens = patch_audio(model, rearrange(rows, "b r s c -> (b r) s c"), with_sinks=True)
        audio = rearrange(tokens, "(b r) n c -> b (r n) c", r=1 + copies)
    video_out, audio_out = run_layers(model, video, audio, run)
    if with_video:
        video_out = rearrange(
            video_out, "b (r f h w) c -> b r c f h w", r=1 + copies, h=height, w=width
        )[:, 1:]
    if with_audio:
        audio_out = rearrange(audio_out, "b (r n) c -> b r n c", r=1 + copies)[:, 1:, sinks:]
        assert audio_out.shape[2] == layout.audio_latents(blocks)
    return video_out, audio_out
