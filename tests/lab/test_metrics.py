"""The measurements, tried where the truth is known: on true clips, whole, rough and spoilt."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from mutual_forcing.lab.metrics import evaluate, longrun, reference
from mutual_forcing.lab.metrics.attributes import measure
from mutual_forcing.lab.metrics.clips import PromptedClip, held_out, true_clip
from mutual_forcing.lab.metrics.frechet import frechet_distance, moments
from mutual_forcing.lab.metrics.samples import onsets, pitch
from mutual_forcing.lab.metrics.score import Target, judge, summary, targets
from mutual_forcing.lab.metrics.sync import hit_sync, match, mouth_sync, seen_hits
from mutual_forcing.lab.world import draw, scene
from mutual_forcing.lab.world.render import render
from mutual_forcing.measures.seams import seam_steps, seams
from mutual_forcing.model_loaders.bundle import (
    StreamDefaults,
    load_bundle,
    save_bundle,
)
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.rollout import sampler_settings
from mutual_forcing.tests.tiny import TRANSFORMER, tiny_parts

RATE, FPS = 16_000, 24
HIT_KINDS = ("ball", "bell", "drum")


def drawn(kind: str, seed: int = 0, seconds: int = 4, **attributes: str):
    made = scene.sample_scene(np.random.default_rng([3, seed]), kind, attributes)
    return made, render(made, seconds)


def rough(clip, seed: int = 0):
    """What a poor codec may do: blur, noise fine and coarse, a tint; hiss 35 dB under the peak."""
    rng = np.random.default_rng(seed)
    video = clip.video.astype(np.float32)
    for axis in (1, 2):
        video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
    coarse = rng.normal(0, 10, (len(video), 16, 16, 3)).repeat(4, 1).repeat(4, 2)
    video += coarse + rng.normal(0, 8, video.shape) + rng.normal(0, 5, 3)
    audio = clip.audio + rng.normal(0, 0.5 * 10 ** (-35 / 20), len(clip.audio))
    return video.clip(0, 255).astype(np.uint8), audio


def test_the_words_mean_what_the_world_means():
    assert reference.COLOURS == draw.RGB and reference.SKINS == draw.SKIN_RGB
    assert reference.WOOD == draw.WOOD
    assert reference.PITCH_HZ == scene.PITCH_HZ
    assert reference.HITS_PER_SECOND == scene.HITS_PER_SECOND
    assert reference.SYLLABLES_PER_SECOND == scene.SYLLABLES_PER_SECOND
    for kind, names in reference.MEASURED.items():
        assert set(names) == set(scene.ATTRIBUTES[kind]) - {"syllables"}


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("spoilt", [False, True])
def test_attributes_are_measured_right(kind, spoilt):
    for seed, tempo in enumerate(("slow", "steady", "fast")):
        made, clip = drawn(kind, seed, tempo=tempo)
        video, audio = rough(clip, seed) if spoilt else (clip.video, clip.audio)
        found = measure(video, audio, RATE, FPS, kind)
        truth = {"kind": kind, **made.attributes}
        truth.pop("syllables", None)
        assert found == truth


def test_larger_pictures_measure_the_same():
    made, _ = drawn("speech", 5)
    small, large = render(made, 2), render(made, 2, size=128)
    args = (small.audio, RATE, FPS, "speech")
    assert measure(small.video, *args) == measure(large.video, *args)


def test_nothing_measures_as_none():
    blank = np.full((49, 64, 64, 3), 243, np.uint8)
    found = measure(blank, np.zeros(32_160), RATE, FPS, "bell")
    assert found["bell"] == found["pitch"] == found["tempo"] == reference.NONE
    assert found["background"] == "white" and found["kind"] != "bell"
    sync = hit_sync(blank, np.zeros(32_160), RATE, FPS, "bell")
    assert not len(sync.seen) and not len(sync.heard) and np.isnan(sync.median_offset)
    assert mouth_sync(blank, np.zeros(32_160), RATE, FPS).at_zero == 0


@pytest.mark.parametrize(
    ("video", "audio", "kind", "message"),
    [
        (np.zeros((5, 32, 64, 3), np.uint8), np.zeros(9), "ball", "at least 64"),
        (np.zeros((5, 64, 64, 3)), np.zeros(9), "ball", "of uint8"),
        (np.zeros((5, 64, 64, 3), np.uint8), np.zeros((1, 9)), "ball", "mono"),
        (np.zeros((5, 64, 64, 3), np.uint8), np.zeros(9), "piano", "expected one of"),
    ],
)
def test_bad_input_is_named(video, audio, kind, message):
    with pytest.raises(ValueError, match=message):
        measure(video, audio, RATE, FPS, kind)


@pytest.mark.parametrize("kind", HIT_KINDS)
def test_seen_and_heard_hits_are_the_true_ones(kind):
    _, clip = drawn(kind, 1, tempo="steady")
    inner = clip.hits[(clip.hits > 0.4) & (clip.hits < 3.6)]
    for times in (seen_hits(clip.video, FPS, kind), onsets(clip.audio, RATE)):
        nearest = np.abs(times[None, :] - inner[:, None]).min(1)
        assert nearest.max() < 0.008
    sync = hit_sync(clip.video, clip.audio, RATE, FPS, kind)
    assert sync.median_offset < 5 and sync.seen_alone == sync.heard_alone == 0


@pytest.mark.parametrize("kind", HIT_KINDS)
def test_sound_that_is_late_or_missing_shows(kind):
    _, clip = drawn(kind, 2, tempo="slow")
    late = hit_sync(clip.video, np.roll(clip.audio, 1600), RATE, FPS, kind)
    assert np.median(late.offsets) == pytest.approx(100, abs=5)
    silent = hit_sync(clip.video, np.zeros_like(clip.audio), RATE, FPS, kind)
    assert silent.seen_alone > 1 and silent.median_offset == np.inf
    still = hit_sync(clip.video[[20] * 97], clip.audio, RATE, FPS, kind)
    assert not len(still.seen) and still.heard_alone > 1


def test_events_are_matched_once_and_nearest_first():
    assert match(np.array([1.0, 1.15]), np.array([1.1])) == [(1, 0)]
    assert match(np.array([1.0]), np.array([1.3])) == []


def test_the_mouth_follows_the_voice_and_a_shift_is_found():
    for seed, skin in enumerate(("pale", "tan", "brown")):
        _, clip = drawn("speech", seed, skin=skin)
        sync = mouth_sync(clip.video, clip.audio, RATE, FPS)
        assert sync.at_zero > 0.9 and sync.lag == 0
        late = mouth_sync(clip.video, np.roll(clip.audio, 3 * RATE // FPS), RATE, FPS)
        assert late.lag == pytest.approx(125) and late.best > 0.9 > late.at_zero


def test_pitch_of_plain_tones():
    t = np.arange(RATE) / RATE
    for hertz in (70.0, 220.0, 740.0):
        tone = 0.3 * np.sin(2 * np.pi * hertz * t) + 0.2 * np.sin(4 * np.pi * hertz * t)
        assert pitch(tone, RATE) == pytest.approx(hertz, rel=0.005)
    assert np.isnan(pitch(0.1 * np.random.default_rng(0).normal(size=RATE), RATE))


def test_frechet_distance_of_known_distributions():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3))
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments(a), moments(a + 2)) == pytest.approx(12, rel=1e-6)
    # Twice as wide in each of three channels: (2 - 1)^2 per channel.
    assert frechet_distance(moments(a), moments(2 * a)) == pytest.approx(3, rel=0.1)
    few, more = moments(rng.normal(size=(5, 20))), moments(rng.normal(size=(6, 20)))
    assert np.isfinite(frechet_distance(few, more))
    with pytest.raises(ValueError, match="same features"):
        frechet_distance(moments(a), few)
    with pytest.raises(ValueError, match="NaN"):
        moments(np.full((3, 2), np.nan))


def test_seams_are_found_where_there_are_some():
    whole, cut = [], []
    for seed, kind in enumerate((*reference.KINDS, *reference.KINDS)):
        _, clip = drawn(kind, seed)
        borders = ([25, 49, 73], [16_160, 32_160, 48_160])
        whole.append(seam_steps(clip.video, clip.audio, RATE, *borders))
        video, audio = clip.video.copy(), clip.audio.copy()
        for frame, sample in zip(*borders, strict=True):
            video[frame:] = video[frame:] * 0.95
            audio[sample:] = np.roll(audio[sample:], 700) * 0.6
        cut.append(seam_steps(video, audio, RATE, *borders))
    good, bad = seams(whole), seams(cut)
    assert set(good) == {"picture", "click", "level", "spectrum"}
    assert all(0.35 < seam.rank < 0.65 and seam.borders == 24 for seam in good.values())
    assert bad["picture"].rank > 0.9 and bad["click"].rank > 0.7
    assert all(bad[name].rank > good[name].rank for name in good)
    assert seams([]) == {}


def test_scores_of_true_clips_meet_the_targets_and_of_wrong_ones_do_not():
    clock = Clock.of(TRANSFORMER)
    prompts = held_out(8)
    assert [prompt.scene.kind for prompt in prompts[:4]] == list(reference.KINDS)
    assert prompts == held_out(8) and prompts[0].named["kind"] == "speech"
    judged = [judge(true_clip(prompt, 4), clock) for prompt in prompts]
    assert all(len(one.steps["picture"].border) == 3 for one in judged)
    true = summary(judged)
    assert true["attributes"] == true["kind"] == 1 and true["hits"]["pairs"] > 15
    assert all(goal.met for goal in targets(true, true, 42))
    # Every prompt answered by another one's clip.
    others = [prompts[i - 1] for i in range(8)]
    swapped = [
        judge(PromptedClip(prompt, 0, true.video, true.audio), clock)
        for prompt, true in zip(prompts, (true_clip(other, 4) for other in others), strict=True)
    ]
    wrong = summary(swapped)
    assert wrong["attributes"] < 0.5 and wrong["kind"] == 0
    assert not any(one.right.get(one.clip.prompt.scene.kind) for one in swapped)
    assert not all(goal.met for goal in targets(wrong, true, 42))
    assert not Target("anything", None, 1, True).met


def test_free_wording_only_counts_what_it_names():
    prompts = held_out(40, free=True)
    assert any(len(p.named) < 1 + len(p.scene.attributes) for p in prompts)
    assert all(
        p.named.items() <= {"kind": p.scene.kind, **p.scene.attributes}.items() for p in prompts
    )


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_bundle(path, *tiny_parts(), StreamDefaults(window=2), title="tiny random model")
    return path


def run(monkeypatch, module, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *args])
    return module.main()


def test_evaluate_writes_numbers_and_a_picture(monkeypatch, tmp_path, model_file):
    out = tmp_path / "measured" / "tiny"
    args = ["--model", str(model_file), "--seconds", "2", "--steps", "2", "--batch", "3"]
    assert run(monkeypatch, evaluate, *args, "--prompts", "4", "--out", str(out)) == 0
    results = json.loads(out.with_suffix(".json").read_text())
    assert set(results["summary"]) == {"truth", "codec", "generated"}
    assert results["summary"]["truth"]["attributes"] > 0.9
    assert len(results["clips"]) == 4 and len(results["targets"]) == 3
    assert results["record"]["commit"] and "evaluate" in results["record"]["command"]
    assert out.with_suffix(".png").stat().st_size > 1000
    args = [*args, "--prompts", "1", "--kinds", "ball", "--check"]
    assert run(monkeypatch, evaluate, *args, "--out", str(out)) == 1


def test_a_clip_does_not_depend_on_its_batch(model_file):
    bundle, sampler = load_bundle(model_file), sampler_settings("multi", 2, 2.0)
    prompts = held_out(3)
    together = evaluate.generate_all(bundle, prompts, 1, 2, sampler, None, 3)
    alone = evaluate.generate_all(bundle, prompts, 1, 2, sampler, None, 1)
    for a, b in zip(together, alone, strict=True):
        assert a.seed == b.seed and a.video.shape == (25, 64, 64, 3)
        assert np.abs(a.video.astype(int) - b.video).max() <= 2
        # An untrained voice screams, and its phase adds up rounding; another clip is 0.5 away.
        assert np.abs(a.audio - b.audio).mean() < 5e-3


def test_longrun_writes_cost_per_block(monkeypatch, tmp_path, model_file):
    out = tmp_path / "long"
    args = ["--model", str(model_file), "--seconds", "22", "--mode", "few", "--steps", "2"]
    assert run(monkeypatch, longrun, *args, "--out", str(out)) == 0
    results = json.loads(out.with_suffix(".json").read_text())
    assert len(results["blocks"]["seconds"]) == 23
    assert set(results["right at the end"]) == {"kind", *reference.MEASURED["speech"]}
    assert run(monkeypatch, longrun, "--seconds", "5", "--out", str(out)) == 2


def test_missing_models_are_one_clear_line(monkeypatch, tmp_path, caplog):
    for module in (evaluate, longrun):
        args = ["--model", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "x")]
        assert run(monkeypatch, module, *args) == 2
    assert "none.safetensors" in caplog.text


def test_costs_are_medians_of_neighbours():
    cost = longrun.BlockCost(1.0, 1.0, 10.0, 10.0)
    costs = [cost] * 10
    costs[5] = replace(cost, seconds=99.0)
    assert longrun.near(costs, 5, "seconds") == longrun.near(costs, 9, "seconds") == 1.0
    assert longrun.resident_mb() > 10
