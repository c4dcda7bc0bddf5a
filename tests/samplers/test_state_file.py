"""Saved and loaded is never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers import tensor_file
from mutual_forcing.samplers.live import live_clip
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import BlockLatents, StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.samplers.tensor_file import TensorFileError, read_header
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
    with pytest.raises(
        ValueError, match=r"made by model 'tiny random model' \(abc\).*load the model"
    ):
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


K = "cache.1.video.k"
WRONG_TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "64 video channels": ("video", lambda x: x.repeat(1, 4, 1, 1, 1), r"video of block 0.*16"),
    "no video channel": ("video", lambda x: x[:, :0], "hold no number"),
    "one audio channel": ("audio", lambda x: x[..., :1], r"audio of block 0.*\(1, 1, 4\)"),
    "no audio channel": ("audio", lambda x: x[..., :0], "hold no number"),
    "two clips": ("audio", lambda x: x.repeat(2, 1, 1), r"audio of block 0 is \(2,"),
    "NaN": ("audio", lambda x: x.fill_(torch.nan), "audio has NaN or infinite values"),
    "infinite keys": (K, lambda x: x.fill_(torch.inf), f"{K} has NaN or infinite values"),
    "whole numbers": ("video", lambda x: x.long(), "video is int64, expected float32"),
    "bytes": ("audio", lambda x: x.byte(), "audio is uint8, expected float32"),
    "booleans": (K, lambda x: x.bool(), f"{K} is bool, expected float32 or bfloat16 or float16"),
    "layers": (K, lambda x: x[:1], rf"{K} is \(1, .*expected \(2, "),
    "heads": (K, lambda x: x[:, :, :1], rf"{K} is"),
    "tokens": (K, lambda x: x[..., :5, :], rf"{K} is .*expected \(2, 1, 2, 12, 16\)"),
    "rank": (K, lambda x: x[0], rf"{K} is"),
    "sinks": ("cache.0.audio.k", lambda x: x[..., :1, :], "block 0|cache.0"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    bundle: Bundle, saved: Path, tmp_path: Path, name: str
) -> None:
    key, change, message = WRONG_TENSORS[name]
    path, tensors, metadata = damaged(saved, tmp_path / "s")
    save_file(tensors | {key: change(tensors[key]).contiguous()}, path, metadata)
    # What only a model can know, how many channels there are, is refused when the two meet.
    with pytest.raises(ValueError, match=message) as caught:
        go_on(bundle, load_state(path), 1)
    assert "\n" not in str(caught.value)


def test_every_tensor_reshaped_alike_is_refused_by_the_model(
    bundle: Bundle, saved: Path, tmp_path: Path
) -> None:
    path, tensors, metadata = damaged(saved, tmp_path / "s")
    fewer = {key: x[:, :, :1].contiguous() if ".video.k" in key or ".video.v" in key else x
             for key, x in tensors.items()}  # fmt: skip
    save_file(fewer, path, metadata)
    with pytest.raises(ValueError, match=r"cache\.0\.video\.k is \(2, 1, 1, .*load the model"):
        go_on(bundle, load_state(path), 1)


WRONG_HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "keys": ({"keys": {"cache": 10**12}}, "cache has keys of 1000000000000 blocks"),
    "blocks": ({"blocks": 10**12}, "for its 1000000000000 blocks"),
    "no blocks": ({"blocks": 0, "keys": {}}, "it has .*which no stream state has"),
    "grid": ({"height": 10**9}, "latent grid is 1000000000x2"),
    "window": ({"window": 10**15}, "window is 1000000000000000 blocks"),
    "layout": ({"layout": [1, 1, 3, 10**9]}, "layout.3"),
    "seeds": ({"seeds": [0] * 1000}, "seeds"),
    "seed": ({"seeds": [2**65]}, "a seed is"),
    "word": ({"window": "3"}, "window: .*valid integer"),
    "name": ({"model_id": "\x1b[31m" * 10**5}, "model_id: String should have at most 64"),
    "branch": ({"keys": {"other": 1}}, "keys.other"),
    "time": ({"schedule": [{"start": -1, "texts": ["a"]}]}, "schedule.0.start"),
    "no time": ({"schedule": [{"start": "NaN", "texts": ["a"]}]}, "schedule.0.start"),
    "times": ({"schedule": [{"start": 5, "texts": ["a"]}] * 2}, "times do not rise"),
    "words": ({"schedule": [{"start": 0, "texts": ["a" * 10**6]}]}, "schedule.0.texts"),
    "past": (
        {"schedule": [{"start": 0, "texts": ["a"], "transition": {"reread": -1}}]},
        "schedule.0.transition",
    ),
    "more": ({"later": 1}, "later"),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_numbers_in_a_header_move_nothing(saved: Path, tmp_path: Path, name: str) -> None:
    header, message = WRONG_HEADERS[name]
    path, tensors, metadata = damaged(saved, tmp_path / "s", **header)
    save_file(tensors, path, metadata)
    with pytest.raises(TensorFileError, match=message) as caught:
        load_state(path)
    told = str(caught.value)
    assert told.isprintable() and len(told) < 1300 and "pydantic" not in told


def test_what_was_dropped_bounds_no_loop(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    """Nothing in the file shows how many blocks were dropped, so nothing goes over them."""
    path, tensors, metadata = damaged(
        saved, tmp_path / "s", blocks=10**12 + 2, dropped=10**12, keys={}
    )
    lengths = {"video": (2, 6), "audio": (1, 50)}
    kept = {name: tensors[name].narrow(axis, 0, n) for name, (axis, n) in lengths.items()}
    save_file({name: x.contiguous() for name, x in kept.items()}, path, metadata)
    with pytest.raises(ValueError, match="no longer holds its first 1000000000000 blocks"):
        go_on(bundle, load_state(path), 1)


def test_a_latent_without_numbers_bounds_no_loop(saved: Path, tmp_path: Path) -> None:
    """With no channel a tensor may have any number of frames, and none of them on the disk."""
    path, tensors, metadata = damaged(saved, tmp_path / "s", blocks=10**9, keys={})
    frames, sounds = 1 + 3 * (10**9 - 1), 1 + 25 * (10**9 - 1)
    tensors = {
        "video": torch.zeros(1, 0, frames, 2, 2),
        "audio": torch.zeros(1, sounds, 0),
    }
    save_file(tensors, path, metadata)
    with pytest.raises(TensorFileError, match="hold no number"):
        load_state(path)


@pytest.mark.parametrize("place", ["/dev/null", "pipe", "folder"])
def test_only_files_are_opened(tmp_path: Path, place: str) -> None:
    path = Path(place) if place[0] == "/" else tmp_path / place
    if place == "pipe":
        os.mkfifo(path)
    elif place == "folder":
        path.mkdir()
    kind = "is a folder" if place == "folder" else "is a device, a pipe or a socket"
    with pytest.raises(TensorFileError, match=kind):
        load_state(path)
    with pytest.raises(TensorFileError, match="cannot be read"):
        load_state(tmp_path / ("n" * 300))


def test_an_empty_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading such a one in /proc can wait for ever, and a link may lead there."""
    path = tmp_path / "empty.safetensors"
    path.touch()
    monkeypatch.delattr(Path, "open")
    with pytest.raises(ValueError, match="not a regular file"):
        read_header(path)
    with pytest.raises(TensorFileError, match="is empty or was cut short"):
        load_state(path)


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


@pytest.fixture(scope="module")
def decoded(bundle: Bundle) -> StreamState:
    """A stream that was decoded as it was made, and trimmed."""
    words = bundle.prompt("red ball")
    *_, (_, state) = live_clip(bundle, words, bundle.begin(), 6, FEW, bundle.decoder())
    return state.trimmed()


def test_the_decoders_memory_is_saved_and_going_on_needs_no_more(
    bundle: Bundle, decoded: StreamState, tmp_path: Path
) -> None:
    assert decoded.dropped
    save_state(tmp_path / "s.state", decoded)
    loaded = load_state(tmp_path / "s.state")
    assert (loaded.dropped, loaded.next_block) == (decoded.dropped, 6)
    for name, tensor in decoded.memory.decoders.tensors().items():
        assert torch.equal(tensor, loaded.memory.decoders.tensors()[name])
    words = bundle.prompt("red ball")
    clips = [
        [block for block, _ in live_clip(bundle, words, state, 2, FEW, bundle.decoder())]
        for state in (decoded, loaded)
    ]
    for one, two in zip(*clips, strict=True):
        assert torch.equal(one.video, two.video) and torch.equal(one.audio, two.audio)


@pytest.mark.parametrize(
    ("header", "changed", "message"),
    [
        ({"dropped": 6}, {}, "6 of 6 blocks are dropped"),
        ({"dropped": 1}, {}, "for its 5 blocks"),
        ({"memory": {"blocks": 9, "sample": 0}}, {}, "memory is of 9 blocks"),
        ({"memory": {"blocks": 6, "sample": 2**63}}, {}, "memory.sample"),
        ({"memory": None}, {}, "which no stream state has"),
        ({}, {"memory.phase": None}, "lacks the tensor 'phase'"),
        ({}, {"memory.phase": torch.zeros(1)}, "memory.phase is float32"),
        ({}, {"memory.video.0": torch.full((1,), torch.nan)}, "memory.video.0 has NaN"),
        ({}, {"memory.f0": torch.zeros(3, 3)}, "decoder memory has f0"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(
    bundle: Bundle,
    decoded: StreamState,
    tmp_path: Path,
    header: dict[str, object],
    changed: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    save_state(tmp_path / "whole", decoded)
    path, tensors, metadata = damaged(tmp_path / "whole", tmp_path / "s", **header)
    tensors = {name: x for name, x in (tensors | changed).items() if x is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        state = load_state(path)
        bundle.decoder().remember(state, state.next_block)
    assert "\n" not in str(caught.value)


def test_a_file_is_put_together_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", 50)
    parts = [torch.randn(2, 3, n, 4) for n in (1, 2, 3)]
    joined = tensor_file.Joined(parts, 2)
    assert max(piece.numel() for piece in joined.pieces()) <= 50
    others = {str(dtype): torch.arange(-3, 4).to(dtype).view(7, 1) for dtype in tensor_file._DTYPES}
    odd = {"none": torch.zeros(0, 3), "scalar": torch.tensor(2.0), "turned": torch.eye(3, 2).T}
    path = tmp_path / "x"
    tensor_file.write_tensors(path, {"joined": joined, **others, **odd}, {"a": "b"}, "it")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "b"}
    found = load_file(path)
    assert torch.equal(found.pop("joined"), torch.cat(parts, dim=2))
    for name, tensor in (others | odd).items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
