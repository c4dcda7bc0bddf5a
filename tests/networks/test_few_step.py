"""Few-step mode's adapters: multi-step mode never feels them, and guidance is a knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutual_forcing.lab.training.history import HistoryMix
from mutual_forcing.lab.training.mutual_forcing import MutualRecipe
from mutual_forcing.lab.training.parallel import ALONE
from mutual_forcing.lab.training.stages import Trained, build_stage
from mutual_forcing.lab.training.system import System
from mutual_forcing.lab.training.train import load_starting
from mutual_forcing.networks import few_step
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.few_step import folded
from mutual_forcing.networks.full_sequence import Told, history_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import (
    Prompt,
    SamplerSettings,
    SigmaConstants,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import StreamSettings
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


@torch.no_grad()
def test_passes_of_few_step_mode_alone_have_the_adapters_in_their_weights() -> None:
    model, _ = pair()
    video, _, context = inputs(model.config, BLOCKS)
    text = text_keys(model, context, context)
    opened = OpenBlock(model, RollingCache(window=1), 2, 3, video)
    noisy = torch.randn(1, *opened.video_shape), torch.randn(1, *opened.audio_shape)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for guidance in (1.0, 2.0, 3.5):
        twin = folded(model, guidance, video)
        assert not any(".few_step." in name for name in twin.state_dict())
        assert twin.transformer_blocks[0].attn2.to_k is not model.transformer_blocks[0].attn2.to_k
        assert twin.patchify_proj.weight is model.patchify_proj.weight
        apart, within = (
            SigmaConstants(model, video, guidance, network).at(SIGMA, STEP)
            for network in (None, twin)
        )
        assert within.network is twin and within.layers[0].video.factors is None
        pairs = zip(
            opened.velocity(*noisy, text, within),
            opened.velocity(*noisy, text, apart),
            strict=True,
        )
        assert all(close(found, expected) < 1e-5 for found, expected in pairs)
        # Multi-step mode and the refresh go over the network itself.
        assert SigmaConstants(model, video, guidance, twin).at(SIGMA).network is None
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    # As each dtype's products read them faster.
    for dtype, rows in ((torch.float32, False), (torch.bfloat16, True)):
        twin = folded(model.to(dtype), 2.0, video.to(dtype))
        assert twin.transformer_blocks[0].ff.net[2].weight.is_contiguous() is rows


@torch.no_grad()
def test_adapters_stay_beside_weights_that_are_not_there_as_they_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = pair()
    like = torch.empty(0)
    assert folded(plain, 3.0, like) is None and folded(model, 3.0, like.bfloat16()) is None
    linear = model.transformer_blocks[0].attn1.to_q
    linear.weight_function = [lambda weight: 2 * weight]  # as ComfyUI applies a LoRA on the way
    assert folded(model, 3.0, like) is None
    linear.weight_function = []
    assert folded(model, 3.0, like) is not None
    monkeypatch.setattr(few_step, "FOLDED_BYTES", 1000)
    assert folded(model, 3.0, like) is None


def adapter_system() -> System:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return awake(System(replace(CONFIG, few_step_rank=2)))


def level_velocities(made: System) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-step mode's."""
    data = batch()
    given = (data.video, data.audio), (data.video[:, None], data.audio[:, None])
    levels = torch.full((3, 1, 3), SIGMA)
    return history_forward(made.transformer, *given, levels, made.told(data.asked))


@torch.no_grad()
def test_weights_become_those_of_the_other_form_and_multi_step_mode_stays() -> None:
    shared, again = awake(System(CONFIG)), System(CONFIG)
    made, same = (System(replace(CONFIG, few_step_rank=2)) for _ in range(2))
    load_starting(made, shared.state_dict())
    load_starting(again, made.state_dict())
    load_starting(same, made.state_dict())
    assert all(
        torch.equal(*pair) for pair in zip(same.parameters(), made.parameters(), strict=True)
    )
    expected = level_velocities(shared)
    for found in (made, again):
        for pair in zip(level_velocities(found), expected, strict=True):
            assert close(*pair) < 1e-5


def multi_step_rollout(made: System) -> list[torch.Tensor]:
    """Latents of a stream in multi-step mode, guided."""
    data = batch(2)
    with torch.no_grad():
        model = BareModel(made.transformer, "x")
        told, empty = made.told(data.asked), made.told_nothing(data.asked)
        state = new_stream(model, StreamSettings(1, 2, 2, (0, 1)))
        prompt = Prompt(told.text, empty.text)
        sampler = sampler_settings("multi", 3, 3.0)
        return [t for latents, _ in rollout(model, prompt, state, 3, sampler) for t in latents]


@pytest.mark.parametrize("matching", [0.0, 0.5])
def test_training_moves_few_step_mode_and_multi_step_mode_stays_bit_for_bit(
    matching: float,
) -> None:
    made = adapter_system()
    history = {"real": (0.0, 0.0), "rollout": (0.5, 0.5), "highest": 0.9}
    mutual = {"history": history, "steps": [4], "matching": matching, "fake_warmup": 1}
    settings = {"mutual": SETTINGS["mutual"] | mutual}
    stage = build_stage("mutual", made, settings, Trained(0.01, 0.9, torch.float32, ALONE))
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    stream = multi_step_rollout(made)
    logged = [stage.step(batch(4), draws(number, 4), number, 0.5, 1.0) for number in range(3)]
    assert all(torch.isfinite(value) for one in logged for value in one.values())
    # The fake score is warm before the first comparison with it.
    assert ["matching" in one for one in logged] == [False, False, bool(matching)]
    assert ["fake" in one for one in logged] == [bool(matching), False, bool(matching)]
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert any(".few_step.up" in name for name in moved)
    assert any(".step_size_embedder." in name for name in moved)
    assert all(".few_step." in name or ".step_size_embedder." in name for name in moved)
    assert all(map(torch.equal, multi_step_rollout(made), stream))


def test_grids_join_one_after_another_and_weights_follow_their_lengths() -> None:
    recipe = MutualRecipe(steps=(8, 4, 2), curriculum=0.6, history=HistoryMix(highest=0.9))
    found = [recipe.grids(progress) for progress in (0.0, 0.19, 0.21, 0.45, 1.0)]
    assert found == [(8,), (8,), (8, 4), (8, 4, 2), (8, 4, 2)]


def test_levels_that_a_grid_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"below every level of the grid of 4 steps"):
        MutualRecipe(history=HistoryMix(highest=0.3))
    MutualRecipe(history=HistoryMix(real=(0.5, 0.5), rollout=(0.5, 0.5), highest=0.3))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="step_size_embedding is false"):
        TransformerConfig(few_step_rank=4).validate()
    with pytest.raises(ValueError, match=r"few-step mode is 5\.0, expected 1 to 4"):
        SamplerSettings("few", (1.0, 0.0), few_step_guidance=5.0)
