"""How keys and values wait until a pass looks back at them, and how they come to it.

l layers, b batch, a heads, n tokens, d head dim.
They are most of what a stream has in memory. As they were computed they cost nothing else. In eight
bits they take half of 16: whole numbers with a scale for each token of each head, which are nearer
to what was computed than float8 is (docs/measured.md). In the computer's memory they take none of a
card's: a layer's come over while the one before it is computed (`Carrier`), and no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Kept = Literal["as computed", "8 bit", "in the computer's memory"]
KEPT: tuple[Kept, ...] = get_args(Kept)
AS_COMPUTED, EIGHT_BITS, ON_HOST = KEPT
FORMAT = torch.int8
_ALIGNED = 256

KeysValues = tuple[Tensor, ...]
"""Keys (unrotated) and values; in eight bits the float32 scales (.., n, 1) of both follow them."""


class BlockKeys(NamedTuple):
    """One block's keys and values of all layers, each (l, b, a, n, d)."""

    video: KeysValues
    audio: KeysValues
    audio_to_video: KeysValues
    video_to_audio: KeysValues

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> BlockKeys:
        """From `tensors()`."""
        size = len(tensors) // len(cls._fields)
        return cls(*(tuple(tensors[at : at + size]) for at in range(0, len(tensors), size)))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, one after the other."""
        return tuple(tensor for part in self for tensor in part)

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockKeys:
        """The same of what a function makes of each."""
        return BlockKeys.of(tuple(map(function, self.tensors())))

    def layer(self, index: int) -> BlockKeys:
        """Those of one layer, each (b, a, n, d)."""
        return self.map(lambda tensor: tensor[index])


ATTENTIONS = BlockKeys._fields


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (.., n, d) in eight bits, and the float32 scale (.., n, 1) to multiply each row with."""
    largest = torch.iinfo(FORMAT).max
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / largest
    return (x / scale).round().clamp(-largest, largest).to(FORMAT), scale


def room(kept: Kept, shape: tuple[int, ...], like: Tensor) -> KeysValues:
    """Where keys and values of a shape will lie that were computed as `like` is."""
    if kept == EIGHT_BITS:
        short = [like.new_empty(shape, dtype=FORMAT) for _ in "kv"]
        scales = [like.new_empty((*shape[:-1], 1), dtype=torch.float32) for _ in "kv"]
        return *short, *scales
    if kept == ON_HOST:
        new = {"dtype": like.dtype, "pin_memory": like.is_cuda}
        return torch.empty(shape, **new), torch.empty(shape, **new)
    return like.new_empty(shape), like.new_empty(shape)


def placed(kept: Kept, tensor: Tensor, like: Tensor) -> Tensor:
    """One of such tensors, from wherever it is, as one that was made by `room`."""
    if kept == EIGHT_BITS:
        return tensor.to(like.device)
    if kept == ON_HOST:
        tensor = tensor.to("cpu", like.dtype)
        return tensor.pin_memory() if like.is_cuda and not tensor.is_pinned() else tensor
    return tensor.to(like)


def write(place: KeysValues, k: Tensor, v: Tensor) -> None:
    """Lay keys and values where there is room for them; nobody waits for it."""
    (k, *k_scale), (v, *v_scale) = (rounded(x) if len(place) > 2 else (x,) for x in (k, v))
    for own, given in zip(place, (k, v, *k_scale, *v_scale), strict=True):
        own.copy_(given, non_blocking=True)


def read(part: KeysValues, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in the dtype of `like`."""
    k, v, *scales = part
    if scales:
        k, v = ((x * scale).to(like.dtype) for x, scale in zip((k, v), scales, strict=True))
    return k, v


def as_kept(kept: Kept, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they are read once they were written."""
    if kept != EIGHT_BITS:
        return k, v
    (short_k, k_scale), (short_v, v_scale) = rounded(k), rounded(v)
    return read((short_k, short_v, k_scale, v_scale), k)


def kept_bytes(kept: Kept, numbers: int, rows: int, element_size: int) -> int:
    """Memory, on the device that computes, of so many numbers in so many rows (tokens of a
    head)."""
    if kept == EIGHT_BITS:
        return numbers * FORMAT.itemsize + rows * torch.float32.itemsize
    return 0 if kept == ON_HOST else numbers * element_size


Wait = Callable[[], None]


def _at_once(copy: Callable[[], None]) -> Wait:
    copy()
    return lambda: None


class _Beside:
    """Copies in a CUDA stream of their own, each after what the caller has issued so far."""

    def __init__(self, device: torch.device) -> None:
        self.lane = torch.cuda.Stream(device)

    def __call__(self, copy: Callable[[], None]) -> Wait:
        """Begin; the caller's stream goes on at once, and waits when what is returned is called."""
        self.lane.wait_stream(torch.cuda.current_stream(self.lane.device))
        with torch.cuda.stream(self.lane):
            copy()
            done = self.lane.record_event()
        return lambda: torch.cuda.current_stream(self.lane.device).wait_event(done)


class _Load:
    """What one layer needs of some blocks, in memory that is used again."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.layer = -1
        self.blocks: list[BlockKeys] = []
        self.parts: list[BlockKeys] = []
        self.wait: Wait = lambda: None

    def holds(self, layer: int, blocks: Sequence[BlockKeys]) -> bool:
        return layer == self.layer and all(map(self.part_of, blocks))

    def part_of(self, block: BlockKeys) -> BlockKeys | None:
        pairs = zip(self.blocks, self.parts, strict=True)
        return next((part for known, part in pairs if known is block), None)

    def fill(
        self, layer: int, blocks: Sequence[BlockKeys], start: Callable[[Callable[[], None]], Wait]
    ) -> None:
        given = [block.layer(layer) for block in blocks]
        sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for part in given for x in part.tensors()]
        if self.memory.numel() < sum(sizes):
            self.memory = self.memory.new_empty(sum(sizes))
        places = iter(self.memory[: sum(sizes)].split(sizes))

        def place(x: Tensor) -> Tensor:
            return next(places)[: x.nbytes].view(x.dtype).view(x.shape)

        self.layer, self.blocks = layer, list(blocks)
        self.parts = parts = [part.map(place) for part in given]

        def copy() -> None:
            for part, source in zip(parts, given, strict=True):
                for own, x in zip(part.tensors(), source.tensors(), strict=True):
                    own.copy_(x, non_blocking=True)
            self.in_use()

        self.wait = start(copy)

    def in_use(self) -> None:
        """Keep its memory from being handed out again while the current stream is at it."""
        if self.memory.is_cuda:
            self.memory.record_stream(torch.cuda.current_stream(self.memory.device))


class Carrier:
    """Brings keys and values from the host's memory to the layer that is computed, and those of the
    next one meanwhile: there is room for two layers.

    Layers are asked for in turn, and what is made of one's is made before the next is asked for:
    where audio and video run side by side they meet in every layer after both have asked.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        self.layers = layers
        self.start = _Beside(device) if device.type == "cuda" else _at_once
        self._here, self._coming = _Load(device), _Load(device)

    def bring(self, layer: int, blocks: Sequence[BlockKeys]) -> list[BlockKeys]:
        """What a layer needs of some blocks, on the device until the layer after it asks."""
        if not self._here.holds(layer, blocks):
            self._here, self._coming = self._coming, self._here
            if not self._here.holds(layer, blocks):
                self._here.fill(layer, blocks, self.start)
            self._coming.fill((layer + 1) % self.layers, blocks, self.start)
        self._here.wait()
        self._here.in_use()
        return [self._here.part_of(block) for block in blocks]
