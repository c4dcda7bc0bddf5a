"""Check this network against the public reference's numbers: `make parity GOLDEN=file`.

The file holds a random-weight model under LTX-2's names, inputs, and what the OmniForcing reference
computed from them in float32 (docs/omniforcing.md, section 9). One line per quantity: its name and
the largest absolute difference over the largest absolute value. The same again, as `NAME@path`, for
every other execution path that this machine can run; what it cannot run is said on standard error.
Exits 1 if any is above 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..networks.config import TransformerConfig
from ..networks.execution import EAGER, PATHS, Execution, Workspace
from ..networks.full_sequence import causal_forward
from ..networks.transformer import CausalAVTransformer, text_keys
from ..samplers.model import BareModel
from ..samplers.noise import Modality
from ..samplers.rollout import Prompt, SamplerSettings, new_stream, rollout
from ..samplers.state import StreamSettings
from .keymap import split_layout

LIMIT = 1e-4


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
        self.raw = json.loads(metadata["config"])["transformer"]
        self.config = TransformerConfig.from_dict(self.raw)
        self.device = torch.device("cpu")
        self.blocks = len(self.raw["video_blocks"])
        self.height, self.width = self.raw["latent_height"], self.raw["latent_width"]

    def on(self, device: torch.device) -> Golden:
        """The same fixture with its tensors on a device."""
        moved = copy.copy(self)
        moved.device = device
        moved.tensors = {key: value.to(device) for key, value in self.tensors.items()}
        return moved

    def model(self) -> CausalAVTransformer:
        """The network with the fixture's weights, every key used."""
        weights = {
            key.removeprefix("model."): value
            for key, value in self.tensors.items()
            if key.startswith("model.")
        }
        model = CausalAVTransformer(self.config, device=self.device)
        model.load_state_dict(split_layout(weights, self.config), strict=True)
        return model.eval()

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


@torch.no_grad()
def errors(
    golden: Golden, execution: Execution = EAGER, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, float]]:
    """Relative error of every quantity, by name."""
    golden = golden.on(torch.device(device))
    model = golden.model()
    kernels = Workspace(execution, golden.device).kernels
    text = text_keys(model, golden["input.video_context"], golden["input.audio_context"])
    video_in, audio_in = golden["input.video_latent"], golden["input.audio_latent"]
    # The fixture keeps video as (b, f, c, h, w); the network takes (b, c, f, h, w).
    video_in = video_in.transpose(1, 2)

    def compare(
        name: str, video: Tensor, audio: Tensor, suffix: str
    ) -> Iterator[tuple[str, float]]:
        yield (
            f"{name}.video",
            relative_error(video.transpose(1, 2), golden[f"{name}.video_{suffix}"]),
        )
        yield f"{name}.audio", relative_error(audio, golden[f"{name}.audio_{suffix}"])

    sigmas = golden["input.video_sigma"], golden["input.audio_sigma"]
    out = causal_forward(model, video_in, audio_in, *sigmas, text, kernels=kernels)
    yield from compare("causal", *out, "velocity")
    one = golden.raw["bidirectional_sigma"]
    flat = [torch.full_like(sigma, one) for sigma in sigmas]
    out = causal_forward(model, video_in, audio_in, *flat, text, causal=False, kernels=kernels)
    yield from compare("bidirectional", *out, "velocity")

    def noise(block: int, step: int, modality: Modality, shape: tuple[int, ...]) -> Tensor:
        tensor = golden.tensors[f"rollout.noise.{modality}.{block}.{step}"].cpu()
        return tensor.transpose(1, 2) if modality == "video" else tensor

    sampler = SamplerSettings("multi", tuple(golden["rollout.sigmas"].tolist()), method="renoise")
    batch = video_in.shape[0]
    # No block is dropped before the last one is made, but its window is full: a recorded path is at
    # work.
    window = max(1, golden.blocks - 2)
    settings = StreamSettings(golden.height, golden.width, window, seeds=(0,) * batch)
    bare = BareModel(model, "golden", torch.empty(0, device=golden.device))
    state = new_stream(bare, settings)
    generated = rollout(
        bare, Prompt(text), state, golden.blocks, sampler, noise=noise, execution=execution
    )
    latents = [block for block, _ in generated]
    video = torch.cat([block.video for block in latents], dim=2)
    audio = torch.cat([block.audio for block in latents], dim=1)
    yield from compare("rollout", video.to(golden.device), audio.to(golden.device), "latent")


def device_of(path: str) -> torch.device:
    """Where a path is checked; eager on the CPU, so that its lines are the same everywhere."""
    return torch.device("cuda" if path != "eager" and torch.cuda.is_available() else "cpu")


def main() -> int:
    """Print the errors; 1 if any is above the limit."""
    parser = argparse.ArgumentParser(prog="make parity", description=__doc__)
    parser.add_argument("golden", type=Path, help="fixture file (safetensors)")
    parser.add_argument(
        "--path",
        help=f"one execution path: {', '.join(PATHS)}, or others joined by '+' (all that can run)",
    )
    arguments = parser.parse_args()
    failed = False
    try:
        golden = Golden(arguments.golden)
        for path in [arguments.path] if arguments.path else PATHS:
            execution, device = Execution.named(path), device_of(path)
            reason = execution.unavailable(device)
            if reason and not arguments.path:
                sys.stderr.write(f"parity: {path} left out: {reason}\n")
                continue
            suffix = "" if path == "eager" else f"@{path}"
            for name, error in errors(golden, execution, device):
                sys.stdout.write(f"{name}{suffix} {error:.3e}\n")
                failed |= not error <= LIMIT
    except (ValueError, KeyError, RuntimeError) as error:
        sys.stderr.write(f"parity: {error}\n")
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
