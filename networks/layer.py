"""One layer over both modalities: which part acts on what, and where the modalities meet.

b batch, n tokens of one modality, m text tokens, c channels, a heads, d head dim.
A modality first looks at itself and at the text, then both look at each other as they were before
either was changed, then each has its feed-forward (order of operations: docs/omniforcing.md,
section 1). Until they meet, and after it, the modalities are independent; `lanes.py` lets them run
side by side. Submodules are addressed by LTX-2's names, so this also runs over another module tree
that has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KeyPattern, KeyValueStore, attend, keys_values
from .config import TransformerConfig
from .few_step import adapted
from .kernels import PLAIN, Kernels
from .lanes import ONE_LANE, Lanes
from .modulation import ModalityModulation, Modulation
from .rope import ModalityTables, RopeTable, rotate


class TextKeys(NamedTuple):
    """Text keys and values of every layer and modality, once per prompt; each (b, a, m, d)."""

    video: tuple[tuple[Tensor, Tensor], ...]
    audio: tuple[tuple[Tensor, Tensor], ...]

    def joined(self, other: TextKeys) -> TextKeys:
        """The keys of two prompts in a row, for a mask to show each token those of its own."""
        return self._with(other, lambda mine, theirs: torch.cat((mine, theirs), dim=2))

    def where(self, chosen: Tensor, other: TextKeys) -> TextKeys:
        """The keys of `other` for the chosen entries of the batch, (b) bool, else these."""
        per_entry = chosen[:, None, None, None]
        return self._with(other, lambda mine, theirs: torch.where(per_entry, theirs, mine))

    def toward(self, other: TextKeys, share: float) -> TextKeys:
        """A mix: `share` of the keys of `other`, 0 to 1, the rest of these.

        Raises:
            ValueError: prompts of different lengths.
        """
        lengths = [keys.video[0][0].shape[2] for keys in (self, other)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"prompts of {lengths[0]} and {lengths[1]} tokens cannot be blended: encode both "
                "alike, or do without blending"
            )
        return self._with(other, lambda mine, theirs: torch.lerp(mine, theirs, share))

    def _with(self, other: TextKeys, both: Callable[[Tensor, Tensor], Tensor]) -> TextKeys:
        modalities = (
            tuple(tuple(map(both, *layer)) for layer in zip(mine, theirs, strict=True))
            for mine, theirs in zip(self, other, strict=True)
        )
        return TextKeys(*modalities)


class Masks(NamedTuple):
    """Who sees whom per attention: (n, m), True = visible, or a block pattern; None = all.

    The last two say which tokens of the text each clip's tokens see, (b, 1, n, m).
    """

    video: Tensor | KeyPattern | None = None
    audio: Tensor | KeyPattern | None = None
    audio_to_video: Tensor | KeyPattern | None = None
    video_to_audio: Tensor | KeyPattern | None = None
    video_text: Tensor | None = None
    audio_text: Tensor | None = None


NOTHING_HIDDEN = Masks()


class FreshKeys:
    """The store without a past: keys are rotated and used as they are."""

    def extend(self, name: str, k: Tensor, v: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """Rotate k and return both."""
        return rotate(k, rope), v


@dataclass(frozen=True)
class Pass:
    """Everything that a pass over the layers needs besides the tokens themselves.

    `stores` holds one key-value store per layer.
    """

    modulation: Modulation
    text: TextKeys
    tables: ModalityTables
    stores: tuple[KeyValueStore, ...]
    masks: Masks = NOTHING_HIDDEN
    kernels: Kernels = PLAIN
    lanes: Lanes = ONE_LANE


class _Side(NamedTuple):
    """One modality's part of a layer: its modules, tables, masks and modulation."""

    modality: str
    heads: int
    cross_heads: int
    own: nn.Module
    text: nn.Module
    feed_forward: nn.Module
    incoming_name: str
    incoming: nn.Module
    outgoing_name: str
    outgoing: nn.Module
    rope: RopeTable
    cross_rope: RopeTable
    modulation: ModalityModulation


def _video_side(
    config: TransformerConfig, block: nn.Module, run: Pass, modulation: ModalityModulation
) -> _Side:
    return _Side(
        modality="video",
        heads=config.num_attention_heads,
        cross_heads=config.audio_num_attention_heads,
        own=block.attn1,
        text=block.attn2,
        feed_forward=block.ff,
        incoming_name="audio_to_video",
        incoming=block.audio_to_video_attn,
        outgoing_name="video_to_audio",
        outgoing=block.video_to_audio_attn,
        rope=run.tables.video,
        cross_rope=run.tables.cross_video,
        modulation=modulation,
    )


def _audio_side(
    config: TransformerConfig, block: nn.Module, run: Pass, modulation: ModalityModulation
) -> _Side:
    return _Side(
        modality="audio",
        heads=config.audio_num_attention_heads,
        cross_heads=config.audio_num_attention_heads,
        own=block.audio_attn1,
        text=block.audio_attn2,
        feed_forward=block.audio_ff,
        incoming_name="video_to_audio",
        incoming=block.video_to_audio_attn,
        outgoing_name="audio_to_video",
        outgoing=block.audio_to_video_attn,
        rope=run.tables.audio,
        cross_rope=run.tables.cross_audio,
        modulation=modulation,
    )


class _Meeting(NamedTuple):
    """A modality as it comes to the other: its tokens, its query, and what it shows the other one.

    `keys` are the other's to attend over, with the past, (b, a, m, d); None where a modality runs
    alone.
    """

    x: Tensor
    query: Tensor | None = None
    keys: tuple[Tensor, Tensor] | None = None


def _until_meeting(
    model: nn.Module, index: int, x: Tensor, side: _Side, run: Pass, both: bool
) -> _Meeting:
    """Own attention and text attention, then query and keys for the other modality."""
    mod, kernels, store, eps = (
        side.modulation,
        run.kernels,
        run.stores[index],
        model.config.norm_eps,
    )
    hidden = kernels.modulate(x, mod.attn_scale, mod.attn_shift, eps)
    own = attend(
        side.own,
        hidden,
        side.heads,
        model.kernel,
        key_values=store.extend(
            side.modality,
            *keys_values(side.own, hidden, side.heads, mod.few_step),
            side.rope,
        ),
        query_rope=side.rope,
        mask=getattr(run.masks, side.modality),
        rotate=kernels.rotate,
        few_step=mod.few_step,
    )
    x, hidden = kernels.add_norm(x, mod.attn_gate, own, eps)
    text = getattr(run.text, side.modality)[index]
    mask = getattr(run.masks, f"{side.modality}_text")
    from_text = attend(
        side.text,
        hidden,
        side.heads,
        model.kernel,
        key_values=text,
        mask=mask,
        few_step=mod.few_step,
    )
    if not both:
        return _Meeting(x + from_text)
    x, query, shown = kernels.add_modulate_twice(
        x, from_text, mod.query_scale, mod.query_shift, mod.key_scale, mod.key_shift, eps
    )
    keys = keys_values(side.outgoing, shown, side.cross_heads, mod.few_step)
    return _Meeting(x, query, store.extend(side.outgoing_name, *keys, side.cross_rope))


def _after_meeting(
    model: nn.Module,
    meeting: _Meeting,
    seen: tuple[Tensor, Tensor] | None,
    side: _Side,
    run: Pass,
) -> Tensor:
    """Attention to the other modality's keys and values (`seen`), then the feed-forward."""
    mod, kernels, eps = side.modulation, run.kernels, model.config.norm_eps
    if seen is None:
        x = meeting.x
        hidden = kernels.modulate(x, mod.ff_scale, mod.ff_shift, eps)
    else:
        other = attend(
            side.incoming,
            meeting.query,
            side.cross_heads,
            model.kernel,
            key_values=seen,
            query_rope=side.cross_rope,
            mask=getattr(run.masks, side.incoming_name),
            rotate=kernels.rotate,
            few_step=mod.few_step,
        )
        x, hidden = kernels.add_modulate(
            meeting.x, mod.cross_gate, other, mod.ff_scale, mod.ff_shift, eps
        )
    net = side.feed_forward.net
    inner = F.gelu(adapted(net[0].proj, hidden, mod.few_step), approximate="tanh")
    return torch.addcmul(x, mod.ff_gate, adapted(net[2], inner, mod.few_step))


def run_layer(
    model: nn.Module,
    index: int,
    video: Tensor | None,
    audio: Tensor | None,
    run: Pass,
    *,
    keys_only: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """One layer over video tokens (b, n, c) and audio tokens (b, n', c'); either may be None.

    `keys_only` stops when all keys and values are in the store: nothing after it would be looked
    at.
    """
    block, lanes, modulation = (
        model.transformer_blocks[index],
        run.lanes,
        run.modulation.layer(index),
    )
    both = video is not None and audio is not None
    video_side = video_keys = audio_side = audio_keys = None
    if audio is not None:
        audio_side = _audio_side(model.config, block, run, modulation.audio)
        with lanes.audio():
            hearing = _until_meeting(model, index, audio, audio_side, run, both)
        audio, audio_keys = hearing.x, hearing.keys
    if video is not None:
        video_side = _video_side(model.config, block, run, modulation.video)
        seeing = _until_meeting(model, index, video, video_side, run, both)
        video, video_keys = seeing.x, seeing.keys
    if keys_only:
        return video, audio
    if both:
        lanes.exchange(audio_keys, video_keys)
    if audio is not None:
        with lanes.audio():
            audio = _after_meeting(model, hearing, video_keys, audio_side, run)
    if video is not None:
        video = _after_meeting(model, seeing, audio_keys, video_side, run)
    return video, audio
