"""A simulated viewer: what it waits for is what a clock on the wall would show."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutual_forcing.lab.bench.viewer import Arrival, made, main, watch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.rollout import sampler_settings


def arriving(*pairs: tuple[float, float]) -> list[Arrival]:
    return [Arrival(at, until, until) for at, until in pairs]


def test_a_steady_stream_is_never_waited_for() -> None:
    seen = watch(arriving((0.5, 0), (1, 1), (1.5, 2), (2, 3)), buffer=1)
    assert (seen.picture, seen.sound, seen.waits, seen.met) == (1, 1, (), 1)
    assert seen.ahead == ((1, 1), (1.5, 1.5), (2, 2))


def test_running_dry_is_waited_for_until_as_much_lies_ready_again() -> None:
    # Plays at 1, dry at 2; one second is there at 4, so it stands still for 2 s; ends as it should.
    seen = watch(arriving((1, 1), (3, 1.5), (4, 2), (4.5, 4)), buffer=1)
    assert seen.waits == (2,) and seen.sound == 1
    assert seen.met == pytest.approx(0)  # wanted at 2, 2.5 and 3
    # The end of a clip is played, however little is left of it.
    assert watch(arriving((1, 1), (5, 1.2)), buffer=1).waits == (3,)


def test_sound_that_lags_is_what_is_waited_for() -> None:
    stream = [Arrival(1, 1, 0.2), Arrival(2, 2, 1.1), Arrival(3, 2, 2)]
    seen = watch(stream, buffer=1)
    assert (seen.picture, seen.sound) == (1, 2) and seen.waits == ()
    with pytest.raises(ValueError, match="can be played"):
        watch([Arrival(1, 2, 0)], buffer=1)


def test_what_a_real_file_holds_grows_to_the_whole_clip(bundle: Bundle, tmp_path: Path) -> None:
    stream = made(bundle, sampler_settings("few", 1), 3, tmp_path / "clip.mp4")
    times, pictures, sound = zip(*stream, strict=True)
    for values in (times, pictures, sound):
        assert list(values) == sorted(values)
    assert pictures[-1] == pytest.approx(73 / 24, abs=0.01)
    assert sound[-1] == pytest.approx(pictures[-1], abs=0.1)
    # One frame is no fragment yet; after that, less than a second is kept back.
    assert pictures[0] == 0
    for block, arrival in enumerate(stream[1:-1], 1):
        assert block + 1 / 24 - 1 < arrival.until <= block + 0.1


def test_a_buffer_longer_than_the_clip_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--seconds", "2", "--buffer", "3"]) == 2
    assert "--buffer is 3.0, expected 0 to 2 seconds" in caplog.text
