"""Transcripts on a stream's clock: in order, at their rate, changed, kept in its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, save_bundle
from mutual_forcing.networks.transcript import (
    REST,
    UNKNOWN,
    TranscriptConfig,
    transcript_track,
)
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.speech import Speech, Transcript, block_seconds, block_track
from mutual_forcing.samplers.start import Given
from mutual_forcing.samplers.state import BlockLatents, StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.tests.tiny import STREAM, TRANSFORMER, tiny_parts

TOLD = TranscriptConfig(("ba", "mi", "tu"), {"slowly": 2.0}, rate=3.0)
CONFIG = replace(TRANSFORMER, transcript_channels=TOLD.channels)
FEW = sampler_settings("few", 2)
SAID = Transcript((0, 1, 2), 2.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model with random weights that can be told what to say."""
    path = tmp_path_factory.mktemp("told") / "model.safetensors"
    save_bundle(path, *tiny_parts(0, CONFIG), STREAM, transcript=TOLD, title="tiny")
    return load_bundle(path)


def told(blocks: int, *transcripts: Transcript | None) -> Speech:
    """A speech after some blocks, each under its transcript; the last one's for all that follow."""
    speech = Speech()
    for block in range(blocks):
        now = transcripts[min(block, len(transcripts) - 1)]
        speech = speech.going_on(now, *block_seconds(CONFIG, block))
    return speech


def test_units_follow_each_other_at_the_rate_and_begin_again() -> None:
    said = told(4, SAID).said
    assert [unit.number for unit in said[:5]] == [0, 1, 2, 0, 1]
    assert [unit.onset for unit in said[:4]] == pytest.approx([0, 0.4, 0.8, 1.2])
    # The unit after the last block is known, and no further.
    assert said[-2].onset <= block_seconds(CONFIG, 3)[1] < said[-1].onset


def test_after_the_end_of_a_transcript_without_a_loop_there_are_rests() -> None:
    said = told(3, SAID._replace(loop=False)).said
    assert [unit.number for unit in said[:5]] == [0, 1, 2, REST, REST]


def test_a_new_transcript_begins_when_the_unit_that_sounds_is_over() -> None:
    other = Transcript((2,), 4.0)
    said = told(3, SAID, SAID, other).said
    # Block 2 begins at 1.01 s; the unit since 0.8 ends at 1.2.
    assert [unit.number for unit in said[:5]] == [0, 1, 2, 2, 2]
    assert [unit.onset for unit in said[2:5]] == pytest.approx([0.8, 1.2, 1.45])


def test_the_same_units_at_another_rate_go_on_where_they_were() -> None:
    said = told(3, SAID, SAID, SAID._replace(rate=5.0)).said
    assert [unit.number for unit in said[:6]] == [0, 1, 2, 0, 1, 2]
    assert [unit.onset for unit in said[2:5]] == pytest.approx([0.8, 1.2, 1.4])


def test_a_block_is_told_the_same_however_far_the_stream_has_come() -> None:
    near, far = told(2, SAID), told(6, SAID)
    assert torch.equal(block_track(CONFIG, (near,), 1), block_track(CONFIG, (far,), 1))


def test_the_track_names_what_is_due_and_its_clocks() -> None:
    onsets = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    units, times = torch.tensor([1, REST, 0]), torch.tensor([-0.1, 0.1, 0.6])
    track = transcript_track(onsets, units, times.double(), 3)
    assert track.shape == (3, TOLD.channels)
    assert track[0].eq(0).all()
    known, due, following = track[:, 0], track[:, 1:4], track[:, 4:7]
    assert known.tolist() == [0, 1, 1]
    assert due[1].tolist() == [0, 1, 0] and due[2].tolist() == [0, 0, 0]
    assert following[1].tolist() == [0, 0, 0] and following[2].tolist() == [1, 0, 0]
    # Since and until, on the hand that turns once in two seconds.
    assert track[1, 7].item() == pytest.approx(torch.tensor(torch.pi * 0.1).sin().item())
    assert track[1, 15].item() == pytest.approx(torch.tensor(torch.pi * 0.4).sin().item())


def test_a_prompt_has_its_syllables_and_its_rate(bundle: Bundle) -> None:
    assert bundle.transcript_of("a face slowly says mi tu loud") == Transcript((1, 2), 2.0)
    assert bundle.transcript_of("says ba") == Transcript((0,), 3.0)
    assert bundle.transcript_of("a red ball") is None


def made(
    bundle: Bundle, state: StreamState, blocks: int, said: Transcript | None
) -> tuple[list[BlockLatents], StreamState]:
    prompt = bundle.prompt("face")._replace(transcripts=(said,))
    steps = list(rollout(bundle, prompt, state, blocks, FEW))
    return [latents for latents, _ in steps], steps[-1][1]


def values(blocks: list[BlockLatents]) -> Iterator[torch.Tensor]:
    return (tensor for block in blocks for tensor in block)


def test_a_stream_that_stops_and_goes_on_says_what_it_would_have_said(
    bundle: Bundle, tmp_path: Path
) -> None:
    whole, end = made(bundle, bundle.begin(), 4, SAID)
    first, state = made(bundle, bundle.begin(), 2, SAID)
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded.speeches == state.speeches
    for start in (state, loaded, state.without_keys()):
        rest, after = made(bundle, start, 2, SAID)
        assert all(map(torch.equal, values(first + rest), values(whole)))
        assert after.speeches == end.speeches


def test_what_is_said_is_heard_and_nothing_told_changes_nothing(bundle: Bundle) -> None:
    silent, _ = made(bundle, bundle.begin(), 2, None)
    spoken, _ = made(bundle, bundle.begin(), 2, SAID)
    other, _ = made(bundle, bundle.begin(), 2, SAID._replace(units=(2, 1)))
    assert not torch.equal(spoken[1].audio, silent[1].audio)
    assert not torch.equal(spoken[1].audio, other[1].audio)


@pytest.mark.parametrize("what", ["video", "audio"])
def test_with_one_stream_given_nothing_is_told_until_it_ends(bundle: Bundle, what: str) -> None:
    layout = bundle.clock.layout
    told, _ = made(bundle, bundle.begin(), 3, SAID)
    time = BlockLatents._fields.index(what)
    latents = torch.cat([block[time] for block in told[:2]], dim=2 - time)
    given = Given(layout, 0, **{what: latents})
    prompts = (bundle.prompt("face")._replace(transcripts=(said,)) for said in (SAID, None))
    with_track, without = (
        list(rollout(bundle, prompt, bundle.begin(), 3, FEW, given=given)) for prompt in prompts
    )
    for (one, _), (other, _) in zip(with_track[:2], without, strict=False):
        assert all(map(torch.equal, one, other))
    latents, state = with_track[2]
    assert not torch.equal(latents.audio, without[2][0].audio)
    begin = block_seconds(CONFIG, 2)[0]
    said = [unit for unit in state.speeches[0].said if unit.number != UNKNOWN]
    assert said and all(unit.onset >= begin for unit in said)


def test_another_number_of_transcripts_than_clips_is_refused(bundle: Bundle) -> None:
    prompt = bundle.prompt("face")._replace(transcripts=(SAID, None, SAID))
    with pytest.raises(ValueError, match="3 transcripts and the stream 2 clips"):
        rollout(bundle, prompt, bundle.begin((0, 1)), 1, FEW)


def test_a_model_and_its_transcript_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transcript_channels"):
        save_bundle(tmp_path / "model.safetensors", *tiny_parts(0, CONFIG), STREAM, title="tiny")
