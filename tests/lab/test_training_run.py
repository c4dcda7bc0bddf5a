"""Training runs go on after a kill, start from each other and draw what they should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from mutual_forcing.lab.training import omniforcing, train
from mutual_forcing.lab.training.data import Batch, LatentSet
from mutual_forcing.lab.training.latents import encode_set, load_codec
from mutual_forcing.lab.training.sources import clips_from
from mutual_forcing.lab.training.stages import TAUGHT
from mutual_forcing.lab.world.scene import VOCABULARY
from mutual_forcing.tests.tiny import (
    CHANNELS,
    TRANSFORMER,
    VIDEO_CHANNELS,
    save_tiny,
    tiny_parts,
)
from mutual_forcing.tests.tiny_training import (
    CONFIG,
    LAYOUT,
    SETTINGS,
    batch,
    draws,
    lines,
    run,
    write_latents,
)
from safetensors.torch import load_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_latents(tmp_path / "latents", batch(8))
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "latents"


def steps(made: train.Run, count: int) -> list[dict[str, torch.Tensor]]:
    return [made.advance(0.5) for _ in range(count)]


# One of each way through a step; the other methods only weigh its parts differently.
KINDS = [
    ("unimodal", "mutual"),
    ("bidirectional", "mutual"),
    ("mutual", "mutual"),
    ("mutual", "teacher_forcing"),
    ("mutual", "shortcut_only"),
    ("bidirectional_dmd", "mutual"),
    ("causal_ode", "mutual"),
    ("self_forcing", "mutual"),
]


@pytest.mark.parametrize(("stage", "method"), KINDS)
def test_every_method_goes_on_after_a_kill_with_the_same_numbers(
    folder: Path, stage: str, method: str
) -> None:
    options = ["--steps", "3", "--method", method]
    if stage in TAUGHT:
        teacher = run(folder, "teacher", stage="bidirectional")
        teacher.save()
        options += ["--teacher", str(folder.parent / "teacher")]
    whole = run(folder, "whole", *options, stage=stage)
    whole.train()
    first = run(folder, "parts", *options, stage=stage)
    first.log.add(first.advance(first.progress), 0.0)
    first.save()
    again = run(folder, "parts", *options, stage=stage)
    assert again.step == 1
    again.train()
    found, expected = (
        load_file(folder.parent / out / "weights.safetensors") for out in ("parts", "whole")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (one,), (other,) = (lines(folder.parent / out) for out in ("parts", "whole"))
    timed = {"seconds", "seconds per step", "peak MB"}
    assert one.keys() == other.keys() > timed
    assert all(one[key] == other[key] for key in one.keys() - timed)


def test_the_three_stages_follow_each_other_and_sinks_enter_at_the_second(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of one, they end at the same weights."""
    bare = {"transformer": {"num_audio_sink_tokens": 0}, "steps": 2}
    stages = {"bidirectional": bare, "bidirectional_dmd": bare}
    stages |= {stage: {"steps": 2} for stage in ("causal_ode", "self_forcing")}
    config = folder.parent / "stages.json"
    config.write_text(json.dumps(SETTINGS | {"stages": stages}))
    init = run(folder, "init")
    init.save()
    taken = train.Run.advance

    def work(out: str) -> dict[str, torch.Tensor]:
        words = ["--init", init.args.out, "--latents", folder, "--config", config]
        words += ["--out", folder.parent / out]
        omniforcing.work(omniforcing.parser().parse_args([str(word) for word in words]))
        return load_file(folder.parent / out / "self_forcing" / "weights.safetensors")

    expected = work("whole")

    def killed(made: train.Run, progress: float) -> dict[str, torch.Tensor]:
        if made.args.out.name == "causal_ode" and made.step == 1:
            made.save()
            raise KeyboardInterrupt
        return taken(made, progress)

    monkeypatch.setattr(train.Run, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        work("parts")
    monkeypatch.setattr(train.Run, "advance", taken)
    found = work("parts")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sinks = "transformer.audio_sink_tokens"
    weights = [
        load_file(folder.parent / "whole" / stage / "weights.safetensors")
        for stage in omniforcing.CHAIN
    ]
    assert [sinks in one for one in weights] == [False, False, True, True]


def test_combinations_that_are_held_out_are_never_drawn(folder: Path) -> None:
    ids = {word: 1 + VOCABULARY.index(word) for word in ("red", "ball", "green")}
    rows = np.full((8, 1, 32), 1 + VOCABULARY.index("a"), np.int16)
    rows[0, 0, :3] = list(ids.values())
    rows[1:4, 0, :2] = ids["ball"], ids["red"]
    later = rows.copy()
    later[4, 0, 5:8] = list(ids.values())
    np.save(folder / "captions.npy", rows)
    np.save(folder / "later.npy", later)
    data = LatentSet([folder], CONFIG, {"ball": 5.0}, [list(ids)])
    assert data.weights[0].tolist() == [0, 5, 5, 5, 0, 1, 1, 1]


def test_lines_of_steps_that_were_lost_are_taken_back(folder: Path) -> None:
    first = run(folder, "out", "--steps", "12")
    for _ in range(7):
        first.log.add(first.advance(first.progress), 0.0)
        first.log.line(first.step, 0.0)
        if first.step == 4:
            first.save()
    assert [line["step"] for line in lines(folder.parent / "out")] == [3, 6]
    run(folder, "out", "--steps", "12").train()
    assert [line["step"] for line in lines(folder.parent / "out")] == [3, 6, 9, 12]


def test_a_run_of_the_first_version_can_be_gone_on_with(folder: Path) -> None:
    """Its optimiser was torch's own Muon, its log was not kept and its rank 0 alone was there."""
    first = run(folder, "out")
    steps(first, 2)
    first.save()
    path = folder.parent / "out" / "resume.pt"
    state = torch.load(path, weights_only=True)
    weights = first.stage.weights
    places = weights.optimisers[0][1]
    muon = torch.optim.Muon(
        [weights.parameters[i] for i in places],
        lr=0.01,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    ).state_dict()
    muon["state"] = state["weights"]["optimisers"][0]["state"]
    state["weights"]["optimisers"][0] = muon
    del state["log"]
    torch.save(state, path)
    again = run(folder, "out")
    expected, found = steps(first, 2), steps(again, 2)
    assert expected == found


def test_the_budget_in_steps_decides_what_minutes_do_not(folder: Path) -> None:
    made = run(folder, "out", "--steps", "8")
    steps(made, 2)
    assert made.progress == 0.25
    made.seconds = 1e9
    assert made.progress == 0.25


def test_a_method_that_does_not_exist_and_a_teacher_that_is_missing_are_refused(
    folder: Path,
) -> None:
    with pytest.raises(ValueError, match="found method 'magic', expected one of mutual"):
        run(folder, "out", "--method", "magic", stage="mutual")
    with pytest.raises(ValueError, match="name its folder with --teacher"):
        run(folder, "out", "--method", "dmd_self_forcing", stage="mutual")
    with pytest.raises(ValueError, match="needs decoders; name a model file"):
        run(folder, "out", "--samples-every", "2")


def test_a_stage_starts_from_the_averaged_weights_of_the_one_before(folder: Path) -> None:
    first = run(folder, "first", stage="unimodal")
    steps(first, 2)
    first.save()
    second = run(folder, "second", "--init", str(folder.parent / "first"))
    saved = load_file(folder.parent / "first" / "weights.safetensors")
    for name, parameter in second.stage.system.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16())


def test_weights_come_back_from_a_model_file(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny.safetensors")
    transformer, text_encoder, *_ = tiny_parts()
    found = train.starting_weights(path)
    expected = {f"transformer.{k}": v for k, v in transformer.state_dict().items()}
    expected |= {f"text_encoder.{k}": v for k, v in text_encoder.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("kind", "index"), [("video_codec", 2), ("audio_codec", 3)])
def test_codecs_come_back_from_a_model_file(tmp_path: Path, kind: str, index: int) -> None:
    found = load_codec(save_tiny(tmp_path / "tiny.safetensors"), kind).state_dict()
    expected = tiny_parts()[index].state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[key], expected[key].half().float())
        for key in expected
        if found[key].ndim > 1
    )


def test_words_that_are_hard_are_drawn_more_often(folder: Path) -> None:
    rows = np.load(folder / "captions.npy")
    ball = 1 + VOCABULARY.index("ball")
    rows[:] = 1
    rows[0, 0, 3] = ball
    np.save(folder / "captions.npy", rows)
    data = LatentSet([folder], CONFIG, {"ball": 7.0})
    assert data.weights[0].tolist() == [7.0] + [1.0] * 7
    drawn = data.batch(2000, 1, range(2000), draws(clips=2000)).ids
    assert 0.4 < (drawn == ball).any(dim=1).float().mean() < 0.6


def test_clips_of_different_lengths_serve_what_they_are_long_enough_for(
    folder: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    for name, latents, axis in (
        ("video", LAYOUT.video_latents(1), 2),
        ("audio", LAYOUT.audio_latents(1), 1),
    ):
        rows = np.load(folder / f"{name}.npy").take(range(latents), axis=axis)
        np.save(short / f"{name}.npy", rows)
    np.save(short / "captions.npy", 0 * np.load(short / "captions.npy") + 3)
    data = LatentSet([folder, short], CONFIG, {})
    everyone = range(400), draws(clips=400)
    from_short = (data.batch(400, 1, *everyone).ids == 3).all(dim=1).float().mean()
    assert 0.4 < from_short < 0.6
    long = data.batch(400, data.blocks[0], *everyone)
    assert not (long.ids == 3).all(dim=1).any()
    assert long.video.shape[2] == LAYOUT.video_latents(data.blocks[0])
    assert torch.equal(
        long.audio.half().unique(), torch.from_numpy(np.load(folder / "audio.npy")).unique()
    )
    with pytest.raises(ValueError, match="encode longer ones"):
        data.batch(400, data.blocks[0] + 1, *everyone)


def test_blocks_after_the_prefix_can_be_left_out(folder: Path) -> None:
    data = LatentSet([folder], CONFIG, {})
    blocks = data.blocks[0]
    whole = data.batch(8, blocks, range(8), draws(clips=8))
    cut = data.batch(8, blocks - 1, range(8), draws(clips=8), skipped=1)
    for part, axis, span in (
        ("video", 2, LAYOUT.video_span),
        ("audio", 1, LAYOUT.audio_span),
    ):
        clip = getattr(whole, part)
        (_, first), (_, second) = span(0), span(1)
        kept = [i for i in range(clip.shape[axis]) if not first <= i < second]
        assert torch.equal(getattr(cut, part), clip.index_select(axis, torch.tensor(kept)))
    with pytest.raises(ValueError, match=f"expected some of {blocks + 1}"):
        data.batch(8, blocks, range(8), draws(clips=8), skipped=1)


def test_an_unfinished_set_is_refused(folder: Path) -> None:
    (folder / "about.json").write_text(json.dumps({"clips": 8, "done": 5}))
    with pytest.raises(ValueError, match="5 of 8 clips; finish it first"):
        run(folder, "any")


def test_latents_are_made_once_and_continued_after_a_kill(tmp_path: Path, bundle) -> None:
    parts = bundle.video_codec, bundle.audio_codec, bundle.text_encoder

    def encode(count: int, out: str, about: dict) -> None:
        encode_set(clips_from("world", 1, 7, 2), count, *parts, tmp_path / out, about)

    encode(3, "whole", {"clips": 3})
    # As a killed run leaves it: arrays for three clips, of which one is there.
    encode(3, "parts", {"clips": 3})
    for name in ("video", "audio"):
        rows = np.load(tmp_path / "parts" / f"{name}.npy", mmap_mode="r+")
        rows[1:] = 0
        rows.flush()
    (tmp_path / "parts" / "about.json").write_text(json.dumps({"clips": 3, "done": 1}))
    encode(3, "parts", {"clips": 3})
    for name in ("video", "audio", "captions"):
        whole, parts_ = (np.load(tmp_path / out / f"{name}.npy") for out in ("whole", "parts"))
        assert len(whole) == 3 and np.array_equal(whole, parts_)
    with pytest.raises(ValueError, match="made with"):
        encode(3, "parts", {"clips": 4})


def test_sample_sheets_have_pictures_sound_and_numbers_and_change_nothing(tmp_path: Path) -> None:
    codecs = save_tiny(tmp_path / "tiny.safetensors")
    generator = torch.Generator().manual_seed(0)
    clips = Batch(
        torch.randn(4, VIDEO_CHANNELS, LAYOUT.video_latents(2), 2, 2, generator=generator),
        torch.randn(4, LAYOUT.audio_latents(2), CHANNELS, generator=generator),
        torch.randint(1, 9, (4, 32), generator=generator),
    )
    write_latents(tmp_path / "latents", clips)
    recipe = SETTINGS["recipe"] | {"lengths": [{"blocks": 2, "batch": 2, "share": 1.0}]}
    stream = {"window": 2, "height": 2, "width": 2}
    settings = {"transformer": TRANSFORMER.to_dict(), "recipe": recipe, "stream": stream}
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | settings))
    sheets = ("--samples-every", "2", "--codecs", str(codecs))
    for out, options in (("with", sheets), ("without", ())):
        run(
            tmp_path / "latents",
            out,
            "--steps",
            "2",
            "--method",
            "shortcut_only",
            *options,
            stage="mutual",
        ).train()
    assert lines(tmp_path / "with")[-1].keys() == {
        "step", "samples", "attributes", "kind", "hit offset ms", "mouth correlation"
    }  # fmt: skip
    samples = tmp_path / "with" / "samples"
    assert (samples / "step_0000002.png").stat().st_size > 1000
    with av.open(str(samples / "step_0000002.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        seconds = [sum(f.pts is not None for f in container.decode(video)) / 24]
        container.seek(0)
        seconds.append(sum(f.samples for f in container.decode(audio)) / audio.rate)
    # Four prompts of four seconds and one frame each.
    assert seconds == pytest.approx([16 + 4 / 24, 16.04], abs=0.2)
    found, expected = (
        load_file(tmp_path / out / "weights.safetensors") for out in ("with", "without")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
