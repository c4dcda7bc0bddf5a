"""How fast blocks come, stage by stage, and how far that is from what the machine could do.

    python launch.py lab.bench.rollout --config quarter --blocks 5 --out output/bench
    python launch.py lab.bench.rollout --config quarter --blocks 3 --plain
    python launch.py lab.bench.rollout --config 19b --blocks 60 --dtype bf16 --device cuda \
        --path compiled+lanes+graph --decode --overlap
    python launch.py lab.bench.rollout --config small --blocks 3 --against "python other.py"

Weights are random: what a pass costs does not depend on them. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ...networks.execution import WAYS, Execution, device_named
from ...networks.fp8 import unavailable
from ..bench import against, plain
from .measure import Measured, Plan, measure
from .report import said, write
from .setups import NAMES, setup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STAGES = ("refresh", "open", "denoise", "video decode", "audio decode")
_LAUNCH = Path(__file__).resolve().parents[2] / "launch.py"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="lab.bench.rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "--config",
        choices=NAMES,
        default="quarter",
        help="sizes (8 layers at a quarter of the widths)",
    )
    add("--layers", type=int, help="another number of layers")
    add("--window", type=int, help="blocks kept besides the prefix (5; small: its own)")
    add("--grid", help="latent height x width, e.g. 16x24 for 512x768 pixels")
    add("--blocks", type=int, default=5, help="blocks to make, the prefix is one of them (5)")
    add("--steps", type=int, default=4, help="denoising steps a block (4)")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu)")
    add(
        "--path",
        default="eager",
        help=f"execution path: eager, or some of {', '.join(WAYS)} joined by +",
    )
    add("--threads", type=int, help="CPU threads (all)")
    add("--decode", action="store_true", help="decode every block, with this pack's codecs")
    add("--overlap", action="store_true", help="decode a block while the next one is denoised")
    add(
        "--plain",
        action="store_true",
        help="run the plainest correct rollout beside it, block by block",
    )
    add(
        "--fp8",
        action="store_true",
        help="products of the layers in eight bits; the floor stays that of --dtype",
    )
    _add_comparison(made)
    return made


def _add_comparison(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--against", metavar="COMMAND", help="time this command and this one in turn instead"
    )
    made.add_argument("--rounds", type=int, default=3, help="how often each, with --against (3)")
    made.add_argument("--out", type=Path, help="write OUT.json and OUT.md as well")


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What was asked for.

    Raises:
        ValueError: it cannot be done here.
    """
    grid = None
    if arguments.grid:
        height, _, width = arguments.grid.partition("x")
        if not (height.isdigit() and width.isdigit()):
            raise ValueError(f"--grid is {arguments.grid!r}, expected HEIGHTxWIDTH such as 16x24")
        grid = int(height), int(width)
    for name in ("blocks", "steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    device = device_named(arguments.device)
    execution = Execution.named(arguments.path)
    reason = execution.unavailable(device) or (arguments.fp8 and unavailable(device))
    if reason:
        raise ValueError(reason)
    plan = Plan(
        setup(arguments.config, arguments.layers, arguments.window, grid),
        arguments.blocks,
        arguments.steps,
        DTYPES[arguments.dtype],
        device,
        execution,
        arguments.decode,
        arguments.overlap,
        arguments.plain,
        arguments.fp8,
    )
    if plan.plain:
        plain.check(plan.setup, plan.blocks)
    return plan


def results(plan: Plan, found: Measured) -> dict[str, object]:
    """Everything as JSON."""
    seconds = sum(block.span.wall for block in found.blocks)
    frames = sum(block.frames for block in found.blocks)
    rates = found.rates
    return {
        "frames a second": frames / seconds,
        "seconds per block": seconds / len(found.blocks),
        "first chunk, seconds": found.first_chunk,
        "text keys, seconds": found.prompt,
        "peak GiB": None if found.peak_bytes is None else found.peak_bytes / 2**30,
        "ratio to the floor": seconds / sum(block.floor.wall for block in found.blocks),
        "ratio to the floor, attention at its own rate": seconds
        / sum(block.attended.wall for block in found.blocks),
        "ratio to the floor, processor time": sum(block.span.cpu for block in found.blocks)
        / sum(block.floor.cpu for block in found.blocks)
        if plan.device.type == "cpu"
        else None,
        "plain over ours": sum(block.plain.wall for block in found.blocks) / seconds
        if plan.plain
        else None,
        "difference to plain": max(block.difference for block in found.blocks)
        if plan.plain
        else None,
        "fp8 against the same without": found.fp8,
        "stages, seconds": found.stages,
        "measured rates": {
            "matmul GFLOP/s": rates.flops / rates.matmul.wall / 1e9,
            "copy GB/s": rates.bytes / rates.copy.wall / 1e9,
            "attention GFLOP/s": rates.attention_flops / rates.attention.wall / 1e9,
        },
        "blocks": [
            {
                "frames": block.frames,
                "seconds": block.span.wall,
                "processor seconds": block.span.cpu,
                "floor seconds": block.floor.wall,
                "stages": block.stages,
                "plain seconds": block.plain and block.plain.wall,
            }
            for block in found.blocks
        ],
    }


def table(plan: Plan, found: Measured, summary: dict[str, object]) -> str:
    """The same for people, in Markdown."""
    stages = [stage for stage in _STAGES if any(stage in block.stages for block in found.blocks)]
    head = [
        "block",
        "seconds",
        "FPS",
        *stages,
        "floor",
        "ratio",
        *(["plain"] if plan.plain else []),
    ]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for index, block in enumerate(found.blocks):
        wall = block.span.wall
        cells = [
            str(index),
            f"{wall:.3f}",
            f"{block.frames / wall:.2f}",
            *(f"{block.stages.get(stage, 0.0):.3f}" for stage in stages),
            f"{block.floor.wall:.3f}",
            f"{wall / block.floor.wall:.2f}",
            *([f"{block.plain.wall:.3f}"] if block.plain else []),
        ]
        lines.append(" | ".join(cells))
    rows = [f"| {line} |" for line in lines]
    for key, value in summary.items():
        if key != "blocks" and value is not None:
            rows.append(f"\n{key}: {said(value)}")
    return "\n".join(rows) + "\n"


def compare(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """This command without --against, and the other one, in turn.

    Raises:
        ValueError: one of them fails.
    """
    own = argparse.ArgumentParser(add_help=False)
    _add_comparison(own)
    _, rest = own.parse_known_args(argv)
    commands = [
        [sys.executable, str(_LAUNCH), "lab.bench.rollout", *rest],
        shlex.split(arguments.against),
    ]
    found = against.compared(*against.in_turn(commands, arguments.rounds))
    write(
        arguments.out,
        {"commands": commands, **found},
        "".join(f"{key}: {said(value)}\n" for key, value in found.items()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2: it cannot be done."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    try:
        plan = plan_of(arguments)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        if arguments.against:
            compare(arguments, argv)
            return 0
        found = measure(plan)
    except ValueError as error:
        sys.stderr.write(f"lab.bench.rollout: {error}\n")
        return 2
    summary = results(plan, found)
    write(arguments.out, summary, table(plan, found, summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
