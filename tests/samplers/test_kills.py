"""Killed with -9: what was left plays, and goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

from mutual_forcing.tests.kills import kill_often
from mutual_forcing.tests.tiny import save_tiny


def test_a_killed_run_leaves_a_clip_and_a_whole_stream(tmp_path: Path) -> None:
    """Twice here; more, and with the shipped model, by the command."""
    model = save_tiny(tmp_path / "tiny.safetensors")
    found = list(kill_often(model, "red ball", times=2, longest=2.0))
    assert all(one.well for one in found), found
