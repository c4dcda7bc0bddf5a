"""The network against the papers' equations: `plain_numpy`, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.few_step import adapted
from mutual_forcing.networks.full_sequence import (
    Told,
    causal_forward,
    history_forward,
    sequence_plan,
)
from mutual_forcing.networks.rope import (
    RopeTable,
    audio_seconds,
    interleaved_to_split,
    modality_tables,
    rotate,
    video_seconds,
)
from mutual_forcing.networks.timestep import sinusoid, timestep_embedding
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.tests.plain_numpy import Geometry, NumpyModel, masked

HEIGHT, WIDTH = 2, 3


def config_of(
    first: tuple[int, int] = (1, 1), sinks: int = 3, **changes: object
) -> TransformerConfig:
    values = dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, audio_num_attention_heads=2,
        audio_attention_head_dim=8, in_channels=6, out_channels=6, audio_in_channels=5,
        audio_out_channels=5, cross_attention_dim=32, audio_cross_attention_dim=16,
        caption_channels=12, rope_type="split", video_first_block=first[0],
        audio_first_block=first[1], num_audio_sink_tokens=sinks, step_size_embedding=True,
    )  # fmt: skip
    return TransformerConfig(**(values | changes))


def model_of(config: TransformerConfig) -> CausalAVTransformer:
    """Random weights, none of them at its neutral value."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = CausalAVTransformer(config)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def witness_of(model: CausalAVTransformer) -> NumpyModel:
    config = model.config
    geometry = Geometry(
        config.num_attention_heads,
        config.audio_num_attention_heads,
        config.video_first_block,
        config.audio_first_block,
        config.num_audio_sink_tokens,
        HEIGHT,
        WIDTH,
        gate_scale=config.av_ca_timestep_scale_multiplier,
    )
    return NumpyModel({k: v.numpy() for k, v in model.state_dict().items()}, geometry)


def latents(geometry: Geometry, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, block])
    frames, sounds = len(geometry.video_latents(block)), len(geometry.audio_latents(block))
    return rng.normal(size=(6, frames, HEIGHT, WIDTH)), rng.normal(size=(sounds, 5))


def whole(blocks: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks in a row as the pack's tensors of a batch of one."""
    video = np.concatenate([video for video, _ in blocks], axis=1)
    audio = np.concatenate([audio for _, audio in blocks], axis=0)
    return torch.from_numpy(video)[None].float(), torch.from_numpy(audio)[None].float()


def as_latents(rows: np.ndarray) -> np.ndarray:
    """Video tokens (n, c) to (c, f, h, w)."""
    return rows.reshape(-1, HEIGHT, WIDTH, rows.shape[1]).transpose(3, 0, 1, 2)


def agree(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    # Found: 1.9e-4. The last frequency of the rotations multiplies a rounded position by 15,000.
    assert np.abs(found.numpy() - expected).max() < 5e-4 * np.abs(expected).max()


CONTEXT = np.random.default_rng(5).normal(size=(4, 12))
TEXT = torch.from_numpy(CONTEXT)[None].float()


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of((4, 26), sinks=0, step_size_embedding=False),
        config_of(av_ca_timestep_scale_multiplier=1000.0),
    ],
    ids=("sinks", "released", "gates of the base model"),
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_whole_sequence_is_what_the_equations_say(
    config: TransformerConfig, causal: bool
) -> None:
    """With a noise level of its own for every block and modality."""
    model = model_of(config)
    witness = witness_of(model)
    geometry = witness.geometry
    blocks = [latents(geometry, block, 0) for block in range(3)]
    levels = [(0.2, 0.9), (0.7, 0.05), (0.45, 0.6)]
    step = 0.25 if config.step_size_embedding else 0.0
    parts = [
        (
            geometry.video(block, video, sigma_v, step),
            geometry.audio(block, audio, sigma_a, step),
            block,
            "clean",
        )
        for block, ((video, audio), (sigma_v, sigma_a)) in enumerate(
            zip(blocks, levels, strict=True)
        )
    ]
    video, audio, visible = masked(geometry, parts)
    expected_v, expected_a, _ = witness.run(video, audio, CONTEXT, visible if causal else None)
    sigmas = [
        np.concatenate([np.full(len(span(b)), level[i]) for b, level in enumerate(levels)])
        for i, span in enumerate((geometry.video_latents, geometry.audio_latents))
    ]
    found_v, found_a = causal_forward(
        model,
        *whole(blocks),
        *(torch.from_numpy(s)[None].float() for s in sigmas),
        text_keys(model, TEXT, TEXT),
        step_size=torch.full((1, 1), step),
        causal=causal,
    )
    agree(found_v[0], as_latents(expected_v))
    agree(found_a[0], expected_a[~audio.sink])


def test_noisy_blocks_beside_a_clean_history_are_what_the_equations_say() -> None:
    """Two noisy copies of three blocks, each block with its own noise level and step size."""
    model = model_of(config_of())
    witness = witness_of(model)
    geometry = witness.geometry
    clean = [latents(geometry, block, 0) for block in range(3)]
    noisy = [[latents(geometry, block, copy) for block in range(3)] for copy in (1, 2)]
    sigma = np.array([[0.9, 0.3, 0.6], [0.1, 1.0, 0.5]])
    step = np.array([[0.1, 0.0, 0.6], [0.05, 0.2, 0.25]])
    parts = [
        (geometry.video(b, v, 0), geometry.audio(b, a, 0), b, "clean")
        for b, (v, a) in enumerate(clean)
    ]
    for copy in range(2):
        for block in range(3):
            level = sigma[copy, block], step[copy, block]
            video, audio = noisy[copy][block]
            parts.append(
                (
                    geometry.video(block, video, *level),
                    geometry.audio(block, audio, *level),
                    block,
                    "noisy",
                )
            )
    video, audio, visible = masked(geometry, parts)
    expected_v, expected_a, _ = witness.run(video, audio, CONTEXT, visible)
    clean_v = sum(len(part[0].sigma) for part in parts[:3])
    clean_a = sum((~part[1].sink).sum() for part in parts[:3])
    copies = [whole(copy) for copy in noisy]
    found_v, found_a = history_forward(
        model,
        whole(clean),
        tuple(torch.stack(both, dim=1) for both in zip(*copies, strict=True)),
        torch.from_numpy(sigma)[None].float(),
        Told(text_keys(model, TEXT, TEXT)),
        step_size=torch.from_numpy(step)[None].float(),
    )
    for copy, rows in enumerate(np.split(expected_v[clean_v:], 2)):
        agree(found_v[0, copy], as_latents(rows))
    for copy, rows in enumerate(np.split(expected_a[~audio.sink][clean_a:], 2)):
        agree(found_a[0, copy], rows)


def test_who_sees_whom_is_equations_3_to_5() -> None:
    """Each token's block by the paper's formula, for three sinks and 2 x 3 tokens a latent."""
    config, tokens, sinks = config_of(), HEIGHT * WIDTH, 3
    masks = sequence_plan(config, 4, HEIGHT, WIDTH).masks
    block_v = [
        0 if q < tokens else 1 + (q - tokens) // (3 * tokens) for q in range((1 + 3 * 3) * tokens)
    ]
    block_a = [0] * sinks + [0 if q < 1 else 1 + (q - 1) // 25 for q in range(1 + 3 * 25)]
    for mask, queries, keys in (
        (masks.video, block_v, block_v),
        (masks.audio, block_a, block_a),
        (masks.audio_to_video, block_v, block_a),
        (masks.video_to_audio, block_a, block_v),
    ):
        assert mask.tolist() == [[k <= q for k in keys] for q in queries]


def test_times_become_128_cosines_and_128_sines() -> None:
    features = sinusoid(torch.tensor([0.0, 1.0, 1000.0]))
    assert features.shape == (3, 256)
    assert torch.equal(features[0], torch.cat((torch.ones(128), torch.zeros(128))))
    # The first frequency is 1, the last 10000^(-127/128).
    assert features[1, 0].item() == pytest.approx(math.cos(1), abs=1e-6)
    assert features[1, 128].item() == pytest.approx(math.sin(1), abs=1e-6)
    last = 1000 * 10000 ** (-127 / 128)
    assert features[2, 127].item() == pytest.approx(math.cos(last), abs=1e-6)
    assert features[2, 255].item() == pytest.approx(math.sin(last), abs=1e-6)


def test_latents_lie_in_the_middle_of_their_frames() -> None:
    config = config_of()
    # Video: frame 0 alone, then frames 1-8 and 9-16, at 24 a second; audio: 10 ms, then 40 ms each.
    assert video_seconds(config, 0, 3).tolist() == pytest.approx([0.5 / 24, 5 / 24, 13 / 24])
    assert audio_seconds(config, 0, 3).tolist() == pytest.approx([0.005, 0.03, 0.07])
    assert video_seconds(config, 7, 8).tolist() == pytest.approx([53 / 24])


def test_a_rotation_turns_pairs_half_a_head_apart() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    angle = torch.tensor([math.pi / 6, math.pi / 2]).reshape(1, 1, 2)
    turned = rotate(x, RopeTable(angle.cos(), angle.sin())).flatten()
    # Channel 0 turns into channel 2 by 30 degrees; channel 3 into minus channel 1 by 90.
    assert turned.tolist() == pytest.approx([math.cos(math.pi / 6), -2.0, 0.5, 0.0], abs=1e-6)


def test_angles_at_known_places() -> None:
    """Half way through the trained 20 s nothing is turned, at their begin by -pi/2 and more."""
    config = config_of(sinks=2)
    tables = modality_tables(config, 11, HEIGHT, WIDTH)
    # Audio: 16 inner channels, 8 frequencies pi/2 * 10000^(k/7); angle = frequency * (2 t / 20 -
    # 1).
    frequencies = math.pi / 2 * 10000 ** (np.arange(8) / 7)
    for latent in (0, 1, 250):
        seconds = 0.005 if latent == 0 else (8 * latent - 2) / 2 * 0.01
        angles = (frequencies * (2 * seconds / 20 - 1)).reshape(2, 4)
        for table in (tables.audio, tables.cross_audio):
            assert np.allclose(table.cos[:, 2 + latent], np.cos(angles), atol=4e-3)
            assert np.allclose(table.sin[:, 2 + latent], np.sin(angles), atol=4e-3)
            assert (table.cos[:, :2] == 1).all() and (table.sin[:, :2] == 0).all()
    # Video: 32 inner channels over three axes are 5 frequencies each; one pair is left over, at the
    # front.
    frequencies = math.pi / 2 * 10000 ** (np.arange(5) / 4)
    for row, column in ((1, 2), (0, 2)):  # of latent 2
        token = (2 * HEIGHT + row) * WIDTH + column
        fractions = np.array([13 / 24 / 20, (32 * row + 16) / 2048, (32 * column + 16) / 2048])
        turned = (frequencies[:, None] * (2 * fractions - 1)).flatten()
        angles = np.append(0.0, turned).reshape(2, 8)
        assert np.allclose(tables.video.cos[:, token], np.cos(angles), atol=4e-3)
        assert np.allclose(tables.video.sin[:, token], np.sin(angles), atol=4e-3)


def test_interleaved_rows_are_reordered_within_each_head() -> None:
    """Pairs (0, 1), (2, 3) of a head of four become (0, 2), (1, 3)."""
    rows = torch.arange(8)
    assert interleaved_to_split(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_few_step_adapters_act_by_half_of_guidance_above_one() -> None:
    """y = W x + (w - 1) / 2 B A x where d > 0, and y = W x where d = 0 (docs/mutual_forcing.md)."""
    model = model_of(config_of(few_step_rank=2))
    levels = torch.full((1, 2), 0.5)
    steps = torch.tensor([[0.0, 0.25]])
    for guidance, factor in ((1.0, 0.0), (3.0, 1.0), (4.0, 1.5)):
        made = timestep_embedding(model, levels, levels, steps, torch.float32, guidance)
        for modality in made:
            assert modality.factors.flatten().tolist() == [0.0, factor]
    linear, x = model.transformer_blocks[0].attn1.to_k, torch.linspace(-1, 1, 32)[None, None]
    thin = linear.few_step
    with torch.no_grad():
        expected = (
            x @ linear.weight.T + linear.bias + 1.5 * x @ thin.down.weight.T @ thin.up.weight.T
        )
        assert torch.allclose(adapted(linear, x, torch.full((1, 1, 1), 1.5)), expected, atol=1e-5)
        assert torch.equal(adapted(linear, x, None), linear(x))
