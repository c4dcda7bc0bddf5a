"""Schedules with the stated numbers; noise that depends on its name alone; time in integers."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutual_forcing.networks.layout import PAPER_LAYOUT, RELEASED_LAYOUT, BlockLayout
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.noise import named_noise, noise_of, varied_seed
from mutual_forcing.samplers.sigmas import few_step_sigmas, ltx2_sigmas

STATED = (0.99999994, 0.90622896, 0.72652376, 0.42071861, 0.0)


def test_four_steps_are_the_stated_sigmas() -> None:
    assert few_step_sigmas(4) == pytest.approx(STATED, abs=1e-6)
    assert few_step_sigmas(8)[::2] == pytest.approx(STATED, abs=1e-6)


def test_the_last_but_one_of_the_long_schedule_is_a_tenth() -> None:
    sigmas = ltx2_sigmas(40)
    assert len(sigmas) == 41 and sigmas[-2] == pytest.approx(0.1) and sigmas[-1] == 0


@given(st.integers(1, 40))
def test_every_schedule_falls_from_one_to_zero(steps: int) -> None:
    for sigmas in (few_step_sigmas(steps), ltx2_sigmas(steps)):
        assert len(sigmas) == steps + 1
        assert sigmas[0] == pytest.approx(1) and sigmas[-1] == 0
        assert all(a > b for a, b in pairwise(sigmas))


@pytest.mark.parametrize("steps", [0, 41, -3])
def test_steps_that_cannot_be_made_say_what_can(steps: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {steps} steps, expected 1 to 40"):
        few_step_sigmas(steps)
    if steps < 1:
        with pytest.raises(ValueError, match=f"steps is {steps}, expected 1 to"):
            ltx2_sigmas(steps)


def test_noise_depends_on_its_name_alone() -> None:
    first = named_noise(7, 3, 1, "video", (4, 2))
    named_noise(7, 2, 0, "audio", (100,))
    torch.randn(10)
    assert torch.equal(first, named_noise(7, 3, 1, "video", (4, 2)))
    others = [(8, 3, 1, "video"), (7, 4, 1, "video"), (7, 3, 2, "video"), (7, 3, 1, "audio")]
    assert not any(torch.equal(first, named_noise(*name, (4, 2))) for name in others)


def test_noise_leaves_the_global_random_numbers_as_found() -> None:
    before = torch.get_rng_state()
    noise_of([1, 2])(0, 0, "audio", (2, 5, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_of_a_clip_does_not_depend_on_its_neighbours() -> None:
    pair = noise_of([5, 9])(1, 0, "video", (2, 3))
    assert torch.equal(pair[1:], noise_of([9])(1, 0, "video", (1, 3)))
    with pytest.raises(ValueError, match="batch of 3"):
        noise_of([5, 9])(1, 0, "video", (3, 3))


def test_noise_is_standard_normal() -> None:
    noise = named_noise(0, 0, 0, "video", (20_000,))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_variation_zero_is_the_stream_itself() -> None:
    assert varied_seed(7, 0) == 7
    assert len({varied_seed(seed, v) for seed in range(5) for v in range(5)}) == 25


layouts = st.sampled_from([PAPER_LAYOUT, RELEASED_LAYOUT, BlockLayout(2, 9, 1, 8)])


@given(layouts, st.integers(0, 10_000))
def test_blocks_join_without_a_gap(layout: BlockLayout, block: int) -> None:
    clock = Clock(layout)
    assert clock.frame_span(block)[1] == clock.frame_span(block + 1)[0]
    assert clock.sample_span(block)[1] == clock.sample_span(block + 1)[0]


@given(st.integers(0, 10_000))
def test_both_streams_stay_within_one_frame_of_each_other(blocks: int) -> None:
    clock = Clock(PAPER_LAYOUT)
    difference = Fraction(clock.frames(blocks), 24) - Fraction(clock.samples(blocks), 16000)
    assert abs(difference) < Fraction(1, 24)


@given(layouts, st.integers(1, 100_000), st.integers(0, 300))
def test_a_length_takes_the_fewest_blocks_that_reach_it(
    layout: BlockLayout, frames: int, start: int
) -> None:
    clock = Clock(layout)

    def made(blocks: int) -> int:
        return clock.frames(start + blocks) - clock.frames(start)

    blocks = clock.blocks_for(Fraction(frames, 24), start)
    assert made(blocks) >= frames and (blocks == 1 or made(blocks - 1) < frames)
    assert clock.blocks_for(frames / 24, start) == blocks  # a float costs no block


def test_ten_seconds_are_at_least_ten_seconds() -> None:
    clock = Clock(PAPER_LAYOUT)
    assert clock.blocks_for(10) == 11 and clock.frames(11) == 241 and clock.samples(11) == 160160
    assert clock.seconds(11) >= 10 > clock.seconds(10)
    assert clock.blocks_for(10, start=11) == 10  # going on, no prefix is made
    assert clock.blocks_for(1e12) > 10**11  # at once, not by counting


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_lengths_that_cannot_be_made_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        Clock(PAPER_LAYOUT).blocks_for(seconds)
