"""One network over several processes: each holds some heads, and columns, of every layer.

b batch, n tokens of one modality, a heads of a rank, d head dim, c channels, l layers.
Tensor parallelism as in Megatron-LM (arXiv:1909.08053, section 3): queries, keys, values, gates and
the first half of a feed-forward are split by rows, what comes after them by columns, and what the
ranks make of a token is summed. Keys and values are a rank's heads' alone. Everything else is whole
on every rank: residuals, norms, modulation, and the memory branch, which has half a hundredth of
the weights and would need a sum more in each layer that has it.

Two things are particular. Queries and keys are normalised over all heads (docs/omniforcing.md,
section 1), so their sums of squares have to be known everywhere before any attention. And there are
two modalities: where both have something to sum at the same point of a layer it goes in one
message. So a layer has 7 messages (squares, outputs of their own attentions; squares of the text's
queries, outputs; squares, outputs of the attentions between the modalities; feed-forwards) where
one message for each sum makes 16. LTX-2.3's text keys, which are made in every pass, have their
squares in the first.

torch's own tensor-parallel API is not used. Its DTensor splits a dimension as `torch.chunk` does,
which is at a head's border only where the heads divide evenly, and knows no other split; its
`RowwiseParallel` sums what each product makes by itself, and `SequenceParallel`'s norm splits
tokens, not the width that it goes over. The messages are torch.distributed's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionKernel
from .config import TransformerConfig
from .few_step import adapted
from .kept_keys import ATTENTIONS, BlockKeys
from .rope import ModalityTables, RopeTable, rotate

Result = TypeVar("Result")
Summed = Callable[[], list[Tensor]]
"""Waits for sums that are under way."""
Sums = Generator[Sequence[Tensor], Summed, Result]
"""Work that yields tensors to be summed over the ranks, and is sent what waits for the sums."""

KINDS = ("video", "audio", "crossing")
_KIND_OF = {
    "attn1": "video",
    "attn2": "video",
    "ff": "video",
    "audio_attn1": "audio",
    "audio_attn2": "audio",
    "audio_ff": "audio",
    "audio_to_video_attn": "crossing",
    "video_to_audio_attn": "crossing",
}
_ROWS = ("to_q", "to_k", "to_v", "q_norm", "k_norm", "to_gate_logits", "net.0.proj")
_COLUMNS = ("to_out.0", "net.2")
_NAME = re.compile(
    rf"transformer_blocks\.\d+\.(?P<module>{'|'.join(_KIND_OF)})"
    rf"\.(?P<layer>{'|'.join(map(re.escape, (*_ROWS, *_COLUMNS)))})"
    r"\.(?P<leaf>weight|bias|(?:few_step|pictures)\.(?:up|down)\.weight)"
)


def _is_added_once(found: re.Match[str]) -> bool:
    """Whether a parameter is the bias of what is summed."""
    return found["leaf"] == "bias" and found["layer"] in _COLUMNS


class RankLostError(RuntimeError):
    """A process that holds a part of the network does not answer any more."""

    def __init__(self) -> None:
        super().__init__(
            "a process that holds a part of the model is gone, so the stream ends here; what was "
            "made is kept, and a saved stream goes on on any number of processes"
        )


class Shares(NamedTuple):
    """How many heads every rank has, of each kind; 0 is a number too.

    Attributes:
        video, audio: of a modality's attention to itself and to the text. Each brings its share of
            the modality's feed-forward.
        crossing: of both attentions between the modalities.
    """

    video: tuple[int, ...]
    audio: tuple[int, ...]
    crossing: tuple[int, ...]

    @classmethod
    def of(
        cls,
        config: TransformerConfig,
        weights: Sequence[float],
        audio: Sequence[float] | None = None,
    ) -> Shares:
        """As nearly in proportion to the ranks' weights as whole heads can be.

        Args:
            audio: other weights for the sound's own heads.

        Raises:
            ValueError: weights that say nothing.
        """
        for given in (weights, audio or weights):
            if len(given) != len(weights) or min(given) < 0 or not 0 < sum(given) < float("inf"):
                raise ValueError(
                    f"shares of the ranks are {tuple(given)}, expected a number for each of "
                    f"{len(weights)} that is not negative, and not all 0"
                )
        narrow = config.audio_num_attention_heads
        return cls(
            _apportioned(config.num_attention_heads, weights),
            _apportioned(narrow, audio or weights),
            _apportioned(narrow, weights),
        )


def _apportioned(heads: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion, the largest remainders rounded up (Hamilton's method)."""
    exact = [heads * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda rank: whole[rank] - exact[rank])
    for rank in order[: heads - sum(whole)]:
        whole[rank] += 1
    return tuple(whole)


class Projection(NamedTuple):
    """Queries, keys or values to be made of x (b, n, c), of the heads of a kind.

    Attributes:
        norm: of queries and keys; None for values.
        table: angles to rotate them by, of the rank's heads; None: they stay.
    """

    linear: nn.Module
    x: Tensor
    kind: str
    norm: nn.Module | None = None
    table: RopeTable | None = None


@dataclass(frozen=True)
class Part:
    """What one rank holds of a network, and how it hears of the others.

    Attributes:
        rank: of this process in the group.
        device: where it computes, and what messages are on.
        group: None for the processes that were started together.
    """

    config: TransformerConfig
    shares: Shares
    rank: int
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    group: Any = None

    @property
    def has_none_of_some(self) -> bool:
        """Whether this rank has no head at all of some kind."""
        return any(not shares[self.rank] for shares in self.shares)

    def held(self, kind: str, rank: int | None = None) -> slice:
        """Which heads of a kind, or of the attention of that name, a rank has; by default this
        one's."""
        rank = self.rank if rank is None else rank
        counts = getattr(self.shares, kind if kind in KINDS else "crossing")
        start = sum(counts[:rank])
        return slice(start, start + counts[rank])

    def count(self, kind: str) -> int:
        """How many."""
        held = self.held(kind)
        return held.stop - held.start

    def tables(self, tables: ModalityTables) -> ModalityTables:
        """Angles of this rank's heads."""
        kinds = "video", "audio", "crossing", "crossing"
        return ModalityTables(
            *(
                RopeTable(*(x[self.held(kind)] for x in table))
                for kind, table in zip(kinds, tables, strict=True)
            )
        )

    def cut(self, name: str, value: Tensor) -> Tensor:
        """What this rank holds of one parameter of the whole network: itself, or a view of it.

        A bias that is added after a sum is the first rank's, and the others have zeros.
        """
        found = _NAME.fullmatch(name)
        if found is not None and self.rank and _is_added_once(found):
            return torch.zeros_like(value)
        where = self._place(name, value.shape)
        return value if where is None else value.narrow(*where)

    def _place(self, name: str, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Of a parameter that is split: the axis, the rank's first place on it, and how many."""
        found = _NAME.fullmatch(name)
        if found is None or _is_added_once(found):
            return None
        rows = found["layer"] in _ROWS
        # A thin matrix of an adapter is whole on the side that the layer's own is.
        if found["leaf"].endswith(".down.weight" if rows else ".up.weight"):
            return None
        kind, axis = _KIND_OF[found["module"]], 0 if rows else 1
        each = shape[axis] // sum(getattr(self.shares, kind))
        return axis, self.held(kind).start * each, self.count(kind) * each

    def divide(self, model: nn.Module) -> None:
        """Make a whole network this rank's part of it, in place; it can't be trained then.

        Raises:
            ValueError: its layers hold something else than their parameters.
        """
        strange = [name for name, _ in model.transformer_blocks.named_buffers()]
        if strange:
            raise ValueError(
                f"a network whose layers have {strange[0]} (8 bit weights) cannot be split over "
                "processes: load it in 16 bit"
            )
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                # Shapes are enough; for anything else there PyTorch imports its compiler.
                where, shape = self._place(name, parameter.shape), list(parameter.shape)
                if where is not None:
                    shape[where[0]] = where[2]
                value = torch.empty(shape, dtype=parameter.dtype, device="meta")
            else:
                value = self.cut(name, parameter.detach())
                if value.shape != parameter.shape:  # what the others hold is let go of
                    value = value.clone()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        model.part = self
        model.kernel = over_some_heads(model.kernel)

    def together(self, *sides: Sums[Result] | None) -> list[Result | None]:
        """Run several at once; what they have to sum at the same point goes in one message.

        Raises:
            RankLostError: another rank does not answer.
        """
        answers: dict[int, Summed | None] = {i: None for i, side in enumerate(sides) if side}
        results: list[Result | None] = [None] * len(sides)
        while answers:
            asked: dict[int, Sequence[Tensor]] = {}
            for i, answer in answers.items():
                try:
                    asked[i] = sides[i].send(answer)
                except StopIteration as done:
                    results[i] = done.value
            answers = dict(zip(asked, self._summed(list(asked.values())), strict=True))
        return results

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Sums over the ranks, in one message.

        Raises:
            RankLostError: another rank does not answer.
        """
        (summed,) = self._summed([tensors])
        return summed()

    def _summed(self, asked: list[Sequence[Tensor]]) -> list[Summed]:
        """Begin to sum what each side asks for; what is returned waits."""
        if not asked:
            return []
        tensors = [tensor for one in asked for tensor in one]
        message = torch.cat([tensor.flatten() for tensor in tensors])
        work = _told(lambda: dist.all_reduce(message, group=self.group, async_op=True))
        parts = iter(message.split([tensor.numel() for tensor in tensors]))
        waited = False

        def wait(views: list[Tensor]) -> list[Tensor]:
            nonlocal waited
            if not waited:
                _told(work.wait)
                waited = True
            return views

        def answer(one: Sequence[Tensor]) -> Summed:
            views = [next(parts).view(tensor.shape) for tensor in one]
            return lambda: wait(views)

        return [answer(one) for one in asked]

    def heads(self, made: Tensor, asked: Projection, squares: Tensor | None) -> Tensor:
        """A projection (b, n, a*d) as (b, a, n, d): as `kernels.norm_heads`, with sums of squares
        (b, n, 1) of all ranks' heads."""
        config = self.config
        heads, dim = config.audio_num_attention_heads, config.audio_attention_head_dim
        if asked.kind == "video":
            heads, dim = config.num_attention_heads, config.attention_head_dim
        if asked.norm is not None:
            factor = torch.rsqrt(squares / (heads * dim) + asked.norm.eps)
            made = (made.float() * factor * asked.norm.weight.float()).to(made.dtype)
        made = rearrange(made, "b n (a d) -> b a n d", d=dim)
        return made if asked.table is None else rotate(made, asked.table)

    def gathered(self, block: BlockKeys) -> BlockKeys:
        """A block's keys and values of all heads, in the computer's memory, on rank 0; the others
        send theirs and get what they gave. To be called by all ranks alike.

        Raises:
            RankLostError: another rank does not answer.
        """

        def sized(own: Tensor, heads: int, device: torch.device | None = None) -> Tensor:
            return torch.empty(
                *own.shape[:2], heads, *own.shape[3:], dtype=own.dtype, device=device
            )

        def whole(name: str, own: Tensor) -> Tensor:
            counts = getattr(self.shares, name if name in KINDS else "crossing")
            if self.rank:
                sent = own.to(self.device).contiguous()
                if sent.numel():
                    _told(partial(dist.send, sent, group=self.group, group_dst=0))
                return own
            out = sized(own, sum(counts))
            out[:, :, self.held(name)] = own
            for rank, count in enumerate(counts):
                if rank and count:
                    got = sized(own, count, self.device)
                    _told(partial(dist.recv, got, group=self.group, group_src=rank))
                    out[:, :, self.held(name, rank)] = got
            return out

        pairs = zip(ATTENTIONS, block, strict=True)
        return BlockKeys(*(tuple(whole(name, x) for x in tensors) for name, tensors in pairs))

    def scattered(self, block: BlockKeys) -> BlockKeys:
        """This rank's heads of a block's keys and values of all heads, or of this rank's already.

        Raises:
            ValueError: they are another rank's, or of another split.
        """

        def own(name: str, x: Tensor) -> Tensor:
            heads = sum(getattr(self.shares, name if name in KINDS else "crossing"))
            if x.shape[2] == heads:
                return x[:, :, self.held(name)].clone()
            if x.shape[2] != self.count(name):
                raise ValueError(
                    f"found keys of {x.shape[2]} heads, expected {heads}, or this process's "
                    f"{self.count(name)}: go on from state.without_keys()"
                )
            return x

        pairs = zip(ATTENTIONS, block, strict=True)
        return BlockKeys(*(tuple(own(name, x) for x in tensors) for name, tensors in pairs))


def part_of(model: nn.Module) -> Part | None:
    """What this process holds of a network; None: all of it."""
    return getattr(model, "part", None)


def alone(side: Sums[Result]) -> Result:
    """Run the work of a process that holds the whole network: it has nothing to sum."""
    try:
        next(side)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a whole network asked for a sum over ranks")


def projected(part: Part, factors: Tensor | None, *asked: Projection) -> Sums[list[Tensor]]:
    """Queries, keys and values (b, a, n, d) of a rank's heads, the first two normalised over all
    heads. Values are made while the sums of squares are under way."""
    normed = [None if one.norm is None else adapted(one.linear, one.x, factors) for one in asked]
    squares = [x.float().square().sum(-1, keepdim=True) for x in normed if x is not None]
    summed = yield squares
    made = [
        adapted(one.linear, one.x, factors) if x is None else x
        for x, one in zip(normed, asked, strict=True)
    ]
    totals = iter(summed())
    return [
        part.heads(x, one, None if one.norm is None else next(totals))
        for x, one in zip(made, asked, strict=True)
    ]


def whole_sum(part: Part | None, out: Tensor) -> Sums[Tensor]:
    """What all ranks' heads or columns give, of what this one's do."""
    if part is None:
        return out
    (out,) = (yield [out])()
    return out


def over_some_heads(kernel: AttentionKernel) -> AttentionKernel:
    """Attention that may be asked for no head at all."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return kernel(q, k, v, mask) if q.shape[1] else q

    return attend


def _told(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except RuntimeError as error:  # torch's own, of every backend
        raise RankLostError from error
