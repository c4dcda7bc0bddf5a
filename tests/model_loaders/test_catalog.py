"""Files are told apart by their headers, and nothing else of them is read."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.model_loaders.catalog import (
    MODEL_VARIABLE,
    list_bases,
    list_ltx2,
    list_models,
    list_streams,
    told_apart,
)
from mutual_forcing.model_loaders.identity import what_is
from mutual_forcing.samplers.state_file import save_state
from mutual_forcing.tests.tiny import save_tiny
from safetensors.torch import save_file


@pytest.fixture
def files(tmp_path: Path, bundle: Bundle) -> Path:
    """A model, a stream, another pack's checkpoint, and things that are no safetensors at all."""
    save_tiny(tmp_path / "ours.safetensors")
    save_state(tmp_path / "stream.safetensors", bundle.begin())
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "pt"})
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)
    (tmp_path / "text.safetensors").write_text("hello, this is no model")
    header = json.dumps(["not", "an", "object"]).encode()
    (tmp_path / "list.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "folder.safetensors").mkdir()
    return tmp_path


def test_models_and_streams_are_told_apart(files: Path) -> None:
    paths = sorted(files.iterdir())
    assert [path.stem for path in paths if what_is(path).fits("model")] == ["ours"]
    assert [path.stem for path in paths if what_is(path).fits("stream")] == ["stream"]
    assert not what_is(files / "missing.safetensors").is_known


def test_a_file_that_changes_is_looked_at_again(files: Path) -> None:
    path = files / "text.safetensors"
    assert not what_is(path).is_known
    path.write_bytes((files / "ours.safetensors").read_bytes())
    assert what_is(path).fits("model")


def test_the_shipped_model_comes_first_and_wins(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    shipped = files / "ours.safetensors"
    found = [(f"sub/{path.name}", path) for path in sorted(files.iterdir())]
    assert list(list_models(shipped, found)) == ["ours.safetensors", "sub/ours.safetensors"]
    assert list_models(shipped, [("ours.safetensors", files / "other.safetensors")]) == {
        "ours.safetensors": shipped
    }
    assert list_models(files / "missing.safetensors", []) == {}
    monkeypatch.setenv(MODEL_VARIABLE, str(shipped))
    assert list_models(files / "missing.safetensors", []) == {"missing.safetensors": shipped}


def header(path: Path, text: bytes, size: int | None = None) -> None:
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text)


@pytest.mark.timeout(60)
def test_a_folder_may_hold_anything(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe would wait for ever, and nesting this deep ends Python's reader."""
    os.mkfifo(files / "pipe.safetensors")
    os.mkfifo(files / "pipe.pt")
    listener = socket.socket(socket.AF_UNIX)
    # A socket's path may have 108 letters, and this folder's alone is about as long.
    monkeypatch.chdir(files)
    listener.bind("socket.safetensors")
    (files / "gone.safetensors").symlink_to(files / "nowhere")
    (files / "loop.safetensors").symlink_to(files / "loop.safetensors")
    (files / "device.safetensors").symlink_to("/dev/zero")
    (files / "round").symlink_to(files)
    header(files / "deep.safetensors", b"[" * 50_000)
    header(files / "deeper.safetensors", b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    header(files / "digits.safetensors", b'{"a": ' + b"9" * 10_000 + b"}")
    header(files / "large.safetensors", b"{}", 1 << 62)
    header(files / "latin.safetensors", b'{"\xe4": 1}')
    header(files / "format.safetensors", b'{"__metadata__": {"format": ["mutual-forcing"]}}')
    header(files / "meta.safetensors", b'{"__metadata__": 3}')
    header(files / "x-00001-of-00002.safetensors", b'{"a.audio_to_video_attn.to_q.bias": 1}')
    (files / "x.safetensors.index.json").symlink_to(files / ("n" * 255))
    with listener:
        found = [(path.name, path) for path in sorted(files.iterdir())]
        found += [("n" * 300 + ".safetensors", files / ("n" * 300 + ".safetensors"))]
        found += [("\0.safetensors", files / "\0.safetensors")]
        assert list_models(files / ("n" * 300), found) == {
            "ours.safetensors": files / "ours.safetensors"
        }
        assert list_ltx2(found) == list_bases(found) == {}
        assert list_streams({"": files}) == {"stream.safetensors": files / "stream.safetensors"}


def test_one_name_in_several_folders_is_several_entries(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "loras", tmp_path / "b" / "loras", tmp_path / "c"]
    paths = [place / "sub" / "x.safetensors" for place in places]
    listed = told_apart([("sub/x.safetensors", path) for path in (*paths, paths[0])])
    assert listed == {
        "sub/x.safetensors": paths[0],
        "sub/x.safetensors [loras]": paths[1],
        "sub/x.safetensors [c]": paths[2],
    }


def test_streams_of_one_name_are_told_apart_and_the_newest_comes_first(
    tmp_path: Path, bundle: Bundle
) -> None:
    output, given = tmp_path / "output", tmp_path / "input"
    for age, path in enumerate((given / "s.safetensors", output / "a" / "s.safetensors")):
        save_state(path, bundle.begin())
        os.utime(path, (1000 + age, 1000 + age))
    save_state(output / "s.safetensors", bundle.begin())
    assert list(list_streams({"": output, "input": given}).items()) == [
        ("s.safetensors", output / "s.safetensors"),
        ("a/s.safetensors", output / "a" / "s.safetensors"),
        ("s.safetensors [input]", given / "s.safetensors"),
    ]
