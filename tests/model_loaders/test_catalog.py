"""Files are told apart by their headers, and nothing else of them is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.model_loaders.catalog import (
    MODEL_VARIABLE,
    is_model,
    is_stream,
    list_models,
    metadata_of,
)
from mutual_forcing.model_loaders.memory import WORKING_BYTES, stream_bytes
from mutual_forcing.samplers.rollout import rollout, sampler_settings
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
    assert [path.stem for path in paths if is_model(path)] == ["ours"]
    assert [path.stem for path in paths if is_stream(path)] == ["stream"]
    assert metadata_of(files / "missing.safetensors") == {}


def test_a_file_that_changes_is_looked_at_again(files: Path) -> None:
    path = files / "text.safetensors"
    assert not is_model(path)
    path.write_bytes((files / "ours.safetensors").read_bytes())
    assert is_model(path)


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


def test_the_memory_that_is_asked_for_holds_the_cache(bundle: Bundle) -> None:
    settings = bundle.begin().settings
    state = bundle.begin()
    rolled = rollout(
        bundle,
        bundle.prompt("red ball"),
        state,
        settings.window + 2,
        sampler_settings("few", 1),
    )
    *_, (_, state) = rolled
    asked = stream_bytes(
        bundle.transformer.config, settings.window, settings.height, settings.width
    )
    # The cache and a rotated copy, with and without prompt.
    assert 4 * state.cache.bytes() <= asked - WORKING_BYTES <= 8 * state.cache.bytes()
