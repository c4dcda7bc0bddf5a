"""A stream's memory in training: a whole sequence is told what a stream is, block by block."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.lab.training import memory, train
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.draws import Draws
from mutual_forcing.lab.training.history import few_step_history, real_memory
from mutual_forcing.lab.training.pair import Pair, by_block, velocity
from mutual_forcing.lab.training.parallel import ALONE
from mutual_forcing.lab.training.stages import Trained, build_stage
from mutual_forcing.lab.training.system import System, initialise
from mutual_forcing.model_loaders.bundle import load_bundle
from mutual_forcing.networks.full_sequence import causal_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.memory_branch import is_memory
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import (
    Prompt,
    SigmaConstants,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import StreamSettings
from mutual_forcing.tests.tiny import CHANNELS, TRANSFORMER, VIDEO_CHANNELS, save_tiny
from mutual_forcing.tests.tiny_training import SETTINGS, awake, write_latents

REMEMBERS = {
    "memory_interval": 2, "memory_video_dim": 8, "memory_audio_dim": 8, "memory_heads": 2,
    "memory_film_hidden": 4, "anchored_colours": True, "few_step_rank": 2,
}  # fmt: skip
CONFIG = replace(TRANSFORMER, **REMEMBERS)
LAYOUT, BLOCKS, CLIPS = CONFIG.layout, 4, 2


@pytest.fixture(scope="module")
def system() -> System:
    with torch.random.fork_rng(devices=[]):
        made = System(CONFIG)
        initialise(made, 0)
    return awake(made)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(CLIPS, VIDEO_CHANNELS, LAYOUT.video_latents(BLOCKS), 2, 2, generator=generator),
        torch.randn(CLIPS, LAYOUT.audio_latents(BLOCKS), CHANNELS, generator=generator),
        torch.randint(1, 9, (CLIPS, 32), generator=generator),
    )


@torch.no_grad()
def test_a_whole_sequence_is_told_what_blocks_are_told_one_by_one(
    system: System, batch: Batch
) -> None:
    model, clip = system.transformer, Pair(batch.video, batch.audio)
    told = system.told(batch.asked)
    memories = real_memory(clip, CONFIG)
    assert len(memories) == BLOCKS - 1
    constants, cache, found = SigmaConstants(model, clip.video), RollingCache(9), []
    noisy = clip.map(lambda x: x.flip(0) + 1)
    for block, after, past in zip(
        by_block(noisy, LAYOUT), by_block(clip, LAYOUT), (None, *memories), strict=True
    ):
        opened = OpenBlock(model, cache, 2, 2, clip.video)
        found.append(opened.velocity(*block, told.text, constants.at(0.6), None, past))
        cache = opened.commit(*after, told.text, constants.at(0.0), None, past)
    told = told._replace(memory=memories)
    level = torch.full((CLIPS, BLOCKS), 0.6)
    whole = velocity(model, clip, noisy, level, told)
    for one, other in zip(by_block(whole, LAYOUT), found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    # What all blocks see clean, under masks, is the same network told the same.
    zero = torch.zeros(CLIPS, 1)
    clean = Pair(*causal_forward(model, *clip, zero, zero, told))
    first = velocity(model, clip, clip, torch.zeros(CLIPS, BLOCKS), told)
    assert torch.allclose(clean.video, first.video, atol=1e-4)
    untold = velocity(model, clip, noisy, level, told._replace(memory=None))
    blocks = zip(by_block(untold, LAYOUT), by_block(whole, LAYOUT), strict=True)
    apart = [float((a.video - b.video).abs().max()) for a, b in blocks]
    assert apart[0] == 0 and min(apart[1:]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("further", [0, 3])
def test_a_history_is_made_under_the_memory_that_the_sampler_has(
    system: System, batch: Batch, further: int
) -> None:
    told, clip = system.told(batch.asked), Pair(batch.video, batch.audio)

    def draws() -> Draws:
        return Draws(0, 0, range(CLIPS))

    made, memories = few_step_history(
        system.transformer, told, clip, steps=4, start_step=0, window=2, draws=draws(),
        further=further,
    )  # fmt: skip
    again = draws()
    prefix, *following = by_block(clip, LAYOUT)
    noise = [block.noise(again) for block in (prefix, *following[:1] * further, *following)]
    model = BareModel(system.transformer, "x")
    states = list(
        rollout(
            model,
            Prompt(told.text),
            new_stream(model, StreamSettings(2, 2, 2, (0,) * CLIPS)),
            BLOCKS + further,
            sampler_settings("few", 4),
            noise=lambda block, step, stream, shape: getattr(noise[block], stream),
        )
    )
    last = slice(1 + further, None)
    for (latents, _), block in zip(states[last], by_block(made, LAYOUT)[1:], strict=True):
        assert torch.allclose(block.video, latents.video, atol=1e-4)
    for (_, state), one in zip(states[last], memories, strict=True):
        for a, b in zip(state.past.was_told(), one, strict=True):
            assert torch.allclose(a, b, atol=1e-3)


def test_a_branch_begins_as_if_it_were_not_there_and_learns(batch: Batch) -> None:
    with torch.random.fork_rng(devices=[]):
        made = System(CONFIG)
        initialise(made, 0)
    awake(made)
    clip = Pair(batch.video, batch.audio)
    fresh = System(CONFIG)
    initialise(fresh, 0)
    state = {k: v for k, v in made.state_dict().items() if not is_memory(k)}
    train.load_starting(fresh, state)
    level = torch.full((CLIPS, BLOCKS), 0.5)
    told = fresh.told(batch.asked)
    with torch.no_grad():
        told = told._replace(memory=real_memory(clip, CONFIG))
        with_branch = velocity(fresh.transformer, clip, clip, level, told)
        without = velocity(fresh.transformer, clip, clip, level, told._replace(memory=None))
    assert all(torch.equal(a, b) for a, b in zip(with_branch, without, strict=True))
    trained = Trained(0.01, 0.9, torch.float32, ALONE)
    values = {k: v for k, v in SETTINGS["mutual"].items() if k != "matching_every"}
    settings = {"mutual": values | {"matching": 0.0}, "recipe": SETTINGS["recipe"]}
    stage = build_stage("mutual", fresh, settings, trained)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    logged = stage.step(batch, Draws(0, 0, range(CLIPS)), 0, 0.0, 1.0)
    assert {"flow", "shortcut", "gradient"} == set(logged)
    moved = {n for n, p in fresh.named_parameters() if not torch.equal(p, before[n])}
    assert any(is_memory(name) for name in moved) and any(".few_step." in name for name in moved)
    assert all(is_memory(n) or ".few_step." in n or "step_size" in n for n in moved)
    with pytest.raises(ValueError, match="nothing else trains a memory"):
        build_stage("joint", System(CONFIG), settings, trained)


def test_the_table_has_a_row_for_every_variant(
    tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, codecs = tmp_path / "latents", tmp_path / "tiny.safetensors"
    write_latents(latents, batch)
    config, plain = tmp_path / "config.json", replace(TRANSFORMER, few_step_rank=2)
    recipe = SETTINGS["recipe"] | {"lengths": [{"blocks": 3, "batch": 2, "share": 1.0}]}
    mutual = {k: v for k, v in SETTINGS["mutual"].items() if k != "matching_every"}
    mutual |= {"matching": 0.0, "history": {"rollout": [0.5, 0.5], "highest": 0.9}}
    config.write_text(
        json.dumps(SETTINGS | {"transformer": plain.to_dict(), "recipe": recipe, "mutual": mutual})
    )
    save_tiny(codecs, transformer=plain)
    run = tmp_path / "run"
    run.mkdir()
    with torch.random.fork_rng(devices=[]):
        system = System(plain)
        initialise(system, 0)
    train.save_file(awake(system).state_dict(), run / "weights.safetensors")
    words = ["--config", config, "--init", run, "--latents", latents, "--codecs", codecs]
    words += ["--steps", 2, "--seconds", 10, "--prompts", 2, "--out", tmp_path / "out"]
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(memory, "launched", lambda *options: asked.append(options))
    args = memory.parser().parse_args([str(word) for word in words])
    memory.work(args)
    (options,) = asked
    assert options[0] == "lab.metrics.horizon" and "memory+colours:few:4" in options
    models = {path.stem: load_bundle(path) for path in (tmp_path / "out" / "models").iterdir()}
    assert len(models) == 5
    branch = {name: bool(one.transformer.config.memory_interval) for name, one in models.items()}
    assert branch == {
        "shipped_0": False, "colours_0": False, "steps_0": False, "memory_0": True,
        "memory+colours_0": True,
    }  # fmt: skip
    same = [models[name].transformer for name in ("memory_0", "memory+colours_0")]
    for a, b in zip(*(one.parameters() for one in same), strict=True):
        assert torch.equal(a, b)
    assert [one.config.anchored_colours for one in same] == [False, True]
    monkeypatch.setattr(train.Run, "train", lambda _: pytest.fail("it is there"))
    memory.work(args)
