"""LTX-2 files: the same weights out of every container and prefix, and a clear error out of every broken one."""

from __future__ import annotations

import json
import pickle
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
from mutual_forcing.samplers.tensor_file import TensorFileError
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = parity.Golden(Path(__file__).parent / "data" / "ltx2_causal_golden.safetensors")
WEIGHTS = {
    key.removeprefix("model."): value
    for key, value in GOLDEN.tensors.items()
    if key.startswith("model.")
}
HEADS = {"num_attention_heads": 4, "audio_num_attention_heads": 4}
LARGE = "transformer_blocks.1.ff.net.2.weight"


def prefixed(prefix: str, weights: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def save_shards(folder: Path, tensors: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    """Write tensors in turn to `count` files; which one is in which."""
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        save_file(dict(list(tensors.items())[i::count]), folder / name)
    return {key: names[i % count] for i, key in enumerate(tensors)}


def save_index(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": save_shards(folder, tensors)}))
    return path


def in_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_index(folder, tensors)
    # Not named by the index, so not part of the model.
    save_file({"x": torch.zeros(1)}, folder / "another.safetensors")
    return folder


def in_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_shards(folder, tensors)
    return folder


def in_one_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "one.safetensors")
    return folder / "one.safetensors"


def in_pickle(folder: Path, tensors: dict[str, Tensor], *parts: str) -> Path:
    """A .pt where the first of `parts` holds the weights, the others something else."""
    wrong = {key: torch.zeros_like(value) for key, value in tensors.items()}
    content = {part: wrong for part in parts[1:]}
    content = {**content, parts[0]: tensors, "critic": wrong, "step": 7} if parts else tensors
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


def in_averaged(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return in_pickle(folder, tensors, "generator_ema", "generator")


CONTAINERS = {
    "folder with index": (in_folder, "folder", None),
    "folder of shards": (in_shards, "folder", None),
    "index": (save_index, "index", None),
    "file": (in_one_file, "safetensors", None),
    "pt generator": (
        lambda f, t: in_pickle(f, t, "generator", "generator_ema", "model", "state_dict"),
        "pickle",
        "generator",
    ),
    "pt model": (lambda f, t: in_pickle(f, t, "model", "state_dict"), "pickle", "model"),
    "pt state_dict": (lambda f, t: in_pickle(f, t, "state_dict"), "pickle", "state_dict"),
    "pt": (in_pickle, "pickle", None),
    "pt averaged": (in_averaged, "pickle", "generator_ema"),
}


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


@pytest.mark.parametrize("container", ["folder with index", "file", "pt generator"])
def test_the_reference_numbers_come_out_of_a_loaded_file(tmp_path, monkeypatch, container):
    path = CONTAINERS[container][0](tmp_path, prefixed("model."))
    loaded = load_transformer(path, overrides=HEADS).transformer
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


def with_header(folder: Path, **header: object) -> Path:
    path = folder / "headed.safetensors"
    config = {"transformer": {**HEADS, **header}, "vae": {}}
    save_file(prefixed("model.diffusion_model."), path, {"config": json.dumps(config)})
    return path


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
        "norm_eps is 'small', expected a number",
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
    return model, sum(float(value.float().sum()) for value in model.parameters())

small, large, dtype = sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4])
load(small, dtype)
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
model = load(large, dtype)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux only")
@pytest.mark.parametrize("container", ["file", "pt generator"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_result_and_little_more(tmp_path, container, dtype):
    save = CONTAINERS[container][0]
    (tmp_path / "small").mkdir()
    small = save(tmp_path / "small", prefixed("model."))
    config = TransformerConfig(
        num_layers=2,
        num_attention_heads=4,
        audio_num_attention_heads=4,
        attention_head_dim=192,
        audio_attention_head_dim=96,
        cross_attention_dim=768,
        audio_cross_attention_dim=384,
        caption_channels=64,
    )
    tensors = {
        key: torch.zeros(value.shape, dtype=torch.bfloat16)
        for key, value in CausalAVTransformer(config, device="meta").state_dict().items()
    }
    size = sum(value.nbytes for value in tensors.values())
    path = save(tmp_path, prefixed("model.", tensors))
    arguments = [sys.executable, "-c", MEASURE, str(ROOT), str(small), str(path), dtype]
    grown = int(subprocess.run(arguments, capture_output=True, check=True, text=True).stdout)
    made = size * getattr(torch, dtype).itemsize // 2
    # A sixteenth of the file passes through at a time; the rest is what this small a file shows of Python.
    assert grown < made + 0.25 * size
