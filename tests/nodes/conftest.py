"""A server that all tests of this folder with the tiny model share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.model_loaders.bundle import StreamDefaults, save_bundle
from mutual_forcing.tests.comfyui_server import Server, comfyui_path
from mutual_forcing.tests.tiny import tiny_parts
from PIL import Image
from safetensors.torch import save_file


def lora() -> dict[str, torch.Tensor]:
    """A LoRA of two layers, under the keys that trainers write."""
    generator, found = torch.Generator().manual_seed(6), {}
    weights = tiny_parts()[0].state_dict()
    for layer in ("attn1.to_q", "audio_ff.net.2"):
        name = f"transformer_blocks.0.{layer}"
        rows, columns = weights[f"{name}.weight"].shape
        down, up = (torch.randn(4, size, generator=generator) for size in (columns, rows))
        found[f"diffusion_model.{name}.lora_A.weight"] = down
        found[f"diffusion_model.{name}.lora_B.weight"] = up.T.contiguous()
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this folder, with a tiny random model in place of the shipped one."""
    folder = tmp_path_factory.mktemp("comfyui")
    model = folder / "tiny.safetensors"
    stream = StreamDefaults(window=2, height=2, width=2, default_mode="few")
    save_bundle(model, *tiny_parts(), stream, title="tiny random model", dtype=torch.float32)

    def prepare(base: Path) -> None:
        (base / "models" / "loras").mkdir()
        save_file(lora(), base / "models" / "loras" / "lora.safetensors")
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(base / "input" / "example.png")

    with Server(comfyui_path(), folder / "base", model, prepare) as running:
        yield running


@pytest.fixture(scope="session")
def schemas(server: Server) -> dict:
    """The schemas of all nodes."""
    return server.get("/object_info")
