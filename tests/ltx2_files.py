"""The parity fixture's weights in every container that LTX-2 is found in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mutual_forcing.model_loaders import parity
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.transformer import CausalAVTransformer
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = parity.Golden(Path(__file__).parent / "data" / "ltx2_causal_golden.safetensors")
WEIGHTS = {
    key.removeprefix("model."): value
    for key, value in GOLDEN.tensors.items()
    if key.startswith("model.")
}
HEADS = {"num_attention_heads": 4, "audio_num_attention_heads": 4}
LARGE = TransformerConfig(
    num_layers=2,
    num_attention_heads=4,
    audio_num_attention_heads=4,
    attention_head_dim=192,
    audio_attention_head_dim=96,
    cross_attention_dim=768,
    audio_cross_attention_dim=384,
    caption_channels=64,
)


def large() -> dict[str, Tensor]:
    """A network of which every part is much larger than what Python takes to read it; all zeros."""
    shapes = CausalAVTransformer(LARGE, device="meta").state_dict()
    return {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in shapes.items()}


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


def with_header(folder: Path, **header: object) -> Path:
    path = folder / "headed.safetensors"
    config = {"transformer": {**HEADS, **header}, "vae": {}}
    save_file(prefixed("model.diffusion_model."), path, {"config": json.dumps(config)})
    return path
