"""Where the time of some work goes, and how much is started for it: products, attention, the rest.

On CUDA a call is a kernel that the card has run, recorded graphs' included; on a CPU it is an
operator that calls no other one, views not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

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


class Part(NamedTuple):
    """Seconds that were spent, and how many calls that took."""

    seconds: float
    calls: int


class Breakdown(NamedTuple):
    """By kind, and the names in each that took longest with their parts."""

    kinds: dict[str, Part]
    longest: list[tuple[str, Part]]


def kind_of(name: str) -> str:
    """Which of the kinds a kernel or an operator is, by its name."""
    return next((kind for kind, known in _KINDS.items() if known.search(name)), "rest")


def breakdown(work: Callable[[], object], device: torch.device, longest: int = 12) -> Breakdown:
    """Profile some work.

    Args:
        longest: how many names to give.
    """
    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as seen:
        work()
        if on_card:
            torch.cuda.synchronize(device)
    calls = _kernels(seen) if on_card else _operators(seen)
    names: dict[str, Part] = {}
    kinds = {kind: Part(0.0, 0) for kind in KINDS}
    for name, seconds in calls:
        for parts, key in ((names, name), (kinds, kind_of(name))):
            before = parts.get(key, Part(0.0, 0))
            parts[key] = Part(before.seconds + seconds, before.calls + 1)
    ranked = sorted(names.items(), key=lambda item: -item[1].seconds)
    return Breakdown(kinds, ranked[:longest])


def _kernels(seen: profile) -> Iterator[tuple[str, float]]:
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            yield event.name, event.time_range.elapsed_us() / 1e6


def _operators(seen: profile) -> Iterator[tuple[str, float]]:
    for event in seen.events():
        if event.cpu_parent is None:
            yield from _innermost(event)


def _innermost(event: FunctionEvent) -> Iterator[tuple[str, float]]:
    """The operators that do the work: those that call no other one, and products and attention with
    what they call."""
    inside = [child for child in event.cpu_children if not _VIEWS.search(child.name)]
    kind = kind_of(event.name)
    whole = kind != "rest" and all(kind_of(child.name) == "rest" for child in inside)
    if whole or not inside:
        ours = event.name.startswith("aten::")
        if ours and not (_VIEWS.search(event.name) or _IDLE.search(event.name)):
            yield event.name, event.cpu_time_total / 1e6
        return
    for child in inside:
        yield from _innermost(child)
