"""What training costs: Mutual Forcing against its rivals, OmniForcing's stages and the teacher.

    python launch.py lab.bench.training_cost --out docs/measured/training_cost
    python launch.py lab.bench.training_cost --batch 8 --blocks 2 --rounds 4 --threads 2

b clips of a batch, k blocks of a clip. All as they are in the config and in configs/methods.json,
on one network and batches of one size. Every round is a process of its own,
so that the peak of memory is its own, and the methods take turns, so that whatever else the machine
does meets all alike. A process takes one step that is not counted, the dearest, and then as many as
lie from one DMD update of the network to the next; rounds differ in what is drawn and are spread
over the schedule. The rivals' teacher must be trained before; what that costs is a line of its own.
FLOPs of products and attention are counted in the same steps taken once more.
Weights and latents are random: what a step costs does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...networks.config import TransformerConfig
from .. import command
from ..metrics.longrun import peak_mb, resident_mb
from ..report import publish, said, table
from ..training.data import Batch
from ..training.draws import Draws
from ..training.parallel import Processes
from ..training.stages import Stage, Trained, build_stage, wants_teacher
from ..training.system import System, initialise, placed
from ..training.train import CONFIGS, read_settings
from ..world.scene import VOCABULARY
from .against import finished
from .stopwatch import spanned

OURS, RIVAL, TEACHER = "Mutual Forcing", "DMD + Self-Forcing", "the teacher of DMD + Self-Forcing"
METHODS = {
    OURS: ("mutual", "mutual"),
    RIVAL: ("mutual", "dmd_self_forcing"),
    TEACHER: ("bidirectional", "mutual"),
    "OmniForcing, stage I": ("bidirectional_dmd", "mutual"),
    "OmniForcing, stage II": ("causal_ode", "mutual"),
    "OmniForcing, stage III": ("self_forcing", "mutual"),
}
MODULE = "lab.bench.training_cost"
Settings = dict[str, dict[str, object]]
Round = dict[str, float | list[float]]


def random_batch(
    config: TransformerConfig, stream: dict[str, int], clips: int, blocks: int
) -> Batch:
    """Latents and captions of random values, (b, c, f, h, w), (b, s, c) and (b, m)."""
    layout, random = config.layout, torch.Generator().manual_seed(0)
    grid = stream["height"], stream["width"]
    video = clips, config.in_channels, layout.video_latents(blocks), *grid
    audio = clips, layout.audio_latents(blocks), config.audio_in_channels
    ids = torch.randint(1, len(VOCABULARY), (clips, 32), generator=random)
    return Batch(torch.randn(video, generator=random), torch.randn(audio, generator=random), ids)


def build(settings: Settings, stage: str, device: torch.device) -> Stage:
    """A stage with random weights, its teacher too where it wants one; its fake score is warm.

    Raises:
        ValueError: the config trains adapters over a base, which this does not have.
    """
    if "adapters" in settings:
        raise ValueError(
            "found a config with adapters, whose base would have to be loaded; expected one that "
            "trains whole networks. What adapters cost is computed by lab.training.plan"
        )
    settings = {**settings, "mutual": {**settings["mutual"], "fake_warmup": 0}}
    config = TransformerConfig.from_dict(settings["transformer"])

    def system() -> System:
        made = System(config)
        initialise(made, 0)
        return placed(made, settings["recipe"], device)

    trained = Trained.from_recipe(settings["recipe"], Processes(device=device))
    other = wants_teacher(stage, settings["mutual"])
    return build_stage(stage, system(), settings, trained, system() if other else None)


def measure(
    settings: Settings, stage: str, clips: int, blocks: int, number: int, rounds: int
) -> Round:
    """One round in this process: a step to warm up, then the steps of one cycle."""
    device = Processes.from_environment().device
    before = 0.0 if device.type == "cuda" else resident_mb()
    made = build(settings, stage, device)
    config = TransformerConfig.from_dict(settings["transformer"])
    batch = random_batch(config, settings["stream"], clips, blocks).to(device)
    cycle = settings["mutual"]["matching_every"]
    progress = (number + 0.5) / rounds

    def taken(step: int) -> None:
        made.step(batch, Draws(number, step, range(clips), device), step, progress, 1.0)

    spans = [spanned(partial(taken, step), device) for step in range(1 + cycle)]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_mb()
    with FlopCounterMode(display=False) as counter:
        for step in range(1, 1 + cycle):
            taken(step)
    return {
        "GFLOP": counter.get_total_flops() / cycle / 1e9,
        "seconds": [span.wall for span in spans[1:]],
        "processor seconds": [span.cpu for span in spans[1:]],
        "peak MB": peak,
        "peak MB of the method": peak - before,
    }


def row(rounds: Sequence[Round], updates: int) -> dict[str, object]:
    """Means over rounds of whole cycles; `updates` of the network in each."""
    steps = [mean(found["seconds"]) for found in rounds]
    per_step = mean(steps)
    return {
        "seconds per step": per_step,
        "lowest and highest round": [min(steps), max(steps)],
        "processor seconds per step": mean(mean(found["processor seconds"]) for found in rounds),
        "seconds per update of the network": per_step * len(rounds[0]["seconds"]) / updates,
        "GFLOP per step": mean(found["GFLOP"] for found in rounds),
        "peak MB": max(found["peak MB"] for found in rounds),
        "peak MB of the method": max(found["peak MB of the method"] for found in rounds),
    }


def compared(rows: dict[str, dict[str, object]]) -> dict[str, float]:
    """The rival over Mutual Forcing: more than 1 means that Mutual Forcing costs less."""

    def ratio(key: str) -> float:
        return rows[RIVAL][key] / rows[OURS][key]

    own, rival, teacher = (rows[name]["seconds per step"] for name in (OURS, RIVAL, TEACHER))
    return {
        "seconds per step": ratio("seconds per step"),
        "processor seconds per step": ratio("processor seconds per step"),
        "seconds per step, its teacher trained for as many steps": (rival + teacher) / own,
        "seconds per update of the network": ratio("seconds per update of the network"),
        "GFLOP per step": ratio("GFLOP per step"),
        "peak MB": ratio("peak MB"),
        "peak MB of the method": ratio("peak MB of the method"),
    }


def lines_of(rows: dict[str, dict[str, object]], ratios: dict[str, float]) -> list[str]:
    """Rows and ratios in Markdown."""
    columns = [key for key in rows[OURS] if key != "lowest and highest round"]
    lines = []
    for name, found in rows.items():
        low, high = found["lowest and highest round"]
        cells = [said(found[key]) for key in columns]
        cells[0] += f" ({low:.3g} to {high:.3g})"
        lines.append([name, *cells])
    told = [f"- {name}: {ratio:.2f}" for name, ratio in ratios.items()]
    return [*table(["", *columns], lines), "", f"{RIVAL} over {OURS}:", "", *told]


def run(arguments: argparse.Namespace) -> None:
    """All methods in turn, each round in a process of its own that is given these options again.

    Raises:
        ValueError: one of them fails.
    """
    found: dict[str, list[Round]] = {name: [] for name in METHODS}
    for number in range(arguments.rounds):
        for name in METHODS:
            one = command.started(MODULE, *arguments.given, "--round", number, "--method", name)
            printed = finished(one)
            found[name].append(json.loads(printed))
    rows = {}
    for name, measured in found.items():
        # In a cycle the network that learns by DMD is updated once, the others at every step.
        by_dmd = name == RIVAL or METHODS[name][0] in ("bidirectional_dmd", "self_forcing")
        rows[name] = row(measured, 1 if by_dmd else len(measured[0]["seconds"]))
    ratios = compared(rows)
    summary = {
        "clips": arguments.batch,
        "blocks": arguments.blocks,
        "rows": rows,
        "rival over ours": ratios,
        "rounds": found,
    }
    publish(arguments.out, summary, lines_of(rows, ratios))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(MODULE, __doc__)
    p.add_argument("--config", type=Path, default=CONFIGS / "small.json")
    p.add_argument("--batch", type=int, default=4, help="clips (4)")
    p.add_argument("--blocks", type=int, default=5, help="blocks of each, with the prefix (5)")
    p.add_argument("--rounds", type=int, default=2, help="cycles of each method (2)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    p.add_argument("--out", type=Path, help="write OUT.json and OUT.md as well")
    p.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    p.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    return p


def work(arguments: argparse.Namespace) -> None:
    """All rounds of all methods, or the one round that this process is asked for."""
    if arguments.method is None:
        run(arguments)
        return
    stage, method = METHODS[arguments.method]
    settings = read_settings(arguments.config, stage, method)
    if stage == "bidirectional":
        # As many steps as a round of the method that it is the teacher of.
        taught = read_settings(arguments.config, *METHODS[RIVAL])
        settings = settings | {"mutual": taught["mutual"]}
    sizes = arguments.batch, arguments.blocks, arguments.round, arguments.rounds
    sys.stdout.write(json.dumps(measure(settings, stage, *sizes)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = parser()
    p.set_defaults(given=sys.argv[1:] if argv is None else argv)
    return command.run(p, work, argv)


if __name__ == "__main__":
    sys.exit(main())
