"""The comparison: equal clips score equally, a resumed row is the row, claims hold."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from mutual_forcing.lab.metrics import claims, compare, horizon, runner
from mutual_forcing.lab.metrics.candidates import (
    Candidate,
    Protocol,
    candidate_of,
    measure,
    scores,
    true_reference,
)
from mutual_forcing.lab.metrics.clips import (
    as_arrays,
    decoded_blocks,
    generate,
    generate_pieces,
    held_out,
    in_pieces,
    redrawn,
    true_clip,
)
from mutual_forcing.lab.metrics.features import (
    SPAN,
    Features,
    apart,
    distances,
    features,
    load_reference,
    reference_of,
    save_reference,
    stacked,
)
from mutual_forcing.lab.metrics.score import judge, summary
from mutual_forcing.lab.world.scene import caption
from mutual_forcing.samplers.decode import DecodedBlock
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.tests.tiny import save_tiny

CLIPS = 4


@pytest.fixture(scope="module")
def true_clips():
    return [true_clip(prompt, 4) for prompt in held_out(CLIPS)]


def test_redrawn_scenes_have_the_same_caption_and_are_others():
    prompts = held_out(8)
    one, other = redrawn(prompts, 0), redrawn(prompts, 1)
    for prompt, a, b in zip(prompts, one, other, strict=True):
        assert caption(a.scene) == caption(b.scene) == prompt.text == a.text
        assert a.scene != prompt.scene and a.scene != b.scene
        assert a.scene.offset != b.scene.offset
    assert redrawn(prompts, 0) == one


def test_true_clips_go_on_where_they_are_cut():
    prompt = held_out(2)[1]
    whole, late = true_clip(prompt, 4), true_clip(prompt, 2, 2)
    assert np.array_equal(whole.video[48:], late.video)
    assert np.abs(whole.audio[32_000:] - late.audio).max() < 1e-5


def test_features_are_those_of_each_clip_alone(bundle, true_clips):
    together = features(bundle, true_clips)
    alone = stacked([features(bundle, [clip]) for clip in true_clips])
    # 97 frames are 13 latents of 2 x 2 tokens; 101 audio latents; the first of each left out.
    assert together.video.shape == (CLIPS * 12 * 4, bundle.video_codec.config.channels)
    assert together.audio.shape == (CLIPS * 20, SPAN * bundle.audio_codec.config.latent_channels)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_set_is_at_no_distance_from_itself_and_at_some_from_others(bundle, true_clips, tmp_path):
    same = features(bundle, true_clips)
    reference = reference_of(same)
    assert distances(same, reference) == pytest.approx((0, 0), abs=1e-4)
    backwards = [replace(c, video=255 - c.video, audio=c.audio[::-1].copy()) for c in true_clips]
    assert min(distances(features(bundle, backwards), reference)) > 0.01
    save_reference(tmp_path / "moments.safetensors", reference)
    kept = load_reference(tmp_path / "moments.safetensors")
    assert distances(same, kept) == distances(same, reference)


def test_scores_agree_with_the_summary_and_count_missing_partners(bundle, true_clips):
    found = features(bundle, true_clips)
    reference = reference_of(found)
    judged = [judge(clip, bundle.clock) for clip in true_clips]
    numbers, table = scores(judged, found, reference), summary(judged)
    assert numbers["attributes"] == table["attributes"] == numbers["paired"] == 1
    assert numbers["offset ms"] == table["hits"]["median |offset| ms"] < 5
    assert numbers["mouth"] == table["mouth"]["correlation"]
    light = [one.without_media() for one in judged]
    assert summary(light) == table and not light[0].clip.video.size
    silent = [replace(clip, audio=np.zeros_like(clip.audio)) for clip in true_clips]
    deaf = scores([judge(clip, bundle.clock) for clip in silent], found, reference)
    assert deaf["offset ms"] == 200 and deaf["paired"] == deaf["mouth"] == 0


def _periodic(bundle, blocks: int, seconds: int):
    """A stream whose frames and samples repeat after `seconds`, in the blocks of the clock."""
    clock, generator = bundle.clock, torch.Generator().manual_seed(0)
    picture = torch.rand((1, int(clock.fps) * seconds, 8, 8, 3), generator=generator)
    sound = torch.rand((1, 1, clock.sample_rate * seconds), generator=generator)
    frames = torch.arange(clock.frames(blocks)) % picture.shape[1]
    samples = torch.arange(clock.samples(blocks)) % sound.shape[2]
    return [
        DecodedBlock(
            picture[:, frames[slice(*clock.frame_span(block))]],
            sound[..., samples[slice(*clock.sample_span(block))]],
        )
        for block in range(blocks)
    ]


def test_pieces_of_a_periodic_stream_are_all_the_same(bundle):
    made = _periodic(bundle, bundle.clock.blocks_for(10), 2)
    pieces = list(in_pieces(made, bundle.clock, 2))
    assert len(pieces) == 5
    for a, b in pairwise(pieces):
        assert a.video.shape[1] == 49 and a.audio.shape[2] == 32_160
        assert torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)
    # The last frame of a piece is the first of the next.
    assert torch.equal(pieces[0].video[:, -1], pieces[1].video[:, 0])


def test_pieces_are_the_stream_cut_and_do_not_depend_on_the_batch(bundle):
    prompts, sampler = held_out(2), sampler_settings("few", 2)
    blocks = list(decoded_blocks(bundle, prompts, [3, 4], 5, sampler))
    (whole,) = generate(bundle, prompts[:1], [3], 5, sampler)
    pieces = [one[0] for one in generate_pieces(bundle, prompts, [3, 4], 2, 2, sampler)]
    assert [piece.seed for piece in pieces] == [3, 3]
    for piece, start in zip(pieces, (0, 2), strict=True):
        part = whole.video[24 * start : 24 * start + 49].astype(int)
        assert np.abs(piece.video - part).max() <= 2
        sound = whole.audio[16_000 * start : 16_000 * start + 32_160]
        assert np.abs(piece.audio - sound).mean() < 5e-3
    assert as_arrays(blocks[0], 1)[0].shape == (1, 64, 64, 3)


@pytest.mark.parametrize("label", ["m:few:3", "m:multi:2", "m:multi:3:1", "m:few:2:renoise"])
def test_passes_a_block_are_what_the_network_runs(bundle, label):
    row, passes = candidate_of(label), []
    hook = bundle.transformer.patchify_proj.register_forward_hook(lambda *_: passes.append(1))
    prompt, counts = bundle.prompt("red ball", guided=True), []
    try:
        for blocks in (2, 4):
            passes.clear()
            # With a window that is never full no pass is replayed as a tape, without the network.
            begun = bundle.begin(window=blocks)
            list(rollout(bundle, prompt, begun, blocks, row.sampler))
            counts.append(len(passes))
    finally:
        hook.remove()
    assert counts[1] - counts[0] == 2 * row.evaluations


@pytest.mark.parametrize(
    "label", ["m", "m:few", "m:some:4", "truth:few:4", "m:few:4:5.0", "m:few:0", "a/b:few:4"]
)
def test_rows_that_mean_nothing_are_named(label):
    with pytest.raises(ValueError, match=label):
        candidate_of(label)


def test_prompts_may_be_those_of_held_out_combinations():
    wanted = ("ball", "red", "green"), ("drum", "black")
    protocol = Protocol(prompts=6, seeds=1, seconds=3, combinations=wanted)
    said = [set(prompt.text.split()) for prompt in protocol.asked()]
    assert len(said) == 6 and all(any(one.issuperset(w) for w in wanted) for one in said)
    assert protocol.described()["combinations"] == ["ball red green", "drum black"]
    # Rows that were measured before there were any are still known.
    assert "combinations" not in Protocol(prompts=6, seeds=1, seconds=3).described()
    with pytest.raises(ValueError, match="found 0 captions"):
        held_out(1, combinations=[("ball", "drum")])


def test_rows_of_true_clips_have_known_scores(bundle):
    protocol = Protocol(prompts=4, seeds=2, seconds=3, pieces=2)
    reference = true_reference(bundle, protocol)
    truth = measure(Candidate("truth", "truth"), protocol, bundle, bundle, reference)
    assert [len(seed) for seed in truth] == [2, 2]
    for seed in truth:
        for piece in seed:
            assert piece["attributes"] == piece["paired"] == 1
            assert piece["offset ms"] < 5 and piece["mouth"] > 0.9
            assert piece["video distance"] > 0 and piece["audio distance"] > 0
    assert truth[0] != truth[1]
    # With two seeds there is one pair, and clips of one prompt are not all the same.
    for name in ("video variety", "audio variety"):
        assert truth[0][0][name] == pytest.approx(truth[1][0][name]) and truth[0][0][name] > 0
    torn = measure(Candidate("unsynced", "unsynced"), protocol, bundle, bundle, reference)
    for one, other in zip(torn[0], truth[0], strict=True):
        assert one["attributes"] == 1 and one["video distance"] == other["video distance"]
        assert one["offset ms"] > 40 and one["mouth"] < 0.7


def test_variety_is_how_far_clips_of_one_prompt_are_apart():
    one = Features(np.zeros((4, 2), np.float32), np.ones((2, 5), np.float32))
    other = Features(np.add(one.video, [[3], [3], [1], [1]]), one.audio)
    # Two clips of two features each, 3 and 1 apart; the sound is the same.
    assert apart(one, other, 2) == (2.0, 0.0)
    made = [runner.Made([[[{"video variety": v, "audio variety": v}]]], []) for v in (1.0, 4.0)]
    assert compare.varied(*made) == "0.25, 0.25"
    assert compare.varied(made[0], runner.Made([[[{}]]], [])) == "-"


def test_a_distance_below_the_truths_says_that_clips_are_too_few():
    def row(distance: float) -> dict[str, claims.Estimate]:
        return {"video distance": claims.Estimate((distance, distance))}

    found = {"truth": row(11.4), "codec": row(11.0), "m:few:4": row(7.6), "n:few:4": row(12.0)}
    (line,) = compare.too_few(found, 16)
    assert "m:few:4 are below the truth's 11.40" in line and "16 clips" in line
    assert compare.too_few(found | {"m:few:4": row(12.0)}, 16) == []


def metric(key: str) -> claims.Metric:
    return next(one for one in claims.METRICS if one.key == key)


def test_rules_follow_the_direction_of_the_metric():
    estimate = claims.Estimate
    up, down = metric("attributes"), metric("offset ms")
    other = estimate((0.8, 0.8))
    assert claims.within(up, estimate((0.76, 0.76)), other) == (pytest.approx(0.76), True)
    assert not claims.within(up, estimate((0.75, 0.75)), other)[1]
    late = estimate((40.0, 40.0))
    assert claims.within(down, estimate((41.9, 41.9)), late)[1]
    assert not claims.within(down, estimate((42.1, 42.1)), late)[1]
    assert claims.better(down, estimate((39.0,)), late)[1]
    assert not claims.better(down, late, late)[1] and not claims.better(up, other, other)[1]
    assert claims.better(up, estimate((1.0,)), estimate((1.0,)))[1]
    # Differences of -0.5, 0, 0.5, 1 ms: chance explains 1.03 ms, and 5 % are 2 ms.
    noisy = estimate((39.5, 40.0, 40.5, 41.0))
    steady = estimate((40.0,) * 4)
    assert claims.no_worse(down, noisy, steady) == (pytest.approx(41.027, abs=1e-3), True)
    assert not claims.no_worse(down, estimate((41.5,) * 4), steady)[1]
    wild = estimate((20.0, 60.0, 45.0, 45.0))
    assert claims.no_worse(down, wild, steady) == (pytest.approx(42.0), False)
    assert claims.no_worse(up, other, other)[1]


def test_limits_are_students_and_of_trainings_where_there_are_several():
    estimate = claims.Estimate
    # Tables of t give 4.3027 for 2 degrees of freedom at 97.5 %.
    assert estimate((1.0, 2.0, 3.0)).limit == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert estimate((1.0,)).limit is None
    scored = [[{**_scores(1, 1, mouth=m)[0][0][0]} for m in pair] for pair in ((1, 3), (5, 7))]
    assert claims.estimates(scored) == {"mouth": estimate((2.0, 6.0), trainings=True)}
    assert claims.estimates(scored[:1]) == {"mouth": estimate((1.0, 3.0))}
    # Sampling seeds go in pairs, trainings do not: Welch's interval, by hand.
    a, b = (3.0, 4.0, 5.0), (1.0, 2.0, 3.0)
    assert claims.limit_of_difference(estimate(a), estimate(b)) == 0
    welch = claims.limit_of_difference(estimate(a, True), estimate(b, True))
    assert welch == pytest.approx(2.7764 * (2 / 3) ** 0.5, abs=1e-4)
    assert claims.limit_of_difference(estimate((1.0,)), estimate(b)) is None


def test_what_is_kept_is_below_one_where_it_got_worse():
    assert metric("mouth").kept(0.8, 0.6) == pytest.approx(0.75)
    assert metric("offset ms").kept(30, 60) == 0.5
    # Hits that never had partners did not stay in time.
    assert metric("offset ms").kept(200.0, 200.0) is None
    assert metric("paired").kept(0.0, 0.0) == 1 and metric("mouth").kept(-0.1, 0.5) is None


def _found(**means: float) -> dict[str, claims.Estimate]:
    return {key.replace("_", " "): claims.Estimate((value, value)) for key, value in means.items()}


def test_claims_hold_the_right_rows_against_each_other():
    rows = [
        candidate_of(f"{name}:{how}") for name in "ab" for how in ("few:4", "few:8", "multi:50")
    ]
    rows += [candidate_of("c:multi:4")]
    found = {row.label: _found(attributes=0.9, video_distance=4.0) for row in rows}
    found["a:few:4"] = _found(attributes=0.91, video_distance=4.3)
    found["c:multi:4"] = _found(attributes=0.5, video_distance=9.0)
    asked = claims.questions(rows, "a", ["b", "c"])
    floor = _found(video_distance=2.0)
    told = [claim for one in asked for claim in one.answers(found, floor)]
    pairs = [(claim.row, claim.against) for claim in told if claim.metric == "attributes"]
    assert pairs == [
        ("a:few:4", "a:multi:50"),
        ("a:few:4", "b:few:4"),
        ("a:few:4", "c:multi:4"),
        ("a:few:8", "a:multi:50"),
    ]
    met = {(claim.against, claim.metric): claim.met for claim in told if claim.row == "a:few:4"}
    assert met["a:multi:50", "attributes"] and not met["a:multi:50", "video distance"]
    assert not met["b:few:4", "video distance"] and met["c:multi:4", "video distance"]
    assert told[1].excess == pytest.approx(2.3 / 2.0) and told[0].excess is None
    assert not claims.questions(rows, "c", [])[0].answers(found, floor)


def test_hits_without_partners_meet_no_claim():
    rows = [candidate_of("a:few:4"), candidate_of("a:multi:50")]
    (question, *_) = claims.questions(rows, "a", [])
    for offset, met in ((200.0, False), (199.0, True)):
        found = {row.label: _found(offset_ms=offset) for row in rows}
        assert [claim.met for claim in question.answers(found, {})] == [met]


def _scores(seeds: int, pieces: int, **values: float) -> runner.Scores:
    keys = [one.key for one in claims.METRICS]
    piece = dict.fromkeys(keys) | {key.replace("_", " "): value for key, value in values.items()}
    return [[[piece] * pieces for _ in range(seeds)]]


def test_windows_of_a_stream_that_never_changes_are_all_the_same():
    spans = horizon.windows_of(60)
    assert spans == [(0, 5), (5, 15), (15, 25), (25, 60)]
    assert horizon.windows_of(15) == [(0, 5), (5, 15)] and horizon.windows_of(80)[-1] == (25, 80)
    assert horizon.windows_of(600)[-2:] == [(25, 540), (540, 600)]
    constant = _scores(2, 12, attributes=0.9, offset_ms=30.0)
    windows = [horizon.in_window(constant, span) for span in spans]
    assert all(
        one["attributes"].mean == pytest.approx(0.9) and "mouth" not in one for one in windows
    )
    assert horizon.kept(windows) == pytest.approx({"attributes": 1.0, "offset ms": 1.0})
    for wrong in (5, 12):
        with pytest.raises(ValueError, match="multiple of 5"):
            horizon.windows_of(wrong)


def test_a_window_is_the_average_of_its_pieces():
    rising = [[[piece | {"mouth": i / 10} for i, piece in enumerate(_scores(1, 12)[0][0])]]]
    assert horizon.in_window(rising, (5, 15))["mouth"].mean == pytest.approx(0.15)
    assert horizon.in_window(rising, (25, 60))["mouth"].mean == pytest.approx(0.8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny(folder / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]


def command(files, out, *more: str) -> list[str]:
    models = [f"{name}={file}" for name, file in zip("ab", files, strict=True)]
    counts = ["--prompts", "2", "--seeds", "2", "--codecs", str(files[0])]
    return ["--models", *models, *counts, "--seconds", "1", "--out", str(out), *more]


def run(monkeypatch, module, *args: str) -> int:
    name = module.__name__.removeprefix("mutual_forcing.")
    monkeypatch.setattr(sys, "argv", [name, *args])
    return module.main()


def _rows(out) -> dict[str, list]:
    return {path.stem: json.loads(path.read_text())["scores"] for path in out.glob("rows/*.json")}


def test_a_comparison_resumed_equals_one_uninterrupted(monkeypatch, tmp_path, files, caplog):
    caplog.set_level("INFO", "mutualforcing")
    rows = ["a:few:4", "b:few:4", "a:multi:2:2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(monkeypatch, compare, *command(files, whole, "--rows", *rows)) == 0
    assert run(monkeypatch, compare, *command(files, halves, "--rows", rows[0])) == 0
    first = (halves / "rows" / "a-few-4.json").stat().st_mtime_ns
    # What a killed run may leave: half a row.
    (halves / "rows" / "b-few-4.json").write_text('{"scores": [[')
    assert run(monkeypatch, compare, *command(files, halves, "--rows", *rows)) == 0
    assert (halves / "rows" / "a-few-4.json").stat().st_mtime_ns == first
    assert _rows(whole) == _rows(halves) and len(_rows(whole)) == 6
    a, b = (json.loads((out / "compare.json").read_text()) for out in (whole, halves))
    assert a["rows"] == b["rows"] and a["claims"] == b["claims"]
    assert a["rows"]["a:multi:2:2"]["evaluations per block"] == 4
    assert {claim["against"] for claim in a["claims"]} == {"b:few:4"}
    assert "± " in (whole / "compare.md").read_text()
    assert "not measured, a row is missing: 4 steps within 5 % of 50" in caplog.text
    # Other settings are another row.
    assert (
        run(monkeypatch, compare, *command(files, halves, "--rows", rows[0], "--seeds", "1")) == 0
    )
    assert len(_rows(halves)["a-few-4"]) == 1


def test_several_trainings_of_a_method_are_one_row(monkeypatch, tmp_path, files):
    models = ["--models", f"m={files[0]},{files[1]}", f"a={files[0]}"]
    args = command(files, tmp_path, "--rows", "m:few:2", "a:few:2", *models)
    assert run(monkeypatch, compare, *args) == 0
    parts = _rows(tmp_path)
    assert {"m-few-2#1", "m-few-2#2", "a-few-2"} <= set(parts)
    assert parts["m-few-2#1"] == parts["a-few-2"]
    results = json.loads((tmp_path / "compare.json").read_text())
    found = results["rows"]["m:few:2"]["video distance"]
    means = [np.mean([seed[0]["video distance"] for seed in parts[f"m-few-2#{n}"]]) for n in (1, 2)]
    assert found["over"] == "trainings" and found["values"] == pytest.approx(means)
    assert len(results["made"]["m:few:2"]) == 2
    assert (
        "sampling seeds of one training or the trainings" in (tmp_path / "compare.md").read_text()
    )


def test_rows_made_at_once_are_those_made_in_turn(monkeypatch, tmp_path, files):
    args = command(files, tmp_path, "--rows", "a:few:2", "b:few:2")
    assert run(monkeypatch, compare, *args) == 0
    turn = _rows(tmp_path)
    for label in ("a-few-2", "b-few-2"):
        (tmp_path / "rows" / f"{label}.json").unlink()
    assert run(monkeypatch, compare, *args, "--ray", "--workers", "2") == 0
    once = _rows(tmp_path)
    for label in ("a-few-2", "b-few-2"):
        for one, other in zip(turn[label], once[label], strict=True):
            assert other[0]["video distance"] == pytest.approx(one[0]["video distance"], rel=0.02)


def test_a_horizon_is_written_and_drawn(monkeypatch, tmp_path, files):
    args = command(files, tmp_path, "--rows", "a:few:2", "--seconds", "10", "--seeds", "1")
    assert run(monkeypatch, horizon, *args) == 0
    results = json.loads((tmp_path / "horizon.json").read_text())
    assert list(results["rows"]["a:few:2"]["windows"]) == ["0-5 s", "5-10 s"]
    truth = results["rows"]["truth"]
    assert truth["kept"]["attributes"] == 1 and len(truth["pieces"]) == 2
    assert (tmp_path / "horizon.png").read_bytes().startswith(b"\x89PNG")
    assert "| a:few:2 |" in (tmp_path / "horizon.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "c:few:4"], "expected names of --models"),
        (["--rows", "a:often:4"], "expected NAME:MODE:STEPS"),
        (["--rows", "a:few:4", "--models", "a=none.safetensors"], "no such model file"),
        (["--rows", "a:few:4", "--models", f"a={__file__}"], "not a safetensors file"),
        (["--rows", "a:few:4", "--models", "a"], "expected NAME=FILE"),
        (["--rows", "a:few:4", "--baselines", "z"], "--claims or --baselines"),
        (["--rows", "a:few:4", "--seeds", "0"], "expected at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(
    monkeypatch, tmp_path, files, caplog, more, message
):
    assert run(monkeypatch, compare, *command(files, tmp_path, *more)) == 2
    assert message in caplog.text and len(caplog.records) == 1


def test_a_model_that_breaks_down_leaves_the_other_rows(monkeypatch, tmp_path, files, capsys):

    def broken(row, *args):
        if row.name == "b":
            raise ValueError("found features with NaN")
        return measure(row, *args)

    monkeypatch.setattr(runner, "measure", broken)
    args = command(files, tmp_path, "--rows", "a:few:2", "b:few:2")
    assert run(monkeypatch, compare, *args) == 1
    assert "b:few:2: refused: found features with NaN" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "compare.json").read_text())["rows"]) == {
        "truth",
        "codec",
        "unsynced",
        "a:few:2",
    }
