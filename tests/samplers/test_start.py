"""A stream that begins with a given picture."""

from __future__ import annotations

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.full_sequence import causal_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.transformer import CausalAVTransformer
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import (
    SigmaConstants,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.start import Start, start_of
from mutual_forcing.samplers.state import BlockLatents, StreamSettings
from mutual_forcing.tests.tiny import TRANSFORMER, tiny_parts

SHAPE = TRANSFORMER.in_channels, 1, 2, 2


def released(bundle: Bundle) -> CausalAVTransformer:
    """The tiny network in the released layout: four video latents in block 0."""
    layout = {"video_first_block": 4, "audio_first_block": 26}
    config = TransformerConfig.from_dict(TRANSFORMER.to_dict() | layout)
    return tiny_parts(0, config)[0]


def given(seed: int = 5) -> Start:
    """A picture's latent."""
    return Start(torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed)))


def stream(bundle: Bundle, start: Start | None, blocks: int = 2) -> list[BlockLatents]:
    """Some blocks of a stream."""
    model = BareModel(released(bundle), "id")
    rolled = rollout(
        model,
        bundle.prompt("red ball"),
        new_stream(model, StreamSettings(2, 2, 2, (3,))),
        blocks,
        sampler_settings("few", 2, method="renoise"),
        start=start,
    )
    return [block for block, _ in rolled]


def test_the_given_latent_comes_out_as_it_was_and_the_rest_is_made(bundle: Bundle) -> None:
    start = given()
    block, following = stream(bundle, start)
    assert torch.equal(block.video[:, :, :1], start.latents)
    free, free_following = stream(bundle, None)
    other, _ = stream(bundle, given(6))
    for name, one, two in (
        ("pictures", block.video[:, :, 1:], free.video[:, :, 1:]),
        ("sound", block.audio, free.audio),
        ("another picture", block.video[:, :, 1:], other.video[:, :, 1:]),
        ("the next block", following.video, free_following.video),
    ):
        assert not torch.allclose(one, two, atol=1e-3), name


@torch.no_grad()
def test_its_pass_is_the_whole_sequence_with_sigma_zero_at_the_given_latent(bundle: Bundle) -> None:
    model, text = released(bundle), bundle.prompt("red ball").text
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, TRANSFORMER.in_channels, 4, 2, 2, generator=generator)
    audio = torch.randn(1, 26, TRANSFORMER.audio_in_channels, generator=generator)
    start, sigma = given(), 0.7
    constants = SigmaConstants(model, video)
    opened = OpenBlock(model, RollingCache(2), 2, 2, video)
    placed = start.placed(video)
    found = opened.velocity(
        placed,
        audio,
        text,
        start.modulation(model, constants.embedding(0.0), constants.embedding(sigma), placed),
    )
    levels = torch.tensor([[0.0, sigma, sigma, sigma]])
    expected = causal_forward(model, placed, audio, levels, torch.full((1, 26), sigma), text)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_a_given_latent_in_the_papers_layout_is_the_whole_prefix(bundle: Bundle) -> None:
    start = given()
    rolled = rollout(
        bundle,
        bundle.prompt("red ball"),
        bundle.begin(),
        1,
        sampler_settings("few", 2),
        start=start,
    )
    ((block, _),) = rolled
    assert torch.equal(block.video, start.latents)


def test_a_start_of_another_kind_is_refused(bundle: Bundle) -> None:
    for shape in ((3, 1, 2, 2), (SHAPE[0], 5, 2, 2), (SHAPE[0], 1, 2, 3)):
        with pytest.raises(ValueError, match="encode one picture"):
            stream(bundle, Start(torch.zeros(1, *shape)), 1)


def test_a_latent_with_a_mask_gives_its_leading_frames() -> None:
    samples = torch.randn(1, 4, 3, 2, 2)
    assert start_of(samples, None).latents is samples
    mask = torch.ones(1, 1, 3, 1, 1)
    mask[:, :, :1] = 0
    assert torch.equal(start_of(samples, mask).latents, samples[:, :, :1])
    for wrong in (torch.ones(1, 1, 3, 1, 1), mask * 0.5 + 0.25, mask.flip(2)):
        with pytest.raises(ValueError, match="the first frames given"):
            start_of(samples, wrong)
    with pytest.raises(ValueError, match="has shape"):
        start_of(torch.zeros(1, 4, 2, 2), None)
