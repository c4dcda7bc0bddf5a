"""The sampler against the papers' equations: whole rollouts of `plain_numpy`, and numbers worked
out by hand.

A network whose velocity is known replaces the real one where a step alone is looked at.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from mutual_forcing.networks.layout import PAPER_LAYOUT, RELEASED_LAYOUT, BlockLayout
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.noise import named_noise, noise_of, varied_seed
from mutual_forcing.samplers.rollout import (
    Prompt,
    SamplerSettings,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.sigmas import few_step_sigmas, ltx2_sigmas
from mutual_forcing.samplers.state import BlockLatents, StreamSettings
from mutual_forcing.samplers.steps import add_noise, euler, guided, predicted_clean, renoise
from mutual_forcing.tests.networks.test_formulas import (
    CONTEXT,
    HEIGHT,
    WIDTH,
    agree,
    config_of,
    model_of,
    witness_of,
)
from mutual_forcing.tests.plain_numpy import generate, ltx2_schedule

# 1000/909/725/421/0 in LTX-2's 40-step list, as OmniForcing's release computes them.
PUBLISHED = (0.99999994, 0.90622896, 0.72652376, 0.42071861, 0.0)
EMPTY = np.random.default_rng(6).normal(size=(4, 12))


def stream_of(
    model: CausalAVTransformer,
    sampler: SamplerSettings,
    blocks: int,
    seed: int = 3,
    window: int = 2,
) -> list[BlockLatents]:
    def keys(context: np.ndarray) -> object:
        embedding = torch.from_numpy(context)[None].float()
        return text_keys(model, embedding, embedding)

    bare = BareModel(model, "x")
    state = new_stream(bare, StreamSettings(HEIGHT, WIDTH, window, (seed,)))
    prompt = Prompt(keys(CONTEXT), keys(EMPTY) if sampler.guidance != 1 else None)
    return [made for made, _ in rollout(bare, prompt, state, blocks, sampler)]


def drawn(block: int, step: int, name: str, shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    return named_noise(seed, block, step, name, shape).numpy()


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (sampler_settings("few", 4), {"few": True}),
        (sampler_settings("few", 4, method="renoise"), {"few": True, "renoise": True}),
        (
            sampler_settings("multi", 3, guidance=2.5),
            {"few": False, "empty": EMPTY, "guidance": 2.5},
        ),
    ],
    ids=("few", "renoise", "guided"),
)
@pytest.mark.parametrize("first", [(1, 1), (4, 26)], ids=("paper", "released"))
def test_a_stream_is_what_the_equations_say(
    sampler: SamplerSettings, options: dict[str, object], first: tuple[int, int]
) -> None:
    """Five blocks, a window of two: at the end blocks 1 and 2 are gone and places counted anew."""
    model = model_of(config_of(first))
    sigmas = PUBLISHED if sampler.mode == "few" else ltx2_schedule(3)
    expected = generate(witness_of(model), 2, 5, sigmas, drawn, CONTEXT, **options)
    for found, (video, audio) in zip(stream_of(model, sampler, 5), expected, strict=True):
        agree(found.video[0], video)
        agree(found.audio[0], audio)


def test_one_step_by_hand() -> None:
    """Signs and factors at x = 2, v = 0.5, e = -1, and at u = 1, c = 3."""
    x, v, e = torch.tensor(2.0), torch.tensor(0.5), torch.tensor(-1.0)
    assert euler(x, v, 0.8, 0.6).item() == pytest.approx(2 - 0.2 * 0.5)
    assert predicted_clean(x, v, 0.8).item() == pytest.approx(2 - 0.8 * 0.5)
    assert add_noise(x, e, 0.75).item() == pytest.approx(0.25 * 2 - 0.75)
    assert renoise(x, v, 0.8, 0.25, e).item() == pytest.approx(0.75 * 1.6 - 0.25)
    assert renoise(x, v, 0.8, 0.0, None).item() == pytest.approx(1.6)
    unguided, conditional = torch.tensor(1.0), torch.tensor(3.0)
    found = [guided(unguided, conditional, w).item() for w in (0.0, 1.0, 3.0)]
    assert found == [1.0, 3.0, 7.0]


def test_a_linear_flow_is_followed_as_euler_follows_it() -> None:
    """dx/dsigma = 2 x - sigma from x(1) = 1 in four equal steps, worked out on paper."""
    x, path = torch.tensor(1.0), []
    for i in range(4, 0, -1):
        x = euler(x, 2 * x - i / 4, i / 4, (i - 1) / 4)
        path.append(x.item())
    assert path == [0.75, 0.5625, 0.40625, 0.265625]


def test_the_exact_flow_of_gaussian_data_ends_on_the_data() -> None:
    """For data N(m, s^2) the velocity E[e - x0 | x] is known; it carries a deviate z to m + s z."""
    mean, scale, z = 1.5, 0.4, torch.linspace(-2, 2, 9)
    x, levels = z, torch.linspace(1, 0, 2001).tolist()
    for sigma, following in pairwise(levels):
        variance = ((1 - sigma) * scale) ** 2 + sigma**2
        slope = (sigma - (1 - sigma) * scale**2) / variance
        v = (x - (1 - sigma) * mean) * slope - mean
        x = euler(x, v, sigma, following)
    assert torch.allclose(x, mean + scale * z, atol=2e-3)


def constant_network(video: float, audio: float) -> CausalAVTransformer:
    """Velocity is `video` and `audio` everywhere, whatever goes in."""
    model = model_of(config_of())
    with torch.no_grad():
        for head, value in ((model.proj_out, video), (model.audio_proj_out, audio)):
            head.weight.zero_()
            head.bias.fill_(value)
    return model


def test_a_constant_velocity_carries_noise_from_one_to_zero() -> None:
    """dx/dsigma = v, so x(0) = x(1) - v, in any number of steps and in either mode."""
    model = constant_network(0.7, -1.3)
    for mode, steps in (("few", 4), ("few", 1), ("multi", 5)):
        sampler = sampler_settings(mode, steps, guidance=1.0 if mode == "multi" else None)
        made = stream_of(model, sampler, 2)
        for block, found in enumerate(made):
            noise = drawn(block, 0, "video", found.video.shape[1:])
            # LTX-2's list begins a rounding below 1.
            agree(found.video[0], noise - 0.7 * sampler.sigmas[0])
            noise = drawn(block, 0, "audio", found.audio.shape[1:])
            agree(found.audio[0], noise + 1.3 * sampler.sigmas[0])


def test_renoise_predicts_the_clean_block_and_noises_it_afresh() -> None:
    """By hand for the list 1, 0.6, 0: x0 = e0 - v; x = 0.4 x0 + 0.6 e1; x0 = x - 0.6 v."""
    model = constant_network(0.5, -2.0)
    sampler = SamplerSettings("few", (1.0, 0.6, 0.0), method="renoise")
    for block, found in enumerate(stream_of(model, sampler, 2)):
        for name, v in (("video", 0.5), ("audio", -2.0)):
            value = getattr(found, name)[0]
            e0, e1 = (drawn(block, step, name, tuple(value.shape)) for step in (0, 1))
            agree(value, 0.4 * (e0 - v) + 0.6 * e1 - 0.6 * v)


def test_the_list_of_four_steps_is_ltx2s() -> None:
    assert few_step_sigmas(4) == pytest.approx(PUBLISHED, abs=1e-6)
    # Times as they are published for bfloat16: 1000, 908, 728, 420, 0.
    times = torch.tensor(few_step_sigmas(4)).bfloat16() * 1000
    assert times.tolist() == [1000, 908, 728, 420, 0]


def test_the_list_of_eight_steps_halves_the_intervals_of_four() -> None:
    """In LTX-2's 40 steps the four are entries 0, 17, 29, 36, 40; between lie 9, 23, 33, 38."""
    entries = (0, 9, 17, 23, 29, 33, 36, 38, 40)
    assert few_step_sigmas(8) == pytest.approx(ltx2_schedule(40)[list(entries)], abs=1e-6)
    assert few_step_sigmas(2) == pytest.approx(ltx2_schedule(40)[[0, 20, 40]], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 8, 40, 50])
def test_the_long_list_is_ltx2s_scheduler(steps: int) -> None:
    assert ltx2_sigmas(steps) == pytest.approx(ltx2_schedule(steps), abs=1e-6)


def test_a_shorter_sequence_shifts_the_list_less() -> None:
    """The shift is 0.95 at 1024 tokens, 2.05 at 4096, and linear between."""
    # Of two steps the last but one entry is 0.1 whatever the shift, so look at three: t = 1, 2/3,
    # 1/3.
    for tokens, shift in ((1024, 0.95), (2560, 1.5), (4096, 2.05)):
        second, third = (math.exp(shift) / (math.exp(shift) + 1 / t - 1) for t in (2 / 3, 1 / 3))
        expected = (1.0, 1 - (1 - second) * 0.9 / (1 - third), 0.1, 0.0)
        assert ltx2_sigmas(3, tokens) == pytest.approx(expected, abs=1e-6)


def test_defaults_of_both_modes() -> None:
    few, multi = sampler_settings("few"), sampler_settings("multi")
    assert (few.steps, few.guidance, few.method) == (4, 1.0, "euler")
    assert (multi.steps, multi.guidance, multi.method) == (50, 3.0, "euler")


def test_noise_has_these_names() -> None:
    """blake2b("seed/block/step/modality") is a torch seed: saved streams depend on it."""
    for name in ((3, 1, 2, "video"), (8, 0, 0, "audio")):
        digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") // 2
        expected = torch.randn(4, 2, generator=torch.Generator().manual_seed(number))
        assert torch.equal(named_noise(*name, (4, 2)), expected)
    digest = hashlib.blake2b(b"7/variation/2", digest_size=8).digest()
    assert varied_seed(7, 2) == int.from_bytes(digest, "little") // 2
    both = noise_of((8, 9))(0, 0, "audio", (2, 3))
    assert torch.equal(both[1], named_noise(9, 0, 0, "audio", (3,)))


def test_codec_time_is_counted_in_frames_and_samples() -> None:
    """Eight frames a video latent, 640 samples an audio latent; the first one and 160."""
    clock = Clock(PAPER_LAYOUT)
    assert [clock.frames(n) for n in range(4)] == [0, 1, 25, 49]
    assert [clock.samples(n) for n in range(4)] == [0, 160, 16160, 32160]
    assert clock.frame_span(2) == (25, 49) and clock.frame_span(0) == (0, 1)
    assert clock.sample_span(0) == (0, 160) and clock.sample_span(1) == (160, 16160)
    assert clock.seconds(3) * 24 == 49
    # 9 s are 216 frames: 1 + 9 * 24 = 217 of ten blocks. A second and a frame needs the third
    # block.
    assert clock.blocks_for(9) == 10 and clock.blocks_for(25 / 24) == 2
    assert clock.blocks_for(26 / 24) == 3 and clock.blocks_for(1, start=5) == 1
    released = Clock(RELEASED_LAYOUT)
    assert [released.frames(n) for n in (1, 2)] == [25, 49]
    assert [released.samples(n) for n in (1, 2)] == [101 * 160, 201 * 160]


def test_blocks_hold_a_second_of_both_modalities() -> None:
    assert [PAPER_LAYOUT.video_span(b) for b in range(3)] == [(0, 1), (1, 4), (4, 7)]
    assert [PAPER_LAYOUT.audio_span(b) for b in range(3)] == [(0, 1), (1, 26), (26, 51)]
    assert [RELEASED_LAYOUT.video_span(b) for b in range(2)] == [(0, 4), (4, 7)]
    assert [RELEASED_LAYOUT.audio_span(b) for b in range(2)] == [(0, 26), (26, 51)]
    assert BlockLayout().blocks(16, 126) == 6  # 121 frames: the clips that LTX-2 was adapted on
