"""A GPU's kernels compute what the plain ones do: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CARD = torch.cuda.is_available()
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 0.02}


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
def test_kernels_of_a_gpu_are_the_plain_ones() -> None:
    """In a process of its own: Triton decides at its import who runs the kernels."""
    interpreted = {} if CARD else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", f"{START}main()"]
    done = subprocess.run(
        command, env=os.environ | interpreted, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 60
    for line in done.stdout.splitlines():
        name, error, limit = line.split()
        assert float(error) < float(limit), name


START = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import launch
launch.register()
from mutual_forcing.tests.networks.test_triton_kernels import main
"""


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, tuple]]:
    """(what, its result, the expected one), over sizes and ways in which tensors may lie."""
    from mutual_forcing.networks import fp8, triton_kernels
    from mutual_forcing.networks.kernels import PLAIN
    from mutual_forcing.networks.rope import RopeTable

    fused, eps = triton_kernels.TRITON, 1e-6

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    for batch, tokens, channels, own, each in (
        (1, 5, 48, 1, 1),
        (2, 3, 64, 2, 1),
        (2, 4, 40, 2, 4),
    ):
        x, out = new(batch, tokens, channels), new(batch, tokens, channels)
        rows = new(own, each, 5 * channels).split(channels, dim=-1)
        gate, *modulations = rows
        for name, inputs in (
            ("modulate", (x, *modulations[:2], eps)),
            ("add_norm", (x, gate, out, eps)),
            ("add_modulate", (x, gate, out, *modulations[:2], eps)),
            ("add_modulate_twice", (x, out, *modulations, eps)),
            ("add_modulate_twice", (x, out, *modulations, eps, gate)),
        ):
            yield name, *(_tuple(getattr(kernels, name)(*inputs)) for kernels in (fused, PLAIN))
    for heads, dim in ((2, 16), (4, 24)):
        for batch in ((), (2,)):
            x = new(2, 19, heads * dim).unflatten(-1, (heads, dim)).transpose(1, 2)
            table = RopeTable(*(new(*batch, heads, 30, dim // 2)[..., 5:24, :] for _ in range(2)))
            yield "rotate", (fused.rotate(x, table),), (PLAIN.rotate(x, table),)
        keys, values = new(3, 1, heads, 19, dim), new(3, 1, heads, 19, dim)
        rooms = [[new(3, 1, heads, 40, dim)] * 2 for _ in range(2)]
        rooms = [(k.clone(), v.clone()) for k, v in zip(*rooms, strict=True)]
        once = RopeTable(table.cos[0], table.sin[0])
        for kernels, (k, v) in zip((fused, PLAIN), rooms, strict=True):
            kernels.keep(k[..., 7:26, :], v[..., 7:26, :], keys, values, once)
        yield "keep", *rooms
        wide, weight = new(2, 19, heads * dim), new(heads * dim)
        for interleaved in (False, True):
            for turned in (None, table):
                inputs = wide, weight, eps, heads, turned, interleaved
                yield "norm_heads", (fused.norm_heads(*inputs),), (PLAIN.norm_heads(*inputs),)
        logits = new(2, 19, heads)
        yield "gate_heads", (fused.gate_heads(x, logits),), (PLAIN.gate_heads(x, logits),)
    tokens = 3 * new(7, 48)
    (rows, scale), (plain, expected) = triton_kernels.quantised(tokens), fp8.quantised(tokens)
    yield "quantised", (scale,), (expected,)
    if CARD:  # the interpreter rounds to eight bits otherwise
        yield "quantised", (rows.float(),), (plain.float(),)


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def main() -> None:
    """Print `NAME error limit`, relative to the largest number."""
    torch.manual_seed(0)
    for dtype, limit in LIMITS.items():
        for name, found, expected in cases(dtype, "cuda" if CARD else "cpu"):
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                error = (a.float() - b.float()).abs().max() / b.float().abs().max()
                sys.stdout.write(f"{name} {error.item():.2e} {limit}\n")
