"""What given pictures show is told to the sound of their block, and to nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.pair import Pair
from mutual_forcing.lab.training.parallel import ALONE
from mutual_forcing.lab.training.pictures import NEAR, seen_in, sound_of_pictures
from mutual_forcing.lab.training.stages import PictureStage, Trained
from mutual_forcing.lab.training.system import System, initialise
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, save_bundle
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.few_step import Adapter, adapted
from mutual_forcing.networks.full_sequence import Told, causal_forward, history_forward
from mutual_forcing.networks.picture_track import SIGHT_DTYPE, PictureTrack, is_sight
from mutual_forcing.networks.timestep import ModalityEmbedding, seeing
from mutual_forcing.networks.transformer import patch_audio, text_keys
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.start import Given, Start
from mutual_forcing.samplers.state import BlockLatents
from mutual_forcing.tests.tiny import STREAM, TRANSFORMER, VIDEO_CHANNELS, save_tiny, tiny_parts
from mutual_forcing.tests.tiny_training import CONFIG, LAYOUT, awake, batch, draws
from safetensors.torch import load_file

TRACK = {"picture_track_hidden": 6, "picture_track_channels": 3, "picture_track_rank": 2}
PLAIN = replace(TRANSFORMER, few_step_rank=2)
SHOWN = replace(PLAIN, **TRACK)
LEVELS = {"sigma_mean": 1.0, "sigma_spread": 1.0, "caption_dropout": 0.1}
SHARES = {"near": 0.35, "anywhere": 0.25, "another": 0.1, "begun": 0.1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model with a track that says something."""
    made = load_bundle(save_tiny(tmp_path_factory.mktemp("model") / "m.safetensors", 0, SHOWN))
    torch.manual_seed(1)
    torch.nn.init.normal_(made.transformer.picture_track.proj_out.weight)
    return made


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def by_hand(
    module: PictureTrack, video: np.ndarray, latents: int, before: int = 0, after: int = 0
) -> np.ndarray:
    """The track (n, t) of one clip (c, f, h, w), token by token, in float64."""
    weights = {k: v.double().numpy() for k, v in module.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    _, frames, height, width = video.shape
    seen = []
    for f in range(frames):
        tokens = [
            gelu(
                linear(
                    "place_in",
                    np.append(
                        video[:, f, y, x], [(2 * y + 1) / height - 1, (2 * x + 1) / width - 1]
                    ),
                )
            )
            for y in range(height)
            for x in range(width)
        ]
        seen.append(sum(tokens) / len(tokens))
    nothing = np.zeros_like(seen[0])
    seen = [nothing] * (1 - before) + seen + [nothing] * (1 - after)
    shown = []
    for three in zip(seen, seen[1:], seen[2:], strict=False):
        joined = gelu(linear("time_in", np.stack(three, axis=1).flatten()))
        shown += np.split(linear("frames_out", joined), module.frames)
    found = []
    for n in range(latents):
        # The middle of a sound, counted in frames from the middle of the first one.
        at = min(max((n + 0.5) * len(shown) / latents - 0.5, 0), len(shown) - 1)
        low = int(at)
        high = min(low + 1, len(shown) - 1)
        found.append(gelu(shown[low] + (at - low) * (shown[high] - shown[low])))
    return np.stack(found)


@pytest.mark.parametrize(
    ("frames", "latents", "grid", "context"),
    [
        (3, 25, (2, 2), (0, 0)),
        (5, 25, (2, 2), (1, 1)),
        (1, 1, (1, 3), (0, 0)),
        (2, 1, (2, 1), (0, 1)),
    ],
)
def test_it_is_the_same_as_by_hand(
    bundle: Bundle, frames: int, latents: int, grid: tuple[int, int], context: tuple[int, int]
) -> None:
    module = bundle.transformer.picture_track
    video = torch.randn(2, VIDEO_CHANNELS, frames, *grid)
    found = module(video, latents, *context)
    for one, clip in zip(found, video, strict=True):
        expected = by_hand(module, clip.double().numpy(), latents, *context)
        np.testing.assert_allclose(one, expected, atol=1e-5)


def inputs(config: TransformerConfig, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    layout = config.layout
    return (
        torch.randn(2, config.in_channels, layout.video_latents(blocks), 2, 2),
        torch.randn(2, layout.audio_latents(blocks), config.audio_in_channels),
    )


@pytest.mark.parametrize("units", [0, 4])
@torch.no_grad()
def test_noisy_blocks_are_told_and_their_history_is_not(bundle: Bundle, units: int) -> None:
    """In a pass over all blocks as in one over the clip without copies."""
    model = bundle.transformer
    text = bundle.prompt("red ball").text
    config = replace(SHOWN, transcript_channels=units)
    if units:
        model = tiny_parts(0, config)[0]
        torch.nn.init.normal_(model.picture_track.proj_out.weight)
        context = torch.randn(2, 6, config.caption_channels)
        text = text_keys(model, context, context)
    video, audio = inputs(config, 2)
    seen = torch.randn(2, audio.shape[1], 3)
    track = torch.randn(2, audio.shape[1], units) if units else None
    told = Told(text, track=track, seen=seen)
    clean = video, audio
    noisy = video[:, None], audio[:, None] + 1
    levels = torch.zeros(2, 1, 2), torch.full((2, 1, 2), 0.5)
    _, found = history_forward(model, clean, noisy, levels, told)
    # Only the first block is its own history, so its sound is that of a clip of one block.
    one = told._replace(track=None if track is None else track[:, :1], seen=seen[:, :1])
    sigma = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    first = causal_forward(model, video[:, :, :1], audio[:, :1] + 1, *sigma, one)[1]
    torch.testing.assert_close(found[:, 0, :1], first, atol=1e-5, rtol=0)
    # What is told of block 0 changes block 0 alone: block 1 sees it as a history without.
    other = told._replace(seen=torch.cat((seen[:, :1] + 1, seen[:, 1:]), dim=1))
    _, moved = history_forward(model, clean, noisy, levels, other)
    assert not torch.allclose(moved[:, 0, :1], found[:, 0, :1], atol=1e-3)
    torch.testing.assert_close(moved[:, 0, 1:], found[:, 0, 1:], atol=1e-6, rtol=0)


def rolled(
    bundle: Bundle, given: Given | None, mode: str = "few", start: Start | None = None
) -> list[BlockLatents]:
    prompt, state = bundle.prompt("red ball", guided=mode == "multi"), bundle.begin((1, 2))
    settings = sampler_settings(mode, 2)
    made = rollout(bundle, prompt, state, 3, settings, given=given, start=start)
    return [block for block, _ in made]


def values(blocks: list[BlockLatents]) -> Iterator[torch.Tensor]:
    return (tensor for block in blocks for tensor in block)


@pytest.mark.parametrize("mode", ["few", "multi"])
def test_a_stream_is_told_where_pictures_are_given_and_is_the_same_bits_elsewhere(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, mode: str
) -> None:
    layout = bundle.clock.layout
    plain = load_bundle(save_tiny(tmp_path_factory.mktemp("plain") / "m.safetensors", 0, PLAIN))
    own = plain.transformer.state_dict()
    own = {name: value for name, value in bundle.transformer.state_dict().items() if name in own}
    plain.transformer.load_state_dict(own)
    plain.text_encoder.load_state_dict(bundle.text_encoder.state_dict())
    video, audio = (x[:1] for x in inputs(SHOWN, 2))
    given = {
        "nothing": (None, None),
        "a picture": (None, Start(video[:, :, : layout.video_first])),
        "sound": (Given(layout, 0, audio=audio), None),
        "pictures": (Given(layout, 0, video=video), None),
    }
    for what, (one, start) in given.items():
        found, expected = (rolled(model, one, mode, start) for model in (bundle, plain))
        same = [torch.equal(a, b) for a, b in zip(values(found), values(expected), strict=True)]
        # Of the three blocks the first two have given pictures; the last one follows another past.
        assert all(same) if what != "pictures" else same == [True, False, True, False, False, False]


def test_a_step_of_a_stream_is_the_pass_over_the_clip(bundle: Bundle) -> None:
    """One Euler step from noise, so the velocity can be read off; the second block, with a past."""
    layout, model = bundle.clock.layout, bundle.transformer
    video = torch.randn(1, VIDEO_CHANNELS, layout.video_latents(2), 2, 2)
    prompt, sampler = bundle.prompt("red ball"), sampler_settings("multi", 1, 1.0)
    noises = {}

    def noise(block: int, step: int, modality: str, shape: tuple[int, ...]) -> torch.Tensor:
        return noises.setdefault((block, modality), torch.randn(shape))

    made = rollout(
        bundle, prompt, bundle.begin(), 2, sampler, given=Given(layout, 0, video=video), noise=noise
    )
    blocks = [block for block, _ in made]
    audio = torch.cat([block.audio for block in blocks], dim=1)
    start = torch.cat([noises[block, "audio"] for block in (0, 1)], dim=1)
    # Each block with the latent of the other one that lies beside it.
    seen = torch.cat(
        (model.picture_track(video[:, :, :2], 1, 0, 1), model.picture_track(video, 25, 1, 0)), dim=1
    )
    torch.testing.assert_close(seen, seen_in(SimpleNamespace(transformer=model), video))
    levels = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    told = Told(prompt.text, seen=seen)
    with torch.no_grad():
        _, v = history_forward(
            model, (video, audio), (video[:, None], start[:, None]), levels, told
        )
    torch.testing.assert_close(audio, start - v[:, 0], atol=1e-5, rtol=0)


def test_a_stream_that_goes_on_sees_what_it_would_have_seen_without_a_break(bundle: Bundle) -> None:
    layout, prompt = bundle.clock.layout, bundle.prompt("red ball")
    video = torch.randn(1, VIDEO_CHANNELS, layout.video_latents(3), 2, 2)
    given, rest = Given(layout, 0, video=video), video[:, :, layout.video_latents(1) :]
    settings = sampler_settings("few", 2)
    whole = [b for b, _ in rollout(bundle, prompt, bundle.begin(), 3, settings, given=given)]
    ((_, state),) = rollout(bundle, prompt, bundle.begin(), 1, settings, given=given)
    later = rollout(bundle, prompt, state, 2, settings, given=Given(layout, 1, video=rest))
    pairs = zip(values([b for b, _ in later]), values(whole[1:]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_pictures_of_another_size_are_refused_before_they_are_read(bundle: Bundle) -> None:
    given = Given(bundle.clock.layout, 0, video=torch.zeros(1, 3, 4, 2, 2))
    with pytest.raises(ValueError, match="encode one picture"):
        rolled(bundle, given)


def test_without_a_transcript_nothing_else_is_added() -> None:
    """A fresh track is silent."""
    made = System(replace(CONFIG, **TRACK))
    initialise(made, 0)
    tokens, seen = torch.randn(2, 25, CONFIG.audio_in_channels), torch.randn(2, 25, 3)
    model = made.transformer
    assert torch.equal(patch_audio(model, tokens, False, seen), patch_audio(model, tokens, False))


def system(**changes: int) -> System:
    with torch.random.fork_rng(devices=[]):
        made = System(replace(CONFIG, **TRACK, **changes))
        initialise(made, 0)
    return awake(made)


@pytest.mark.parametrize("reads", [True, False])
def test_training_moves_the_track_alone_and_towards_the_sound(reads: bool) -> None:
    made, data = system(), batch(4)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    recipe = LEVELS | {"histories": SHARES}
    stage = PictureStage(made, Trained(0.02, 0.9, torch.float32, ALONE), recipe, reads)
    losses = [float(stage.step(data, draws(0, 4), 0, 0.0, 1.0)["audio"]) for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]
    moved = {name for name, value in made.state_dict().items() if (value != before[name]).any()}
    sight = {name for name in before if is_sight(name)}
    # What is read needs no pass: neither the adapters nor what is added to tokens.
    read = {name for name in sight if ".pictures." not in name and "proj_out" not in name}
    assert moved == (read if reads else sight) and len(sight) > len(read) > 5


def test_a_network_without_a_track_and_unknown_histories_are_refused() -> None:
    made = System(CONFIG)
    recipe = LEVELS | {"histories": SHARES}
    trained = Trained(0.02, 0.9, torch.float32, ALONE)
    several = replace(trained, processes=replace(ALONE, world=2))
    with pytest.raises(ValueError, match="found 2 processes, expected one"):
        PictureStage(system(), several, recipe, False)
    with pytest.raises(ValueError, match="no picture track"):
        PictureStage(made, trained, recipe, False)
    with pytest.raises(ValueError, match="histories has later, expected shares of near, any"):
        PictureStage(system(), trained, LEVELS | {"histories": {"near": 0.1, "later": 0.2}}, False)


@torch.no_grad()
def test_what_is_learned_from_sees_no_sound_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories: the clip's own sound at another time, another clip's, a beginning that was made,
    and the true one. No transcript says when."""
    clips = 400
    made, data = system(transcript_channels=2), batch(clips, 5)
    data = data._replace(track=torch.ones(clips, data.audio.shape[1], 2))
    found = {}

    def velocity(model: object, past: Pair, x: Pair, sigma: Pair, told: Told) -> Pair:
        found.setdefault("calls", []).append((past, x, sigma, told))
        return x

    monkeypatch.setattr("mutual_forcing.lab.training.pictures.velocity", velocity)
    sound_of_pictures(made, data, draws(0, clips), **LEVELS, histories=SHARES)
    *steps, (past, x, sigma, told) = found["calls"]
    assert len(steps) == 4 and torch.equal(past.video, data.video)
    assert not sigma.video.any() and sigma.audio.all()
    for *_, heard in found["calls"]:
        assert not heard.track.any() and heard.track.shape[1] == heard.seen.shape[1]
    assert torch.equal(x.video, data.video)
    assert torch.equal(told.seen, seen_in(made, data.video))
    first, rest = past.audio[:, : LAYOUT.audio_first], past.audio[:, LAYOUT.audio_first :]
    true = data.audio[:, : LAYOUT.audio_first], data.audio[:, LAYOUT.audio_first :]

    def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a == b).flatten(1).all(dim=1)

    def check(which: torch.Tensor, expected: float) -> None:
        assert float(which.float().mean()) == pytest.approx(expected, abs=0.055)

    check(same(past.audio, data.audio.roll(1, 0)), 0.1)
    check(same(rest, true[1]) & ~same(first, true[0]), 0.1)
    # A shift of nothing is one of the others.
    length, each = data.audio.shape[1], 2 * NEAR + 1
    check(same(past.audio, data.audio), 0.2 + 0.35 / each + 0.25 / length)
    late = torch.stack([same(past.audio, data.audio.roll(n, 1)) for n in range(length)], dim=1)
    near = 0.35 * NEAR / each + 0.25 * NEAR / length
    check(late[:, 1 : 1 + NEAR].any(dim=1), near)
    check(late[:, -NEAR:].any(dim=1), near)
    check(late[:, 1 + NEAR : -NEAR].any(dim=1), 0.25 * (length - each) / length)


def test_a_layer_has_two_adapters_and_each_its_own_factor() -> None:
    linear, x = torch.nn.Linear(3, 2), torch.randn(2, 4, 3)
    linear.few_step, linear.pictures = (
        Adapter((3, 2), 1, torch.nn, torch.float32, "cpu") for _ in range(2)
    )
    expected = linear(x)
    for factor, one in ((0.5, linear.few_step), (2.0, linear.pictures)):
        torch.nn.init.normal_(one.up.weight)
        expected = expected + factor * x @ one.down.weight.T @ one.up.weight.T
    torch.testing.assert_close(adapted(linear, x, torch.tensor([[[0.5, 2.0]]])), expected)
    told = ModalityEmbedding(torch.zeros(1, 3, 6, 4), *[torch.zeros(1)] * 3, None)
    few = told._replace(factors=torch.tensor([[[0.25], [0.5], [0.75]]]))
    assert seeing(told).factors.tolist() == [[[0, 1]] * 3]
    shown = torch.tensor([False, True, True])
    assert seeing(few, shown).factors.tolist() == [[[0.25, 0], [0.5, 1], [0.75, 1]]]


@torch.no_grad()
def test_what_it_learned_is_stored_in_the_eight_bits_that_it_learned_with(
    bundle: Bundle, tmp_path: Path
) -> None:
    parts = bundle.transformer, bundle.text_encoder, bundle.video_codec, bundle.audio_codec
    save_bundle(tmp_path / "m.safetensors", *parts, STREAM, title="", dtype=torch.float32)
    stored, found = load_file(tmp_path / "m.safetensors"), load_bundle(tmp_path / "m.safetensors")
    for name, value in bundle.transformer.state_dict().items():
        kept = stored[f"model.diffusion_model.{name}"]
        in_eight = is_sight(name) and value.ndim > 1
        assert kept.dtype == (SIGHT_DTYPE if in_eight else torch.float32), name
        expected = value.to(SIGHT_DTYPE).float() if in_eight else value
        assert torch.equal(found.transformer.state_dict()[name], expected), name


def test_it_learns_with_its_matrices_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = system(), []

    def loss(found: System, _: Batch) -> torch.Tensor:
        matrix = found.transformer.picture_track.time_in.weight
        seen.append(matrix.detach().clone())
        return matrix.square().sum()

    monkeypatch.setattr("mutual_forcing.lab.training.stages.sound_read", loss)
    recipe = LEVELS | {"histories": SHARES}
    stage = PictureStage(made, Trained(0.02, 0.9, torch.float32, ALONE), recipe, True)
    exact = made.transformer.picture_track.time_in.weight.detach().clone()
    stage.step(batch(2), draws(0, 2), 0, 0.0, 0.0)
    assert torch.equal(seen[0], exact.to(SIGHT_DTYPE).float())
    assert not torch.equal(seen[0], exact)
    # What it learns from is rounded, and what moves is not.
    assert torch.equal(made.transformer.picture_track.time_in.weight, exact)
