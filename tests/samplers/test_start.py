"""A stream that begins with a given picture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
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
from mutual_forcing.samplers.start import Held, Start, given_of, start_of
from mutual_forcing.samplers.state import BlockLatents, StreamSettings, StreamState
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


@pytest.mark.parametrize("what", ["a picture", "pictures", "sound"])
@torch.no_grad()
def test_its_pass_is_the_whole_sequence_with_sigma_zero_at_what_is_given(
    bundle: Bundle, what: str
) -> None:
    model, text = released(bundle), bundle.prompt("red ball").text
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, TRANSFORMER.in_channels, 4, 2, 2, generator=generator)
    audio = torch.randn(1, 26, TRANSFORMER.audio_in_channels, generator=generator)
    kept = {
        "a picture": Held(given().latents),
        "pictures": Held(video.flip(2)),
        "sound": Held(audio=audio.flip(1)),
    }[what]
    sigma, constants = 0.7, SigmaConstants(model, video)
    opened = OpenBlock(model, RollingCache(2), 2, 2, video)
    placed = kept.placed(video, audio)
    levels = constants.embedding(0.0), constants.embedding(sigma)
    found = opened.velocity(*placed, text, kept.modulation(model, *levels, *placed))
    seen, heard = torch.full((1, 4), sigma), torch.full((1, 26), sigma)
    seen[:, : 0 if kept.video is None else kept.video.shape[2]] = 0
    heard[:, : 0 if kept.audio is None else 26] = 0
    expected = causal_forward(model, *placed, seen, heard, text)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("mode", ["few", "multi"])
def test_one_modality_is_given_from_any_block_on_and_the_other_goes_with_it(
    bundle: Bundle, mode: str
) -> None:
    """In whole blocks, and for as long as there are any; a start image may be given as well."""
    sampler, layout = sampler_settings(mode, 2), bundle.begin().layout
    generator = torch.Generator().manual_seed(2)
    channels = {"video": TRANSFORMER.in_channels, "audio": TRANSFORMER.audio_in_channels}

    def rolled(state: StreamState, **options: object) -> list[tuple[BlockLatents, StreamState]]:
        prompt = bundle.prompt("red ball", guided=mode == "multi")
        return list(rollout(bundle, prompt, state, 3, sampler, **options))

    sound = torch.randn(1, channels["audio"], layout.audio_latents(3) - 3, 1, generator=generator)
    free = rolled(bundle.begin((1, 2)))
    heard = rolled(bundle.begin((1, 2)), given=given_of(sound, layout, 0), start=given())
    expected = rearrange(sound, "b c s 1 -> b s c").expand(2, -1, -1)
    found = torch.cat([block.audio for block, _ in heard[:2]], dim=1)
    assert torch.equal(found, expected[:, : layout.audio_latents(2)])
    assert torch.equal(heard[0][0].video[:1], given().latents)
    for block in (1, 2):
        assert not torch.allclose(heard[block][0].video, free[block][0].video, atol=1e-3)
    assert not torch.equal(heard[2][0].audio[:, :3], expected[:, layout.audio_latents(2) :][:, :3])

    seen = torch.randn(1, channels["video"], 1 + 3 * 2, 2, 2, generator=generator)
    more = rolled(free[-1][1], given=given_of(seen, layout, 3))
    found = torch.cat([block.video for block, _ in more[:2]], dim=2)
    assert torch.equal(found, seen[:, :, 1:].expand(2, -1, -1, -1, -1))
    for frames, expected in ((2, "9 frames can be used, expected at least 25"), (3, "17 frames")):
        for first in (0, 3):
            with pytest.raises(ValueError, match=expected):
                given_of(seen[:, :, :frames], layout, first)
    with pytest.raises(ValueError, match="sound 25 latents can be used, expected at least 26, a"):
        given_of(sound[:, :, :25], layout, 0)
    with pytest.raises(ValueError, match="pictures and sound, expected one of them"):
        given_of(SimpleNamespace(is_nested=True, ndim=5), layout, 0)
    with pytest.raises(
        ValueError, match=r"given pictures are 96 x 64 pixels, and the stream's 64 x"
    ):
        rolled(bundle.begin(), given=given_of(seen.repeat(1, 1, 1, 1, 2)[..., :3], layout, 0))
    with pytest.raises(ValueError, match="are those of 3 clips, and the stream has 2: give one"):
        rolled(bundle.begin((1, 2)), given=given_of(seen.repeat(3, 1, 1, 1, 1), layout, 0))
    with pytest.raises(ValueError, match="expected pictures"):
        given_of(torch.zeros(1, 4, 32, 8), layout, 0, audio_bins=1)  # a still picture's
    with pytest.raises(ValueError, match="encode one picture"):
        rolled(bundle.begin(), given=given_of(torch.zeros(1, 3, 4, 2, 2), layout, 0))


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
    sizes = "are 96 x 64 pixels, and the stream's 64 x 64: scale"
    for shape, said in (
        ((3, 1, 2, 2), "encode one picture"),
        ((SHAPE[0], 5, 2, 2), "encode one picture"),
        ((SHAPE[0], 1, 2, 3), sizes),
    ):
        with pytest.raises(ValueError, match=said):
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
