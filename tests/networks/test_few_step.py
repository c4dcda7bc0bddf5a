"""Few-step mode's adapters: multi-step mode never feels them, and guidance is a knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutual_forcing.lab.training.history import HistoryMix
from mutual_forcing.lab.training.mutual_forcing import MutualRecipe
from mutual_forcing.lab.training.parallel import ALONE
from mutual_forcing.lab.training.stages import Trained, build_stage
from mutual_forcing.lab.training.system import System, only_few_step
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.full_sequence import Told, history_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.rollout import SamplerSettings, SigmaConstants
from mutual_forcing.tests.networks.test_networks import close, inputs, random_model, tiny_config
from mutual_forcing.tests.tiny_training import CONFIG, SETTINGS, awake, batch, draws

BLOCKS, SIGMA, STEP = 3, 0.6, 0.25


def pair() -> tuple[CausalAVTransformer, CausalAVTransformer]:
    """A network with adapters that do something, and the same without any."""
    config = tiny_config(few_step_rank=2)
    model, plain = (
        random_model(config),
        CausalAVTransformer(replace(config, few_step_rank=0)).eval(),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".few_step." in name:
                parameter.normal_(0, 0.3)
            if ".step_size_embedder." in name:
                parameter.zero_()
    weights = {k: v for k, v in model.state_dict().items() if ".few_step." not in k}
    plain.load_state_dict(weights)
    return model, plain


def velocities(
    model: CausalAVTransformer, d: float | None, guidance: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    video, audio, context = inputs(model.config, BLOCKS)
    levels = torch.full((2, 1, BLOCKS), SIGMA)
    told = Told(text_keys(model, context, context), guidance=guidance)
    noisy = (video + 0.5)[:, None], (audio - 0.5)[:, None]
    step = None if d is None else torch.full_like(levels, d)
    return history_forward(model, (video, audio), noisy, levels, told, step_size=step)


@torch.no_grad()
def test_multi_step_mode_is_bit_for_bit_what_it_is_without_adapters() -> None:
    model, plain = pair()
    for d in (None, 0.0):
        for found, expected in zip(velocities(model, d), velocities(plain, d), strict=True):
            assert torch.equal(found, expected)


@torch.no_grad()
def test_guidance_is_a_knob_that_rests_at_one() -> None:
    model, plain = pair()
    still = velocities(plain, STEP)
    for found, expected in zip(velocities(model, STEP, 1.0), still, strict=True):
        assert torch.equal(found, expected)
    apart = [close(velocities(model, STEP, w)[0], still[0]) for w in (1.5, 2.0, 3.0)]
    assert 0 < apart[0] < apart[1] < apart[2]


@torch.no_grad()
def test_the_cached_pass_has_the_same_adapters() -> None:
    model, _ = pair()
    config = model.config
    video, audio, context = inputs(config, BLOCKS)
    text = text_keys(model, context, context)
    whole = velocities(model, STEP, 2.0)
    constants = SigmaConstants(model, video, 2.0)
    cache = RollingCache(window=BLOCKS)
    for block in range(BLOCKS):
        vs, as_ = slice(*config.layout.video_span(block)), slice(*config.layout.audio_span(block))
        opened = OpenBlock(model, cache, 2, 3, video)
        noisy = video[:, :, vs] + 0.5, audio[:, as_] - 0.5
        v, a = opened.velocity(*noisy, text, constants.at(SIGMA, STEP))
        assert close(v, whole[0][:, 0, :, vs]) < 1e-5 and close(a, whole[1][:, 0, as_]) < 1e-5
        cache = opened.commit(video[:, :, vs], audio[:, as_], text, constants.at(0.0))


def adapter_system() -> System:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return awake(System(replace(CONFIG, few_step_rank=2)))


@torch.no_grad()
def test_what_the_step_size_of_zero_added_becomes_part_of_the_noise_level() -> None:
    made = adapter_system()
    shared = System(CONFIG)
    weights = {k: v for k, v in made.state_dict().items() if ".few_step." not in k}
    shared.load_state_dict(weights)
    only_few_step(made)
    data = batch()
    given = (data.video, data.audio), (data.video[:, None], data.audio[:, None])
    levels = torch.full((3, 1, 3), SIGMA)
    both = [
        history_forward(one.transformer, *given, levels, one.told(data.asked))
        for one in (made, shared)
    ]
    for found, expected in zip(*both, strict=True):
        assert close(found, expected) < 1e-5


def test_a_step_moves_few_step_mode_and_nothing_else() -> None:
    made = adapter_system()
    history = {"real": (0.0, 0.0), "rollout": (0.0, 0.0), "highest": 0.9}
    settings = {"mutual": SETTINGS["mutual"] | {"history": history, "steps": [4], "matching": 0.0}}
    stage = build_stage("mutual", made, settings, Trained(0.01, 0.9, torch.float32, ALONE))
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    for number in range(2):
        logged = stage.step(batch(4), draws(number, 4), number, 0.5, 1.0)
        assert torch.isfinite(logged["shortcut"])
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert any(".few_step.up" in name for name in moved)
    assert any(".step_size_embedder." in name for name in moved)
    assert all(".few_step." in name or ".step_size_embedder." in name for name in moved)


def test_levels_that_a_grid_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"below every level of the grid of 4 steps"):
        MutualRecipe(history=HistoryMix(highest=0.3))
    MutualRecipe(history=HistoryMix(real=(0.5, 0.5), rollout=(0.5, 0.5), highest=0.3))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="step_size_embedding is false"):
        TransformerConfig(few_step_rank=4).validate()
    with pytest.raises(ValueError, match=r"few-step mode is 5\.0, expected 1 to 4"):
        SamplerSettings("few", (1.0, 0.0), few_step_guidance=5.0)
