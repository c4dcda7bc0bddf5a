"""How fast blocks come, stage by stage, and how far that is from what the machine could do.

    python launch.py lab.bench.rollout --config quarter --blocks 5 --out output/bench
    python launch.py lab.bench.rollout --config quarter --blocks 3 --plain
    python launch.py lab.bench.rollout --config 19b --blocks 60 --dtype bf16 --device cuda \
        --path compiled+lanes+graph --decode --overlap
    python launch.py lab.bench.rollout --config taomate --blocks 12 --dtype bf16 --device cuda \
        --host whole --path automatic --profile
    python launch.py lab.bench.rollout --config small --blocks 3 --against "python other.py"

Weights are random: what a pass costs does not depend on them. With --host it is not this pack's own
network that runs but the one that ComfyUI makes of LTX-2's files, in the ComfyUI at COMFYUI_PATH:
loaded whole, with nearly all weights kept off the card (low), brought as they are needed (dynamic),
or as Load OmniForcing Model has it where ComfyUI starts by itself (usual); "view" is our own
network as such a one is looked at, without ComfyUI. Their positions are interleaved, as
OmniForcing's are. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import get_args

import torch

from ...networks.execution import AUTOMATIC, WAYS, Execution, device_named
from ...networks.fp8 import unavailable
from ...networks.kept_keys import AS_COMPUTED, KEPT
from .. import command
from ..comfyui import inside_comfyui, run_in_comfyui
from ..report import publish, said, table
from . import against, plain
from .floor import block_work
from .measure import HostMode, Measured, Workload, measure
from .setups import NAMES, setup
from .stopwatch import Span

MODULE = "lab.bench.rollout"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STAGES = ("refresh", "open", "refresh and denoise", "denoise", "video decode", "audio decode")


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
    add("--steps", type=int, help="denoising steps a block (as trained: 4, taomate 3)")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu)")
    add(
        "--path",
        default="eager",
        help=f"execution path: {AUTOMATIC}, eager, or some of {', '.join(WAYS)} joined by +",
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
        "--separate",
        action="store_true",
        help="run a rollout whose refreshes are passes by themselves beside it, block by block",
    )
    add(
        "--fp8",
        action="store_true",
        help="products of the layers in eight bits; the floor stays that of --dtype",
    )
    add("--keys", choices=KEPT, default=AS_COMPUTED, help="how keys and values are kept")
    add("--host", choices=get_args(HostMode), help="run the network that ComfyUI loads; see above")
    add(
        "--profile",
        action="store_true",
        help="one more block: what is started for it, and where its time goes",
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
    made = setup(arguments.config, arguments.layers, arguments.window, grid)
    if arguments.host and arguments.config == "small":
        raise ValueError("--host is for LTX-2's shapes: choose another --config")
    load = Workload(
        made,
        arguments.blocks,
        arguments.steps or len(made.entries) - 1,
        DTYPES[arguments.dtype],
        device,
        execution,
        arguments.decode,
        arguments.overlap,
        arguments.plain,
        arguments.fp8,
        arguments.profile,
        arguments.host,
        arguments.separate,
        arguments.keys,
    )
    if load.plain:
        plain.check(load.setup, load.blocks)
    if load.separate and load.blocks < 3:
        raise ValueError("--separate needs 3 blocks or more: a refresh is merged from block 2 on")
    return load


def results(load: Workload, found: Measured) -> dict[str, object]:
    """Everything as JSON."""
    seconds = sum(block.span.wall for block in found.blocks)
    frames = sum(block.frames for block in found.blocks)
    rates, block_floors = found.rates, [block.floor.wall for block in found.blocks]
    whole = max(found.rows.values())
    last = median(_repeating(load, found))
    return {
        "frames a second": frames / seconds,
        "frames a second, once passes repeat": last,
        "path": found.path,
        "seconds per block": seconds / len(found.blocks),
        "first chunk, seconds": found.first_chunk,
        "text keys, seconds": found.prompt,
        "peak GiB": None if found.peak_bytes is None else found.peak_bytes / 2**30,
        "ratio to the floor": seconds / sum(block_floors),
        "ratio to the floor, attention at its own rate": seconds
        / sum(block.attended.wall for block in found.blocks),
        "ratio to the floor, processor time": sum(block.span.cpu for block in found.blocks)
        / sum(block.floor.cpu for block in found.blocks)
        if load.device.type == "cpu"
        else None,
        "plain over ours": sum(block.plain.wall for block in found.blocks) / seconds
        if load.plain
        else None,
        "separate refreshes over merged ones": _separate_over_merged(found)
        if load.separate
        else None,
        "difference to plain": max(block.difference for block in found.blocks)
        if load.plain
        else None,
        "fp8 against the same without": found.fp8,
        "stages, seconds": found.stages,
        "products, TFLOP/s by tokens": {str(n): rate / 1e12 for n, rate in found.rows.items()},
        "efficiency of the tiles": {str(n): rate / whole for n, rate in found.rows.items()},
        "one block": None if found.breakdown is None else _spent(load, found),
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
                "separate seconds": block.separate and block.separate.wall,
            }
            for block in found.blocks
        ],
    }


def _repeating(load: Workload, found: Measured) -> list[float]:
    """Frames a second of the blocks from which on every pass repeats one before it, where there
    are any, else of the last one."""
    rates = [block.frames / block.span.wall for block in found.blocks]
    config = load.setup.config
    return rates[max(1 + load.setup.window, config.opening_blocks) + 4 :] or rates[-1:]


def _spent(load: Workload, found: Measured) -> dict[str, dict[str, float | None]]:
    """Seconds and calls by kind in the profiled block, the least that its work could take at the
    rates of a layer's products and of attention to a full window, and what each of its products
    and attentions takes by itself."""
    work = block_work(load.setup, load.blocks, load.steps, load.element_size)
    rates, kinds = found.rates, found.breakdown.kinds
    least = {
        "products": sum(n * one.linear for one, n in work) * rates.matmul.wall / rates.flops,
        "attention": sum(n * one.attention for one, n in work)
        * rates.attention.wall
        / rates.attention_flops,
        "rest": 0.0,
    }
    return {
        kind: {
            "seconds": part.seconds,
            "least": least[kind],
            "alone": part.alone,
            "calls": part.calls,
        }
        for kind, part in kinds.items()
    }


def _separate_over_merged(found: Measured) -> dict[str, float]:
    """By either clock; from block 2 on, the first whose refresh is merged."""

    def all_of(which: str) -> Span:
        spans = [getattr(block, which) for block in found.blocks[2:]]
        return Span(*map(sum, zip(*spans, strict=True)))

    pairs = zip(Span._fields, all_of("separate"), all_of("span"), strict=True)
    return {clock: separate / merged for clock, separate, merged in pairs}


def rows_of(load: Workload, found: Measured) -> list[str]:
    """A table of a line per block."""
    stages = [stage for stage in _STAGES if any(stage in block.stages for block in found.blocks)]
    heads = ["block", "seconds", "FPS", *stages, "floor", "ratio"]
    heads += [*["plain"] * load.plain, *["separate"] * load.separate]
    rows = []
    for index, block in enumerate(found.blocks):
        wall, floor = block.span.wall, block.floor.wall
        seconds = [said(block.stages.get(stage, 0.0), 3) for stage in stages]
        cells = [index, said(wall, 3), said(block.frames / wall, 2), *seconds]
        cells += [said(floor, 3), said(wall / floor, 2)]
        cells += [said(other.wall, 3) for other in (block.plain, block.separate) if other]
        rows.append(cells)
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


def work(arguments: argparse.Namespace) -> int:
    """Measure, print and write."""
    load = workload_of(arguments)
    if arguments.against:
        compare(arguments)
        return 0
    if load.host not in (None, "view") and not inside_comfyui():
        on_cpu = load.device.type == "cpu"
        if load.host == "dynamic" and on_cpu:
            raise ValueError(
                "ComfyUI's memory is never dynamic on a CPU: choose --host usual or low"
            )
        dynamic = load.host in ("dynamic", "usual") and not on_cpu
        return run_in_comfyui(MODULE, arguments.given, cpu=on_cpu, dynamic=dynamic)
    found = measure(load)
    summary = results(load, found)
    lines = rows_of(load, found)
    for key, value in summary.items():
        if key not in ("blocks", "one block") and value is not None:
            lines += ["", f"{key}: {said(value)}"]
    if found.breakdown is not None:
        spent = summary["one block"]
        heads = ["one block", "seconds", "least", "alone", "calls"]
        lines += ["", *table(heads, [[kind, *row.values()] for kind, row in spent.items()])]
        names = [[name[:90], part.seconds, part.calls] for name, part in found.breakdown.longest]
        lines += ["", *table(["longest", "seconds", "calls"], names)]
    publish(arguments.out, summary, lines)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = parser()
    p.set_defaults(given=sys.argv[1:] if argv is None else argv)
    return command.run(p, work, argv)


if __name__ == "__main__":
    sys.exit(main())
