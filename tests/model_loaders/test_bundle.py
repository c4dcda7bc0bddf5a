"""One file is the whole model; every file that is not says what is wrong with it and what to do."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders import bundle as loading
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, save_bundle, shipped_model_path
from mutual_forcing.networks.transformer import CausalAVTransformer
from mutual_forcing.samplers.tensor_file import TensorFileError
from mutual_forcing.tests import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def rewritten(
    file: Path, to: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]
) -> Path:
    """A copy of a file with other tensors or metadata."""
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, to, metadata)
    return to


def test_what_was_saved_is_what_is_loaded(file: Path) -> None:
    loaded = load_bundle(file)
    parts = (loaded.transformer, loaded.text_encoder, loaded.video_codec, loaded.audio_codec)
    for part, original in zip(parts, tiny.tiny_parts(), strict=True):
        found, expected = part.state_dict(), original.state_dict()
        assert found.keys() == expected.keys()
        # The codecs' matrices are stored in float16.
        assert all(torch.allclose(found[k], expected[k], atol=2e-3, rtol=1e-3) for k in found)
        assert not any(p.requires_grad for p in part.parameters()) and not part.training
    assert loaded.stream == tiny.STREAM and loaded.clock.frames(2) == 25
    assert torch.equal(
        loaded.transformer.patchify_proj.weight, tiny.tiny_parts()[0].patchify_proj.weight
    )


def test_the_file_has_ltx2_names_and_says_what_it_is(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
    assert "model.diffusion_model.transformer_blocks.0.audio_to_video_attn.to_q.weight" in keys
    assert metadata["format"] == "mutual-forcing" and metadata["license"] == "GPL-3.0-or-later"
    assert json.loads(metadata["config"])["stream"]["default_mode"] == "multi"


def test_the_model_id_is_of_the_file_and_not_of_the_load(file: Path, tmp_path: Path) -> None:
    loaded, half = load_bundle(file), load_bundle(file, dtype=torch.bfloat16)
    assert loaded.model_id == half.model_id
    assert half.transformer.proj_out.weight.dtype == torch.bfloat16
    assert half.video_codec.latent_mean.dtype == torch.float32
    assert half.prompt("red").text.video[0][0].dtype == torch.bfloat16
    assert (
        load_bundle(tiny.save_tiny(tmp_path / "other.safetensors", 1)).model_id != loaded.model_id
    )


def test_a_file_in_half_precision_keeps_its_vectors(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_bundle(path, *tiny.tiny_parts(), tiny.STREAM, title="half")
    types = {key: value.dtype for key, value in load_file(path).items()}
    assert types["model.diffusion_model.proj_out.weight"] == torch.bfloat16
    assert types["model.diffusion_model.proj_out.bias"] == torch.float32
    assert types["video_codec.latent_std"] == torch.float32
    assert types["audio_codec.heads.weight"] == torch.float16


def test_interleaved_weights_are_brought_to_the_one_layout(file: Path, tmp_path: Path) -> None:
    """Loading and saving a file in the other rotary layout reorders its rows once, not twice."""

    def interleave(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["config"] = metadata["config"].replace('"split"', '"interleaved"')

    once = load_bundle(rewritten(file, tmp_path / "other.safetensors", interleave))
    parts = once.transformer, once.text_encoder, once.video_codec, once.audio_codec
    save_bundle(tmp_path / "again.safetensors", *parts, tiny.STREAM, title="", dtype=torch.float32)
    twice = load_bundle(tmp_path / "again.safetensors")
    key = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(once.transformer.state_dict()[key], twice.transformer.state_dict()[key])
    assert not torch.equal(
        once.transformer.state_dict()[key], load_file(file)[loading.TRANSFORMER + key]
    )


def test_loading_leaves_the_global_random_numbers_as_found(file: Path) -> None:
    before = torch.get_rng_state()
    load_bundle(file)
    assert torch.equal(before, torch.get_rng_state())


def test_loading_draws_no_weights(file: Path) -> None:
    """PyTorch imports its compiler, for seconds, to draw numbers that have no memory."""
    code = (
        "import launch, sys; launch.register(); from pathlib import Path\n"
        "from mutual_forcing.model_loaders.bundle import load_bundle\n"
        f"load_bundle(Path({str(file)!r}))\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    )
    root = Path(loading.__file__).parents[1]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr


def test_no_number_in_a_config_makes_memory(file: Path, tmp_path: Path) -> None:
    """The largest codec that a config can ask for is compared with the file before it is made."""
    wide = config(video_codec__fine_width=65536, audio_codec__channels=65536)
    path = rewritten(file, tmp_path / "wide.safetensors", wide)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TensorFileError, match="weights of another shape"):
        load_bundle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_the_small_model_lies_in_the_pack() -> None:
    assert shipped_model_path().parts[-2:] == ("models", "mutual_forcing_small.safetensors")
    assert (shipped_model_path().parents[1] / "launch.py").is_file()


def test_prompts_that_say_nothing_are_refused(bundle: Bundle) -> None:
    bundle.check_prompt("A RED, red ball!")
    for text, message in ((" \n", "is empty"), ("une balle", "no word that this model knows")):
        with pytest.raises(ValueError, match=f"{message}.*red, ball"):
            bundle.check_prompt(text)


def test_an_empty_prompt_is_told_words_of_every_kind() -> None:
    """Colours come first in the shipped vocabulary; things and what they do are named as well."""
    said = load_bundle(shipped_model_path()).prompt_refusal("")
    assert all(f" {word}," in said for word in ("red", "high", "voice", "bounces"))


def pickled(path: Path) -> None:
    """Would create a file if anything unpickled it."""

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(path) + ".trapped",)

    path.write_bytes(pickle.dumps(Trap()))


BROKEN_FILES: dict[str, tuple[Callable[[bytes, Path], object], str]] = {
    "missing": (lambda data, p: None, "is not there"),
    "folder": (lambda data, p: p.mkdir(), "is a folder"),
    "empty": (lambda data, p: p.write_bytes(b""), "empty or was cut short"),
    "four bytes": (lambda data, p: p.write_bytes(data[:4]), "empty or was cut short"),
    "half a header": (lambda data, p: p.write_bytes(data[:300]), "was cut short"),
    "last byte lost": (lambda data, p: p.write_bytes(data[:-1]), "was cut short"),
    "web page": (lambda data, p: p.write_bytes(b"<!doctype html>" * 30), "not a safetensors file"),
    "pickle": (lambda data, p: pickled(p), "pickled PyTorch file"),
    "zip": (lambda data, p: torch.save({"a": torch.zeros(1)}, p), "pickled PyTorch file"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_says_so(file: Path, tmp_path: Path, name: str) -> None:
    damage, message = BROKEN_FILES[name]
    path = tmp_path / "model.safetensors"
    damage(file.read_bytes(), path)
    with pytest.raises(TensorFileError, match=message) as caught:
        load_bundle(path)
    assert str(path) in str(caught.value) and "ships with this pack" in str(caught.value)
    assert not list(tmp_path.glob("*.trapped"))


def config(**changes: object) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        values = json.loads(metadata["config"])
        for key, value in changes.items():
            part, _, name = key.partition("__")
            if name:
                values[part][name] = value
            else:
                values[part] = value
        metadata["config"] = json.dumps(values)

    return change


WRONG_CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], object], str]] = {
    "no config": (lambda t, m: m.pop("config"), "no 'config' in its metadata"),
    "not json": (lambda t, m: m.update(config="{"), "config that does not work"),
    "part missing": (
        lambda t, m: m.update(config='{"transformer": {}}'),
        r"\(text_encoder: .*equired",
    ),
    "wrong type": (config(transformer__num_layers="two"), "num_layers is 'two'"),
    "odd head": (config(transformer__attention_head_dim=15), "attention_head_dim is 15"),
    "future codec": (config(video_codec__depth=3), "depth"),
    "no words": (config(text_encoder__vocabulary=[]), "vocabulary is empty"),
    "codec does not fit": (config(transformer__in_channels=5), "in_channels is 5, expected 16"),
    "window": (config(stream={"window": 0}), "stream.window"),
    "mode": (config(stream={"default_mode": "slow"}), "stream.default_mode"),
    "missing key": (
        lambda t, m: t.pop("video_codec.latent_std"),
        "lacks video_codec.latent_std; choose",
    ),
    "four missing": (
        lambda t, m: [t.pop(k) for k in list(t) if k.startswith("text_encoder.")],
        "lacks text_encoder.*; .*; .* and .* more",
    ),
    "unexpected key": (
        lambda t, m: t.update({"lora.up": torch.zeros(2)}),
        "no place for: lora.up",
    ),
    "shape": (
        lambda t, m: t.update({"model.diffusion_model.proj_out.weight": torch.zeros(16, 31)}),
        r"proj_out.weight is \(16, 31\), expected \(16, 32\)",
    ),
    "layers without end": (config(transformer__num_layers=10**15), "num_layers is 10000"),
    "half a layer": (config(transformer__num_layers=1.5), "num_layers is 1.5"),
    "endless block": (config(transformer__audio_first_block=float("inf")), "config that does not"),
    "rate": (config(stream={"sample_rate": 1}), "audio_sampling_rate is 16000, expected 1"),
    "stride": (config(transformer__video_time_stride=0), "video_time_stride is 0"),
    "other stride": (
        config(transformer__video_time_stride=4),
        "video_time_stride is 4, expected 8",
    ),
    "hop": (config(audio_codec__hop=320), "audio_hop_length is 160, expected 320"),
    "codes": (config(transformer__rope_type="\x1b[31m" * 10**5), "rope_type is"),
    "whole numbers": (
        lambda t, m: t.update({"video_codec.latent_std": torch.ones(4, dtype=torch.int64)}),
        "latent_std as int64, expected finite",
    ),
    "NaN": (
        lambda t, m: t.update(
            {"model.diffusion_model.proj_out.bias": torch.full((16,), torch.nan)}
        ),
        "proj_out.bias as float32, expected finite",
    ),
    "more layers than weights": (config(transformer__num_layers=3), "lacks .*transformer_blocks.2"),
}


@pytest.mark.parametrize("name", WRONG_CONTENTS)
def test_wrong_contents_are_named(file: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG_CONTENTS[name]
    path = rewritten(file, tmp_path / "wrong.safetensors", change)
    with pytest.raises(TensorFileError, match=message):
        load_bundle(path)


def test_parts_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    transformer, *others = tiny.tiny_parts()
    path = tmp_path / "model.safetensors"
    wide = CausalAVTransformer(
        replace(tiny.TRANSFORMER, in_channels=6, out_channels=6), device="meta"
    )
    with pytest.raises(ValueError, match="in_channels is 6, expected 16"):
        save_bundle(path, wide, *others, tiny.STREAM, title="")
    with torch.no_grad():
        transformer.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"proj_out.weight is not finite"):
        save_bundle(path, transformer, *others, tiny.STREAM, title="")
    assert not list(tmp_path.iterdir())


def test_an_older_model_stays_when_the_disk_is_full(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.read_bytes())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"disk is full: the model file .*make room"):
        tiny.save_tiny(path, seed=1)
    assert path.read_bytes() == file.read_bytes() and list(tmp_path.iterdir()) == [path]
