"""Whole or not at all, and never in the place of something that is no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mutual_forcing.samplers.atomic_file import replacing, write_whole


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), b"x")
    with pytest.raises(OSError, match="too long"):
        write_whole(tmp_path / ("n" * 256), b"x")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_and_rights_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "link"
    write_whole(path, "old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    """Root could: a rename would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(OSError, match="device, a pipe or a socket"):
            write_whole(path, "x")
        assert not path.is_file()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "x")
