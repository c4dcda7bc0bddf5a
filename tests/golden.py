"""What the shipped model makes of one prompt and seed, in numbers: `make golden` writes them, a
test reads them.

Two blocks in both modes, a few numbers of every block's latents and of its pictures and sound, kept
in data/shipped_model.json under the fingerprint of the model that made them. Run it again when
another model is shipped, after having looked at its clips:

    python launch.py tests.golden

It also prints how far the same numbers lie apart with two threads, with compiled kernels and in
float64. For the model that was shipped first that was 0, 1.9e-4 and 1.2e-4 of a block's root mean
square. The tolerance is 25 times as much, for machines that round differently, and far below what a
wrong formula does.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from ..model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ..networks.execution import EAGER, Execution
from ..samplers.rollout import SamplerSettings, rollout, sampler_settings

FILE = Path(__file__).parent / "data" / "shipped_model.json"
PROMPT = (
    "a girl with red hair, pale skin and a green shirt on a blue background says ba mi tu in a "
    "high voice"
)
SEED, BLOCKS, NUMBERS = 7, 2, 5
TOLERANCE = 5e-3
MODES = {"few": sampler_settings("few"), "multi": sampler_settings("multi", 8)}


def spread(values: Tensor) -> list[float]:
    """The root mean square of a tensor, and some of its numbers at even distances."""
    flat = values.flatten().double()
    places = torch.arange(1, 2 * NUMBERS, 2) * len(flat) // (2 * NUMBERS)
    size = flat.square().mean().sqrt().item()
    return [float(f"{value:.6g}") for value in (size, *flat[places].tolist())]


def numbers(
    bundle: Bundle, sampler: SamplerSettings, execution: Execution = EAGER
) -> dict[str, list[float]]:
    """Numbers of every block, by block and what they are of."""
    prompt = bundle.prompt(PROMPT, guided=sampler.guidance != 1)
    found, memory, decoder = {}, None, bundle.decoder()
    for block, (latents, _) in enumerate(
        rollout(bundle, prompt, bundle.begin((SEED,)), BLOCKS, sampler, execution=execution)
    ):
        decoded, memory = decoder.decode(latents, memory)
        for name, value in zip(
            ("video latents", "audio latents", "pictures", "sound"),
            (*latents, *decoded),
            strict=True,
        ):
            found[f"block {block}, {name}"] = spread(value)
    return found


def difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """The largest difference over the root mean square of the same block and kind."""
    if a.keys() != b.keys():
        return float("inf")
    return max(abs(x - y) / b[key][0] for key in a for x, y in zip(a[key], b[key], strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(shipped_model_path())
    made = {mode: numbers(bundle, sampler) for mode, sampler in MODES.items()}
    record = {
        "model_id": bundle.model_id,
        "prompt": PROMPT,
        "seed": SEED,
        "tolerance": TOLERANCE,
        "numbers": made,
    }
    # A list of numbers to a line.
    text = re.sub(r"\[[^\]]*\]", lambda m: " ".join(m[0].split()), json.dumps(record, indent=1))
    FILE.write_text(text + "\n")
    print(f"{FILE}: model {bundle.model_id}")  # noqa: T201 - what a command answers
    double = load_bundle(shipped_model_path(), dtype=torch.float64)
    for mode, sampler in MODES.items():
        others = {"float64": numbers(double, sampler)}
        torch.set_num_threads(2)
        others["two threads"] = numbers(bundle, sampler)
        torch.set_num_threads(1)
        if Execution(compiled=True).unavailable(bundle.device) is None:
            others["compiled"] = numbers(bundle, sampler, Execution(compiled=True))
        for name, other in others.items():
            apart = difference(made[mode], other)
            print(f"{mode}, {name}: apart by {apart:.1e}")  # noqa: T201


if __name__ == "__main__":
    main()
