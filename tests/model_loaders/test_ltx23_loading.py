"""LTX-2.3 and TaoMate: what their files are, from names and shapes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.fixture import Golden
from mutual_forcing.model_loaders.generator import CONNECTORS, assemble
from mutual_forcing.model_loaders.ltx2 import load_transformer
from mutual_forcing.model_loaders.parity_ltx23 import causal_config
from mutual_forcing.networks.memory_branch import is_memory
from mutual_forcing.samplers.tensor_file import TensorFileError
from mutual_forcing.tests.ltx2_files import HEADS, WEIGHTS, prefixed
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Golden(Path(__file__).parents[1] / "data" / "ltx23_golden.safetensors")
LATER = {
    key.removeprefix("model."): value
    for key, value in GOLDEN.tensors.items()
    if key.startswith("model.")
}
ASKED = {**HEADS, "memory_heads": 4}


def published(folder: Path, name: str = "model.pt") -> Path:
    torch.save({"generator_ema": prefixed("model.", LATER)}, folder / name)
    return folder / name


def base_of(path: Path, names: dict[str, Tensor], gated: bool) -> Path:
    """A file with connectors, as a base has them, and a transformer."""
    connectors = {f"{part}.x.weight": torch.zeros(2, 2) for part in CONNECTORS}
    if gated:
        connectors |= {f"{part}.x.to_gate_logits.weight": torch.zeros(2) for part in CONNECTORS}
    header = {"config": json.dumps({"transformer": HEADS})}
    save_file(prefixed("model.diffusion_model.", names | connectors), path, header)
    return path


def test_taomate_as_published_is_known_by_its_tensors(tmp_path: Path) -> None:
    loaded = load_transformer(published(tmp_path), overrides=ASKED)
    assert (loaded.report.part, loaded.report.preset) == ("generator_ema", "taomate")
    config = causal_config(GOLDEN)
    assert loaded.transformer.config == config
    assert config.absolute_positions and config.opening_blocks == 5 and config.memory_interval == 2
    found = loaded.transformer.state_dict()
    assert found.keys() == LATER.keys()
    assert all(torch.equal(found[name], value) for name, value in LATER.items())


def test_ltx23_without_memory_has_its_own_positions(tmp_path: Path) -> None:
    plain = {name: value for name, value in LATER.items() if not is_memory(name)}
    save_file(plain, tmp_path / "plain.safetensors")
    loaded = load_transformer(tmp_path / "plain.safetensors", overrides=HEADS)
    config = loaded.transformer.config
    assert loaded.report.preset == "ltx2_base"
    assert (config.rope_type, config.frequencies_precision) == ("split", "float64")
    assert config.av_ca_timestep_scale_multiplier == 1000
    assert not (config.memory_interval or config.absolute_positions or config.opening_blocks)


def test_each_version_needs_its_own_base(tmp_path: Path) -> None:
    old = base_of(tmp_path / "old.safetensors", WEIGHTS, gated=False)
    new = base_of(tmp_path / "new.safetensors", LATER, gated=True)
    causal = tmp_path / "causal.safetensors"
    save_file(prefixed("model."), causal)
    with pytest.raises(TensorFileError, match=r"of LTX-2.3, and .*old.* choose ltx-2.3-22b-dev"):
        assemble(published(tmp_path), old)
    with pytest.raises(TensorFileError, match=r"of LTX-2 19B, and .*new.* choose ltx-2-19b-dev"):
        assemble(causal, new)


def test_a_memory_that_is_not_whole_is_named(tmp_path: Path) -> None:
    lacking = "transformer_blocks.3.video_color_film.net.2.weight"
    some = {name: value for name, value in LATER.items() if name != lacking}
    save_file(some, tmp_path / "some.safetensors")
    with pytest.raises(TensorFileError, match=lacking):
        load_transformer(tmp_path / "some.safetensors", overrides=ASKED)


@pytest.mark.parametrize("name", ["LTX2.3_ar.pt", "ltx2_3_ar/model.pt"])
def test_another_causal_ltx23_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    published(path.parent, path.name)
    with pytest.raises(TensorFileError, match=r"LightX2V's ltx2_3_ar.* TaoMate's model.pt"):
        load_transformer(path, overrides=ASKED)


def test_flags_travel_to_the_host_and_the_memory_beside_them(tmp_path: Path) -> None:
    new = base_of(tmp_path / "new.safetensors", LATER, gated=True)
    whole = assemble(published(tmp_path), new)
    assert whole.additions.keys() == {name for name in LATER if is_memory(name)}
    assert all(whole.header[flag] for flag in ("apply_gated_attention", "cross_attention_adaln"))
    assert not any(is_memory(name) for name in whole.tensors)
