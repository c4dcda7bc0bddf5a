"""Runs that the page plays, steers and stops; without ComfyUI."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from mutual_forcing.host.live import CHARACTERS, WAITING, LiveRun, live_run, run_of


def test_a_run_is_found_by_its_names_and_is_over_when_its_node_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), live_run(("p", "7"), tmp_path / "a.mp4", 6) as run:
        assert run_of("p", "7") is run and not run.over
        raise KeyboardInterrupt  # Cancel
    assert run_of("p", "7") is run and run.over
    with live_run(("p", "7"), None, None) as again:
        assert run_of("p", "7") is again
    assert run_of("p", "8") is None
    with pytest.raises(ValueError, match="over"):
        run.say("a bell")


def test_the_oldest_runs_are_forgotten_but_none_that_goes_on() -> None:
    with live_run(("q", "going on"), None, None) as run:
        for index in range(100):
            with live_run(("q", str(index)), None, 1):
                pass
        assert run_of("q", "0") is None and run_of("q", "99") is not None
        assert run_of("q", "going on") is run


def test_lines_arrive_once_in_order_and_are_bounded() -> None:
    run = LiveRun("p", "1", None, None)
    for line in ("  a green\n ball ", "a bell"):
        run.say(line)
    assert run.lines() == ["a green ball", "a bell"] and run.lines() == []
    for line in (" \n", "x" * (CHARACTERS + 1)):
        with pytest.raises(ValueError, match="expected 1 to"):
            run.say(line)
    for index in range(WAITING):
        run.say(str(index))
    with pytest.raises(ValueError, match="wait already"):
        run.say("one more")


def test_no_line_is_lost_or_doubled_between_two_threads() -> None:
    run, found = LiveRun("p", "1", None, None), []
    sent = [str(index) for index in range(500)]

    def send() -> None:
        for line in sent:
            while True:
                try:
                    run.say(line)
                    break
                except ValueError:  # enough wait
                    pass

    thread = threading.Thread(target=send)
    thread.start()
    while len(found) < len(sent):
        found += run.lines()
    thread.join()
    assert found == sent
