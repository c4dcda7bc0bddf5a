"""Identities of the Mutual Forcing recipe, on a network that is built in a moment."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from mutual_forcing.lab.training import distillation, train
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.distillation import (
    Guided,
    few_step_sample,
    matching_loss,
    shortcut_target,
)
from mutual_forcing.lab.training.draws import Draws
from mutual_forcing.lab.training.history import HistoryMix, few_step_history
from mutual_forcing.lab.training.mutual_forcing import (
    MutualRecipe,
    distribution_loss,
    draw_level,
    fake_loss,
    flow_loss,
    prepare,
    shortcut_loss,
)
from mutual_forcing.lab.training.pair import Pair, by_block, joined, velocity
from mutual_forcing.lab.training.parallel import ALONE
from mutual_forcing.lab.training.self_forcing import exit_rollout, rollout_matching
from mutual_forcing.lab.training.stages import MutualStage, Trained
from mutual_forcing.lab.training.system import System, initialise, of_few_step, twin
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import Prompt, new_stream, rollout, sampler_settings
from mutual_forcing.samplers.sigmas import few_step_sigmas
from mutual_forcing.samplers.state import StreamSettings
from mutual_forcing.tests.tiny_training import awake

CONFIG = TransformerConfig(
    num_layers=1, num_attention_heads=2, attention_head_dim=12, audio_num_attention_heads=2,
    audio_attention_head_dim=8, in_channels=6, out_channels=6, audio_in_channels=5,
    audio_out_channels=5, cross_attention_dim=24, audio_cross_attention_dim=16,
    caption_channels=16, rope_type="split", num_audio_sink_tokens=2, step_size_embedding=True,
)  # fmt: skip
BLOCKS, CLIPS = 3, 2


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def draws(step: int = 0) -> Draws:
    return Draws(0, step, range(CLIPS))


@pytest.fixture
def system() -> System:
    with torch.random.fork_rng(devices=[]):
        made = System(CONFIG)
        initialise(made, 0)
        with torch.no_grad():
            # Fresh weights give zero velocity; wake everything up, the mode embedding included.
            for parameter in made.transformer.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return made


@pytest.fixture
def batch() -> Batch:
    layout = CONFIG.layout
    return Batch(
        torch.randn(CLIPS, 6, layout.video_latents(BLOCKS), 1, 1, generator=seeded(1)),
        torch.randn(CLIPS, layout.audio_latents(BLOCKS), 5, generator=seeded(2)),
        torch.randint(1, 9, (CLIPS, 32), generator=seeded(3)),
    )


def test_a_real_history_is_the_clip_and_a_resampled_one_departs_from_it(
    system: System, batch: Batch
) -> None:
    told, clip = system.told(batch.asked), Pair(batch.video, batch.audio)

    def history(start: int) -> Pair:
        return few_step_history(
            system.transformer, told, clip, steps=4, start_step=start, window=2, draws=draws()
        ).clip

    assert history(4) is clip
    distances = []
    for start in (3, 0):
        made = history(start)
        assert made.video.shape == clip.video.shape and made.audio.shape == clip.audio.shape
        assert not made.video.requires_grad
        distances.append(float((made.video - clip.video).square().mean()))
        # Nobody sees the last block; a full rollout is a clip of its own to its end.
        assert torch.equal(made.video[:, :, -3:], clip.video[:, :, -3:]) == (start > 0)
    assert 0 < distances[0] < distances[1]


@pytest.mark.parametrize("backbone", [False, True])
def test_the_backbone_learns_from_flow_alone_and_only_if_it_is_to(
    batch: Batch, backbone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for shortcut in (0.0, 1.0):
        with torch.random.fork_rng(devices=[]):
            made = System(replace(CONFIG, few_step_rank=2))
            initialise(made, 0)
        awake(made)
        recipe = MutualRecipe(shortcut=shortcut, matching=0.0, backbone=backbone, window=2)
        stage = MutualStage(made, Trained(0.01, 0.9, torch.float32, ALONE), recipe, 0.01)
        grads = {}

        def caught(rate: float, made: System = made, grads: dict = grads) -> torch.Tensor:
            grads.update((n, p.grad) for n, p in made.named_parameters() if p.grad is not None)
            return torch.zeros(())

        monkeypatch.setattr(stage.weights, "step", caught)
        logged = stage.step(batch, draws(), 0, 0.0, 1.0)
        assert ("flow" in logged) == backbone
        found[shortcut] = grads
    without, with_shortcut = found[0.0], found[1.0]
    assert any(of_few_step(name) for name in with_shortcut)
    learned = {name for name in with_shortcut if not of_few_step(name)}
    assert bool(learned) == backbone
    assert learned == {name for name in without if not of_few_step(name)}
    assert all(torch.equal(without[name], with_shortcut[name]) for name in learned)


@pytest.mark.parametrize("further", [0, 2])
def test_a_history_rolled_out_is_what_the_sampler_generates(
    system: System, batch: Batch, further: int
) -> None:
    told, clip = system.told(batch.asked), Pair(batch.video, batch.audio)
    with torch.no_grad():
        made = few_step_history(
            system.transformer,
            told,
            clip,
            steps=4,
            start_step=0,
            window=2,
            draws=draws(),
            further=further,
        ).clip
        again = draws()
        prefix, *following = by_block(clip, CONFIG.layout)
        noise = [block.noise(again) for block in (prefix, *following[:1] * further, *following)]
        model = BareModel(system.transformer, "x")
        state = new_stream(model, StreamSettings(1, 1, 2, (0,) * CLIPS))
        blocks = rollout(
            model,
            Prompt(told.text),
            state,
            BLOCKS + further,
            sampler_settings("few", 4),
            noise=lambda block, step, stream, shape: getattr(noise[block], stream),
        )
        first, *others = [latents for latents, _ in blocks]
        kept = (first, *others[further:])
        for latents, found in zip(kept, by_block(made, CONFIG.layout), strict=True):
            assert torch.allclose(found.video, latents.video, atol=1e-5)
            assert torch.allclose(found.audio, latents.audio, atol=1e-5)


def test_the_target_of_a_straight_teacher_is_its_velocity(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    slope = Pair(batch.video * 0.3, batch.audio * -0.2)
    monkeypatch.setattr(distillation, "velocity", lambda *a, **k: slope)
    teacher = Guided(None, None, None, 3.0, 2.0)
    start, end = torch.full((CLIPS, BLOCKS), 0.9), torch.full((CLIPS, BLOCKS), 0.4)
    target = shortcut_target(teacher, None, Pair(*batch[:2]), start, end, 3, CONFIG.layout)
    for found, expected in zip(target, slope, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("gradient_step", [0, 3])
def test_a_sample_has_the_value_of_the_whole_path(
    system: System, batch: Batch, gradient_step: int
) -> None:
    told, history, noise = (
        system.told(batch.asked),
        Pair(*batch[:2]),
        Pair(*(t + 1 for t in batch[:2])),
    )
    sample = few_step_sample(system.transformer, history, noise, told, 4, gradient_step)
    x, grid = noise, few_step_sigmas(4)
    with torch.no_grad():
        for sigma, following in itertools.pairwise(grid):
            level = torch.full((CLIPS, BLOCKS), sigma)
            d = torch.full_like(level, sigma - following)
            u = velocity(system.transformer, history, x, level, told, d)
            x = Pair(*(a - (sigma - following) * b for a, b in zip(x, u, strict=True)))
    assert torch.allclose(sample.video, x.video, atol=1e-6) and torch.allclose(
        sample.audio, x.audio, atol=1e-6
    )
    sample.video.sum().backward()
    # A step's velocity gets the sample's gradient as it is, however short the step.
    ones = torch.tensor(float(sample.video[0, 0].numel() * CLIPS))
    assert torch.allclose(system.transformer.proj_out.bias.grad, -ones)


def test_matching_pulls_a_sample_from_the_fake_score_to_the_real_one() -> None:
    sample = Pair(torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 2, requires_grad=True))
    real, fake = Pair(torch.ones(1, 4), torch.ones(1, 2)), Pair(-torch.ones(1, 4), torch.ones(1, 2))
    sum(matching_loss(sample, real, fake, None)).backward()
    assert torch.allclose(sample.video.grad, torch.full((1, 4), -2.0 / 4))
    assert torch.equal(sample.audio.grad, torch.zeros(1, 2))


def test_matching_by_block_is_matching_of_each_block(batch: Batch) -> None:
    clip = Pair(batch.video, batch.audio)
    real, fake = clip.map(lambda t: 0.5 * t), clip.map(lambda t: 2 * t + 1)
    found = matching_loss(clip, real, fake, CONFIG.layout)
    each = [
        matching_loss(*blocks, None)
        for blocks in zip(*(by_block(c, CONFIG.layout) for c in (clip, real, fake)), strict=True)
    ]
    for stream in ("video", "audio"):
        expected = sum(getattr(loss, stream) for loss in each) / BLOCKS
        assert torch.allclose(getattr(found, stream), expected)
    assert all(
        torch.equal(*p) for p in zip(joined(by_block(clip, CONFIG.layout)), clip, strict=True)
    )


def test_every_loss_reaches_the_network_and_none_the_teacher(system: System, batch: Batch) -> None:
    teacher, fake = twin(system), twin(system)
    recipe = MutualRecipe(history=HistoryMix((0.0, 0.0), (1.0, 1.0)), window=2)
    shown, taught = prepare(system, batch, recipe, 0.5, draws())
    matched = distribution_loss(system, teacher, fake, taught, recipe)
    for loss in (
        flow_loss(system, shown, recipe, draws()),
        shortcut_loss(system, teacher, taught, recipe),
        matched.loss,
    ):
        system.zero_grad()
        loss.backward()
        assert torch.isfinite(loss) and loss > 0
        assert system.transformer.proj_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for model in (teacher, fake) for p in model.parameters())
    system.zero_grad()
    level = draw_level(BLOCKS, recipe, draws())
    fake_loss(fake, taught.history, matched.sample, taught.asked, level, draws()).backward()
    assert fake.transformer.proj_out.weight.grad.abs().sum() > 0
    assert system.transformer.proj_out.weight.grad is None


def test_a_step_learns_from_every_term_that_is_switched_on_and_from_no_other(
    system: System, batch: Batch
) -> None:
    terms = {
        (): (0.0, 0.0),
        ("shortcut",): (1.0, 0.0),
        ("matching",): (0.0, 1.0),
        ("shortcut", "matching"): (1.0, 0.5),
    }
    trained = Trained(0.01, 0.9, torch.float32, ALONE)
    for names, (shortcut, matching) in terms.items():
        recipe = MutualRecipe(
            shortcut=shortcut,
            matching=matching,
            matching_every=2,
            fake_updates=1,
            fake_warmup=0,
            window=2,
        )
        stage = MutualStage(twin(system), trained, recipe, 0.01)
        assert (stage.teacher is None) == (not names)
        for number in (0, 1):
            logged = stage.step(batch, draws(), number, 0.0, 1.0)
            due = [name for name in names if name == "shortcut" or number == 0]
            assert [name for name in logged if name in ("shortcut", "matching")] == due
            assert all(value > 0 for value in logged.values())


@pytest.mark.parametrize("further", [0, 2])
def test_a_rollout_that_leaves_at_the_last_step_is_what_the_renoise_sampler_generates(
    system: System, batch: Batch, further: int
) -> None:
    mix = HistoryMix(further=further)
    recipe = MutualRecipe(teacher="bidirectional", steps=(2,), window=1, history=mix)
    clip, told = Pair(batch.video, batch.audio), system.told(batch.asked)

    # The first number decides the grid, the second the exit step, the third by how many blocks.
    def numbers(step: int) -> tuple[int, ...]:
        drawn = draws(step)
        return drawn.choice(1), drawn.choice(2), drawn.choice(further + 1)

    step = next(i for i in range(99) if numbers(i) == (0, 1, further))
    asked = draws(step)
    prefix, *following = by_block(clip, CONFIG.layout)
    places = prefix, *following[:1] * further, *following
    order = [[block.noise(asked) for _ in range(2)] for block in places]
    with torch.no_grad():
        made = exit_rollout(system, clip, batch.asked, recipe, draws(step))
        model = BareModel(system.transformer, "x")
        state = new_stream(model, StreamSettings(1, 1, 1, (0,) * CLIPS))
        expected = rollout(
            model,
            Prompt(told.text),
            state,
            len(places),
            sampler_settings("few", 2, None, "renoise"),
            noise=lambda block, step, stream, shape: getattr(order[block][step], stream),
        )
        first, *others = [latents for latents, _ in expected]
        kept = (first, *others[further:])
        for latents, found in zip(kept, by_block(made, CONFIG.layout), strict=True):
            assert torch.allclose(found.video, latents.video, atol=1e-5)
            assert torch.allclose(found.audio, latents.audio, atol=1e-5)


def test_every_block_of_a_rollout_carries_a_gradient_and_none_its_history(
    system: System, batch: Batch
) -> None:
    recipe = MutualRecipe(teacher="bidirectional", steps=(2,), window=1)
    clip = Pair(batch.video, batch.audio)
    embedder = system.transformer.adaln_single.linear.weight
    for index in range(BLOCKS):
        system.zero_grad()
        made = exit_rollout(system, clip, batch.asked, recipe, draws())
        by_block(made, CONFIG.layout)[index].video.sum().backward()
        assert system.transformer.proj_out.weight.grad.abs().sum() > 0
        # The modulation is part of the graph, not a constant.
        assert embedder.grad.abs().sum() > 0
        # The sinks are in the first block only, which the others see as a constant.
        sinks = system.transformer.audio_sink_tokens.grad
        assert (sinks is not None and sinks.abs().sum() > 0) == (index == 0)


def test_the_rivals_loss_reaches_the_network_alone(system: System, batch: Batch) -> None:
    recipe = MutualRecipe(teacher="bidirectional", steps=(2,), window=1)
    teacher, fake = twin(system), twin(system)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded()) * 0.02)
    clip = Pair(batch.video, batch.audio)
    gradients = []
    for recompute in (False, True):
        system.transformer.recompute = recompute
        system.zero_grad()
        loss, _ = rollout_matching(system, teacher, fake, clip, batch.asked, recipe, draws())
        loss.backward()
        gradients.append([p.grad.clone() for p in system.parameters() if p.grad is not None])
    # Also where the past rolled on before the layers of a block are computed again.
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert loss > 0 and system.transformer.proj_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for model in (teacher, fake) for p in model.parameters())
    # Two equal scores have nothing to say.
    unguided = replace(recipe, guidance=(1.0, 1.0))
    same = rollout_matching(system, teacher, twin(teacher), clip, batch.asked, unguided, draws())
    assert same.loss == 0


def test_methods_are_one_recipe_with_switches() -> None:
    recipes = {}
    for name in json.loads((train.CONFIGS / "methods.json").read_text()):
        values = dict(train.read_settings(train.CONFIGS / "small.json", "mutual", name)["mutual"])
        del values["fake_learning_rate"]
        recipes[name] = MutualRecipe.from_dict(values)
    real, resampled = ((1, 1), (0, 0)), (0, 0)
    found = {name: (r.history.real, r.history.rollout) for name, r in recipes.items()}
    for name in (
        "teacher_forcing",
        "shortcut_teacher_forcing",
        "dmd_teacher_forcing",
        "real_history",
    ):
        assert found[name] == real
    assert found["resampling_only"][1] == resampled
    assert all(a + b == 1 for a, b in zip(*found["rollouts_only"], strict=True))
    off = {name: (bool(r.shortcut), bool(r.matching)) for name, r in recipes.items()}
    assert off["teacher_forcing"] == (False, False)
    assert off["shortcut_only"] == off["shortcut_teacher_forcing"] == (True, False)
    assert off["dmd_only"] == off["dmd_teacher_forcing"] == (False, True)
    assert off["mutual"] == off["real_history"] == (True, True)
    assert [name for name, r in recipes.items() if r.teacher != "self"] == ["dmd_self_forcing"]
    # A method that says what share of histories is of which kind leaves the rest of the mix as it
    # is.
    others = {(r.history.highest, r.history.further) for r in recipes.values()}
    assert others == {(recipes["mutual"].history.highest, recipes["mutual"].history.further)}


def test_the_comparison_is_the_shipped_recipe_in_smaller_batches() -> None:
    small, compared = (
        train.read_settings(train.CONFIGS / f"{name}.json", "mutual", "mutual")
        for name in ("small", "comparison")
    )
    assert compared["transformer"] == small["transformer"]
    assert compared["mutual"] == small["mutual"]
    changed = {k for k, v in compared["recipe"].items() if small["recipe"][k] != v}
    assert changed == {"lengths", "ema"}
    lengths = [config["recipe"]["lengths"] for config in (small, compared)]
    for large, little in zip(*lengths, strict=True):
        assert little.pop("batch") < large.pop("batch")
        assert little == large


def test_histories_start_low_enough_to_stay_in_step_or_from_noise() -> None:
    mix = HistoryMix(real=(0.0, 0.0), rollout=(0.2, 0.2), highest=0.75)
    for steps in (4, 8):
        starts = {mix.start_step(steps, 0.5, Draws(0, n, ())) for n in range(200)}
        low = {s for s in range(1, steps) if few_step_sigmas(steps)[s] <= 0.75}
        assert starts == {0} | low
    mix = HistoryMix(further=2)
    assert {mix.further_blocks(0, Draws(0, n, ())) for n in range(50)} == {0, 1, 2}
    assert mix.further_blocks(1, draws()) == HistoryMix().further_blocks(0, draws()) == 0


@pytest.mark.parametrize("kind", ["resampled", "rollout"])
def test_few_step_mode_learns_on_some_clips_and_flow_on_all(
    system: System, batch: Batch, kind: str
) -> None:
    rollout_share = float(kind == "rollout")
    mix = HistoryMix((0.0, 0.0), (rollout_share,) * 2)
    recipe = MutualRecipe(steps=(4,), history=mix, taught_every=2, window=2, caption_dropout=0.0)
    shown, taught = prepare(system, batch, recipe, 0.5, draws())
    assert CLIPS == 2 and torch.equal(taught.asked.ids, batch.ids[:1])
    for stream in ("video", "audio"):
        clip = getattr(batch, stream)
        assert torch.equal(getattr(shown.clean, stream), clip)
        history, own = getattr(shown.history, stream), getattr(taught.history, stream)
        states = getattr(taught.clip, stream)
        if kind == "rollout":
            # The real block does not follow from a rollout: flow is learned on the real history,
            # and few-step mode on the rollout itself.
            assert torch.equal(history, clip)
            assert torch.equal(states, own) and not torch.equal(own, clip[:1])
        else:
            assert not torch.equal(history, clip)
            assert torch.equal(own, history[:1]) and torch.equal(states, clip[:1])


def test_draws_of_some_clips_are_those_clips_own_on_any_process() -> None:
    whole = Draws(3, 5, range(6)).normal(4)
    rows, some = Draws(3, 5, range(6)).every(3)
    assert rows == [0, 3] and torch.equal(some.normal(4), whole[rows])
    rows, some = Draws(3, 5, range(3, 6)).every(3)
    assert rows == [0] and torch.equal(some.normal(4), whole[[3]])
    assert some.choice(1000) == Draws(3, 5, ()).choice(1000)
    with pytest.raises(ValueError, match="found 4 clips"):
        Draws(3, 5, range(4)).every(3)


def test_recipes_are_read_from_json() -> None:
    recipe = MutualRecipe.from_dict({"steps": [4], "history": {"real": [1, 1], "rollout": [0, 0]}})
    assert recipe.steps == (4,) and recipe.history.real == (1, 1)
    with pytest.raises(TypeError, match="shortcat"):
        MutualRecipe.from_dict({"shortcat": 1.0})
