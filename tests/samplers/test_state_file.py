"""Saved and loaded is never stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import BlockLatents, StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.samplers.tensor_file import TensorFileError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FEW, GUIDED = sampler_settings("few", 2), sampler_settings("multi", 2)


def go_on(
    bundle: Bundle, state: StreamState, blocks: int, sampler: object = FEW, text: str = "red ball"
) -> StreamState:
    prompt = bundle.prompt(text, guided=sampler is GUIDED)
    *_, (_, after) = rollout(bundle, prompt, state, blocks, sampler)
    return after


def equal(a: tuple[BlockLatents, ...], b: tuple[BlockLatents, ...]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.video, y.video) and torch.equal(x.audio, y.audio)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("sampler", [FEW, GUIDED], ids=("few", "guided"))
@pytest.mark.parametrize("blocks", [1, 4])
def test_saved_and_loaded_is_never_stopped(
    bundle: Bundle, tmp_path: Path, keys: bool, sampler: object, blocks: int
) -> None:
    past = go_on(bundle, bundle.begin((3, 4)), blocks, sampler)
    save_state(tmp_path / "s.state", past, keys=keys)
    loaded = load_state(tmp_path / "s.state")
    assert loaded.settings == past.settings and equal(loaded.latents, past.latents)
    assert (loaded.cache is not None) == keys
    expected = go_on(bundle, past, 2, sampler)
    assert equal(expected.latents, go_on(bundle, loaded, 2, sampler).latents)


def test_a_changed_prompt_is_remembered_in_the_keys(bundle: Bundle, tmp_path: Path) -> None:
    past = go_on(bundle, go_on(bundle, bundle.begin(), 2), 2, text="bell low")
    save_state(tmp_path / "s.state", past)
    expected = go_on(bundle, past, 1, text="bell low")
    loaded = go_on(bundle, load_state(tmp_path / "s.state"), 1, text="bell low")
    assert equal(expected.latents, loaded.latents)


def test_a_stream_that_has_not_begun_can_be_saved(bundle: Bundle, tmp_path: Path) -> None:
    save_state(tmp_path / "s.state", bundle.begin((5,)))
    loaded = load_state(tmp_path / "s.state")
    assert loaded == bundle.begin((5,))
    assert go_on(bundle, loaded, 1).next_block == 1


def test_without_keys_the_file_is_small(bundle: Bundle, tmp_path: Path) -> None:
    past = go_on(bundle, bundle.begin(), 4)
    save_state(tmp_path / "large", past)
    save_state(tmp_path / "small", past, keys=False)
    assert (tmp_path / "small").stat().st_size * 5 < (tmp_path / "large").stat().st_size


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "s.state"
    save_state(path, go_on(bundle, bundle.begin(), 3))
    return path


def damaged(
    saved: Path, to: Path, **header: object
) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(saved, "pt") as file:
        metadata = dict(file.metadata())
    metadata["header"] = json.dumps(json.loads(metadata["header"]) | header)
    return to, load_file(saved), metadata


def test_a_state_of_another_version_or_model_is_refused(
    bundle: Bundle, saved: Path, tmp_path: Path
) -> None:
    path, tensors, metadata = damaged(saved, tmp_path / "v", version=7)
    save_file(tensors, path, metadata)
    with pytest.raises(
        TensorFileError, match=r"version 7, expected 2.*another version of this pack"
    ):
        load_state(path)
    path, tensors, metadata = damaged(saved, tmp_path / "m", model_id="abc")
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"made by model abc.*load the model that made it"):
        go_on(bundle, load_state(path), 1)


def test_broken_state_files_say_what_is_wrong(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    path, tensors, metadata = damaged(saved, tmp_path / "s")

    def check(message: str) -> None:
        with pytest.raises(TensorFileError, match=message):
            load_state(path)

    check("is not there; choose a file that was saved as a stream state")
    path.write_bytes(saved.read_bytes()[:-10])
    check("was cut short")
    save_file(tensors, path)
    check("not a stream state")
    save_file(tensors, path, metadata | {"header": '{"version": 2}'})
    check("damaged header")
    save_file({k: v for k, v in tensors.items() if k != "audio"}, path, metadata)
    check("lacks the tensor 'audio'")
    save_file({k: v for k, v in tensors.items() if k != "cache.1.audio.v"}, path, metadata)
    check("lacks the tensor 'cache.1.audio.v'")
    save_file(tensors | {"video": tensors["video"][:, :, :-1].contiguous()}, path, metadata)
    check(r"latents are video \(1, \d+, 6, 2, 2\).*3 blocks")
    save_file(tensors | {"video": torch.zeros(2)}, path, metadata)
    check(r"latents are video \(2,\)")


def test_a_header_that_begins_like_a_pickle_is_no_pickle(saved: Path, tmp_path: Path) -> None:
    """One file in 256 was refused: its first byte is that of a pickle."""
    path, tensors, metadata = damaged(saved, tmp_path / "s")
    for padding in range(256):
        save_file(tensors, path, metadata | {"padding": " " * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert load_state(path).next_block == 3


def test_an_older_state_stays_when_the_disk_is_full(
    bundle: Bundle, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.state"
    path.write_bytes(saved.read_bytes())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full: the stream state"):
        save_state(path, bundle.begin())
    assert path.read_bytes() == saved.read_bytes() and list(tmp_path.iterdir()) == [path]
