"""Every broken LTX-2 file says what is wrong with it, and no file runs code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.ltx2 import load_transformer
from mutual_forcing.samplers.tensor_file import TensorFileError
from mutual_forcing.tests.ltx2_files import (
    CONTAINERS,
    HEADS,
    WEIGHTS,
    in_one_file,
    in_pickle,
    in_shards,
    prefixed,
    save_index,
    with_header,
)
from safetensors.torch import save_file
from torch import Tensor

LARGE = "transformer_blocks.1.ff.net.2.weight"


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in WEIGHTS.items() if name != key}


DAMAGED = {
    "missing": (without(LARGE), rf"lacks model\.{LARGE};"),
    "missing first": (without("patchify_proj.weight"), r"lacks patchify_proj\.weight;"),
    "missing layer": (
        {k: v for k, v in WEIGHTS.items() if not k.startswith("transformer_blocks.0.")},
        r"lacks model\.transformer_blocks\.0\..* and 69 more",
    ),
    "extra": (WEIGHTS | {"scale.shift": torch.zeros(1)}, r"no place for: model\.scale\.shift;"),
    "misshapen": (
        WEIGHTS | {LARGE: WEIGHTS[LARGE][:, :-1].contiguous()},
        rf"another shape: model\.{LARGE} is \(96, 383\), expected \(96, 384\)",
    ),
    "misshapen width": (
        WEIGHTS | {"patchify_proj.weight": torch.zeros(90, 16)},
        r"another shape: model\.patchify_proj\.weight is \(90, 16\), expected \(96, 16\);",
    ),
    "quantised": (
        WEIGHTS | {LARGE: WEIGHTS[LARGE].to(torch.int8)},
        "is quantised .*torch.int8.*ComfyUI's own loader",
    ),
    "scaled": (WEIGHTS | {f"{LARGE}_scale": torch.ones(())}, "is quantised .*weight_scale"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("container", ["folder of shards", "pt generator"])
def test_wrong_weights_are_named(tmp_path, damage, container):
    weights, message = DAMAGED[damage]
    path = CONTAINERS[container][0](tmp_path, prefixed("model.", weights))
    with pytest.raises(TensorFileError, match=message) as caught:
        load_transformer(path, overrides=HEADS)
    assert str(path) in str(caught.value)


def test_a_key_elsewhere_or_twice_is_named(tmp_path):
    tensors = prefixed("model.") | {"proj_out.weight": torch.zeros(1)}
    with pytest.raises(TensorFileError, match=r"no place for: proj_out\.weight;"):
        load_transformer(in_one_file(tmp_path, tensors), overrides=HEADS)
    twin = "model._fsdp_wrapped_module.proj_out.bias"
    tensors = prefixed("model.") | {twin: torch.zeros(1)}
    with pytest.raises(TensorFileError, match=rf"proj_out\.bias twice, as .*{twin}"):
        load_transformer(in_one_file(tmp_path, tensors), overrides=HEADS)
    save_file(prefixed("model."), tmp_path / "again.safetensors")
    with pytest.raises(TensorFileError, match=r"twice, in again\.safetensors and in one"):
        load_transformer(tmp_path, overrides=HEADS)


class RunsCode:
    """A pickle that would leave a file behind if it were opened carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def lose(path: Path, lost: Path) -> Path:
    lost.unlink()
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def index_of(folder: Path, change: dict[str, str]) -> Path:
    path = save_index(folder, prefixed("model."))
    content = json.loads(path.read_text())
    content["weight_map"] |= change
    path.write_text(json.dumps(content))
    return path


def pickled(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def old_pickle(path: Path) -> Path:
    torch.save(prefixed("model."), path, _use_new_zipfile_serialization=False)
    return path


FIRST = "model-00001-of-00003.safetensors"
BROKEN = {
    "absent": (lambda f: f / "none.safetensors", "is not there"),
    "truncated": (lambda f: cut(in_one_file(f, WEIGHTS), 0.7), "was cut short"),
    "truncated header": (lambda f: cut(in_one_file(f, WEIGHTS), 0.001), "was cut short"),
    "truncated shard": (
        lambda f: cut(in_shards(f, WEIGHTS) / FIRST, 0.7).parent,
        rf"{FIRST} was cut short",
    ),
    "text": (lambda f: written(f / "x.safetensors", b"not a model" * 9), "not a safetensors file"),
    "empty": (lambda f: written(f / "x.safetensors", b""), "is empty or was cut short"),
    "empty folder": (lambda f: f, r"no \*\.safetensors\.index\.json and no \.safetensors"),
    "folder of pt": (lambda f: in_pickle(f, WEIGHTS).parent, r"choose one .*weights\.pt"),
    "another model": (
        lambda f: in_one_file(f, {"decoder.weight": torch.zeros(2)}),
        r"no LTX-2 transformer.*decoder\.weight",
    ),
    "missing shard": (lambda f: lose(in_shards(f, WEIGHTS), f / FIRST), rf"lacks {FIRST} of 3"),
    "index of a missing file": (
        lambda f: lose(save_index(f, WEIGHTS), f / FIRST),
        rf"index .* names {FIRST}, not found",
    ),
    "index of a missing tensor": (
        lambda f: index_of(f, {"model.nothing": FIRST}),
        rf"names model\.nothing in {FIRST}, not found there",
    ),
    "index leading away": (lambda f: index_of(f, {"x": "../x.safetensors"}), "file beside it"),
    "index without map": (lambda f: written(f / "x.index.json", b"{}"), "'weight_map'"),
    "index not JSON": (lambda f: written(f / "x.index.json", b"{"), "'weight_map'"),
    "pt with code": (
        lambda f: pickled(f / "x.pt", {"generator": WEIGHTS, "args": RunsCode(f / "trace")}),
        "needs code to open it .*code from a file is never run",
    ),
    "plain pickle with code": (
        lambda f: written(f / "x.pt", pickle.dumps(RunsCode(f / "trace"))),
        "never opened: it could run any code",
    ),
    "pt called safetensors": (
        lambda f: pickled(f / "x.safetensors", {"args": RunsCode(f / "trace")}),
        "under the name of a safetensors file; rename it",
    ),
    "old pt": (lambda f: old_pickle(f / "x.pt"), "never opened: it could run any code"),
    "truncated pt": (lambda f: cut(in_pickle(f, WEIGHTS), 0.7), r"weights\.pt was cut short"),
    "pt of a list": (lambda f: pickled(f / "x.pt", [torch.zeros(1)]), "holds a list"),
    "pt without weights": (lambda f: pickled(f / "x.pt", {"step": 1}), "no weights .*step"),
    "header not JSON": (
        lambda f: save_file(WEIGHTS, f / "x.safetensors", {"config": "{"}) or f / "x.safetensors",
        "not JSON",
    ),
    "header of another": (
        lambda f: with_header(f, num_layers=3),
        r"lacks model\.diffusion_model\.transformer_blocks\.2\..* and 69 more",
    ),
    "heads that do not fit": (
        lambda f: with_header(f, num_attention_heads=5),
        "width of 96, which num_attention_heads = 5 does not divide",
    ),
    "header with a word": (
        lambda f: with_header(f, norm_eps="small"),
        "norm_eps is 'small', expected a valid number",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_say_what_is_wrong(tmp_path, broken):
    make, message = BROKEN[broken]
    path = make(tmp_path)
    with pytest.raises(TensorFileError, match=message) as caught:
        load_transformer(path)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_averaged_weights_only_where_there_are_some(tmp_path):
    with pytest.raises(TensorFileError, match=r"no 'generator_ema' \(it has .*generator"):
        load_transformer(in_pickle(tmp_path, WEIGHTS, "generator"), ema=True)
    with pytest.raises(TensorFileError, match=r"only a \.pt can hold"):
        load_transformer(in_one_file(tmp_path, WEIGHTS), ema=True)


@pytest.mark.parametrize(
    "arguments",
    [{"preset": "ltx3"}, {"overrides": {"heads": 4}}, {"overrides": {"layout": (1, 1)}}],
)
def test_arguments_that_do_not_exist_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="expected"):
        load_transformer(in_one_file(tmp_path, WEIGHTS), **arguments)
