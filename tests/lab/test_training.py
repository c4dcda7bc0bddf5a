"""Identities of the recipes: weights count as stated, modalities stay apart, steps are equal."""

from __future__ import annotations

import pytest
import torch
from mutual_forcing.lab.training.draws import Draws
from mutual_forcing.lab.training.flow_matching import flow_matching, whole_clip_matching
from mutual_forcing.lab.training.optimiser import MasterWeights, Muon, orthogonalise
from mutual_forcing.lab.training.pair import Pair, block_error, per_latent, velocity
from mutual_forcing.lab.training.system import math_attention
from mutual_forcing.networks.full_sequence import Told, causal_forward
from mutual_forcing.networks.layout import BlockLayout
from mutual_forcing.tests.tiny_training import LAYOUT, awake, batch, draws, system

FLOW = {"sigma_mean": 0.3, "sigma_spread": 1.2, "caption_dropout": 0.1, "history_noise": 0.1}


def test_what_is_drawn_does_not_depend_on_how_a_batch_is_split() -> None:
    whole, first, second = Draws(3, 7, range(4)), Draws(3, 7, range(2)), Draws(3, 7, range(2, 4))
    for ask in (lambda d: d.normal(2, 5), lambda d: d.uniform(), lambda d: d.integers(9, 3)):
        assert torch.equal(ask(whole), torch.cat((ask(first), ask(second))))
    assert whole.level() == first.level() == second.level()
    assert whole.choice(1000) == first.choice(1000)
    assert not torch.equal(Draws(3, 8, range(4)).normal(2), Draws(3, 7, range(4)).normal(2))


@pytest.mark.parametrize("layout", [LAYOUT, BlockLayout(4, 26)])
def test_every_block_has_the_same_weight(layout: BlockLayout) -> None:
    zero = Pair(
        torch.zeros(2, 6, layout.video_latents(4), 1, 2), torch.zeros(2, layout.audio_latents(4), 5)
    )
    for block in range(4):
        one = zero.map(torch.clone)
        one.video[:, :, slice(*layout.video_span(block))] = 1
        one.audio[:, slice(*layout.audio_span(block))] = 2
        assert block_error(one, zero, layout) == (0.25, 1.0)


@pytest.mark.parametrize("layout", [LAYOUT, BlockLayout(4, 26)])
def test_levels_are_spread_over_the_latents_of_their_blocks(layout: BlockLayout) -> None:
    video, audio = per_latent(torch.arange(3.0)[None], layout)
    for stream, span in ((video, layout.video_span), (audio, layout.audio_span)):
        for block in range(3):
            assert (stream[0, slice(*span(block))] == block).all()
        assert stream.shape[1] == span(2)[1]


def test_fresh_weights_predict_nothing_and_closed_gates_keep_the_streams_apart() -> None:
    made = system()
    losses = flow_matching(made, batch(), draws(1), coupled=True, **FLOW)
    assert 1.5 < losses.video < 2.5 and 1.5 < losses.audio < 2.5
    losses.video.backward()
    assert made.transformer.audio_patchify_proj.weight.grad.abs().sum() == 0


def test_uncoupled_streams_never_reach_each_other() -> None:
    made = awake(system())
    losses = flow_matching(made, batch(), draws(1), coupled=False, **FLOW)
    losses.video.backward()
    assert made.transformer.patchify_proj.weight.grad.abs().sum() > 0
    assert made.transformer.audio_patchify_proj.weight.grad is None
    assert made.transformer.transformer_blocks[0].audio_to_video_attn.to_q.weight.grad is None


def test_without_masks_every_block_sees_every_other_and_one_level_serves_all() -> None:
    made, data = awake(system()), batch()
    clip, text = Pair(data.video, data.audio), made.text(data.ids)
    level = torch.full((3, 3), 0.7)
    whole = velocity(made.transformer, None, clip, level, Told(text))
    changed = clip._replace(audio=clip.audio + torch.eye(LAYOUT.audio_latents(3))[-1][:, None])
    assert not torch.allclose(
        velocity(made.transformer, None, changed, level, Told(text)).video[:, :, 0],
        whole.video[:, :, 0],
    )
    spread = per_latent(level, LAYOUT)
    expected = causal_forward(made.transformer, *clip, *spread, text, causal=False)
    assert torch.allclose(whole.video, expected[0], atol=1e-6)
    assert torch.allclose(whole.audio, expected[1], atol=1e-6)
    losses = whole_clip_matching(
        made, data, draws(), sigma_mean=0.3, sigma_spread=1.2, caption_dropout=0.1
    )
    assert losses.video > 0 and losses.audio > 0


def test_a_network_overfits_one_batch() -> None:
    made, data = system(), batch(2, 2)
    weights = MasterWeights(made, 0.02, 0.9)
    losses = []
    for step in range(40):
        loss = sum(flow_matching(made, data, draws(step % 2, 2), coupled=True, **FLOW))
        loss.backward()
        weights.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_recomputed_layers_have_the_same_gradients() -> None:
    made = awake(system())
    gradients = []
    for recompute in (False, True):
        made.transformer.recompute = recompute
        made.zero_grad()
        sum(flow_matching(made, batch(), draws(), coupled=True, **FLOW)).backward()
        gradients.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalise(matrix) @ v.T
    assert torch.allclose(
        found - torch.diag(found.diag()), torch.zeros(8 if 8 in shape else 24, 1), atol=0.02
    )
    assert (found.diag()[s > 0.1 * s[0]] > 0.6).all() and (found.diag() < 1.3).all()


def test_training_attention_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    for chosen in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=chosen)
        assert torch.allclose(math_attention(q, k, v, chosen), expected, atol=1e-6)


def test_muon_steps_as_torchs_own_does() -> None:
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone(), start.clone().requires_grad_()
    mine = Muon([ours], [12], 0.02)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(1 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=2e-3)
    assert (ours - start).abs().max() > 0.01
