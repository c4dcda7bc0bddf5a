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
from .memory_branch import Remembered, coloured, recalled
from .modulation import ModalityModulation, Modulation
from .rope import ModalityTables, RopeTable, rotate

Pair = Callable[[Tensor, Tensor], Tensor]


class TextKeys(NamedTuple):
    """Text keys and values of every layer and modality, once per prompt; each (b, a, m, d)."""

    video: tuple[tuple[Tensor, Tensor], ...]
    audio: tuple[tuple[Tensor, Tensor], ...]

    @property
    def sample(self) -> Tensor:
        """One of the tensors: its first size is the batch, the last but one the length."""
        return self.video[0][0]

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
        _check_lengths(self, other)
        return self._with(other, lambda mine, theirs: torch.lerp(mine, theirs, share))

    def spread(self, batch: int) -> TextKeys:
        """One entry's keys for every clip of a batch."""
        return self._with(self, lambda mine, _: mine.expand(batch, -1, -1, -1))

    def layer(self, index: int, modality: str, *_: object) -> tuple[Tensor, Tensor]:
        """Of one layer."""
        return getattr(self, modality)[index]

    def beside(self, other: TextKeys) -> _TextKeysBeside:
        """The keys of a batch, and of as many clips more."""
        return _TextKeysBeside(self, other)

    def _with(self, other: TextKeys, both: Pair) -> TextKeys:
        modalities = (
            tuple(tuple(map(both, *layer)) for layer in zip(mine, theirs, strict=True))
            for mine, theirs in zip(self, other, strict=True)
        )
        return TextKeys(*modalities)


class _TextKeysBeside(NamedTuple):
    """The text keys of two batches, put together in the layer that needs them: those of all layers
    are large."""

    one: TextKeys
    other: TextKeys

    def layer(self, index: int, modality: str, *_: object) -> tuple[Tensor, ...]:
        """Of one layer."""
        pairs = zip(self.one.layer(index, modality), self.other.layer(index, modality), strict=True)
        return tuple(map(_beside, *zip(*pairs, strict=True)))


def _beside(one: Tensor, other: Tensor) -> Tensor:
    if one is other and (one.shape[0] == 1 or one.stride(0) == 0):
        return one[:1].expand(2 * one.shape[0], *one.shape[1:])
    return torch.cat((one, other))


class TextContexts(NamedTuple):
    """A prompt for a network that modulates it with the noise level, each (b, m, c).

    Its keys and values differ in every step, so each pass makes them, layer by layer: for LTX-2.3's
    1024 tokens and 48 layers that is 4.1 TFLOP beside the 36.5 of a pass over 512 x 768 pixels, 11
    %. Kept for the four noise levels of a block they would take 4 x 1.21 GB, and to bring 1.21 GB
    from the host's memory takes longer than to make them (computed: 24 ms over 16 lanes of PCIe 5,
    against 10 ms at 400 TFLOP a second).
    """

    video: Tensor
    audio: Tensor

    @property
    def sample(self) -> Tensor:
        """One of the tensors: its first size is the batch, the last but one the length."""
        return self.video

    def joined(self, other: TextContexts) -> TextContexts:
        """Two prompts in a row, for a mask to show each token its own."""
        return self._with(other, lambda mine, theirs: torch.cat((mine, theirs), dim=1))

    def where(self, chosen: Tensor, other: TextContexts) -> TextContexts:
        """`other` for the chosen entries of the batch, (b) bool, else this."""
        per_entry = chosen[:, None, None]
        return self._with(other, lambda mine, theirs: torch.where(per_entry, theirs, mine))

    def toward(self, other: TextContexts, share: float) -> TextContexts:
        """A mix: `share` of `other`, 0 to 1, the rest of this.

        Raises:
            ValueError: prompts of different lengths.
        """
        _check_lengths(self, other)
        return self._with(other, lambda mine, theirs: torch.lerp(mine, theirs, share))

    def spread(self, batch: int) -> TextContexts:
        """One entry for every clip of a batch."""
        return self._with(self, lambda mine, _: mine.expand(batch, -1, -1))

    def beside(self, other: TextContexts) -> TextContexts:
        """The prompts of a batch, and of as many clips more."""
        return self._with(other, lambda mine, theirs: torch.cat((mine, theirs)))

    def layer(
        self,
        _index: int,
        modality: str,
        module: nn.Module,
        heads: int,
        mod: ModalityModulation,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (b, a, m, d) of one layer's attention over the text."""
        context = torch.addcmul(mod.prompt_shift, getattr(self, modality), mod.prompt_scale)
        return keys_values(module, context, heads, kernels=kernels)

    def _with(self, other: TextContexts, both: Pair) -> TextContexts:
        return TextContexts(*map(both, self, other))


Text = TextKeys | TextContexts


def _check_lengths(one: Text, other: Text) -> None:
    lengths = [text.sample.shape[-2] for text in (one, other)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"prompts of {lengths[0]} and {lengths[1]} tokens cannot be blended: encode both "
            "alike, or do without blending"
        )


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

    def receive(self, name: str, k: Tensor, v: Tensor) -> None:
        """Nothing to do: there is no past."""


@dataclass(frozen=True)
class Pass:
    """Everything that a pass over the layers needs besides the tokens themselves.

    `stores` holds one key-value store per layer, `memory` what is told of the stream, encoded. That
    of a whole sequence has parts for all blocks, and `video_block` and `audio_block` (n,) say which
    one each token has.
    """

    modulation: Modulation
    text: Text
    tables: ModalityTables
    stores: tuple[KeyValueStore, ...]
    masks: Masks = NOTHING_HIDDEN
    kernels: Kernels = PLAIN
    lanes: Lanes = ONE_LANE
    memory: Remembered | None = None
    video_block: Tensor | None = None
    audio_block: Tensor | None = None


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

    def latter(self) -> _Side:
        """Of the second half of the batch."""
        rope = self.cross_rope
        if rope.cos.ndim == 4:
            rope = RopeTable(*map(_latter, rope))
        vectors = (vector if vector is None else _latter(vector) for vector in self.modulation)
        return self._replace(cross_rope=rope, modulation=ModalityModulation(*vectors))


def _latter(x: Tensor) -> Tensor:
    return x[len(x) // 2 :]


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
    keys: tuple[Tensor, ...] | None = None

    def latter(self) -> _Meeting:
        """Of the second half of the batch, which has keys of its own."""
        return _Meeting(_latter(self.x), _latter(self.query), self.keys[len(self.keys) // 2 :])


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
            *keys_values(side.own, hidden, side.heads, mod.few_step, kernels),
            side.rope,
        ),
        query_rope=side.rope,
        mask=getattr(run.masks, side.modality),
        kernels=kernels,
        few_step=mod.few_step,
    )
    if run.memory is not None and model.config.remembers(index):
        x, hidden = _remembering(model, index, x, own, side, run)
    elif mod.text_scale is None:
        x, hidden = kernels.add_norm(x, mod.attn_gate, own, eps)
    else:
        x, hidden = kernels.add_modulate(x, mod.attn_gate, own, mod.text_scale, mod.text_shift, eps)
    text = run.text.layer(index, side.modality, side.text, side.heads, mod, kernels)
    mask = getattr(run.masks, f"{side.modality}_text")
    from_text = attend(
        side.text,
        hidden,
        side.heads,
        model.kernel,
        key_values=text,
        mask=mask,
        kernels=kernels,
        few_step=mod.few_step,
    )
    gate = mod.text_gate
    if not both:
        return _Meeting(x + from_text if gate is None else torch.addcmul(x, gate, from_text))
    cross = mod.query_scale, mod.query_shift, mod.key_scale, mod.key_shift
    x, query, shown = kernels.add_modulate_twice(x, from_text, *cross, eps, gate)
    keys = keys_values(side.outgoing, shown, side.cross_heads, mod.few_step, kernels)
    return _Meeting(x, query, store.extend(side.outgoing_name, *keys, side.cross_rope))


def _remembering(
    model: nn.Module, index: int, x: Tensor, own: Tensor, side: _Side, run: Pass
) -> tuple[Tensor, Tensor]:
    """With what its own attention found and what the stream's memory says: the tokens, and the
    text's queries."""
    mod, kernels, config = side.modulation, run.kernels, model.config
    block, eps = model.transformer_blocks[index], config.norm_eps
    x, hidden = kernels.add_norm(x, mod.attn_gate, own, eps)
    memory = getattr(run.memory, side.modality)
    module = getattr(block, f"{side.modality}_memory_attn")
    places = getattr(run, f"{side.modality}_block")
    x = x + recalled(module, hidden, memory, config.memory_heads, model.kernel, places)
    if side.modality == "video":
        x = coloured(block.video_color_film, x, run.memory.colour, kernels, eps, places)
    if mod.text_scale is None:
        return x, F.rms_norm(x, (x.shape[-1],), eps=eps)
    return x, kernels.modulate(x, mod.text_scale, mod.text_shift, eps)


def _after_meeting(
    model: nn.Module,
    meeting: _Meeting,
    seen: tuple[Tensor, ...] | None,
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
            kernels=kernels,
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
    latter: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """One layer over video tokens (b, n, c) and audio tokens (b, n', c'); either may be None.

    Where all keys and values are in the store, `keys_only` stops, and `latter` goes on with the
    second half of the batch alone: nothing else after it would be looked at.
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
    if latter:
        hearing, seeing = hearing.latter(), seeing.latter()
        audio_side, video_side = audio_side.latter(), video_side.latter()
        audio_keys, video_keys = hearing.keys, seeing.keys
    if audio is not None:
        with lanes.audio():
            audio = _after_meeting(model, hearing, video_keys, audio_side, run)
    if video is not None:
        video = _after_meeting(model, seeing, audio_keys, video_side, run)
    return video, audio
