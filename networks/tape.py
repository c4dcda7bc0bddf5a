"""A pass as a tape: the operators that it comes down to, played again over the same memory.

A small network on a CPU spends its time on starting work: modules, views, shapes and new memory for
a thousand numbers at a time. Here a function is carried out once while its operators are noted, and
from then on only those that compute something are called, each with a place for its result. Every
number is what the function itself would make of the same inputs, bit for bit. It is to a CPU what
CUDA graphs are to a card, and asks for the same: what the function reads besides its inputs lies
still, and no branch depends on a tensor.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = tuple[Tensor, ...]
Nested = TypeVar("Nested")
"""Tensors, in tuples in tuples."""
_ALIGNED = 64
_COPIES = torch.ops.aten.clone, torch.ops.aten._to_copy
# Views that are not declared as such.
_VIEWS = torch.ops.aten._unsafe_view, torch.ops.aten._reshape_alias


class Tape:
    """function(*inputs), noted once and called with other inputs of the same shapes. Without
    gradients, and by one thread at a time.

    Raises:
        RuntimeError: it asks for a number in a tensor, or names a place for a result.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        with _uncollected():
            with _Noting() as noting:
                made = function(*self.inputs)
            places = _Places(noting.calls, made)
            self.outputs = tuple(map(places.of, made))
            self._steps = [step for call in noting.calls for step in _steps(call, places)]

    def __call__(self, *inputs: Tensor) -> Tensors:
        """What the function makes of these, in memory of its own."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        for step in self._steps:
            step()
        return tuple(x.clone() for x in self.outputs)


@contextmanager
def _uncollected() -> Iterator[None]:
    """In the body Python does not look for what is garbage: so many new objects, all of them kept,
    would have it go through everything several times."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Still:
    """A place for tensors that a tape reads: what comes next is laid where the last one was."""

    def __init__(self) -> None:
        self._given: object = None
        self._own: object = None

    def of(self, value: Nested) -> Nested:
        """The same numbers where the last ones were, if those were of the same shapes."""
        if value is not self._given:
            own = list(_tensors((self._own,)))
            given = list(_tensors((value,)))
            if list(map(_form, own)) == list(map(_form, given)):
                for place, tensor in zip(own, given, strict=True):
                    _once(place).copy_(_once(tensor))
            else:
                self._own = _copied(value)
            self._given = value
        return self._own


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _once(tensor: Tensor) -> Tensor:
    """Of one entry that stands for every clip of a batch, that entry."""
    return tensor if tensor.stride(0) else tensor[:1]


def _copied(value: Nested) -> Nested:
    if isinstance(value, Tensor):
        return _once(value).clone().expand_as(value)
    parts = map(_copied, value)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def taped_on(device: torch.device) -> bool:
    """Whether what is done on a device now can be a tape."""
    return device.type == "cpu" and not torch.is_grad_enabled()


def is_plain(network: nn.Module) -> bool:
    """Whether a network's weights are tensors and nothing more: a host's own kinds carry out their
    operators by themselves."""
    weights = getattr(network, "hosted", network).parameters()
    return all(type(weight.data) is Tensor for weight in weights)


class _Call(NamedTuple):
    operator: OpOverload
    args: tuple[object, ...]
    kwargs: dict[str, object]
    made: object

    @property
    def given(self) -> list[Tensor]:
        return list(_tensors((self.args, tuple(self.kwargs.values()))))


class _Noting(TorchDispatchMode):
    """Inside, every operator is noted with what it was given and what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To skip it takes importing it, for seconds."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if torch.is_inference_mode_enabled():
            # There operators come as they were called, and some make a view or a copy, as it is.
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        made = func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, made))
        return made


class _Places:
    """Where everything lies that the calls of a tape make: in one piece of memory, which is used
    again as soon as nobody reads what was there."""

    def __init__(self, calls: list[_Call], kept: Tensors) -> None:
        # What a tensor is a view of, the first tensor over its memory; and where that is last used.
        self._root: dict[int, int] = {}
        last: dict[int, int] = {}
        fresh: list[list[Tensor]] = []
        for index, call in enumerate(calls):
            given, made = call.given, list(_tensors((call.made,)))
            fresh.append([])
            if _makes(call.operator):
                fresh[-1] = made
                self._root |= {id(tensor): id(tensor) for tensor in made}
            elif given and id(given[0]) in self._root:
                self._root |= {id(tensor): self._root[id(given[0])] for tensor in made}
            for tensor in (*given, *made):
                last[self._root.get(id(tensor), 0)] = index
        last |= {self._root.get(id(tensor), 0): len(calls) for tensor in kept}
        free: dict[int, list[int]] = defaultdict(list)
        leaving: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._starts: dict[int, int] = {}
        self._new: dict[int, Tensor] = {}
        end = 0
        for index, made in enumerate(fresh):
            for tensor in made:
                size = -(-tensor.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
                if free[size]:
                    start = free[size].pop()
                else:
                    start, end = end, end + size
                self._starts[id(tensor)] = start
                leaving[last[id(tensor)]].append((size, start))
            for size, start in leaving.pop(index, ()):
                free[size].append(start)
        self._rooms = {torch.uint8: torch.empty(end, dtype=torch.uint8)}

    def of(self, value: object) -> object:
        """A tensor of the calls where it lies now, or several; anything else as it is."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.of, value))
        root = self._root.get(id(value))
        if root is None:
            return value
        new = self._new.get(id(value))
        if new is None:
            dtype = value.dtype
            if dtype not in self._rooms:
                self._rooms[dtype] = self._rooms[torch.uint8].view(dtype)
            offset = self._starts[root] // dtype.itemsize + value.storage_offset()
            new = self._rooms[dtype].as_strided(value.shape, value.stride(), offset)
            self._new[id(value)] = new
        return new


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@cache
def _makes(operator: OpOverload) -> bool:
    """Whether what an operator returns is memory of its own, and not what it was given first."""
    if operator.overloadpacket in _VIEWS:
        return False
    return all(one.alias_info is None for one in operator._schema.returns)


@cache
def _writes(operator: OpOverload) -> tuple[bool, bool]:
    """Whether an operator writes into what it is given, and whether that is a place for a
    result."""
    schema = operator._schema
    return schema.is_mutable, any(one.is_out for one in schema.arguments)


@cache
def _is_room(operator: OpOverload) -> bool:
    return "empty" in operator.overloadpacket.__name__


def _steps(call: _Call, places: _Places) -> Iterator[Callable[[], object]]:
    """What has to be called again for a call: nothing for views, and for room to be filled."""
    operator = call.operator
    is_mutable, is_placed = _writes(operator)
    if is_placed or next(_tensors((call.made,)), None) is None:
        raise RuntimeError(f"{operator} cannot be played again")
    if not is_mutable and (_is_room(operator) or not _makes(operator)):
        return
    args = places.of(call.args)
    kwargs = {name: places.of(value) for name, value in call.kwargs.items()}
    if is_mutable:
        yield partial(_spoken(Tensor, operator), *args, **kwargs)
        return
    out, into = places.of(call.made), _into(operator)
    if operator.overloadpacket in _COPIES:
        yield partial(out.copy_, args[0])
    elif into is not None:
        yield partial(into, *args, **kwargs, out=out)
    else:
        yield partial(_laid, partial(operator, *args, **kwargs), tuple(_tensors((out,))))


def _laid(function: Callable[[], object], places: Tensors) -> None:
    for place, made in zip(places, _tensors((function(),)), strict=True):
        place.copy_(made)


@cache
def _spoken(owner: object, operator: OpOverload) -> Callable[..., object]:
    """An operator by its name in Python, which is quicker to call, where it has one."""
    if torch.Tag.generated in operator.tags:
        return operator
    return getattr(owner, operator.overloadpacket.__name__, operator)


@cache
def _into(operator: OpOverload) -> Callable[..., object] | None:
    """The form of an operator that writes its one result to a place; None: it has no such one."""
    wanted = [(one.name, str(one.type)) for one in operator._schema.arguments]
    for name in operator.overloadpacket.overloads():
        other = getattr(operator.overloadpacket, name)
        arguments = other._schema.arguments
        given = [(one.name, str(one.type)) for one in arguments if not one.is_out]
        if given == wanted and [one.name for one in arguments if one.is_out] == ["out"]:
            return _spoken(torch, other)
    return None
