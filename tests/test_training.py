"""Identities of the training recipes: weights that count as stated, streams that stay apart, runs that go on."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.networks.layout import BlockLayout
from mutual_forcing.tests.tiny import save_tiny, tiny_parts
from mutual_forcing.training import train
from mutual_forcing.training.flow_matching import Batch, block_weights, flow_matching
from mutual_forcing.training.latents import encode_set, load_codec
from mutual_forcing.training.optimiser import MasterWeights
from mutual_forcing.training.sources import clips_from
from mutual_forcing.training.system import System, initialise, math_attention
from mutual_forcing.training.world.scene import VOCABULARY
from safetensors.torch import load_file

SETTINGS = {
    "transformer": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "in_channels": 6, "out_channels": 6, "audio_in_channels": 5,
        "audio_out_channels": 5, "cross_attention_dim": 24, "audio_cross_attention_dim": 16,
        "caption_channels": 16, "rope_type": "split", "num_audio_sink_tokens": 2, "step_size_embedding": True,
    },
    "recipe": {
        "lengths": [{"blocks": 1, "batch": 4, "share": 0.5}, {"blocks": 3, "batch": 2, "share": 0.5}],
        "learning_rate": 0.01, "warmup_steps": 2, "caption_dropout": 0.1, "history_noise": 0.1,
        "sigma_mean": 0.3, "sigma_spread": 1.2, "ema": 0.9,
    },
    "mutual": {"matching_every": 2, "fake_updates": 1, "fake_learning_rate": 0.01, "window": 2},
}  # fmt: skip
LAYOUT = BlockLayout()
FLOW = {"sigma_mean": 0.3, "sigma_spread": 1.2, "caption_dropout": 0.1, "history_noise": 0.1}


def system() -> System:
    with torch.random.fork_rng(devices=[]):
        made = System(train.TransformerConfig.from_dict(SETTINGS["transformer"]))
        initialise(made, 0)
    return made


def batch(clips: int = 3, blocks: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(clips, 6, LAYOUT.video_latents(blocks), 1, 2, generator=generator),
        torch.randn(clips, LAYOUT.audio_latents(blocks), 5, generator=generator),
        torch.randint(1, 9, (clips, 32), generator=generator),
    )


@pytest.mark.parametrize("layout", [LAYOUT, BlockLayout(4, 26)])
def test_every_block_has_the_same_weight(layout: BlockLayout) -> None:
    for weights, span in zip(
        block_weights(4, layout), (layout.video_span, layout.audio_span), strict=True
    ):
        for block in range(4):
            assert float(weights[slice(*span(block))].sum()) == pytest.approx(0.25)


def test_fresh_weights_predict_nothing_and_closed_gates_keep_the_streams_apart() -> None:
    made = system()
    losses = flow_matching(made, batch(), torch.Generator().manual_seed(1), coupled=True, **FLOW)
    assert 1.5 < losses.video < 2.5 and 1.5 < losses.audio < 2.5
    losses.video.backward()
    assert made.transformer.audio_patchify_proj.weight.grad.abs().sum() == 0


def test_uncoupled_streams_never_reach_each_other() -> None:
    made = system()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    losses = flow_matching(made, batch(), torch.Generator().manual_seed(1), coupled=False, **FLOW)
    losses.video.backward()
    assert made.transformer.patchify_proj.weight.grad.abs().sum() > 0
    assert made.transformer.audio_patchify_proj.weight.grad is None
    assert made.transformer.transformer_blocks[0].audio_to_video_attn.to_q.weight.grad is None


def test_a_network_overfits_one_batch() -> None:
    made, data = system(), batch(2, 2)
    weights = MasterWeights(made, 0.02, 0.9)
    losses = []
    for step in range(60):
        generator = torch.Generator().manual_seed(step % 2)
        loss = sum(flow_matching(made, data, generator, coupled=True, **FLOW))
        loss.backward()
        weights.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_training_attention_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    for chosen in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=chosen)
        assert torch.allclose(math_attention(q, k, v, chosen), expected, atol=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "latents"
    made.mkdir()
    data = batch(8)
    for name, values in (("video", data.video), ("audio", data.audio)):
        np.save(made / f"{name}.npy", values.half().numpy())
    np.save(made / "captions.npy", data.ids[:, None].numpy().astype(np.int16))
    (made / "about.json").write_text(json.dumps({"clips": 8, "done": 8}))
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return made


def run(folder: Path, out: str, **changes: object) -> train.Run:
    values = {
        "stage": "joint", "config": folder.parent / "config.json", "latents": [folder], "init": None,
        "out": folder.parent / out, "minutes": 1e9, "learning_rate": None, "seed": 0,
    } | changes  # fmt: skip
    return train.Run(argparse.Namespace(**values))


def steps(made: train.Run, count: int) -> list[dict[str, float]]:
    return [made.advance(0.5) for _ in range(count)]


@pytest.mark.parametrize("stage", ["joint", "mutual"])
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(folder: Path, stage: str) -> None:
    expected = steps(run(folder, "whole", stage=stage), 4)
    first = run(folder, "parts", stage=stage)
    begun = steps(first, 2)
    first.save()
    again = run(folder, "parts", stage=stage)
    assert again.step == 2
    assert begun + steps(again, 2) == expected


def test_a_stage_starts_from_the_averaged_weights_of_the_one_before(folder: Path) -> None:
    first = run(folder, "first", stage="unimodal")
    steps(first, 2)
    first.save()
    second = run(folder, "second", init=folder.parent / "first")
    saved = load_file(folder.parent / "first" / "weights.safetensors")
    for name, parameter in second.system.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16())


def test_weights_come_back_from_a_model_file(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny.safetensors")
    transformer, text_encoder, *_ = tiny_parts()
    found = train.starting_weights(path)
    expected = {f"transformer.{k}": v for k, v in transformer.state_dict().items()}
    expected |= {f"text_encoder.{k}": v for k, v in text_encoder.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("kind", "index"), [("video_codec", 2), ("audio_codec", 3)])
def test_codecs_come_back_from_a_model_file(tmp_path: Path, kind: str, index: int) -> None:
    found = load_codec(save_tiny(tmp_path / "tiny.safetensors"), kind).state_dict()
    expected = tiny_parts()[index].state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[key], expected[key].half().float())
        for key in expected
        if found[key].ndim > 1
    )


def test_words_that_are_hard_are_drawn_more_often(folder: Path) -> None:
    rows = np.load(folder / "captions.npy")
    ball = 1 + VOCABULARY.index("ball")
    rows[:] = 1
    rows[0, 0, 3] = ball
    np.save(folder / "captions.npy", rows)
    data = train.LatentSet([folder], LAYOUT, {"ball": 7.0})
    assert data.weights[0].tolist() == [7.0] + [1.0] * 7
    drawn = data.batch(2000, 1, torch.Generator().manual_seed(0)).ids
    assert 0.4 < (drawn == ball).any(dim=1).float().mean() < 0.6


def test_clips_of_different_lengths_serve_what_they_are_long_enough_for(
    folder: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    for name, latents, axis in (
        ("video", LAYOUT.video_latents(1), 2),
        ("audio", LAYOUT.audio_latents(1), 1),
    ):
        rows = np.load(folder / f"{name}.npy").take(range(latents), axis=axis)
        np.save(short / f"{name}.npy", rows)
    np.save(short / "captions.npy", 0 * np.load(short / "captions.npy") + 3)
    data = train.LatentSet([folder, short], LAYOUT, {})
    generator = torch.Generator().manual_seed(0)
    from_short = (data.batch(400, 1, generator).ids == 3).all(dim=1).float().mean()
    assert 0.4 < from_short < 0.6
    long = data.batch(400, data.blocks[0], generator)
    assert not (long.ids == 3).all(dim=1).any()
    assert long.video.shape[2] == LAYOUT.video_latents(data.blocks[0])
    assert torch.equal(
        long.audio.half().unique(), torch.from_numpy(np.load(folder / "audio.npy")).unique()
    )
    with pytest.raises(ValueError, match="encode longer ones"):
        data.batch(1, data.blocks[0] + 1, generator)


def test_an_unfinished_set_is_refused(folder: Path) -> None:
    (folder / "about.json").write_text(json.dumps({"clips": 8, "done": 5}))
    with pytest.raises(ValueError, match="5 of 8 clips; finish it first"):
        run(folder, "any")


def test_latents_are_made_once_and_continued_after_a_kill(tmp_path: Path, bundle) -> None:
    parts = bundle.video_codec, bundle.audio_codec, bundle.text_encoder

    def encode(count: int, out: str, about: dict) -> None:
        encode_set(clips_from("world", 1, 7, 2), count, *parts, tmp_path / out, about)

    encode(3, "whole", {"clips": 3})
    # As a killed run leaves it: arrays for three clips, of which one is there.
    encode(3, "parts", {"clips": 3})
    for name in ("video", "audio"):
        rows = np.load(tmp_path / "parts" / f"{name}.npy", mmap_mode="r+")
        rows[1:] = 0
        rows.flush()
    (tmp_path / "parts" / "about.json").write_text(json.dumps({"clips": 3, "done": 1}))
    encode(3, "parts", {"clips": 3})
    for name in ("video", "audio", "captions"):
        whole, parts_ = (np.load(tmp_path / out / f"{name}.npy") for out in ("whole", "parts"))
        assert len(whole) == 3 and np.array_equal(whole, parts_)
    with pytest.raises(ValueError, match="made with"):
        encode(3, "parts", {"clips": 4})
