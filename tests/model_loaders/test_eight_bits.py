"""Weights in eight bits: which are rounded, how far off they are, and what the host is told."""

from __future__ import annotations

import json

import pytest
import torch
from mutual_forcing.model_loaders.eight_bits import in_eight_bits
from mutual_forcing.networks.fp8 import FORMAT

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
