"""Clips that say more than their caption, and clips whose prompt changes: truth and batches."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.lab.metrics.switches import choice, held_out_switches
from mutual_forcing.lab.training.data import TRANSCRIPT, Asked, LatentSet
from mutual_forcing.lab.training.flow_matching import some_given
from mutual_forcing.lab.training.latents import encode_set
from mutual_forcing.lab.training.sources import clips_from
from mutual_forcing.lab.training.system import without_some
from mutual_forcing.lab.world.captions import parse
from mutual_forcing.lab.world.render import render
from mutual_forcing.lab.world.scene import caption, sample_transcript
from mutual_forcing.lab.world.switch import Switch, render_switch, sample_switch
from mutual_forcing.lab.world.timing import speech_at, spoken
from mutual_forcing.lab.world.vocabulary import ATTRIBUTES, REST
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.samplers.schedule import Transition
from mutual_forcing.tests.tiny import TEXT, tiny_parts
from mutual_forcing.tests.tiny_training import draws, system


def switches(count: int, cut: bool, kind: str | None = None, block: int = 2) -> list[Switch]:
    return [sample_switch(np.random.default_rng(seed), block, kind, cut) for seed in range(count)]


def test_held_out_streams_of_two_prompts_are_the_beginnings_of_longer_ones() -> None:
    pairs, streams = held_out_switches(0, 4), held_out_switches(0, 4, 4, every=5)
    for (pair,), chain in zip(pairs, streams, strict=True):
        assert pair.before == chain[0].before and pair.is_cut == chain[0].is_cut
        assert [switch.block for switch in chain] == [6, 11, 16]
        assert all(a.after == b.before for a, b in pairwise(chain))
    assert choice("blend 2") == Transition(blend=2) and choice("keep") == Transition()


def test_a_transcript_does_not_loop_and_its_caption_only_says_that_someone_speaks() -> None:
    scene = sample_transcript(np.random.default_rng(0))
    said = spoken(scene, 0, 4)
    assert len(said) > 8 and "says" not in caption(scene) and "speaks" in caption(scene)
    assert "syllables" not in parse(caption(scene))
    for onset, syllable in said:
        at = speech_at(scene, np.array([onset + 0.01]))
        assert scene.syllables[at.slot[0]] == syllable


def test_a_rest_is_silent_and_the_mouth_is_shut() -> None:
    for seed in range(40):
        scene = sample_transcript(np.random.default_rng(seed))
        said = spoken(scene, 0, 4)
        pauses = [
            (begin, end)
            for (begin, syllable), (end, _) in pairwise(said)
            if syllable == REST and begin > 0.1 and end < 3.9
        ]
        if pauses:
            break
    begin, end = pauses[0]
    clip = render(scene, 4)
    inside = clip.audio[int(16_000 * (begin + 0.03)) : int(16_000 * (end - 0.03))]
    assert np.abs(inside).max() < 0.01 < np.abs(clip.audio).max()
    assert clip.mouth[int(24 * begin) + 2 : int(24 * end)].max() < 0.05


@pytest.mark.parametrize("cut", [False, True])
def test_a_switch_is_the_one_scene_and_then_the_other(cut: bool) -> None:
    for switch in switches(4, cut):
        clip, old, new = (
            render_switch(switch, 3),
            render(switch.before, 3),
            render(switch.after, 3),
        )
        assert np.array_equal(clip.video[:25], old.video[:25])
        assert np.array_equal(clip.video[25:], new.video[25:])
        assert np.array_equal(clip.audio[: 160 + 16_000], old.audio[: 160 + 16_000])
        assert np.array_equal(clip.audio[320 + 16_000 :], new.audio[320 + 16_000 :])
        assert np.array_equal(clip.mouth[25:], new.mouth[25:])


def test_the_motion_goes_on_where_an_attribute_changes() -> None:
    for kind in ATTRIBUTES:
        for switch in switches(12, False, kind):
            now = np.array([switch.seconds])
            cycles = [(now - scene.offset) * scene.rate for scene in (switch.before, switch.after)]
            assert abs(cycles[0] - cycles[1]) < 1e-6
            if kind == "speech":
                before, after = (speech_at(scene, now) for scene in (switch.before, switch.after))
                assert abs(before.mouth - after.mouth) < 1e-6
                sounding = [
                    scene.syllables[at.slot[0]]
                    for scene, at in ((switch.before, before), (switch.after, after))
                ]
                assert sounding[0] == sounding[1]


@pytest.mark.parametrize("cut", [False, True])
def test_the_new_prompt_names_what_it_changes(cut: bool) -> None:
    rng = np.random.default_rng(0)
    for switch in switches(60, cut):
        for before, after in (switch.captions(None), switch.captions(rng)):
            named = parse(after)
            for key in switch.changed if not cut else ():
                assert named[key] == switch.after.attributes[key] != switch.before.attributes[key]
            for text, scene in ((before, switch.before), (after, switch.after)):
                assert parse(text).items() <= ({"kind": scene.kind} | scene.attributes).items()


def test_a_switch_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="block 2, expected 1 to 1"):
        render_switch(switches(1, False)[0], 1)


CONFIG = TransformerConfig(transcript_channels=TRANSCRIPT.channels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two clips of two seconds of each source of the world, through random codecs."""
    _, text, video, audio = tiny_parts()
    made = {}
    for name in ("world", "transcripts", "switches"):
        made[name] = tmp_path_factory.mktemp("sets") / name
        clips = list(islice(clips_from(name, 2, 5, 2), 2))
        about = {"clips": 2, "seconds": 2}
        encode_set(iter(clips), 2, video, audio, text, made[name], about)
    assert TEXT.length > 1
    return made


def test_a_batch_has_each_blocks_prompt_and_what_is_spoken_in_it(folders: dict[str, Path]) -> None:
    data = LatentSet([folders["switches"], folders["transcripts"]], CONFIG, {})
    batch = data.batch(12, 3, range(12), draws(clips=12), sets={"switches": 1.0})
    clips = list(islice(clips_from("switches", 2, 5, 2), 2))
    assert {tuple(row) for row in batch.prompts.tolist()} == {
        tuple(int(block >= clip.switch) for block in range(3)) for clip in clips
    }
    assert not torch.equal(batch.ids, batch.later)
    spoken_only = data.batch(4, 3, range(4), draws(clips=4), sets={"transcripts": 1.0})
    assert spoken_only.prompts is None and spoken_only.later is None
    assert spoken_only.track.shape == (4, 51, TRANSCRIPT.channels)
    assert (spoken_only.track[:, :, 0] == 1).all()
    expected = []
    for clip in islice(clips_from("transcripts", 2, 5, 2), 2):
        times = [0.005, *(0.01 + 0.04 * (i + 0.5) for i in range(50))]
        expected.append([[said for at, said in clip.spoken if at <= time][-1] for time in times])
    names = (REST, *TRANSCRIPT.vocabulary)
    for row in spoken_only.track:
        due = [names[int(unit.argmax() + 1) if unit.any() else 0] for unit in row[:, 1:31]]
        assert due in expected


def test_sets_have_the_shares_that_are_asked_for(folders: dict[str, Path]) -> None:
    data = LatentSet(list(folders.values()), CONFIG, {})
    asked = {"world": 1.0, "switches": 3.0}
    batch = data.batch(400, 1, range(400), draws(clips=400), sets=asked)
    rows = [np.load(folders[name] / "audio.npy")[:, 0] for name in asked]
    mine = [(torch.from_numpy(r).float()[None] == batch.audio[:, :1]).all(2).any(1) for r in rows]
    assert 0.65 < mine[1].float().mean() < 0.85
    with pytest.raises(ValueError, match="of at most 0 blocks in films"):
        data.batch(1, 1, range(1), draws(clips=1), sets={"films": 1.0})


def test_a_set_of_before_there_were_transcripts_is_told_nothing(folders: dict[str, Path]) -> None:
    for name in ("spoken", "switch", "later"):
        (folders["world"] / f"{name}.npy").unlink()
    batch = LatentSet([folders["world"]], CONFIG, {}).batch(2, 2, range(2), draws(clips=2))
    assert batch.track.eq(0).all() and batch.prompts is None


def test_dropping_takes_the_transcript_with_the_prompt_or_alone() -> None:
    made, clips = system(), 400
    batch_of = draws(clips=clips)
    ids, track = torch.ones(clips, 4, dtype=torch.long), torch.ones(clips, 3, 2)
    asked = Asked(ids, ids + 1, torch.ones(clips, 1), track)
    kept = without_some(made, asked, 0.3, batch_of, 0.5)
    prompt, told = kept.ids[:, 0] == 1, kept.track[:, 0, 0] == 1
    assert torch.equal(prompt, kept.later[:, 0] == 2)
    assert 0.62 < prompt.float().mean() < 0.78
    assert not (told & ~prompt).any()
    assert 0.4 < told[prompt].float().mean() < 0.6


def test_a_given_stream_is_clean_and_weighs_nothing() -> None:
    sigma = torch.full((900, 2), 0.5)
    levels, weights = some_given(sigma, 0.4, 0.0, 1.0, draws(clips=900))
    video, audio = (level.eq(0).all(1) for level in levels)
    assert not (video & audio).any()
    assert 0.15 < video.float().mean() < 0.25 and 0.15 < audio.float().mean() < 0.25
    for given, weight in ((video, weights.video), (audio, weights.audio)):
        assert torch.equal(weight.eq(0).all(1), given) and weight[~given].eq(1).all()
    apart = ~video & ~audio & (levels.video != levels.audio).all(1)
    assert 0.15 < apart.float().mean() < 0.25
