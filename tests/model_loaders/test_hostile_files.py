"""A part of what `launch.py tests.fuzz` and `launch.py tests.writers` run at full length."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutual_forcing.tests.fuzz import report
from mutual_forcing.tests.writers import contest


@pytest.mark.timeout(600)
def test_hostile_files_end_in_a_sentence() -> None:
    line, well = report(300, seed=1)
    assert well, line
    # Else the changes would be too coarse to get past the first check.
    assert "state went through two blocks" in line and "model went through two blocks" in line


def test_writers_of_one_state_never_tear_it(tmp_path: Path) -> None:
    found = contest(2.0, tmp_path)
    assert found["failed"] == found["torn"] == found["left"] == 0
    assert found["saves"] > 3 and found["reads"] > 1
