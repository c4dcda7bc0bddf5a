"""Runs that the page plays, steers and stops; without ComfyUI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mutual_forcing.host.live import CHARACTERS, LEAD, WAITING, LiveRun, live_run, run_of


def test_a_run_is_found_by_its_names_and_is_over_when_its_node_is(tmp_path: Path) -> None:
    run = LiveRun(("p", "7"), tmp_path / "a.mp4", 6)
    with pytest.raises(KeyboardInterrupt), live_run(run):
        assert run_of("p", "7") is run and not run.over
        raise KeyboardInterrupt  # Cancel
    assert run_of("p", "7") is run and run.over
    with live_run(LiveRun(("p", "7"), None, None)) as again:
        assert run_of("p", "7") is again
    assert run_of("p", "8") is None
    with pytest.raises(ValueError, match="over"):
        run.type("a bell")


def test_the_oldest_runs_are_forgotten_but_none_that_goes_on() -> None:
    with live_run(LiveRun(("q", "going on"), None, None)) as run:
        for index in range(100):
            with live_run(LiveRun(("q", str(index)), None, 1)):
                pass
        assert run_of("q", "0") is None and run_of("q", "99") is not None
        assert run_of("q", "going on") is run


def test_lines_arrive_once_in_order_and_are_bounded() -> None:
    run = LiveRun(("p", "1"), None, None)
    for line in ("  a green\n ball ", "a bell"):
        run.type(line)
    assert run.line_waits
    assert run.lines() == ["a green ball", "a bell"] and run.lines() == []
    assert not run.line_waits
    for line in (" \n", "x" * (CHARACTERS + 1)):
        with pytest.raises(ValueError, match="expected 1 to"):
            run.type(line)
    for index in range(WAITING):
        run.type(str(index))
    with pytest.raises(ValueError, match="wait already"):
        run.type("one more")


def test_the_page_is_told_whenever_something_changes() -> None:
    told: list[dict] = []
    run = LiveRun(("p", "1"), None, 4, tell=told.append)
    with live_run(run):
        run.add(1.5, begun=True)
        run.say("no word 'zebra'")
        run.say("no word 'zebra'")
        run.stop()
    assert [status["made"] for status in told] == [0, 1.5, 1.5, 1.5, 1.5]
    assert told[-1]["words"] == ["no word 'zebra'"] and told[-1]["asked"] == 4
    assert [status["stop_asked"] for status in told[-2:]] == [True, True]
    assert [status["over"] for status in told[-2:]] == [False, True]
    assert run.status["took"] == told[-1]["took"]  # how fast it was stays what it was


def test_no_line_is_lost_or_doubled_between_two_threads() -> None:
    run, found = LiveRun(("p", "1"), None, None), []
    sent = [str(index) for index in range(500)]

    def send() -> None:
        for line in sent:
            while True:
                try:
                    run.type(line)
                    break
                except ValueError:  # enough wait
                    pass

    thread = threading.Thread(target=send)
    thread.start()
    while len(found) < len(sent):
        found += run.lines()
    thread.join()
    assert found == sent


def test_an_endless_run_waits_for_who_plays_it_and_for_nobody_else() -> None:
    def wait(run: LiveRun, move: Callable[[LiveRun], None] = LiveRun.stop) -> int:
        """How often it looked around before it went on; somebody else moves meanwhile."""
        looks = []

        def look() -> None:
            looks.append(0)
            if len(looks) == 3:
                move(run)

        run.wait_for_player(look)
        return len(looks)

    moves = {
        "the player": lambda run: run.plays_at(9 - LEAD),
        "a line": lambda run: run.type("a bell"),
        "Stop": LiveRun.stop,
    }
    for move in moves.values():
        run = LiveRun(("p", "1"), None, None)
        run.add(9.0)
        assert wait(run) == 0  # nobody plays it
        with run.watched():
            assert wait(run) == 0  # it does not play yet
            run.plays_at(8.9 - LEAD)
            assert wait(run, move) == 3
        run.plays_at(0.0)
        assert wait(run) == 0  # the page is gone
    # A page that is about to jump to a typed line is where that begins.
    run = LiveRun(("p", "1"), None, None)
    with run.watched():
        run.plays_at(2.0)
        run.follow(5.0, "a bell")
        run.add(5.0 + LEAD)
        assert wait(run) == 0
        run.add(5.1 + LEAD)
        assert wait(run, lambda run: run.plays_at(5.1)) == 3
        run.plays_at(2.0)  # and somebody went back
        assert wait(run) == 3
    with_an_end = LiveRun(("p", "1"), None, 60)
    with_an_end.add(9.0)
    with with_an_end.watched():
        with_an_end.plays_at(0.0)
        assert wait(with_an_end) == 0
    cancelled = LiveRun(("p", "1"), None, None)
    cancelled.add(9.0)
    with cancelled.watched(), pytest.raises(KeyboardInterrupt):
        cancelled.plays_at(0.0)

        def cancel() -> None:
            raise KeyboardInterrupt

        cancelled.wait_for_player(cancel)
