"""A parity fixture: a random-weight model by LTX-2's names, its inputs, a reference's numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..networks.config import TransformerConfig
from ..networks.memory_branch import is_memory
from ..networks.transformer import CausalAVTransformer
from ..samplers.noise import Modality
from .keymap import split_layout


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Golden:
    """A fixture file: its model, its inputs and its numbers."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"cannot read {path}: {error}; expected a safetensors parity fixture"
            ) from error
        if "config" not in metadata:
            raise ValueError(f"{path} has no 'config' in its metadata; expected a parity fixture")
        self.metadata = {
            key: json.loads(value) for key, value in metadata.items() if value.startswith("{")
        }
        self.raw = self.metadata["config"]["transformer"]
        self.config = TransformerConfig.from_dict(self.raw)
        self.device = torch.device("cpu")
        run = self.metadata.get("run", self.raw)
        self.blocks = run.get("blocks", len(self.raw["video_blocks"]))
        self.height, self.width = run["latent_height"], run["latent_width"]

    def on(self, device: torch.device) -> Golden:
        """The same fixture with its tensors on a device."""
        moved = copy.copy(self)
        moved.device = device
        moved.tensors = {key: value.to(device) for key, value in self.tensors.items()}
        return moved

    def model(self, config: TransformerConfig | None = None) -> CausalAVTransformer:
        """The network with the fixture's weights, every key used; but for the memory's, for a
        config without one."""
        config = config or self.config
        weights = {
            key.removeprefix("model."): value
            for key, value in self.tensors.items()
            if key.startswith("model.") and (config.memory_interval or not is_memory(key))
        }
        model = CausalAVTransformer(config, device=self.device)
        model.load_state_dict(split_layout(weights, config), strict=True)
        return model.eval()

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def compare(
        self, name: str, video: Tensor, audio: Tensor, suffix: str
    ) -> Iterator[tuple[str, float]]:
        """Relative errors of video (b, c, f, h, w), which is kept as (b, f, c, h, w), and audio."""
        found = video.transpose(1, 2), audio
        for modality, actual in zip(("video", "audio"), found, strict=True):
            expected = self[f"{name}.{modality}_{suffix}"]
            yield f"{name}.{modality}", relative_error(actual.to(expected), expected)

    def noise(self, block: int, step: int, modality: Modality, _shape: tuple[int, ...]) -> Tensor:
        """What the reference drew; a `NoiseSource`."""
        tensor = self[f"rollout.noise.{modality}.{block}.{step}"].cpu()
        return tensor.transpose(1, 2) if modality == "video" else tensor

    def latents(self) -> tuple[Tensor, Tensor]:
        """Video (b, c, f, h, w) and audio (b, s, c) that velocities are asked of."""
        return self["input.video_latent"].transpose(1, 2), self["input.audio_latent"]
