"""The procedural world: windows, captions, and the claim that what is seen is what is heard."""

from __future__ import annotations

import numpy as np
import pytest
from mutual_forcing.lab.world.captions import OMIT_PROBABILITY
from mutual_forcing.lab.world.draw import MOUTH_HEIGHT, MOUTH_RGB
from mutual_forcing.lab.world.render import render
from mutual_forcing.lab.world.scene import (
    ATTRIBUTES,
    KINDS,
    VOCABULARY,
    Scene,
    caption,
    parse,
    sample_scene,
    words,
)

HIT_KINDS = KINDS[1:]


def scene_of(kind: str, seed: int = 0, **attributes: str) -> Scene:
    return sample_scene(np.random.default_rng(seed), kind, attributes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_equals_the_same_cut_of_the_whole(kind):
    scene = scene_of(kind, seed=3)
    whole, part = render(scene, 4), render(scene, 2, start=1)
    assert whole.video.shape == (97, 64, 64, 3) and whole.video.dtype == np.uint8
    assert whole.audio.shape == (160 + 64_000,) and whole.audio.dtype == np.float32
    assert whole.f0.shape == (401,) and whole.mouth.shape == (97,)
    assert np.array_equal(part.video, whole.video[24:73])
    assert np.allclose(part.audio, whole.audio[16_000:48_160], atol=1e-6)
    assert np.array_equal(part.f0, whole.f0[100:301])
    assert np.allclose(part.mouth, whole.mouth[24:73], atol=1e-6)
    inside = whole.hits[(whole.hits >= 1) & (whole.hits < 3.01)] - 1
    assert np.allclose(part.hits, inside)


@pytest.mark.parametrize("kind", KINDS)
def test_far_windows_render_and_levels_are_normalised(kind):
    for seed in range(3):
        clip = render(scene_of(kind, seed), 3, start=100_000)
        assert 0.35 < np.abs(clip.audio).max() < 0.7
        assert clip.video.std() > 10


def test_sampling_is_deterministic_and_colours_differ():
    for seed in range(50):
        scene = sample_scene(np.random.default_rng(seed))
        assert scene == sample_scene(np.random.default_rng(seed))
        coloured = ("hair", "shirt", "background", "ball", "bell", "drum")
        colours = [scene.attributes[k] for k in coloured if k in scene.attributes]
        assert len(set(colours)) == len(colours)
        assert set(scene.attributes) == set(ATTRIBUTES[scene.kind])


def test_bad_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="expected one of"):
        scene_of("piano")
    with pytest.raises(ValueError, match="expected one of"):
        scene_of("ball", ball="pink")
    with pytest.raises(ValueError, match="expected at least 64"):
        render(scene_of("ball"), 1, size=32)


def test_captions_read_back_as_what_they_name():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    known, used = set(VOCABULARY), set()
    said = total = 0
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        truth = {"kind": scene.kind, **scene.attributes}
        assert parse(caption(scene)) == truth
        text = caption(scene, rng)
        found = parse(text)
        assert found["kind"] == scene.kind, text
        assert found.items() <= truth.items(), text
        said += len(found) - 1
        total += len(truth) - 1
        used |= set(words(text))
    assert used <= known
    assert known <= used, sorted(known - used)
    assert abs(1 - said / total - OMIT_PROBABILITY) < 0.04


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a girl with red hair, pale skin and a green shirt on a blue background slowly says "
            "ba mi tu in a high voice",
            "kind=speech hair=red skin=pale shirt=green background=blue tempo=slow voice=high",
        ),
        (
            "a yellow ball bounces fast on a purple background with a low sound",
            "kind=ball ball=yellow tempo=fast background=purple pitch=low",
        ),
        (
            "a blue bell swings slowly and rings high, white background",
            "kind=bell bell=blue tempo=slow pitch=high background=white",
        ),
        (
            "Purple background, a stick quickly hits a drum that is black. Deep sound!",
            "kind=drum drum=black background=purple tempo=fast pitch=low",
        ),
        (
            "in a deep voice: person, hair red, shirt green, at a steady pace",
            "kind=speech voice=low hair=red shirt=green tempo=steady",
        ),
        ("a sunny day", ""),
    ],
)
def test_parse_reads_free_sentences(text, expected):
    found = parse(text)
    syllables = found.pop("syllables", None)
    assert found == dict(pair.split("=") for pair in expected.split())
    assert syllables == ("ba mi tu" if "mi" in text.split() else None)


@pytest.mark.parametrize("tempo", ["slow", "fast"])
@pytest.mark.parametrize("kind", HIT_KINDS)
def test_hits_are_the_onsets_of_the_sound(kind, tempo):
    clip = render(scene_of(kind, seed=5, tempo=tempo), 4)
    bright = np.diff(clip.audio, n=2, prepend=[0.0, 0.0])
    level = np.sqrt(np.convolve(bright**2, np.ones(48) / 48)[: len(bright)])  # 3 ms, causal
    novelty = level - np.concatenate([np.zeros(48), level[:-48]])
    rate = {"slow": 1.0, "fast": 2.5}[tempo]
    assert abs(len(clip.hits) - 4 * rate) <= 1
    for hit in clip.hits[(clip.hits > 0.1) & (clip.hits < 3.8)]:
        near = slice(int((hit - 0.1) * 16_000), int((hit + 0.2) * 16_000))
        onset = (near.start + np.argmax(novelty[near])) / 16_000
        assert abs(onset - hit) < 0.010


def test_the_ball_is_lowest_when_it_is_heard():
    scene = scene_of("ball", ball="red", background="white", tempo="steady")
    clip = render(scene, 4)
    red = (clip.video[..., 0] > 150) & (clip.video[..., 1] < 100)
    bottom = np.array([np.flatnonzero(frame.any(1)).max() for frame in red])
    for hit in clip.hits[clip.hits < 4]:
        at = round(hit * 24)
        near = bottom[max(0, at - 6) : at + 7]
        assert bottom[at] >= near.max() - 2 and bottom[at] >= 50


def loudness(audio: np.ndarray, frames: int) -> np.ndarray:
    """RMS of 40 ms about each frame."""
    power = np.convolve(audio.astype(np.float64) ** 2, np.ones(640) / 640, mode="same")
    at = np.minimum(np.arange(frames) * 16_000 // 24, len(power) - 1)
    return np.sqrt(np.maximum(power[at], 0))


@pytest.mark.parametrize("tempo", ["slow", "steady", "fast"])
def test_the_mouth_opens_as_the_voice_sounds(tempo):
    for seed in range(4):
        clip = render(scene_of("speech", seed, tempo=tempo), 4)
        assert clip.mouth.min() >= 0 and 0.4 < clip.mouth.max() <= 1
        assert np.corrcoef(loudness(clip.audio, 97), clip.mouth)[0, 1] > 0.9


def test_the_drawn_mouth_is_the_true_one():
    fixed = {"skin": "pale", "hair": "blue", "shirt": "green", "background": "white"}
    clip = render(scene_of("speech", 2, syllables="ba du", **fixed), 2)
    inside = np.abs(clip.video.astype(int) - MOUTH_RGB).sum(-1) < 60
    tall = inside[:, 28:52].any(2).sum(1)
    assert np.abs(tall - MOUTH_HEIGHT * clip.mouth).max() <= 2.0
    assert np.corrcoef(tall, clip.mouth)[0, 1] > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_true_pitch_is_the_measured_pitch(kind):
    for seed, pitch in enumerate(("low", "middle", "high")):
        key = "voice" if kind == "speech" else "pitch"
        scene = scene_of(kind, seed, **{key: pitch})
        clip = render(scene, 4)
        voiced = clip.f0[clip.f0 > 0]
        assert len(voiced) > 100 and np.all(voiced == np.float32(scene.f0))
        size = 1 << 17
        spectrum = np.abs(np.fft.rfft(clip.audio * np.hanning(len(clip.audio)), size))
        candidates = np.arange(scene.f0 / 1.4, scene.f0 * 1.4, 0.1)  # within an octave
        bins = np.rint(candidates[:, None] * np.arange(1, 4) * size / 16_000).astype(int)
        comb = np.log(spectrum[bins] + 1e-3).sum(1)
        assert abs(candidates[comb.argmax()] / scene.f0 - 1) < 0.01


def test_a_pitch_is_absent_in_silence():
    clip = render(scene_of("speech", 1, syllables="sa ta"), 2)
    assert 0.2 < np.mean(clip.f0 == 0) < 0.8
    drum = render(scene_of("drum", 1, tempo="slow"), 3)
    assert np.mean(drum.f0 == 0) > 0.1


def test_other_sizes_show_the_same_picture():
    for kind in KINDS:
        scene = scene_of(kind, 4)
        small, large = render(scene, 0).video, render(scene, 0, size=128).video
        mean = large.reshape(1, 64, 2, 64, 2, 3).mean((2, 4))
        assert np.abs(mean - small).mean() < 4
