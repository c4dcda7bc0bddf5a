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
from typing import NamedTuple, TypeVar

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
from .tensor_parallel import Part, Projection, Sums, alone, part_of, projected, whole_sum

Pair = Callable[[Tensor, Tensor], Tensor]
Side = TypeVar("Side")


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
        return keys_values(module, self.context(modality, mod), heads, kernels=kernels)

    def context(self, modality: str, mod: ModalityModulation) -> Tensor:
        """What one layer's keys and values are made of in a pass, (b, m, c)."""
        return torch.addcmul(mod.prompt_shift, getattr(self, modality), mod.prompt_scale)

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
    alone. `heads` (b, a, n, d) are its query's, where they had to be made together with the keys.
    """

    x: Tensor
    query: Tensor | None = None
    keys: tuple[Tensor, ...] | None = None
    heads: Tensor | None = None

    def latter(self) -> _Meeting:
        """Of the second half of the batch, which has keys of its own."""
        heads = None if self.heads is None else _latter(self.heads)
        keys = self.keys[len(self.keys) // 2 :]
        return _Meeting(_latter(self.x), _latter(self.query), keys, heads)


def _own_heads(
    part: Part, hidden: Tensor, side: _Side, text: Text
) -> Sums[tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None]]:
    """On a rank: queries, keys and values of the modality's attention to itself, and keys and
    values of the text where they are made in every pass."""
    own, kind, mod = side.own, side.modality, side.modulation
    asked = [
        Projection(own.to_q, hidden, kind, own.q_norm, side.rope),
        Projection(own.to_k, hidden, kind, own.k_norm),
        Projection(own.to_v, hidden, kind),
    ]
    if isinstance(text, TextContexts):
        context = text.context(kind, mod)
        asked.append(Projection(side.text.to_k, context, kind, side.text.k_norm))
        asked.append(Projection(side.text.to_v, context, kind))
    made = yield from projected(part, mod.factors, *asked)
    return tuple(made[:3]), tuple(made[3:]) or None


def _until_meeting(
    model: nn.Module, index: int, x: Tensor, side: _Side, run: Pass, both: bool
) -> Sums[_Meeting]:
    """Own attention and text attention, then query and keys for the other modality."""
    mod, kernels, store, eps = (
        side.modulation,
        run.kernels,
        run.stores[index],
        model.config.norm_eps,
    )
    part = part_of(model)
    hidden = kernels.modulate(x, mod.attn_scale, mod.attn_shift, eps)
    q = text = None
    if part is None:
        k, v = keys_values(side.own, hidden, side.heads, mod.factors, kernels)
    else:
        (q, k, v), text = yield from _own_heads(part, hidden, side, run.text)
    own = attend(
        side.own,
        hidden,
        side.heads,
        model.kernel,
        key_values=store.extend(side.modality, k, v, side.rope),
        query_rope=side.rope,
        mask=getattr(run.masks, side.modality),
        kernels=kernels,
        factors=mod.factors,
        q=q,
    )
    own = yield from whole_sum(part, own)
    if run.memory is not None and model.config.remembers(index):
        x, hidden = _remembering(model, index, x, own, side, run)
    elif mod.text_scale is None:
        x, hidden = kernels.add_norm(x, mod.attn_gate, own, eps)
    else:
        x, hidden = kernels.add_modulate(x, mod.attn_gate, own, mod.text_scale, mod.text_shift, eps)
    if text is None:
        text = run.text.layer(index, side.modality, side.text, side.heads, mod, kernels)
    q = None
    if part is not None:
        asked = Projection(side.text.to_q, hidden, side.modality, side.text.q_norm)
        (q,) = yield from projected(part, mod.factors, asked)
    mask = getattr(run.masks, f"{side.modality}_text")
    from_text = attend(
        side.text,
        hidden,
        side.heads,
        model.kernel,
        key_values=text,
        mask=mask,
        kernels=kernels,
        factors=mod.factors,
        q=q,
    )
    from_text = yield from whole_sum(part, from_text)
    gate = mod.text_gate
    if not both:
        return _Meeting(x + from_text if gate is None else torch.addcmul(x, gate, from_text))
    cross = mod.query_scale, mod.query_shift, mod.key_scale, mod.key_shift
    x, query, shown = kernels.add_modulate_twice(x, from_text, *cross, eps, gate)
    q = None
    if part is None:
        k, v = keys_values(side.outgoing, shown, side.cross_heads, mod.factors, kernels)
    else:
        incoming, outgoing = side.incoming, side.outgoing
        q, k, v = yield from projected(
            part,
            mod.factors,
            Projection(incoming.to_q, query, "crossing", incoming.q_norm, side.cross_rope),
            Projection(outgoing.to_k, shown, "crossing", outgoing.k_norm),
            Projection(outgoing.to_v, shown, "crossing"),
        )
    return _Meeting(x, query, store.extend(side.outgoing_name, k, v, side.cross_rope), q)


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
) -> Sums[Tensor]:
    """Attention to the other modality's keys and values (`seen`), then the feed-forward."""
    mod, kernels, eps, part = side.modulation, run.kernels, model.config.norm_eps, part_of(model)
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
            factors=mod.factors,
            q=meeting.heads,
        )
        other = yield from whole_sum(part, other)
        x, hidden = kernels.add_modulate(
            meeting.x, mod.cross_gate, other, mod.ff_scale, mod.ff_shift, eps
        )
    net = side.feed_forward.net
    inner = F.gelu(adapted(net[0].proj, hidden, mod.factors), approximate="tanh")
    out = yield from whole_sum(part, adapted(net[2], inner, mod.factors))
    return torch.addcmul(x, mod.ff_gate, out)


def _both_sides(
    part: Part | None,
    lanes: Lanes,
    video: Sums[Side] | None,
    audio: Sums[Side] | None,
) -> tuple[Side | None, Side | None]:
    """Both modalities' work, each on its lane; on a rank in step, because they share messages."""
    if part is not None:
        # Video's first: while its squares are summed there are its values to make.
        seen, heard = part.together(video, audio)
        return seen, heard
    seen = heard = None
    if audio is not None:
        with lanes.audio():
            heard = alone(audio)
    if video is not None:
        seen = alone(video)
    return seen, heard


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
    both, part = video is not None and audio is not None, part_of(model)
    seeing = hearing = None
    if video is not None:
        video_side = _video_side(model.config, block, run, modulation.video)
        seeing = _until_meeting(model, index, video, video_side, run, both)
    if audio is not None:
        audio_side = _audio_side(model.config, block, run, modulation.audio)
        hearing = _until_meeting(model, index, audio, audio_side, run, both)
    seeing, hearing = _both_sides(part, lanes, seeing, hearing)
    if keys_only:
        return seeing and seeing.x, hearing and hearing.x
    video_keys = audio_keys = None
    if both:
        lanes.exchange(hearing.keys, seeing.keys)
        if latter:
            hearing, seeing = hearing.latter(), seeing.latter()
            audio_side, video_side = audio_side.latter(), video_side.latter()
        audio_keys, video_keys = hearing.keys, seeing.keys
    if video is not None:
        video = _after_meeting(model, seeing, audio_keys, video_side, run)
    if audio is not None:
        audio = _after_meeting(model, hearing, video_keys, audio_side, run)
    return _both_sides(part, lanes, video, audio)
