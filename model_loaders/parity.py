"""Check this network against the public reference's numbers: `make parity GOLDEN=file`.

The file holds a random-weight model under LTX-2's names, inputs, and what a reference computed from
them in float32: OmniForcing's code (docs/omniforcing.md, section 9) or TaoMate's (docs/ltx23.md,
section 7). One line per quantity: its name and the largest absolute difference over the largest
absolute value. The same again, as `NAME@path`, for every other execution path that this machine can
run; what it cannot run is said on standard error. Exits 1 if any is above 1e-4; above 5e-4, where
the reference takes a token's middle in another order of rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..networks.execution import EAGER, PATHS, Execution, Workspace
from ..networks.full_sequence import causal_forward
from ..networks.kept_keys import AS_COMPUTED, EIGHT_BITS, KEPT, Kept
from ..networks.transformer import text_keys
from ..samplers.model import BareModel
from ..samplers.rollout import Prompt, SamplerSettings, new_stream, rollout
from ..samplers.state import StreamSettings
from . import parity_ltx23
from .fixture import Golden

LIMIT, EIGHT_BITS_LIMIT = 1e-4, 5e-3


@torch.no_grad()
def errors(
    golden: Golden,
    execution: Execution = EAGER,
    device: torch.device | str = "cpu",
    kept: Kept = AS_COMPUTED,
) -> Iterator[tuple[str, float]]:
    """Relative error of every quantity, by name."""
    golden = golden.on(torch.device(device))
    model = golden.model()
    kernels = Workspace(execution, golden.device).kernels
    text = text_keys(model, golden["input.video_context"], golden["input.audio_context"])
    video_in, audio_in = golden.latents()
    sigmas = golden["input.video_sigma"], golden["input.audio_sigma"]
    out = causal_forward(model, video_in, audio_in, *sigmas, text, kernels=kernels)
    yield from golden.compare("causal", *out, "velocity")
    one = golden.raw["bidirectional_sigma"]
    flat = [torch.full_like(sigma, one) for sigma in sigmas]
    out = causal_forward(model, video_in, audio_in, *flat, text, causal=False, kernels=kernels)
    yield from golden.compare("bidirectional", *out, "velocity")

    sampler = SamplerSettings("multi", tuple(golden["rollout.sigmas"].tolist()), method="renoise")
    batch = video_in.shape[0]
    # No block is dropped before the last one is made, but its window is full: a recorded path is at
    # work.
    window = max(1, golden.blocks - 2)
    settings = StreamSettings(golden.height, golden.width, window, (0,) * batch, kept)
    bare = BareModel(model, "golden", torch.empty(0, device=golden.device))
    state = new_stream(bare, settings)
    generated = rollout(
        bare, Prompt(text), state, golden.blocks, sampler, noise=golden.noise, execution=execution
    )
    latents = [block for block, _ in generated]
    video = torch.cat([block.video for block in latents], dim=2)
    audio = torch.cat([block.audio for block in latents], dim=1)
    yield from golden.compare("rollout", video, audio, "latent")


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
    parser.add_argument(
        "--keys",
        choices=KEPT,
        default=AS_COMPUTED,
        help=f"how keys and values are kept; in {EIGHT_BITS} the limit is {EIGHT_BITS_LIMIT:g}",
    )
    arguments = parser.parse_args()
    kept = arguments.keys
    least = EIGHT_BITS_LIMIT if kept == EIGHT_BITS else LIMIT
    failed = False
    try:
        golden = Golden(arguments.golden)
        later = "memory" in golden.metadata
        found, limits = (parity_ltx23.errors, parity_ltx23.LIMITS) if later else (errors, {})
        for path in [arguments.path] if arguments.path else PATHS:
            execution, device = Execution.named(path), device_of(path)
            reason = execution.unavailable(device)
            if execution.graph and kept != AS_COMPUTED:
                reason = "graphs need keys and values as they were computed"
            if reason and not arguments.path:
                sys.stderr.write(f"parity: {path} left out: {reason}\n")
                continue
            suffix = "" if path == "eager" else f"@{path}"
            for name, error in found(golden, execution, device, kept):
                sys.stdout.write(f"{name}{suffix} {error:.3e}\n")
                failed |= not error <= max(least, limits.get(name, 0))
    except (ValueError, KeyError, RuntimeError) as error:
        sys.stderr.write(f"parity: {error}\n")
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
