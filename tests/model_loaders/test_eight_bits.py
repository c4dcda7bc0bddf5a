"""Weights in eight bits: which are rounded, how far off they are, and what the host is told."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders import fixture, parity, parity_ltx23
from mutual_forcing.model_loaders.eight_bits import LAYERS, in_eight_bits
from mutual_forcing.model_loaders.fixture import Golden
from mutual_forcing.networks.fp8 import FORMAT
from mutual_forcing.networks.memory_branch import is_memory

DATA, FILES = Path(__file__).parents[1] / "data", ("ltx2_causal", "ltx23")
LAYER = "transformer_blocks.3.attn1.to_q"


@pytest.mark.parametrize("products", [False, True])
def test_layers_matrices_have_a_scale_each_and_all_else_stays(products: bool) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{LAYER}.weight": torch.randn(8, 16) * 1e-3,  # a plain cast would lose most of these
        f"{LAYER}.bias": torch.randn(8),
        "transformer_blocks.3.scale_shift_table": torch.randn(6, 16),
        "proj_out.weight": torch.randn(4, 16),
    }
    made = in_eight_bits(tensors, products=products, device=torch.device("cpu"))
    short, scale = made.pop(f"{LAYER}.weight"), made.pop(f"{LAYER}.weight_scale")
    described = json.loads(bytes(made.pop(f"{LAYER}.comfy_quant").tolist()))
    whole = tensors.pop(f"{LAYER}.weight")
    assert short.dtype == FORMAT and scale.shape == () and scale.dtype == torch.float32
    off = (short.float() * scale - whole).norm() / whole.norm()
    assert 0.005 < off < 0.035 < (whole.to(FORMAT).float() - whole).norm() / whole.norm()
    assert made == tensors
    assert described["format"] == "float8_e4m3fn"
    # Multiplied out, unless products are to be made in eight bits.
    assert described.get("full_precision_matrix_mult", False) is not products


def in_float8(golden: Golden, closer: bool) -> Golden:
    """A fixture whose layers' matrices were in float8 and are multiplied out again; the host's
    network has no memory branch, which is put beside it as it is."""
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in golden.tensors.items()
        if name.startswith(f"model.{LAYERS}") and not is_memory(name)
    }
    made = in_eight_bits(weights, closer=closer)
    moved = copy.copy(golden)
    moved.tensors = dict(golden.tensors)
    for name, x in made.items():
        if x.dtype == FORMAT:
            scale = made[f"{name.removesuffix('.weight')}.weight_scale"]
            moved.tensors[f"model.{name}"] = x.float() * scale
    return moved


@pytest.mark.parametrize("closer", [False, True])
def test_what_it_changes_on_both_fixtures_is_what_is_said(
    closer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative L2, docs/measured.md; LTX-2.3's two rollouts are the least off and left out."""
    monkeypatch.setattr(fixture, "relative_error", lambda a, b: ((a - b).norm() / b.norm()).item())
    two, three = (in_float8(Golden(DATA / f"{name}_golden.safetensors"), closer) for name in FILES)
    found = [*parity.errors(two), *islice(parity_ltx23.errors(three), 8)]
    worst = max(error for _, error in found)
    assert 0.025 < worst < (0.0355 if closer else 0.045)
