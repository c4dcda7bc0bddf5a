# ruff: noqa: ANN001, ANN202, N803 - what Triton compiles is its own language
"""The arithmetic between matrix products (`kernels.py`) in one pass over memory each, for a GPU.

b batch, a heads, n tokens, c channels, d head dim, r rotation pairs per head (d/2).
A program of `_rows` is one token, one of `_turned` some tokens of one head: no index is divided and
neighbouring threads read neighbouring numbers. Everything is computed in float32 and rounded where
PyTorch's own operators round. Sizes are free, so a block rounds the same whatever ran before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import Kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # it is for GPUs, and comes with PyTorch there
    triton = None

FORMAT = torch.float8_e4m3fn
_MOST_CHANNELS = 2**16
_TOKENS = 16


class _Rows(NamedTuple):
    """A vector or one for each token, (b or 1, n or 1, c), and its strides over all tokens."""

    x: Tensor
    batch: int = 0
    token: int = 0

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        """Its strides are 0 where there is one for all."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        return cls(x, *(0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1)))


if triton is not None:

    @triton.jit
    def _row(pointer, batch, token, batch_stride, token_stride, columns, inside):
        offset = batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
        return tl.load(pointer + offset + columns, mask=inside, other=0.0).to(tl.float32)

    @triton.jit(do_not_specialize=["tokens"])
    def _rows(
        x,
        added,
        gate,
        gate_batch,
        gate_token,
        scale,
        shift,
        batch_stride,
        token_stride,
        other_scale,
        other_shift,
        other_batch,
        other_token,
        whole,
        out,
        other,
        tokens,
        channels,
        eps,
        GATED: tl.constexpr,
        ADDED: tl.constexpr,
        MODULATED: tl.constexpr,
        TWICE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        batch, token = row // tokens, row % tokens
        columns = tl.arange(0, BLOCK)
        inside = columns < channels
        place = row.to(tl.int64) * channels + columns
        kind = out.dtype.element_ty
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if ADDED:
            more = tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                more *= _row(gate, batch, token, gate_batch, gate_token, columns, inside)
            rounded = (value + more).to(kind)
            tl.store(whole + place, rounded, mask=inside)
            value = rounded.to(tl.float32)
        power = tl.sum(value * value, axis=0) / channels
        # Rounded between the norm and the modulation, as two operators would.
        normed = (value * tl.rsqrt(power + eps)).to(kind)
        if MODULATED:
            value = normed.to(tl.float32)
            one = _row(scale, batch, token, batch_stride, token_stride, columns, inside)
            two = _row(shift, batch, token, batch_stride, token_stride, columns, inside)
            tl.store(out + place, (two + value * one).to(kind), mask=inside)
            if TWICE:
                one = _row(other_scale, batch, token, other_batch, other_token, columns, inside)
                two = _row(other_shift, batch, token, other_batch, other_token, columns, inside)
                tl.store(other + place, (two + value * one).to(kind), mask=inside)
        else:
            tl.store(out + place, normed, mask=inside)

    @triton.jit(do_not_specialize=["tokens"])
    def _turned(
        x,
        x_batch,
        x_head,
        x_token,
        cos,
        sin,
        table_batch,
        table_head,
        table_token,
        out,
        out_batch,
        out_head,
        out_token,
        values,
        values_batch,
        values_head,
        values_token,
        kept,
        tokens,
        pairs,
        VALUES: tl.constexpr,
        TOKENS: tl.constexpr,
        PAIRS: tl.constexpr,
    ):
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        pair = tl.arange(0, PAIRS)[None, :]
        inside = (token < tokens) & (pair < pairs)
        turn = batch * table_batch + head * table_head + token * table_token + pair
        c = tl.load(cos + turn, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
        place = x + batch * x_batch + head * x_head + token * x_token + pair
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(place + pairs, mask=inside, other=0.0).to(tl.float32)
        to = batch * out_batch + head * out_head + token * out_token + pair
        kind = out.dtype.element_ty
        tl.store(out + to, (first * c - second * s).to(kind), mask=inside)
        tl.store(out + to + pairs, (second * c + first * s).to(kind), mask=inside)
        if VALUES:
            place = values + batch * values_batch + head * values_head + token * values_token + pair
            first = tl.load(place, mask=inside, other=0.0).to(kind)
            second = tl.load(place + pairs, mask=inside, other=0.0).to(kind)
            tl.store(kept + to, first, mask=inside)
            tl.store(kept + to + pairs, second, mask=inside)

    @triton.jit
    def _pairs(
        pointer, heads, pairs, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr
    ):
        head, pair = tl.arange(0, HEADS), tl.arange(0, PAIRS)
        inside = (head[:, None] < heads) & (pair[None, :] < pairs)
        if INTERLEAVED:
            place = head[:, None] * pairs + pair[None, :]
            if pointer.dtype.element_ty == tl.bfloat16:
                # A pair is 32 bits, and a number's 16 are the upper half of its float32.
                words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
                both = tl.load(words + place, mask=inside, other=0)
                first = (both << 16).to(tl.float32, bitcast=True)
                second = (both & -65536).to(tl.float32, bitcast=True)
            else:
                first = tl.load(pointer + 2 * place, mask=inside, other=0.0).to(tl.float32)
                second = tl.load(pointer + 2 * place + 1, mask=inside, other=0.0).to(tl.float32)
        else:
            place = pointer + head[:, None] * (2 * pairs) + pair[None, :]
            first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(place + pairs, mask=inside, other=0.0).to(tl.float32)
        return first, second

    @triton.jit(do_not_specialize=["tokens"])
    def _headed(
        x,
        weight,
        cos,
        sin,
        table_batch,
        table_head,
        table_token,
        out,
        tokens,
        heads,
        pairs,
        eps,
        INTERLEAVED: tl.constexpr,
        ROTATED: tl.constexpr,
        HEADS: tl.constexpr,
        PAIRS: tl.constexpr,
    ):
        row = tl.program_id(0)
        batch, token = (row // tokens).to(tl.int64), row % tokens
        start = row.to(tl.int64) * (2 * heads * pairs)
        kind = out.dtype.element_ty
        first, second = _pairs(x + start, heads, pairs, INTERLEAVED, HEADS, PAIRS)
        power = (tl.sum(first * first) + tl.sum(second * second)) / (2 * heads * pairs)
        scale = tl.rsqrt(power + eps)
        one, two = _pairs(weight, heads, pairs, INTERLEAVED, HEADS, PAIRS)
        first = (first * scale * one).to(kind).to(tl.float32)
        second = (second * scale * two).to(kind).to(tl.float32)
        head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
        inside = (head < heads) & (pair < pairs)
        to = out + start + head * (2 * pairs) + pair
        if ROTATED:
            turn = batch * table_batch + head * table_head + token * table_token + pair
            c = tl.load(cos + turn, mask=inside, other=1.0).to(tl.float32)
            s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
            tl.store(to, (first * c - second * s).to(kind), mask=inside)
            tl.store(to + pairs, (second * c + first * s).to(kind), mask=inside)
        else:
            tl.store(to, first.to(kind), mask=inside)
            tl.store(to + pairs, second.to(kind), mask=inside)

    @triton.jit
    def _rounded(x, out, scales, channels, largest, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        inside = columns < channels
        place = row.to(tl.int64) * channels + columns
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / largest
        value = tl.minimum(tl.maximum(value / scale, -largest), largest)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit(do_not_specialize=["tokens"])
    def _gated(
        x,
        x_batch,
        x_head,
        x_token,
        logits,
        out,
        tokens,
        heads,
        dim,
        TOKENS: tl.constexpr,
        DIM: tl.constexpr,
    ):
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, DIM)[None, :]
        inside = (token < tokens) & (channel < dim)
        kind = out.dtype.element_ty
        row = batch * tokens + token
        gate = tl.load(logits + row * heads + head, mask=token < tokens, other=0.0).to(tl.float32)
        gate = (2 * tl.sigmoid(gate).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        place = batch * x_batch + head * x_head + token * x_token + channel
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        to = out + (row * heads + head) * dim + channel
        tl.store(to, (value * gate).to(kind), mask=inside)


def _start(
    kernel: object, grid: tuple[int, ...], x: Tensor, *arguments: object, **options: object
) -> None:
    """Start programs on the card that x lies on, which need not be the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        kernel[grid](x, *arguments, **options)
        return
    with torch.cuda.device(x.device):
        kernel[grid](x, *arguments, **options)


def _warps(channels: int) -> int:
    """For a program that reads so many numbers; a power of two."""
    return max(1, min(16, triton.next_power_of_2(channels) // 512))


def _run_rows(
    x: Tensor,
    eps: float,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, the same normalised (and modulated), and modulated otherwise; where asked for."""
    x = x.contiguous()
    batch, tokens, channels = x.shape
    if channels > _MOST_CHANNELS:
        raise ValueError(f"{channels} channels, expected at most {_MOST_CHANNELS}")
    whole = x if added is None else torch.empty_like(x)
    out = torch.empty_like(x)
    second = out if other is None else torch.empty_like(x)
    added = x if added is None else added.contiguous()
    gates = _Rows(x) if gate is None else _Rows.of(gate)
    scale, shift = (_Rows(x), _Rows(x)) if modulation is None else _like_rows(*modulation)
    one, two = (_Rows(x), _Rows(x)) if other is None else _like_rows(*other)
    block = triton.next_power_of_2(channels)
    _start(
        _rows,
        (batch * tokens,),
        x,
        added,
        *gates,
        scale.x,
        *shift,
        one.x,
        *two,
        whole,
        out,
        second,
        tokens,
        channels,
        eps,
        GATED=gate is not None,
        ADDED=whole is not x,
        MODULATED=modulation is not None,
        TWICE=other is not None,
        BLOCK=block,
        num_warps=_warps(channels),
    )
    return whole, out, second


def _like_rows(one: Tensor, other: Tensor) -> tuple[_Rows, _Rows]:
    """Both with the same strides."""
    rows = _Rows.of(one), _Rows.of(other)
    if rows[0][1:] != rows[1][1:]:
        rows = _Rows.of(one.contiguous()), _Rows.of(other.contiguous())
    return rows


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, the last one 1."""
    if one.stride() == other.stride() and one.stride(-1) == 1:
        return one, other
    return one.contiguous(), other.contiguous()


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """As `kernels.modulate`."""
    return _run_rows(x, eps, modulation=(scale, shift))[1]


def add_norm(x: Tensor, gate: Tensor, out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels.add_norm`."""
    return _run_rows(x, eps, out, gate)[:2]


def add_modulate(
    x: Tensor, gate: Tensor, out: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.add_modulate`."""
    return _run_rows(x, eps, out, gate, (scale, shift))[:2]


def add_modulate_twice(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    shift: Tensor,
    other_scale: Tensor,
    other_shift: Tensor,
    eps: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.add_modulate_twice`."""
    return _run_rows(x, eps, out, gate, (scale, shift), (other_scale, other_shift))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """As `rope.rotate`; laid out as x is."""
    out = torch.empty_like(x)
    _turn(out, x, table)
    return out


def keep(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, table: tuple[Tensor, Tensor]) -> None:
    """As `kernels.keep`."""
    _turn(keys, k, table, values, v)


def _turn(
    out: Tensor,
    x: Tensor,
    table: tuple[Tensor, Tensor],
    kept: Tensor | None = None,
    values: Tensor | None = None,
) -> None:
    """Rotate x into `out`, and copy `values` into `kept`."""
    beside = values is not None
    kept, values = (kept, values) if beside else (out, x)
    if x.ndim > 4:
        # Of many layers at once: what is written to lies so that layers and clips are one axis.
        x, values = (t.reshape(-1, *t.shape[-3:]) for t in (x, values))
        out, kept = (t.view(-1, *t.shape[-3:]) for t in (out, kept))
    x, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, values))
    if kept.stride() != out.stride():
        raise ValueError(f"keys lie with strides {out.stride()}, values with {kept.stride()}")
    cos, sin = _alike(*table)
    batch, heads, tokens, dim = x.shape
    strides = cos.stride() if cos.ndim == 4 else (0, *cos.stride())
    _start(
        _turned,
        (triton.cdiv(tokens, _TOKENS), heads, batch),
        x,
        *x.stride()[:3],
        cos,
        sin,
        *strides[:3],
        out,
        *out.stride()[:3],
        values,
        *values.stride()[:3],
        kept,
        tokens,
        dim // 2,
        VALUES=beside,
        TOKENS=_TOKENS,
        PAIRS=triton.next_power_of_2(dim // 2),
        num_warps=4,
    )


def norm_heads(
    x: Tensor,
    weight: Tensor,
    eps: float,
    heads: int,
    table: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """As `kernels.norm_heads`; heads lie side by side."""
    x = x.contiguous()
    batch, tokens, channels = x.shape
    pairs = channels // heads // 2
    out = torch.empty_like(x)
    cos, sin = (x, x) if table is None else _alike(*table)
    strides = cos.stride() if cos.ndim == 4 else (0, *cos.stride())
    _start(
        _headed,
        (batch * tokens,),
        x,
        weight,
        cos,
        sin,
        *strides[:3],
        out,
        tokens,
        heads,
        pairs,
        eps,
        INTERLEAVED=interleaved,
        ROTATED=table is not None,
        HEADS=triton.next_power_of_2(heads),
        PAIRS=triton.next_power_of_2(pairs),
        num_warps=_warps(channels),
    )
    return out.unflatten(-1, (heads, 2 * pairs)).transpose(1, 2)


def gate_heads(out: Tensor, logits: Tensor) -> Tensor:
    """As `kernels.gate_heads`; heads lie side by side, as the product after it reads them."""
    batch, heads, tokens, dim = out.shape
    if out.stride(-1) != 1:
        out = out.contiguous()
    gated = out.new_empty(batch, tokens, heads, dim)
    _start(
        _gated,
        (triton.cdiv(tokens, _TOKENS), heads, batch),
        out,
        *out.stride()[:3],
        logits.contiguous(),
        gated,
        tokens,
        heads,
        dim,
        TOKENS=_TOKENS,
        DIM=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return gated.transpose(1, 2)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `fp8.quantised`."""
    x = x.contiguous()
    rows, channels = x.shape
    out, scales = torch.empty_like(x, dtype=FORMAT), x.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(channels)
    largest = torch.finfo(FORMAT).max
    rest = {"BLOCK": block, "num_warps": _warps(channels)}
    _start(_rounded, (rows,), x, out, scales, channels, largest, **rest)
    return out, scales


TRITON = Kernels(
    modulate,
    add_norm,
    add_modulate,
    add_modulate_twice,
    norm_heads,
    rotate,
    keep,
    gate_heads,
)
