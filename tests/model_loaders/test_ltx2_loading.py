"""LTX-2 files: the same weights from every container and prefix, in little more memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders import parity
from mutual_forcing.model_loaders.keymap import PREFIXES
from mutual_forcing.model_loaders.ltx2 import load_transformer
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.layout import PAPER_LAYOUT, RELEASED_LAYOUT
from mutual_forcing.networks.transformer import CausalAVTransformer
from mutual_forcing.tests.ltx2_files import (
    CONTAINERS,
    GOLDEN,
    HEADS,
    WEIGHTS,
    in_one_file,
    in_pickle,
    large,
    prefixed,
    with_header,
)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """What the parity test runs: split order, this network's names."""
    return GOLDEN.model().state_dict()


def same(found: CausalAVTransformer, expected: dict[str, Tensor]) -> bool:
    weights = found.state_dict()
    return weights.keys() == expected.keys() and all(
        torch.equal(value, expected[key]) for key, value in weights.items()
    )


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_same_weights_from_every_container_and_prefix(tmp_path, expected, container, prefix):
    save, kind, part = CONTAINERS[container]
    path = save(tmp_path, prefixed(prefix))
    loaded = load_transformer(path, overrides=HEADS, ema=part == "generator_ema")
    assert same(loaded.transformer, expected)
    assert loaded.transformer.config == GOLDEN.config
    assert (loaded.report.container, loaded.report.part) == (kind, part)
    assert (loaded.report.prefix, loaded.report.left_out) == (prefix, {})
    assert not any(value.requires_grad for value in loaded.transformer.parameters())


@pytest.mark.parametrize(
    ("container", "prefix"),
    [(name, "model.") for name in CONTAINERS] + [("file", prefix) for prefix in PREFIXES],
)
def test_the_reference_numbers_come_out_of_a_loaded_file(tmp_path, monkeypatch, container, prefix):
    save, _, part = CONTAINERS[container]
    path = save(tmp_path, prefixed(prefix))
    loaded = load_transformer(path, overrides=HEADS, ema=part == "generator_ema").transformer
    monkeypatch.setattr(parity.Golden, "model", lambda _: loaded)
    found = list(parity.errors(GOLDEN))
    # Not to the last bit: where a mapped tensor begins decides which kernel multiplies it.
    assert all(error < parity.LIMIT for _, error in found)


def test_wrappers_are_stripped_wherever_they_are(tmp_path, expected):
    wrapped = {
        "_fsdp_wrapped_module.model."
        + key.replace("transformer_blocks.1.", "transformer_blocks.1._fsdp_wrapped_module."): value
        for key, value in WEIGHTS.items()
    }
    path = in_pickle(tmp_path, wrapped, "generator")
    assert same(load_transformer(path, overrides=HEADS).transformer, expected)


def test_other_parts_are_left_out_and_named(tmp_path, expected):
    others = (
        "model.diffusion_model.video_embeddings_connector.learnable_registers",
        "model.diffusion_model.audio_embeddings_connector.learnable_registers",
        "vae.decoder.conv_in.conv.weight",
        "vae.per_channel_statistics.mean-of-means",
        "audio_vae.decoder.conv_in.conv.weight",
        "vocoder.conv_pre.weight",
        "text_embedding_projection.aggregate_embed.weight",
    )
    tensors = prefixed("model.diffusion_model.") | {key: torch.zeros(2) for key in others}
    loaded = load_transformer(in_one_file(tmp_path, tensors), preset="omniforcing", overrides=HEADS)
    assert same(loaded.transformer, expected)
    assert loaded.report.left_out == {
        "video_embeddings_connector": 1,
        "audio_embeddings_connector": 1,
        "vae": 2,
        "audio_vae": 1,
        "vocoder": 1,
        "text_embedding_projection": 1,
    }
    assert "vae (2)" in str(loaded.report)
    found = load_transformer(tmp_path / "one.safetensors", overrides=HEADS)
    assert found.report.preset == "ltx2_base"


def positions(config: TransformerConfig) -> tuple[object, ...]:
    return (
        config.rope_type,
        config.frequencies_precision,
        config.av_ca_timestep_scale_multiplier,
    )


def test_positions_come_from_override_header_or_preset(tmp_path):
    released, base = ("interleaved", "float32", 1.0), ("split", "float64", 1000.0)

    def found(path: Path, **arguments: object) -> tuple[object, ...]:
        return positions(load_transformer(path, **arguments).transformer.config)

    silent = with_header(tmp_path)
    assert found(silent) == base
    assert found(silent, preset="omniforcing") == released
    path = with_header(tmp_path, rope_type="interleaved", av_ca_timestep_scale_multiplier=10.0)
    assert found(path) == ("interleaved", "float64", 10.0)
    assert found(path, preset="ltx2_base") == ("interleaved", "float64", 10.0)
    assert found(path, preset="omniforcing") == released
    overrides = {"rope_type": "split", "av_ca_timestep_scale_multiplier": 7.0}
    assert found(path, overrides=overrides) == ("split", "float64", 7.0)
    assert found(path, preset="omniforcing", overrides=overrides) == ("split", "float32", 7.0)


def test_split_weights_are_taken_as_they_are(tmp_path):
    loaded = load_transformer(
        in_one_file(tmp_path, prefixed("model.")), preset="ltx2_base", overrides=HEADS
    )
    assert same(loaded.transformer, WEIGHTS)


def test_layout_follows_sinks_header_and_override(tmp_path, expected):
    sinks = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(0))
    path = in_pickle(tmp_path, prefixed("model.", WEIGHTS | {"audio_sink_tokens": sinks}))
    legacy = load_transformer(path, overrides=HEADS).transformer
    assert legacy.config.num_audio_sink_tokens == 16
    assert legacy.config.layout == PAPER_LAYOUT
    assert same(legacy, expected | {"audio_sink_tokens": sinks})
    told = load_transformer(path, overrides=HEADS | {"layout": RELEASED_LAYOUT}).transformer
    assert told.config.layout == RELEASED_LAYOUT
    assert told.config.num_audio_sink_tokens == 16
    path = with_header(tmp_path, video_blocks=[1, 3], audio_blocks=[1, 25])
    assert load_transformer(path).transformer.config.layout == PAPER_LAYOUT
    told = load_transformer(path, overrides={"layout": RELEASED_LAYOUT}).transformer
    assert told.config.layout == RELEASED_LAYOUT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("container", ["file", "pt"])
def test_cast_on_the_way(tmp_path, expected, dtype, container):
    path = CONTAINERS[container][0](tmp_path, prefixed("model."))
    loaded = load_transformer(path, overrides=HEADS, dtype=dtype).transformer
    assert same(loaded, {key: value.to(dtype) for key, value in expected.items()})


@pytest.mark.parametrize(
    ("stored", "found"),
    [(torch.bfloat16, torch.bfloat16), (torch.float8_e4m3fn, torch.bfloat16)],
)
def test_dtype_of_the_file_unless_asked(tmp_path, stored, found):
    tensors = {
        key: value.to(stored) if value.ndim > 1 else value
        for key, value in prefixed("model.").items()
    }
    loaded = load_transformer(in_one_file(tmp_path, tensors), overrides=HEADS).transformer
    assert {value.dtype for value in loaded.parameters()} == {found}


def test_full_size_network():
    weights = CausalAVTransformer(TransformerConfig(), device="meta").state_dict()
    assert len(weights) == 3510
    assert sum(value.numel() for value in weights.values()) == 18_876_174_592


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import launch
launch.register()
import torch
from mutual_forcing.model_loaders.ltx2 import load_transformer

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

def load(path, dtype):
    model = load_transformer(path, overrides={"num_attention_heads": 4,
        "audio_num_attention_heads": 4}, dtype=dtype).transformer
    # Every page is read, and nothing is copied for it.
    return model, sum(float(value.view(-1)[::512].sum()) for value in model.parameters())

small, large, dtype = sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4])
load(small, dtype)
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
model = load(large, dtype)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux only")
@pytest.mark.parametrize(
    ("container", "dtype"), [("file", "bfloat16"), ("file", "float32"), ("pt generator", "float32")]
)
def test_peak_memory_is_the_result_and_little_more(tmp_path, container, dtype):
    save = CONTAINERS[container][0]
    (tmp_path / "small").mkdir()
    small = save(tmp_path / "small", prefixed("model."))
    tensors = large()
    size = sum(value.nbytes for value in tensors.values())
    path = save(tmp_path, prefixed("model.", tensors))
    arguments = [sys.executable, "-c", MEASURE, str(ROOT), str(small), str(path), dtype]
    grown = int(subprocess.run(arguments, capture_output=True, check=True, text=True).stdout)
    made = size * getattr(torch, dtype).itemsize // 2
    assert grown < 1.1 * made
