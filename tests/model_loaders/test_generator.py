"""A causal checkpoint and the base file together: nothing is missing, nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.catalog import list_bases, list_ltx2
from mutual_forcing.model_loaders.generator import assemble
from mutual_forcing.samplers.tensor_file import TensorFileError
from mutual_forcing.tests.ltx2_files import (
    CONTAINERS,
    HEADS,
    WEIGHTS,
    in_one_file,
    large,
    prefixed,
    save_shards,
)
from mutual_forcing.tests.tiny import save_tiny
from safetensors.torch import save_file

CONNECTORS = {
    f"{stream}_embeddings_connector.{name}": torch.randn(4, 4)
    for stream in ("video", "audio")
    for name in ("learnable_registers", "transformer_1d_blocks.0.attn1.to_q.weight")
}
BASE_HEADER = {**HEADS, "rope_type": "split", "av_ca_timestep_scale_multiplier": 1000.0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """LTX-2's own file: another transformer, and the connectors."""
    path = tmp_path / "base" / "ltx-2.safetensors"
    path.parent.mkdir()
    tensors = {key: value + 1 for key, value in WEIGHTS.items()} | CONNECTORS
    header = {"transformer": BASE_HEADER, "vae": {}}
    save_file(prefixed("model.diffusion_model.", tensors), path, {"config": json.dumps(header)})
    return path


@pytest.mark.parametrize("container", ["folder with index", "file", "pt generator"])
def test_weights_are_the_checkpoints_and_connectors_the_base_files(
    container: str, tmp_path: Path, base: Path
) -> None:
    path = CONTAINERS[container][0](tmp_path, prefixed("model."))
    made = assemble(path, base)
    assert made.tensors.keys() == WEIGHTS.keys() | CONNECTORS.keys()
    # In the file's own order: a LoRA's rows are numbered as these are.
    assert all(torch.equal(made.tensors[key], value) for key, value in WEIGHTS.items())
    assert all(torch.equal(made.tensors[key], value) for key, value in CONNECTORS.items())
    assert set(made.from_base) == CONNECTORS.keys()
    assert made.config.rope_type == "interleaved"
    assert made.config.av_ca_timestep_scale_multiplier == 1.0
    assert made.header["rope_type"] == "split"


def test_what_the_checkpoint_lacks_comes_from_the_base_file_by_whole_layers(
    tmp_path: Path, base: Path
) -> None:
    layer = "transformer_blocks.1.ff.net.2"
    partial = {key: value for key, value in WEIGHTS.items() if not key.startswith(layer)}
    made = assemble(in_one_file(tmp_path, prefixed("model.", partial)), base)
    assert {key for key in made.from_base if key in WEIGHTS} == {f"{layer}.weight", f"{layer}.bias"}
    assert torch.equal(made.tensors[f"{layer}.bias"], WEIGHTS[f"{layer}.bias"] + 1)


def test_a_scale_of_the_base_file_never_comes_without_its_weight(tmp_path: Path) -> None:
    layer = "transformer_blocks.1.ff.net.2"
    quantised = WEIGHTS | CONNECTORS
    for name in (layer, "transformer_blocks.0.ff.net.2"):
        quantised |= {
            f"{name}.weight": WEIGHTS[f"{name}.weight"].to(torch.float8_e4m3fn),
            f"{name}.weight_scale": torch.tensor(2.0),
            f"{name}.comfy_quant": torch.zeros(3, dtype=torch.uint8),
        }
    base = tmp_path / "fp8.safetensors"
    header = {"config": json.dumps({"transformer": BASE_HEADER})}
    save_file(prefixed("model.diffusion_model.", quantised), base, header)
    own = [f"{layer}.weight", "transformer_blocks.0.ff.net.2.bias"]
    partial = {key: value for key, value in WEIGHTS.items() if key not in own}
    made = assemble(in_one_file(tmp_path, prefixed("model.", partial)), base)
    scales = {f"{layer}.weight_scale", f"{layer}.comfy_quant"}
    assert set(made.from_base) == {*own, *scales, *CONNECTORS}


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    starts = [index for index, line in enumerate(maps) if line.endswith(str(path))]
    found = [next(line for line in maps[start:] if line.startswith("Rss:")) for start in starts]
    return sum(int(line.split()[1]) * 1024 for line in found)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="measured on Linux only")
@pytest.mark.parametrize("lacking", [False, True])
def test_weights_of_the_base_file_are_read_only_where_the_checkpoint_lacks_them(
    tmp_path: Path, lacking: bool
) -> None:
    weights, base = large(), tmp_path / "base.safetensors"
    tensors = prefixed("model.diffusion_model.", weights | CONNECTORS)
    save_file(tensors, base, {"config": json.dumps({"transformer": HEADS})})
    if lacking:
        weights = {key: value for key, value in weights.items() if "blocks.1." not in key}
    made = assemble(in_one_file(tmp_path, prefixed("model.", weights)), base)
    needed = [made.tensors[name] for name in made.from_base]
    assert all(torch.isfinite(value.float()).all() for value in needed)
    read = resident(base) - sum(value.nbytes for value in needed)
    assert abs(read) < 0.01 * base.stat().st_size


@pytest.mark.parametrize("key", ["patchify_proj.weight", "transformer_blocks.1.ff.net.2.weight"])
def test_a_tensor_of_another_shape_is_named(key: str, tmp_path: Path, base: Path) -> None:
    wrong = WEIGHTS | {key: WEIGHTS[key][:-1].contiguous()}
    with pytest.raises(TensorFileError, match=rf"another shape: {key} is"):
        assemble(in_one_file(tmp_path, prefixed("model.", wrong)), base)


def test_the_fingerprint_is_the_weights_whatever_they_are_stored_in(
    tmp_path: Path, base: Path
) -> None:
    def identity(name: str, change: float = 0.0, dtype: torch.dtype = torch.float32) -> str:
        tensors = {key: (value + change).to(dtype) for key, value in WEIGHTS.items()}
        (tmp_path / name).mkdir()
        return assemble(in_one_file(tmp_path / name, prefixed("model.", tensors)), base).model_id

    assert identity("a") == identity("b", dtype=torch.bfloat16) != identity("c", change=0.1)


def test_sink_tokens_are_additions(tmp_path: Path, base: Path) -> None:
    sinks = torch.randn(1, 16, 48)
    path = in_one_file(tmp_path, prefixed("model.", WEIGHTS | {"audio_sink_tokens": sinks}))
    made = assemble(path, base)
    assert made.config.num_audio_sink_tokens == 16
    assert torch.equal(made.additions["audio_sink_tokens"], sinks)
    assert "audio_sink_tokens" not in made.tensors


def test_quantised_layers_keep_their_scales_and_their_shapes_are_the_hosts_business(
    tmp_path: Path, base: Path
) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    packed = WEIGHTS | {
        f"{name}.weight": torch.zeros(96, 48, dtype=torch.uint8),
        f"{name}.weight_scale": torch.ones(96),
        f"{name}.a_scale_of_another_name": torch.ones(96),
        f"{name}.comfy_quant": torch.zeros(3, dtype=torch.uint8),
    }
    made = assemble(in_one_file(tmp_path, prefixed("model.", packed)), base)
    assert made.tensors[f"{name}.weight"].dtype == torch.uint8
    assert packed.keys() <= made.tensors.keys()


def test_what_is_in_neither_file_is_named(tmp_path: Path, base: Path) -> None:
    key = "transformer_blocks.1.ff.net.2.bias"
    partial = {name: value for name, value in WEIGHTS.items() if name != key}
    header = {"transformer": HEADS}
    alone = tmp_path / "alone.safetensors"
    save_file(prefixed("model.", partial), alone, {"config": json.dumps(header)})
    with pytest.raises(TensorFileError, match="or choose a base file that has what it lacks"):
        assemble(alone)
    poor = tmp_path / "poor.safetensors"
    save_file(
        prefixed("model.diffusion_model.", partial | CONNECTORS),
        poor,
        {"config": json.dumps(header)},
    )
    with pytest.raises(TensorFileError, match=key):
        assemble(poor)
    with pytest.raises(TensorFileError, match="lacks them too"):
        assemble(alone, alone)
    strange = in_one_file(tmp_path, prefixed("model.", WEIGHTS | {"another.weight": torch.ones(2)}))
    with pytest.raises(TensorFileError, match=r"another\.weight"):
        assemble(strange, base)


def test_the_lists_offer_what_can_be_loaded(tmp_path: Path, base: Path) -> None:
    (tmp_path / "shards").mkdir()
    save_shards(tmp_path / "shards", prefixed("model."))
    save_shards(tmp_path, prefixed("model."))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    save_tiny(tmp_path / "ours.safetensors")
    layer = "diffusion_model.transformer_blocks.0.audio_to_video_attn.to_q"
    lora = {f"{layer}.lora_{x}.weight": torch.ones(2) for x in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    own = tmp_path / "mutual_forcing"
    own.mkdir()
    for folder in (own, tmp_path):
        torch.save({"x": torch.ones(1)}, folder / "another.pt")
    torch.save({"generator": prefixed("model.")}, own / "stage3.pt")
    files = [
        (path.relative_to(tmp_path).as_posix(), path) for path in sorted(tmp_path.rglob("*.*"))
    ]
    assert list_ltx2(files) == {
        "base/ltx-2.safetensors": base,
        "model.safetensors.index.json": tmp_path / "model.safetensors.index.json",
        "mutual_forcing/stage3.pt": own / "stage3.pt",
        "shards": tmp_path / "shards",
    }
    assert list_bases(files) == {"base/ltx-2.safetensors": base}
