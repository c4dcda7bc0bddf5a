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
from .. import command
from ..report import publish, said, table
from . import against, plain
from .measure import Measured, Workload, measure
from .setups import NAMES, setup

MODULE = "lab.bench.rollout"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STAGES = ("refresh", "open", "denoise", "video decode", "audio decode")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command.parser(MODULE, __doc__)
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


def workload_of(arguments: argparse.Namespace) -> Workload:
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
    device = device_named(arguments.device)
    execution = Execution.named(arguments.path)
    reason = execution.unavailable(device) or (arguments.fp8 and unavailable(device))
    if reason:
        raise ValueError(reason)
    load = Workload(
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
    if load.plain:
        plain.check(load.setup, load.blocks)
    return load


def results(load: Workload, found: Measured) -> dict[str, object]:
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
        if load.device.type == "cpu"
        else None,
        "plain over ours": sum(block.plain.wall for block in found.blocks) / seconds
        if load.plain
        else None,
        "difference to plain": max(block.difference for block in found.blocks)
        if load.plain
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


def rows_of(load: Workload, found: Measured) -> list[str]:
    """A table of a line per block."""
    stages = [stage for stage in _STAGES if any(stage in block.stages for block in found.blocks)]
    heads = ["block", "seconds", "FPS", *stages, "floor", "ratio", *["plain"] * load.plain]
    rows = []
    for index, block in enumerate(found.blocks):
        wall, floor = block.span.wall, block.floor.wall
        seconds = [said(block.stages.get(stage, 0.0), 3) for stage in stages]
        cells = [index, said(wall, 3), said(block.frames / wall, 2), *seconds]
        cells += [said(floor, 3), said(wall / floor, 2)]
        rows.append([*cells, *([said(block.plain.wall, 3)] if block.plain else [])])
    return table(heads, rows)


def compare(arguments: argparse.Namespace) -> None:
    """This command without --against, and the other one, in turn.

    Raises:
        ValueError: one of them fails.
    """
    own = argparse.ArgumentParser(add_help=False)
    _add_comparison(own)
    _, rest = own.parse_known_args(arguments.given)
    commands = [command.started(MODULE, *rest), shlex.split(arguments.against)]
    found = against.compared(*against.in_turn(commands, arguments.rounds))
    lines = [f"{key}: {said(value)}" for key, value in found.items()]
    publish(arguments.out, {"commands": commands, **found}, lines)


def work(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    load = workload_of(arguments)
    if arguments.against:
        compare(arguments)
        return
    found = measure(load)
    summary = results(load, found)
    lines = rows_of(load, found)
    for key, value in summary.items():
        if key != "blocks" and value is not None:
            lines += ["", f"{key}: {said(value)}"]
    publish(arguments.out, summary, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = parser()
    p.set_defaults(given=sys.argv[1:] if argv is None else argv)
    return command.run(p, work, argv)


if __name__ == "__main__":
    sys.exit(main())
