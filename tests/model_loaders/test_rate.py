"""Frame rates: both streams of a block last equally long at every rate that is allowed."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from mutual_forcing.model_loaders.rate import at_rate, audio_latents_a_second, rate_of
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.rope import audio_seconds, video_seconds

RELEASED = TransformerConfig(video_first_block=4, audio_first_block=26)


@pytest.mark.parametrize("fps", [12, 15, 20, 24, 25, 30, 50, 60])
def test_both_streams_of_a_block_last_equally_long(fps: int) -> None:
    config = at_rate(RELEASED, fps)
    video = Fraction(config.video_next_block * config.video_time_stride, fps)
    assert video == config.audio_next_block / audio_latents_a_second(config)
    assert rate_of(RELEASED, config.layout) == fps
    # The first blocks too, as nearly as whole latents allow: half a latent is 20 ms.
    seconds = Fraction(25, fps)
    assert abs(seconds - Fraction(config.audio_first_block, 25)) <= Fraction(1, 50)


@pytest.mark.parametrize("fps", [12, 25, 50])
def test_positions_of_both_streams_stay_together(fps: int) -> None:
    config = at_rate(RELEASED, fps)
    blocks = 6
    video = video_seconds(config, *config.layout.video_span(blocks))
    audio = audio_seconds(config, *config.layout.audio_span(blocks))
    assert torch.allclose(video.mean(), audio.mean(), atol=0.1)


def test_its_own_rate_is_its_own_config() -> None:
    assert at_rate(RELEASED, 24) is RELEASED
    assert at_rate(RELEASED, 24.0) is RELEASED


@pytest.mark.parametrize("fps", [0, -1, 23, 29.97])
def test_rates_without_whole_latents_are_refused_with_those_that_work(fps: float) -> None:
    with pytest.raises(ValueError, match="10, 12, 15, 20, 24, 25, 30, 40, 50, 60"):
        at_rate(RELEASED, fps)
