"""The whole sequence in one pass under block-causal masks: training, and the cache's check.

b batch, n m tokens, f h w video latent grid, s audio latents, k blocks, g groups of tokens with one
sigma.
`causal_forward` is OmniForcing's full-sequence form (arXiv 2603.11647, section 3.2, equations 3-5).
`history_forward` puts a clean history and one or more noisy copies of every block side by side, so
that one pass trains every block on its own past: a noisy block sees itself and the clean blocks
before it (docs/mutual_forcing.md, section 3.5 B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionKernel
from .config import TransformerConfig
from .kernels import PLAIN, Kernels
from .layer import FreshKeys, Masks, Pass, Text
from .layout import BlockLayout
from .memory_branch import Remembered, encoded, of_all_blocks
from .modulation import TokenModulation
from .rope import ModalityTables, RopeTable, modality_tables
from .tensor_parallel import part_of
from .timestep import GUIDANCE, seeing, timestep_embedding
from .transformer import patch_audio, patch_video, run_layers, with_seen


class Told(NamedTuple):
    """What a clip's blocks are told: one prompt or one of two each, and a transcript.

    Attributes:
        text: keys of the prompt.
        later: keys of the prompt that it changes to, as many, with (b, k) bool for the blocks under
            it; None: none.
        track: timed transcript (b, s, c) of all blocks; None: none.
        guidance: of few-step mode, one for all or (b, 1), for a network that has adapters for it.
        seen: what given pictures show (b, s, t) of all blocks, told to all of a plain sequence, and
            beside a history to its noisy copies alone; None: none are given.
        memory: of the stream before it, for every block but the first, to a network with a memory
            branch; None: nothing.
    """

    text: Text
    later: tuple[Text, Tensor] | None = None
    track: Tensor | None = None
    seen: Tensor | None = None
    guidance: float | Tensor = GUIDANCE
    memory: tuple[Remembered, ...] | None = None

    def block(self, index: int) -> Text:
        """Text keys of a block."""
        if self.later is None:
            return self.text
        keys, blocks = self.later
        return self.text.where(blocks[:, index], keys)

    def block_track(self, index: int, layout: BlockLayout) -> Tensor | None:
        """Timed transcript (b, s, c) of a block."""
        return None if self.track is None else self.track[:, slice(*layout.audio_span(index))]

    def tracks(self, config: TransformerConfig, copies: int = 0) -> Tensor | None:
        """All that the sound is told, (b, s, c), or of a clean clip and copies (b (1+r), s, c)."""
        if self.seen is None:
            if self.track is None or not copies:
                return self.track
            return self.track.repeat_interleave(1 + copies, dim=0)
        seen = self.seen
        if not copies:
            return with_seen(self.track, seen, config)
        # A history is what a stream has read by itself: its sound is told nothing of its pictures.
        noisy = with_seen(self.track, seen, config).unsqueeze(1).expand(-1, copies, -1, -1)
        clean = with_seen(self.track, torch.zeros_like(seen), config).unsqueeze(1)
        return torch.cat((clean, noisy), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class BlockPattern:
    """Which keys each run of queries sees: (query span, key spans, mask).

    Stands in for a dense mask where most of it would be False: each run attends over just its keys.
    A mask, if any, is (queries, keys) bool over the joined key spans.
    """

    runs: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...], Tensor | None], ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel) -> Tensor:
        """Attention of q (b, a, n, d) over k, v (b, a, m, d) under this pattern."""

        def join(x: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
            parts = [x[:, :, start:stop] for start, stop in spans if stop > start]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

        out = [
            kernel(q[:, :, start:stop], join(k, keys), join(v, keys), mask)
            for (start, stop), keys, mask in self.runs
        ]
        return torch.cat(out, dim=2)

    def dense(self, keys: int) -> Tensor:
        """The same pattern as one mask (n, m) bool."""
        parts = []
        for (start, stop), spans, mask in self.runs:
            visible = torch.zeros(stop - start, keys, dtype=torch.bool)
            seen = torch.cat([torch.arange(a, b) for a, b in spans])
            visible[:, seen] = True if mask is None else mask
            parts.append(visible)
        return torch.cat(parts)


@dataclass(frozen=True)
class SequencePlan:
    """Who every token is: its block, its copy (0 = clean), its tables and who sees whom.

    A plain sequence has copy 0 only. With noisy copies behind it, copy 0 lacks the last block,
    which nobody would look at.

    Attributes:
        video_group, audio_group: (n,) each token's group in the modulation: 0 for the clean copy,
            then one per block and copy. Sinks belong to block 0.
        video_clean, audio_clean: tokens of the clean copy.
        video_block, audio_block: (n,) the block of each of these.
    """

    video_group: Tensor
    audio_group: Tensor
    video_clean: int
    audio_clean: int
    tables: ModalityTables
    masks: Masks
    video_block: Tensor
    audio_block: Tensor


def _visible(query_block: Tensor, key_block: Tensor) -> Tensor:
    """Equations 3-5: (n, m) bool, blocks up to the query's own."""
    return key_block[None, :] <= query_block[:, None]


def _pattern(query_sizes: list[int], key_sizes: list[int], copies: int) -> BlockPattern:
    """Clean queries under the causal mask; noisy block i sees clean blocks before it and itself."""
    blocks = len(query_sizes)
    query_block = torch.arange(blocks).repeat_interleave(torch.tensor(query_sizes))
    key_block = torch.arange(blocks).repeat_interleave(torch.tensor(key_sizes))
    query_clean, key_clean = sum(query_sizes[:-1]), sum(key_sizes[:-1])
    runs = []
    if query_clean:
        mask = _visible(query_block[:query_clean], key_block[:key_clean])
        runs.append(((0, query_clean), ((0, key_clean),), mask))
    query_at, key_at = query_clean, key_clean
    for _ in range(copies):
        for block in range(blocks):
            query_end, key_end = query_at + query_sizes[block], key_at + key_sizes[block]
            past = sum(key_sizes[:block])
            runs.append(((query_at, query_end), ((0, past), (key_at, key_end)), None))
            query_at, key_at = query_end, key_end
    return BlockPattern(tuple(runs))


@lru_cache(maxsize=32)
def sequence_plan(
    config: TransformerConfig,
    blocks: int,
    height: int,
    width: int,
    copies: int = 0,
    causal: bool = True,
) -> SequencePlan:
    """Plan of `blocks` blocks and `copies` noisy copies behind them (0: a plain sequence).

    `causal=False` drops all masks (the bidirectional base model).
    """
    layout, sinks = config.layout, config.num_audio_sink_tokens

    def sizes(
        span: Callable[[int], tuple[int, int]], per_latent: int, first_extra: int
    ) -> list[int]:
        spans = [span(block) for block in range(blocks)]
        return [
            (b - a) * per_latent + (first_extra if i == 0 else 0) for i, (a, b) in enumerate(spans)
        ]

    video_sizes = sizes(layout.video_span, height * width, 0)
    audio_sizes = sizes(layout.audio_span, 1, sinks)

    def clean_tokens(lengths: list[int]) -> int:
        return sum(lengths[:-1]) if copies else sum(lengths)

    def groups(lengths: list[int]) -> Tensor:
        noisy = torch.arange(1, 1 + copies * blocks).repeat_interleave(
            torch.tensor(lengths).repeat(copies)
        )
        return torch.cat((torch.zeros(clean_tokens(lengths), dtype=torch.long), noisy))

    def repeated(table: RopeTable, lengths: list[int]) -> RopeTable:
        noisy = torch.arange(sum(lengths)).repeat(copies)
        return table.index(torch.cat((torch.arange(clean_tokens(lengths)), noisy)))

    once = modality_tables(config, blocks, height, width)
    tables = ModalityTables(
        repeated(once.video, video_sizes),
        repeated(once.audio, audio_sizes),
        repeated(once.cross_video, video_sizes),
        repeated(once.cross_audio, audio_sizes),
    )

    def mask(queries: list[int], keys: list[int]) -> Tensor | BlockPattern | None:
        if not causal:
            return None
        if copies:
            return _pattern(queries, keys, copies)
        block = torch.arange(blocks)
        return _visible(
            block.repeat_interleave(torch.tensor(queries)),
            block.repeat_interleave(torch.tensor(keys)),
        )

    masks = Masks(
        video=mask(video_sizes, video_sizes),
        audio=mask(audio_sizes, audio_sizes),
        audio_to_video=mask(video_sizes, audio_sizes),
        video_to_audio=mask(audio_sizes, video_sizes),
    )
    return SequencePlan(
        groups(video_sizes),
        groups(audio_sizes),
        clean_tokens(video_sizes),
        clean_tokens(audio_sizes),
        tables,
        masks,
        *(
            torch.arange(blocks).repeat_interleave(torch.tensor(sizes))[: clean_tokens(sizes)]
            for sizes in (video_sizes, audio_sizes)
        ),
    )


@lru_cache(maxsize=8)
def _placed_plan(device: torch.device, dtype: torch.dtype, *what: object) -> SequencePlan:
    """`sequence_plan(*what)` where it is needed: copied once, not in every pass."""
    plan = sequence_plan(*what)

    def move(mask: Tensor | BlockPattern | None) -> Tensor | BlockPattern | None:
        if isinstance(mask, BlockPattern):
            return BlockPattern(
                tuple((q, k, None if m is None else m.to(device)) for q, k, m in mask.runs)
            )
        return None if mask is None else mask.to(device)

    like = torch.empty(0, dtype=dtype, device=device)
    groups = ("video_group", "audio_group", "video_block", "audio_block")
    return replace(
        plan,
        tables=ModalityTables(*(table.to(like) for table in plan.tables)),
        masks=Masks(*map(move, plan.masks)),
        **{name: getattr(plan, name).to(device) for name in groups},
    )


def _tables(model: nn.Module, plan: SequencePlan) -> ModalityTables:
    part = part_of(model)
    return plan.tables if part is None else part.tables(plan.tables)


def video_tokens(video: Tensor) -> Tensor:
    """(b, c, f, h, w) to (b, n, c)."""
    return rearrange(video, "b c f h w -> b (f h w) c")


def causal_forward(
    model: nn.Module,
    video: Tensor,
    audio: Tensor,
    video_sigma: Tensor,
    audio_sigma: Tensor,
    told: Text | Told,
    *,
    step_size: Tensor | None = None,
    causal: bool = True,
    kernels: Kernels = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Velocities of a whole sequence under the four masks (or none, `causal=False`).

    Args:
        video: (b, c, f, h, w); audio: (b, s, c); lengths must fill whole blocks.
        video_sigma: (b, f) noise level per video latent; audio_sigma: (b, s). Or both (b, 1): one
            for all.
        told: keys of the prompt, or all that the blocks are told.
        step_size: (b, 1) d, or None for 0.
        kernels: how the arithmetic between the products is carried out.
    """
    config = model.config
    told = told if isinstance(told, Told) else Told(told)
    frames, height, width = video.shape[2:]
    blocks = config.layout.blocks(frames, audio.shape[1])
    plan = _placed_plan(video.device, video.dtype, config, blocks, height, width, 0, causal)
    text, masks = _prompted(told, plan, 0)
    sinks = config.num_audio_sink_tokens
    video_groups = audio_groups = None
    if video_sigma.shape[1] > 1 or audio_sigma.shape[1] > 1:
        video_groups = torch.arange(frames, device=video.device).repeat_interleave(height * width)
        audio_places = torch.arange(audio.shape[1] + sinks, device=audio.device)
        audio_groups = (audio_places - sinks).clamp(min=0)
    embedding = timestep_embedding(
        model, video_sigma, audio_sigma, step_size, video.dtype, told.guidance
    )
    if told.seen is not None:
        embedding = embedding._replace(audio=seeing(embedding.audio))
    run = Pass(
        TokenModulation(model, embedding, video_groups, audio_groups),
        text,
        _tables(model, plan),
        (FreshKeys(),) * config.num_layers,
        masks,
        kernels,
    )
    run = _with_memory(model, run, plan, told, blocks, video)
    video_out, audio_out = run_layers(
        model,
        patch_video(model, video_tokens(video)),
        patch_audio(model, audio, with_sinks=True, track=told.tracks(config)),
        run,
        recompute=getattr(model, "recompute", False),
    )
    video_out = rearrange(video_out, "b (f h w) c -> b c f h w", h=height, w=width)
    return video_out, audio_out[:, sinks:]


def _with_memory(
    model: nn.Module, run: Pass, plan: SequencePlan, told: Told, blocks: int, like: Tensor
) -> Pass:
    """A pass that tells each block of a sequence what it is told of the stream before it."""
    if not told.memory or blocks == 1:
        return run

    def places(clean: Tensor, group: Tensor) -> Tensor:
        return torch.cat((clean, (group[len(clean) :] - 1) % blocks))

    return replace(
        run,
        memory=encoded(model, of_all_blocks(told.memory[: blocks - 1], like)),
        video_block=places(plan.video_block, plan.video_group),
        audio_block=places(plan.audio_block, plan.audio_group),
    )


def _prompted(told: Told, plan: SequencePlan, copies: int) -> tuple[Text, Masks]:
    """The text keys of a pass, and its masks with those of the text, (b, 1, n, m) bool, if any."""
    if told.later is None:
        return told.text, plan.masks
    keys, later = told.later
    before, after = (text.sample.shape[-2] for text in (told.text, keys))
    ends = torch.tensor([False] * before + [True] * after, device=later.device)

    def mask(clean: Tensor, group: Tensor, tokens: int) -> Tensor:
        # Of a plain sequence every block reads its own; of a history, that of the next one.
        clean = later[:, clean + (copies > 0)]
        blocks = torch.cat((clean, later.repeat(1, copies)[:, group[tokens:] - 1]), dim=1)
        return (blocks[:, :, None] == ends)[:, None]

    video = mask(plan.video_block, plan.video_group, plan.video_clean)
    audio = mask(plan.audio_block, plan.audio_group, plan.audio_clean)
    return told.text.joined(keys), plan.masks._replace(video_text=video, audio_text=audio)


def history_forward(
    model: nn.Module,
    clean: tuple[Tensor | None, Tensor | None],
    noisy: tuple[Tensor | None, Tensor | None],
    sigma: Tensor | tuple[Tensor, Tensor],
    told: Told,
    *,
    step_size: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Velocities of every noisy block, each seeing the clean blocks before it, in one pass.

    Nobody sees the last block of the history, so it may hold anything.

    Args:
        clean: history, video (b, c, f, h, w) and audio (b, s, c); either modality None to run the
            other alone.
        noisy: the same blocks with noise, video (b, r, c, f, h, w) and audio (b, r, s, c) for r
            copies.
        sigma: (b, r, k) noise level of each block in each copy, shared by both modalities or one
            for each.
        told: noisy blocks read their own prompt. Of the history, each block reads that of the block
            after it: a stream writes a block's keys when it goes on, under the prompt that it goes
            on with.
        step_size: (b, r, k) d of each block, or None for 0. The history always has sigma 0 and d 0.

    Returns:
        velocities shaped like `noisy`.
    """
    config = model.config
    sinks = config.num_audio_sink_tokens
    both = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    copies, blocks = both[0].shape[1:]
    height, width = clean[0].shape[3:] if clean[0] is not None else (1, 1)
    like = clean[0] if clean[0] is not None else clean[1]
    plan = _placed_plan(like.device, like.dtype, config, blocks, height, width, copies)
    text, masks = _prompted(told, plan, copies)

    def with_clean(values: Tensor) -> Tensor:
        noisy = rearrange(values, "b r k -> b (r k)")
        return torch.cat((torch.zeros_like(noisy[:, :1]), noisy), dim=1)

    with_video, with_audio = clean[0] is not None, clean[1] is not None
    embedding = timestep_embedding(
        model,
        with_clean(both[0]) if with_video else None,
        with_clean(both[1]) if with_audio else None,
        None if step_size is None else with_clean(step_size),
        like.dtype,
        told.guidance,
    )
    if told.seen is not None:
        shown = torch.arange(embedding.audio.own.shape[1], device=like.device) > 0
        embedding = embedding._replace(audio=seeing(embedding.audio, shown))
    groups = plan.video_group, plan.audio_group
    run = Pass(
        TokenModulation(model, embedding, *groups),
        text,
        _tables(model, plan),
        (FreshKeys(),) * config.num_layers,
        masks,
    )
    run = _with_memory(model, run, plan, told, blocks, like)
    video = audio = None
    if with_video:
        history = video_tokens(clean[0])[:, : plan.video_clean]
        current = rearrange(noisy[0], "b r c f h w -> b (r f h w) c")
        video = patch_video(model, torch.cat((history, current), dim=1))
    if with_audio:
        sequences = torch.cat((clean[1][:, None], noisy[1]), dim=1)
        track = told.tracks(config, copies)
        sequences = rearrange(sequences, "b r s c -> (b r) s c")
        tokens = patch_audio(model, sequences, with_sinks=True, track=track)
        tokens = rearrange(tokens, "(b r) n c -> b r n c", r=1 + copies)
        current = rearrange(tokens[:, 1:], "b r n c -> b (r n) c")
        audio = torch.cat((tokens[:, 0, : plan.audio_clean], current), dim=1)
    recompute = getattr(model, "recompute", False)
    video, audio = run_layers(model, video, audio, run, recompute=recompute)
    if with_video:
        video = rearrange(
            video[:, plan.video_clean :],
            "b (r f h w) c -> b r c f h w",
            r=copies,
            h=height,
            w=width,
        )
    if with_audio:
        audio = rearrange(audio[:, plan.audio_clean :], "b (r n) c -> b r n c", r=copies)[
            :, :, sinks:
        ]
    return video, audio
