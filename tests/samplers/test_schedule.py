"""Prompts with times: as text, in a rollout, told while it runs, and made again from the record."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, save_bundle
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.layer import TextKeys
from mutual_forcing.networks.layout import BlockLayout
from mutual_forcing.networks.transcript import TranscriptConfig
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.rollout import (
    SamplerSettings,
    SigmaConstants,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.schedule import (
    KEEP,
    Line,
    Prompt,
    Schedule,
    Transition,
    is_mark,
    parse_schedule,
    written,
)
from mutual_forcing.samplers.speech import block_track
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.tests.tiny import STREAM, TRANSFORMER, tiny_parts
from torch import Tensor

TOLD = TranscriptConfig(("low", "high"), {}, rate=3.0)
FEW = sampler_settings("few", 1)
GUIDED = sampler_settings("multi", 1)
A, B = "red ball", "face says low high"
TEXTS = [A, B, "drum", "bell low", "face says high"]
HOWS = [KEEP, Transition(reread=1), Transition(reread=2), Transition(99), Transition(blend=2)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model with random weights that can be told what to say; its window is 2 blocks."""
    path = tmp_path_factory.mktemp("told") / "model.safetensors"
    config = replace(TRANSFORMER, transcript_channels=TOLD.channels)
    save_bundle(path, *tiny_parts(0, config), STREAM, transcript=TOLD, title="tiny")
    return load_bundle(path)


def played(
    bundle: Bundle,
    asked: Prompt | Schedule | Iterable[Line],
    blocks: int,
    state: StreamState | None = None,
    sampler: SamplerSettings = FEW,
    **options: object,
) -> StreamState:
    if not isinstance(asked, (Prompt, Schedule)):
        asked = bundle.schedule(asked, guided=sampler is GUIDED)
    *_, (_, after) = rollout(bundle, asked, state or bundle.begin(), blocks, sampler, **options)
    return after


def values(state: StreamState) -> list[Tensor]:
    """All that a stream goes on from."""
    found = [tensor for block in state.latents for tensor in block]
    for cache in (state.cache, state.unguided):
        found += [x for block in cache.blocks for pair in block for x in pair] if cache else []
    return found


def equal(one: StreamState, other: StreamState) -> bool:
    return (one.schedule, one.speeches) == (other.schedule, other.speeches) and all(
        torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True)
    )


def switch(how: Transition, second: float = 3) -> list[Line]:
    return [Line(0, (A,)), Line(second, (B,), how)]


# As text.


@given(
    st.lists(
        st.builds(
            Line,
            st.floats(0.01, 999_999_999),
            st.tuples(st.text(max_size=20).filter(lambda x: x.strip() and ":" not in x)),
            st.builds(Transition, st.integers(0, 9999), st.integers(0, 9999)),
        ),
        unique_by=lambda line: line.start,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_schedule_and_its_text_are_the_same(lines: list[Line]) -> None:
    lines = [line for line in lines if line.texts[0] and not is_mark(line.texts[0].split("\n")[0])]
    assert parse_schedule(written(lines), Transition(7)) == lines


def test_a_schedule_is_read_as_an_artist_writes_it() -> None:
    found = parse_schedule(
        "0: a red ball\n\n12.5 reread 3 :a blue: ball \r\n20. blend 2: slow\n  and\n\ta drum\n"
        "30 keep: x",
        Transition(5),
    )
    assert found == [
        Line(0, ("a red ball",), Transition(5)),
        Line(12.5, ("a blue: ball",), Transition(3)),
        Line(20, ("slow\nand\na drum",), Transition(blend=2)),
        Line(30, ("x",), KEEP),
    ]


def test_words_may_begin_with_a_question_mark_and_what_stands_for_some_is_not_told() -> None:
    assert parse_schedule("0: ? a red\0 ball") == [Line(0, ("? a red ball",))]
    schedule = Schedule(Clock(BlockLayout()), [], lambda _texts: None)
    for text in ("?", " ?12ab", "\ud800"):
        with pytest.raises(ValueError, match="stands for a prompt"):
            schedule.tell(text)
    schedule.tell("? a blue ball")
    schedule.heard(3)
    assert schedule.due(3).texts == ("? a blue ball",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red ball", "line 1 .* is 'a red ball', expected seconds, a colon"),
        ("0: a\n12,5: b", "line 2 .*'12,5: b'"),
        ("0: a\n 4: b", "line 2"),
        (" 0: a", "line 1"),
        ("0: a\n\n1:30: b", "line 3 .*seconds .90, not 1:30"),
        ("0: a\n5 :", "line 2 .*no prompt"),
        ("0: a\n5: b\n5.0: c", "line 3 .*the same second"),
        ("0: a\n5 read 3: b", "line 2"),
        ("0: ?3f2a", "line 1 .*stands for a prompt"),
        ("0: " + "x" * 20_001, "20001 characters"),
        ("9" * 400 + ": a", "line 1"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_schedule(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@given(st.integers(0, 5000), st.sampled_from([1, 4]), st.sampled_from(["24", "25", "30000/1001"]))
@settings(max_examples=60, deadline=None)
def test_a_blocks_time_is_its_own(block: int, first: int, rate: str) -> None:
    clock = Clock(BlockLayout(video_first=first), Fraction(rate))
    assert clock.block_at(clock.time_of(block)) == block
    # The first one at or after it.
    assert clock.block_at(clock.seconds(block)) == block
    assert clock.block_at(clock.seconds(block) + Fraction(1, 1000)) == block + 1


# In a rollout.


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_until_a_prompt_takes_over_nothing_is_changed_and_then_what_was_chosen(
    bundle: Bundle, how: Transition
) -> None:
    """The witness calls the network itself."""
    old, new = bundle.prompt(A).text, bundle.prompt(B).text
    before, after = played(bundle, bundle.prompt(A), 4), played(bundle, switch(how), 6)
    assert all(map(torch.equal, before.block(3), after.block(3)))
    cut = played(bundle, switch(how), 5)  # block 4 is the first one after 3 s
    assert cut.schedule == (Line(0, (A,)), Line(3, (B,), how))
    config = bundle.transformer.config
    clean = SigmaConstants(bundle.transformer, bundle.like).at(0.0)

    def read(cache: RollingCache, block: int, text: TextKeys) -> RollingCache:
        opened = OpenBlock(bundle.transformer, cache, 2, 2, bundle.like)
        track = block_track(config, cut.speeches, block)
        return opened.commit(*cut.block(block), text, clean, track)

    cache = RollingCache(2)
    for block in range(4):
        cache = read(cache, block, old)
    kept, again = (0, 2, 3), min(3, how.reread)
    if again:
        cache = RollingCache(2, kept[:-again], cache.blocks[: 3 - again])
        for end in range(3 - again, 3):
            cache = replace(read(cache, kept[end], new), indices=kept[: end + 1])
    assert cut.cache.indices == kept == cache.indices
    assert all(map(torch.equal, values(cut), values(replace(cut, cache=cache))))

    def encode(texts: tuple[str, ...]) -> Prompt:
        mixed = old.toward(new, 1 / 3 if how.blend else 1)
        return bundle.prompt(A) if texts == (A,) else bundle.prompt(B)._replace(text=mixed)

    lines = [Line(0, (A,)), Line(3, ("mixed",), replace(how, blend=0))]
    mixed = played(bundle, Schedule(bundle.clock, lines, encode), 5)
    assert all(map(torch.equal, mixed.block(4), cut.block(4)))


@pytest.mark.parametrize(("how", "sampler"), [*((how, FEW) for how in HOWS), (HOWS[2], GUIDED)])
def test_cut_anywhere_and_without_its_keys_it_is_the_same_stream(
    bundle: Bundle, how: Transition, sampler: SamplerSettings, tmp_path: Path
) -> None:
    lines = [*switch(how, 2.5), Line(5, ("drum",), how)]
    whole = played(bundle, lines, 8, sampler=sampler)
    for cut in (4, 6):
        first = played(bundle, lines, cut, sampler=sampler, settle=StreamState.trimmed)
        save_state(tmp_path / "state", first, keys=cut == 4)
        loaded = load_state(tmp_path / "state")
        assert loaded.schedule == first.schedule
        if loaded.cache is None:  # trimmed, it cannot be read from its beginning
            loaded = replace(first, latents=whole.latents[:cut], dropped=0).without_keys()
        rest = played(bundle, lines, 8 - cut, loaded, sampler)
        assert equal(whole, replace(rest, latents=whole.latents[:cut] + rest.latents[-(8 - cut) :]))
        assert all(map(torch.equal, rest.block(7), whole.block(7)))


def test_what_is_told_from_another_thread_is_recorded_and_made_again_bit_for_bit(
    bundle: Bundle, tmp_path: Path
) -> None:
    for seed in range(2):
        rng, schedule = random.Random(seed), bundle.schedule([Line(0, (A,)), Line(7, ("drum",))])
        over = threading.Event()

        def type_lines(
            rng: random.Random = rng,
            schedule: Schedule = schedule,
            over: threading.Event = over,
        ) -> None:
            while not over.wait(rng.random() * 0.03):
                schedule.tell(rng.choice(TEXTS), rng.choice(HOWS))

        typist = threading.Thread(target=type_lines)
        typist.start()
        state = bundle.begin((seed,))
        endless = rollout(bundle, schedule, state, None, FEW)
        while state.next_block < 13:
            _, state = next(endless)
            time.sleep(rng.random() * 0.03)
        over.set()
        typist.join()
        assert len(state.schedule) > 2
        again = played(bundle, parse_schedule(written(state.schedule)), 13, bundle.begin((seed,)))
        assert equal(state, again)
        save_state(tmp_path / "state", state, keys=False)
        # Going on needs nothing that is not in the file.
        more = played(bundle, [], 2, load_state(tmp_path / "state"))
        assert equal(more, played(bundle, state.schedule, 2, state))


def test_a_prompt_that_nobody_can_encode_again_is_read_over_by_the_next(bundle: Bundle) -> None:
    first = played(bundle, bundle.prompt(A), 3)
    after = played(bundle, bundle.prompt(B), 1, first)
    assert after.schedule[1] == Line(2, (B,), Transition(reread=1))
    lines = parse_schedule(written(after.schedule))
    assert equal(after, played(bundle, lines, 4))
    same = played(bundle, bundle.prompt(A), 1, first)
    assert len(same.schedule) == 1


def test_what_a_schedule_cannot_be_is_said_at_once(bundle: Bundle) -> None:
    after = played(bundle, switch(Transition(blend=3)), 5)
    for message, call in {
        "says nothing for second 0": lambda: played(bundle, [Line(2, (A,))], 1),
        "same block": lambda: bundle.schedule([Line(2.5, (A,)), Line(2.9, (B,))]),
        "'red ball', which cannot be encoded": lambda: played(bundle, bundle.prompt(B), 1, after),
        "line 2 .* a block after 4": lambda: played(
            bundle, [], 1, replace(after, schedule=(after.schedule[1],) * 2)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for texts, start in (((A, B), 0), ((A,), 5e8)):
        with pytest.raises(ValueError, match="line 1 of the stream's schedule"):
            played(bundle, [], 1, replace(after, schedule=(Line(start, texts),)))
