"""What a file is, as people have them: from names and headers, and never from the weights."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import FORMAT, PACKED_HEADER, load_bundle
from mutual_forcing.model_loaders.catalog import list_bases, list_ltx2
from mutual_forcing.model_loaders.containers import Checkpoint
from mutual_forcing.model_loaders.generator import assemble
from mutual_forcing.model_loaders.identity import (
    CAUSAL_MARK,
    CONNECTORS,
    KINDS,
    SINKS,
    identify,
    names_in_pickle,
    table,
    what_is,
)
from mutual_forcing.model_loaders.ltx2 import PRESETS, Mark, load_transformer
from mutual_forcing.samplers.state_file import FORMAT as STREAM
from mutual_forcing.samplers.tensor_file import TensorFileError
from mutual_forcing.tests.ltx2_files import HEADS, WEIGHTS, in_one_file, prefixed, save_index
from mutual_forcing.tests.pack.archive import ROOT
from safetensors.torch import save_file

OURS = "model.diffusion_model."
PLAIN = [
    "patchify_proj.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "transformer_blocks.0.audio_to_video_attn.to_q.bias",
    "transformer_blocks.0.ff.net.2.weight",
    "transformer_blocks.0.ff.net.2.bias",
]
GATES = [*PLAIN, "transformer_blocks.0.attn1.to_gate_logits.weight"]
MEMORY = [*GATES, "learned_memory_video_encoder.weight"]
CONNECTED = [f"{part}.learnable_registers" for part in CONNECTORS]
CODECS = [
    "vae.decoder.conv_in.conv.weight",
    "audio_vae.decoder.conv_in.conv.weight",
    "vocoder.conv_pre.weight",
    "text_embedding_projection.aggregate_embed.weight",
]
LTX2 = {"config": json.dumps({"transformer": {"av_ca_timestep_scale_multiplier": 1000.0}})}
CAUSAL = {"config": json.dumps({"transformer": {"av_ca_timestep_scale_multiplier": 1.0}})}
TRAINED = {"config": json.dumps({"transformer": {"video_first_block": 4}})}


def under(prefix: str, names: list[str]) -> list[str]:
    return [prefix + name for name in names]


# key: names of tensors, metadata, path, preset.
FILES = [
    ("ours", [*under(OURS, PLAIN), "text_encoder.x"], {"format": FORMAT}, "x.safetensors", None),
    ("ours", [*under(OURS, PLAIN), PACKED_HEADER], {}, "saved.safetensors", None),
    ("stream", ["video.0"], {"format": STREAM}, "s.safetensors", None),
    ("taomate", under("model.", MEMORY), {}, "taomate/model.pt", "taomate"),
    ("taomate", under(OURS, MEMORY), LTX2, "converted.safetensors", "taomate"),
    ("omniforcing", under("model.", PLAIN), {}, "x/a-00001-of-00003.safetensors", "omniforcing"),
    ("omniforcing", under("model._fsdp_wrapped_module.", PLAIN), {}, "x.pt", "omniforcing"),
    # Save Model behind Load OmniForcing Model, before there was a mark: no header, connectors.
    ("omniforcing", under(OURS, PLAIN + CONNECTED), {}, "saved.safetensors", "omniforcing"),
    ("omniforcing", under(OURS, PLAIN), LTX2, "OmniForcing_bf16.safetensors", "omniforcing"),
    ("causal", under(OURS, [*PLAIN, CAUSAL_MARK]), {}, "saved.safetensors", "omniforcing"),
    ("causal", under(OURS, PLAIN), TRAINED, "mine.safetensors", "ltx2_base"),
    ("causal", under(OURS, PLAIN), CAUSAL, "stock.safetensors", "ltx2_base"),
    ("causal", under("model.", [*PLAIN, SINKS]), {}, "v1.pt", "omniforcing"),
    ("ltx2", under(OURS, PLAIN + CONNECTED) + CODECS, LTX2, "ltx-2-19b-dev.safetensors", None),
    ("ltx2 distilled", under(OURS, PLAIN) + CODECS, LTX2, "ltx-2-19b-distilled.safetensors", None),
    ("ltx23", under(OURS, GATES + CONNECTED) + CODECS, LTX2, "ltx-2.3-22b-dev.safetensors", None),
    ("ltx23 distilled", under(OURS, GATES) + CODECS, LTX2, "a-distilled-1.safetensors", None),
    ("transformer", under(OURS, PLAIN), LTX2, "dev_transformer_only.safetensors", "ltx2_base"),
    ("transformer", under("", GATES), {}, "x.safetensors", "ltx2_base"),
    ("connectors", under(OURS, CONNECTED), LTX2, "embeddings_connector.safetensors", None),
    ("connectors", [*CONNECTED, CODECS[3]], {}, "embeddings_connector.safetensors", None),
    ("projection", [CODECS[3]], {}, "ltx-2.3_text_projection_bf16.safetensors", None),
    ("text encoder", ["model.layers.0.self_attn.q_norm.weight"], {}, "gemma.safetensors", None),
    ("video VAE", CODECS[:1], {}, "vae.safetensors", None),
    ("audio VAE", CODECS[1:3], {}, "audio.safetensors", None),
    (
        "lora",
        ["diffusion_model.transformer_blocks.0.audio_to_video_attn.to_q.lora_A.weight"],
        {},
        "x.safetensors",
        None,
    ),
    ("upsampler", ["initial_conv.weight", "upsampler.0.weight"], {}, "up.safetensors", None),
    (
        "diffusers",
        ["proj_in.weight", "transformer_blocks.0.audio_to_video_attn.norm_q.weight"],
        {},
        "diffusion_pytorch_model.safetensors",
        None,
    ),
    ("lightx2v", under("model.", MEMORY), {}, "ltx2_3_ar/model.pt", None),
    ("later", under(OURS, PLAIN[:-1]), LTX2, "ltx-2.5.safetensors", None),
    ("later", under(OURS, [*PLAIN, "keyframes_abs_pos_embedding"]), LTX2, "x.safetensors", None),
    ("ltxv", under(OURS, PLAIN[:2]), {}, "ltxv-13b.safetensors", None),
    ("other", ["x", "decoder.weight"], {"format": "pt"}, "x.safetensors", None),
]


@pytest.mark.parametrize(
    ("key", "names", "metadata", "path", "preset"), FILES, ids=[f"{x[0]}, {x[3]}" for x in FILES]
)
def test_every_kind_of_file_is_told_by_names_and_header(
    key: str, names: list[str], metadata: dict[str, str], path: str, preset: str | None
) -> None:
    found = identify(names, metadata, Path("models") / path)
    assert found.key == key
    assert found.is_known == (key in KINDS)
    assert preset in (None, found.preset)
    assert found.has_connectors == any("_connector." in name for name in names)
    if key not in ("ours", "stream", "lora"):
        assert found.is_later == any("gate_logits" in name for name in names)
    if not found.kind.causal and found.fits("file"):
        assert "expect noise" in found.remarks("x", "file")[0]
    assert found.refusal().isprintable() and "`" not in found.refusal()


def test_every_kind_was_seen_and_says_what_to_do() -> None:
    assert {key for key, *_ in FILES} == {*KINDS, "other"} - {"gguf"}
    for kind in KINDS.values():
        assert kind.have and kind.name and kind.choose


def test_the_table_in_readme_is_made_of_what_the_code_asks() -> None:
    assert "\n".join(table()) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_only_the_beginning_of_a_file_is_read(tmp_path: Path) -> None:
    """The rest is a hole of a hundred gigabytes, which would take minutes."""
    shape = {"dtype": "BF16", "shape": [50_000_000_000], "data_offsets": [0, 100_000_000_000]}
    header = json.dumps({f"model.{name}": shape for name in MEMORY}).encode()
    path = tmp_path / "taomate.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 100_000_000_000)
    assert what_is(path).key == "taomate"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    assert what_is(path).key == "gguf"


def test_a_pickle_is_told_without_being_opened(tmp_path: Path) -> None:
    path, strange = tmp_path / "model.pt", tmp_path / "strange.pt"
    ema = {f"model.{name}": torch.zeros(2) for name in MEMORY}
    torch.save({"generator_ema": ema}, path)
    assert ema.keys() <= names_in_pickle(path)
    assert what_is(path).key == "taomate"
    for code, packing in ((b"\x80\x04garbage", 0), (b"N." * 9, 8), (b"", 0), (b"X\xff", 0)):
        with zipfile.ZipFile(strange, "w", packing) as archive:
            archive.writestr("x/data.pkl", code)
        assert not what_is(strange).is_known
    with zipfile.ZipFile(strange, "w") as archive:
        archive.writestr("x/other", b"")
    assert not what_is(strange).is_known
    assert list_ltx2([("a.pt", path), ("b.pt", strange)]) == {"a.pt": path}


def saved(path: Path, names: list[str], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: torch.zeros(2) for name in names}, path, metadata)
    return path


@pytest.mark.parametrize("key", ["ltxv", "diffusers", "lora", "video VAE", "text encoder", "later"])
def test_what_is_something_else_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    names, metadata = next((x[1], x[2]) for x in FILES if x[0] == key)
    path = saved(tmp_path / "x.safetensors", names, metadata)
    wanted = rf"cannot be run as a stream: it is {KINDS[key].name.split(',')[0]}.*; "
    with pytest.raises(TensorFileError, match=wanted):
        load_transformer(path)
    with pytest.raises(TensorFileError, match=r"is no Mutual Forcing model: it is"):
        load_bundle(path)
    causal = in_one_file(tmp_path, prefixed("model."))
    with pytest.raises(TensorFileError, match=r"holds no connectors.*as base choose ltx-2-19b-dev"):
        assemble(causal, path)
    assert not list_ltx2([("x", path)]) and not list_bases([("x", path)])


def connectors(folder: Path, name: str = "connectors.safetensors") -> Path:
    """A file with the connectors alone."""
    tensors = {f"{part}.x.weight": torch.randn(2, 2) for part in CONNECTORS}
    header = {"transformer": HEADS | PRESETS["ltx2_base"] | {"connector_num_layers": 1}}
    save_file(prefixed(OURS, tensors), folder / name, {"config": json.dumps(header)})
    return folder / name


def test_the_connectors_alone_are_base_enough(tmp_path: Path) -> None:
    base = connectors(tmp_path)
    assert list_bases([("c", base)]) == {"c": base} and not list_ltx2([("c", base)])
    made = assemble(in_one_file(tmp_path, prefixed("model.")), base)
    assert made.connected and len(made.from_base) == 2 and not made.remarks
    assert made.header["connector_num_layers"] == 1
    assert made.config.rope_type == "interleaved"


def test_no_base_is_needed_where_prompts_come_connected(tmp_path: Path) -> None:
    path = tmp_path / "causal.safetensors"
    save_file(prefixed("model."), path, {"config": json.dumps({"transformer": HEADS})})
    made = assemble(path)
    assert not made.connected and made.header["connector_num_layers"] == 0


@pytest.mark.parametrize("preset", ["omniforcing", "taomate"])
def test_a_saved_network_is_run_as_before_it_was_saved(tmp_path: Path, preset: str) -> None:
    """A host's node saves tensors and no header of ours; the mark lies among them."""
    base = connectors(tmp_path)
    source = in_one_file(tmp_path, prefixed("model."))
    made = assemble(source, base, preset=preset)
    tensors = made.tensors | {CAUSAL_MARK: made.mark}
    save_file(prefixed(OURS, tensors), tmp_path / "again.safetensors")
    again = assemble(tmp_path / "again.safetensors")
    assert again.config == made.config and again.header == made.header
    assert again.model_id == made.model_id and again.connected and not again.remarks
    assert CAUSAL_MARK not in again.tensors
    (tmp_path / "again.safetensors").unlink()
    broken = tensors | {CAUSAL_MARK: made.mark[:-3]}
    save_file(prefixed(OURS, broken), tmp_path / "broken.safetensors")
    with pytest.raises(TensorFileError, match=r"a mark .* cannot be read"):
        assemble(tmp_path / "broken.safetensors")


def test_weights_that_may_not_be_causal_and_a_wrong_base_are_named(tmp_path: Path) -> None:
    header = {"config": json.dumps({"transformer": HEADS | PRESETS["ltx2_base"]})}
    plain = tmp_path / "plain.safetensors"
    save_file(prefixed(OURS), plain, header)
    (remark,) = assemble(plain).remarks
    assert "expect noise: plain.safetensors is a transformer of LTX-2" in remark
    assert not assemble(plain, preset="omniforcing").remarks
    everything = prefixed(OURS) | {name: torch.zeros(2) for name in CODECS}
    everything |= prefixed(OURS, {f"{part}.x": torch.zeros(2) for part in CONNECTORS})
    distilled = tmp_path / "ltx-2-19b-distilled.safetensors"
    save_file(everything, distilled, header)
    causal = tmp_path / "a"
    causal.mkdir()
    (remark,) = assemble(in_one_file(causal, prefixed("model.")), distilled).remarks
    assert "distilled file" in remark and "choose ltx-2-19b-dev.safetensors" in remark


@pytest.mark.parametrize("scale", [".scale_weight", "_scale"])
def test_eight_bits_whose_format_nothing_names_are_understood(tmp_path: Path, scale: str) -> None:
    layer = "transformer_blocks.0.attn1.to_q"
    own = f"{layer}.weight"
    key = f"{layer}{scale}" if scale[0] == "." else own + scale
    packed = WEIGHTS | {own: WEIGHTS[own].to(torch.float8_e4m3fn), key: torch.tensor(2.0)}
    made = assemble(in_one_file(tmp_path, prefixed("model.", packed)), connectors(tmp_path))
    assert made.tensors[f"{own}_scale"] == 2
    assert json.loads(bytes(made.tensors[f"{layer}.comfy_quant"])) == {"format": "float8_e4m3fn"}
    packed[key] = torch.ones(WEIGHTS[own].shape[0])
    with pytest.raises(TensorFileError, match=r"quantised in a way that it does not name .*16 bit"):
        assemble(in_one_file(tmp_path, prefixed("model.", packed)), connectors(tmp_path))


def test_a_folder_is_what_its_files_are_together(tmp_path: Path) -> None:
    index = save_index(tmp_path, prefixed("model."))
    assert Checkpoint(index).identity == Checkpoint(tmp_path).identity
    assert Checkpoint(index).identity.key == "omniforcing"
    assert Mark.model_validate_json(Mark(config={"a": 1}).packed().numpy().tobytes()).config
