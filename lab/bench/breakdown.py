"""Where the time of some work goes, and how much is started for it: products, attention, the rest.

On CUDA a call is a kernel that the card has run, recorded graphs' included; on a CPU it is an
operator that calls no other one, views not counted, and the same products and attentions are timed
by themselves: what they take longer on their way, their operands cost that have left the caches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .stopwatch import best

_KINDS = {
    "attention": re.compile("attention|flash|fmha|sdpa|mha_", re.IGNORECASE),
    "products": re.compile(
        "gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|splitk|::(mm|addmm|bmm|linear|_scaled_mm)$",
        re.IGNORECASE,
    ),
}
KINDS = (*_KINDS, "rest")
_VIEWS = re.compile(
    "::(as_strided|view|_unsafe_view|slice|select|expand|permute|transpose|t|unsqueeze|squeeze|"
    "split|split_with_sizes|chunk|unbind|alias|detach|empty.*|resize_)$"
)
_IDLE = re.compile("::(reshape|contiguous|to|result_type|resolve_conj|resolve_neg|item)$")
"""No work of their own: what they call, if anything, does it."""


_PRODUCTS = {"aten::mm": torch.mm, "aten::addmm": torch.addmm, "aten::bmm": torch.bmm}
Shapes = tuple[tuple[int, ...], ...]


class Part(NamedTuple):
    """Seconds that were spent, and how many calls that took.

    Attributes:
        alone: seconds of the same calls one by one, at best; None where that is not measured.
    """

    seconds: float
    calls: int
    alone: float | None = None


class Breakdown(NamedTuple):
    """By kind, and the names in each that took longest with their parts."""

    kinds: dict[str, Part]
    longest: list[tuple[str, Part]]


def kind_of(name: str) -> str:
    """Which of the kinds a kernel or an operator is, by its name."""
    return next((kind for kind, known in _KINDS.items() if known.search(name)), "rest")


def breakdown(work: Callable[[], object], like: Tensor, longest: int = 12) -> Breakdown:
    """Profile some work.

    Args:
        like: tensor with the dtype and device that it computes in.
        longest: how many names to give.
    """
    on_card = like.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    with profile(activities=[activity], record_shapes=not on_card) as seen:
        work()
        if on_card:
            torch.cuda.synchronize(like.device)
    calls = list(_kernels(seen) if on_card else _operators(seen))
    names: dict[str, Part] = {}
    kinds = {kind: Part(0.0, 0) for kind in KINDS}
    for name, seconds, _ in calls:
        for parts, key in ((names, name), (kinds, kind_of(name))):
            before = parts.get(key, Part(0.0, 0))
            parts[key] = Part(before.seconds + seconds, before.calls + 1)
    known = (kind_of(name) != "products" or name in _PRODUCTS for name, *_ in calls)
    if not on_card and all(known):
        alone: Counter[str] = Counter()
        for (name, shapes), count in Counter((name, shapes) for name, _, shapes in calls).items():
            if kind_of(name) != "rest":
                alone[kind_of(name)] += count * _alone(name, shapes, like)
        kinds |= {kind: kinds[kind]._replace(alone=seconds) for kind, seconds in alone.items()}
    ranked = sorted(names.items(), key=lambda item: -item[1].seconds)
    return Breakdown(kinds, ranked[:longest])


def _alone(name: str, shapes: Shapes, like: Tensor) -> float:
    """Seconds of one product or attention of these sizes, over and over."""
    given = [torch.randn(shape).to(like) for shape in shapes if shape]
    if kind_of(name) == "attention":
        return best(lambda: F.scaled_dot_product_attention(*given), like.device, 0.05).wall
    if given[-1].ndim == 2:  # a weight, which has output channels first
        given[-1] = given[-1].t().contiguous().t()
    return best(lambda: _PRODUCTS[name](*given), like.device, 0.05).wall


def _kernels(seen: profile) -> Iterator[tuple[str, float, Shapes]]:
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            yield event.name, event.time_range.elapsed_us() / 1e6, ()


def _operators(seen: profile) -> Iterator[tuple[str, float, Shapes]]:
    for event in seen.events():
        if event.cpu_parent is None:
            yield from _innermost(event)


def _innermost(event: FunctionEvent) -> Iterator[tuple[str, float, Shapes]]:
    """The operators that do the work: those that call no other one, and products and attention with
    what they call."""
    inside = [child for child in event.cpu_children if not _VIEWS.search(child.name)]
    kind = kind_of(event.name)
    whole = kind != "rest" and all(kind_of(child.name) == "rest" for child in inside)
    if whole or not inside:
        ours = event.name.startswith("aten::")
        if ours and not (_VIEWS.search(event.name) or _IDLE.search(event.name)):
            yield event.name, event.cpu_time_total / 1e6, tuple(map(tuple, event.input_shapes))
        return
    for child in inside:
        yield from _innermost(child)
