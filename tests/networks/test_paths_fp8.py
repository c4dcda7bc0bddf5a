"""Products in eight bits: what they compute exactly, and how far that is from what was asked."""

from __future__ import annotations

import copy

import pytest
import torch
from mutual_forcing.networks import fp8
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.fp8 import Fp8Linear, quantised, use_fp8
from mutual_forcing.networks.full_sequence import causal_forward
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.tests.tiny import TRANSFORMER
from torch import nn


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
    short = Fp8Linear(linear)
    rows, scale = quantised(x.reshape(10, 64))
    exact = (rows.float() * scale) @ (short.weight.float() * short.scale.T).T + linear.bias
    found = short(x)
    assert found.shape == (2, 5, 48) and found.dtype == x.dtype
    assert (found.reshape(10, 48) - exact).abs().max() < 2**-7 * exact.abs().max()  # bfloat16
    wanted = linear(x)
    assert 0.005 < (found - wanted).norm() / wanted.norm() < 0.06


def test_rounding_keeps_each_row_in_range() -> None:
    x = torch.tensor([[1e-6, -2e-6], [3e4, 1.0], [0.0, 0.0]])
    rows, scale = quantised(x)
    assert torch.isfinite(rows.float()).all()
    back = rows.float() * scale
    assert torch.allclose(back.abs().amax(dim=1), x.abs().amax(dim=1), rtol=1e-6)


@torch.no_grad()
def test_a_model_takes_less_memory_and_gives_nearly_the_same() -> None:
    values = TRANSFORMER.to_dict() | {"num_attention_heads": 4, "audio_num_attention_heads": 4}
    config = TransformerConfig.from_dict(
        values | {"cross_attention_dim": 64, "audio_cross_attention_dim": 32}
    )
    torch.manual_seed(0)
    model = CausalAVTransformer(config).eval()
    short = copy.deepcopy(model)
    layers = sum(isinstance(m, nn.Linear) for m in model.transformer_blocks.modules())
    assert use_fp8(short) == layers

    def size(module: nn.Module) -> int:
        tensors = (*module.parameters(), *module.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    assert size(short.transformer_blocks) < 0.4 * size(model.transformer_blocks)
    context = torch.randn(1, 3, config.caption_channels)
    layout = config.layout
    inputs = (
        torch.randn(1, config.in_channels, layout.video_latents(2), 2, 2),
        torch.randn(1, layout.audio_latents(2), config.audio_in_channels),
        torch.full((1, layout.video_latents(2)), 0.5),
        torch.full((1, layout.audio_latents(2)), 0.5),
    )
    found, expected = (
        causal_forward(m, *inputs, text_keys(m, context, context)) for m in (short, model)
    )
    for a, b in zip(found, expected, strict=True):
        assert 0 < (a - b).norm() / b.norm() < 0.1


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "compute capability 8.9" in fp8.unavailable(torch.device("cuda"))
    assert "mps" in fp8.unavailable(torch.device("mps"))
