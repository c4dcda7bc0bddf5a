"""A hosted module with its weights as in the file gives the permuted network's numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutual_forcing.host.transformer_view import TransformerView
from mutual_forcing.model_loaders.keymap import split_layout
from mutual_forcing.networks.attention import sdpa
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.few_step import FEW_STEP, adapted, folded
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import Prompt, new_stream, rollout, sampler_settings
from mutual_forcing.samplers.state import StreamSettings
from mutual_forcing.tests.ltx2_files import GOLDEN, WEIGHTS
from mutual_forcing.tests.tiny import TRANSFORMER, tiny_parts


def run(model: object) -> torch.Tensor:
    """Two blocks of a rollout."""
    text = text_keys(model, GOLDEN["input.video_context"], GOLDEN["input.audio_context"])
    batch = GOLDEN["input.video_context"].shape[0]
    settings = StreamSettings(2, 3, window=2, seeds=tuple(range(batch)))
    bare = BareModel(model, "id")
    state = new_stream(bare, settings)
    made = rollout(bare, Prompt(text), state, 2, sampler_settings("few", 2, method="renoise"))
    blocks = [block for block, _ in made]
    return torch.cat(
        [block.video.flatten() for block in blocks] + [b.audio.flatten() for b in blocks]
    )


@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
@torch.no_grad()
def test_weights_in_file_order_give_the_same_numbers(rope_type: str) -> None:
    config = TransformerConfig.from_dict(GOLDEN.config.to_dict() | {"rope_type": rope_type})
    ours, theirs = CausalAVTransformer(config), CausalAVTransformer(config)
    ours.load_state_dict(split_layout(WEIGHTS, config))
    theirs.load_state_dict(WEIGHTS)
    found = run(TransformerView(theirs, config, sdpa))
    expected = run(ours)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_the_order_matters() -> None:
    """The test above could not fail if it did not."""
    config = GOLDEN.config
    theirs = CausalAVTransformer(config)
    theirs.load_state_dict(WEIGHTS)
    wrong = TransformerConfig.from_dict(config.to_dict() | {"rope_type": "split"})
    found = run(TransformerView(theirs, wrong, sdpa))
    expected = run(TransformerView(theirs, config, sdpa))
    assert not torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())


@torch.no_grad()
def test_adapters_become_part_of_the_weights_of_what_is_hosted() -> None:
    ours, *_ = tiny_parts(0, replace(TRANSFORMER, few_step_rank=2))
    for name, weight in ours.named_parameters():
        if FEW_STEP in name:
            weight.normal_(0, 0.2)
    hosted = TransformerView(ours, ours.config, sdpa)
    twin = folded(hosted, 2.0, torch.empty(0))
    x = torch.randn(1, 3, ours.config.video_dim)
    ours, theirs = (one.transformer_blocks[1].attn1 for one in (hosted, twin))
    assert torch.allclose(theirs.to_q(x), adapted(ours.to_q, x, torch.tensor([0.5])), atol=1e-6)
    assert theirs.q_norm.weight_for(x) is ours.q_norm.weight_for(x)


@torch.no_grad()
def test_a_weight_that_the_host_changes_is_seen() -> None:
    """LoRAs come and go while the view stays: no weight may be remembered."""
    config = GOLDEN.config
    theirs = CausalAVTransformer(config)
    theirs.load_state_dict(WEIGHTS)
    hosted = TransformerView(theirs, config, sdpa)
    before = run(hosted)
    layer = "transformer_blocks.0"
    for name in ("attn1.to_q.weight", "attn1.q_norm.weight", "scale_shift_table"):
        key = f"{layer}.{name}"
        weight = theirs.get_parameter(key)
        kept = weight.clone()
        weight.add_(torch.ones_like(weight))
        assert not torch.equal(run(hosted), before)
        weight.copy_(kept)
    assert torch.equal(run(hosted), before)
    norm = theirs.get_submodule(f"{layer}.attn1.q_norm")
    called: list[object] = []
    norm.register_forward_hook(lambda *_: called.append(norm))
    assert torch.equal(run(hosted), before) and not called
    norm.weight_function = [lambda weight: weight]  # as ComfyUI marks one that it patches
    assert torch.allclose(run(hosted), before, atol=1e-5) and called
