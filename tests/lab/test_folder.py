"""The measures of a folder: every film in the tables or named as left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from mutual_forcing.lab.metrics import folder
from mutual_forcing.measures.film import film_of
from PIL import Image


def film(path: Path) -> None:
    """Two seconds of noise without sound."""
    generator = np.random.default_rng(0)
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width = video.height = 32
        for _ in range(48):
            picture = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(video.encode(None))


def test_every_film_is_in_the_tables_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    film(tmp_path / "in" / "A.MP4")
    (tmp_path / "b.mp4").write_bytes(b"no film at all" * 99)
    (tmp_path / "notes.txt").write_text("not asked for")
    monkeypatch.setattr(sys, "argv", ["lab.metrics.folder", str(tmp_path)])
    assert folder.main() == 0
    found = json.loads((tmp_path / "measured" / "folder.json").read_text())
    told = found["films"]["in/A.MP4"]
    assert told["picture s"] == pytest.approx(2) and told["frames a second"] == pytest.approx(24)
    assert told["offset ms"] is None and told["borders"] == 1 and "sound s" not in told
    assert found["left out"]["b.mp4"].startswith("unreadable: ")
    text = (tmp_path / "measured" / "folder.md").read_text()
    assert "| in/A.MP4 | 2" in text and "left out: b.mp4: unreadable" in text
    assert Image.open(tmp_path / "measured" / "in_A.MP4.png").width == 1200
    (tmp_path / "in" / "A.MP4").unlink()
    monkeypatch.setattr(sys, "argv", ["lab.metrics.folder", str(tmp_path / "in")])
    assert folder.main() == 2


def test_every_column_is_a_number_of_a_film_with_sound() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (72, 16, 16, 3), dtype=np.uint8)
    wave = np.random.default_rng(0).normal(0, 0.1, (1, 48_000)).astype(np.float32)
    told = folder.facts(film_of(frames, 24, wave))
    assert set(told) >= {*folder.TOGETHER, *folder.APART}
    assert json.loads(json.dumps(told, allow_nan=False)) == told
