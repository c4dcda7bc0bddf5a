"""A stream as somebody watches it: when it is seen and heard, and whether it ever stops.

    python launch.py lab.bench.viewer --seconds 60 --buffer 1.0 --out docs/measured/viewer

Makes a clip and writes it as the nodes do, with the model loaded before the clock starts. After
every block it is noted how much of the file is there; what a frame's bytes are there for can be
played. A simulated viewer begins when `--buffer` seconds of picture and sound lie ready, plays in
real time, and after running dry waits for as much again. With --out it writes OUT.json, OUT.md and
OUT.png (what lies ready, over time).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

from ... import shell
from ...model_loaders.bundle import Bundle
from ...samplers.clip_writer import ClipWriter
from ...samplers.live import live_clip
from ...samplers.rollout import SamplerSettings
from .. import command
from ..report import publish, table

MODULE = "lab.bench.viewer"
PROMPT = "a girl with red hair on a blue background says ba mi tu in a high voice"


class Arrival(NamedTuple):
    """What a viewer has at a moment: `at` seconds after Run, seconds of pictures and of sound."""

    at: float
    pictures: float
    sound: float

    @property
    def until(self) -> float:
        """How far it can be played."""
        return min(self.pictures, self.sound)


class Watched(NamedTuple):
    """What a viewer saw; seconds after Run.

    Attributes:
        picture: the first one is there.
        sound: it plays, so it is heard.
        waits: how long it stood still, each time that it ran dry.
        met: share of arrivals that were there when a viewer who never waits would have needed them.
        ahead: (moment, seconds that lie ready then) at every arrival once it plays.
    """

    picture: float
    sound: float
    waits: tuple[float, ...]
    met: float
    ahead: tuple[tuple[float, float], ...]


def made(bundle: Bundle, sampler: SamplerSettings, seconds: float, path: Path) -> list[Arrival]:
    """Make a clip, and say what of it was there when."""
    state = bundle.begin()
    sizes: list[tuple[float, int]] = []
    began = time.perf_counter()
    prompt = bundle.prompt(PROMPT, guided=sampler.guidance != 1)
    with ClipWriter(path, bundle.clock, *bundle.pixel_size) as writer:

        def note() -> None:
            size = path.stat().st_size if writer.growing else 0
            sizes.append((time.perf_counter() - began, size))

        def use(decoded: object, _state: object) -> None:
            writer.write(decoded)
            note()

        blocks = bundle.clock.blocks_for(seconds)
        for _ in live_clip(bundle, prompt, state, blocks, sampler, bundle.decoder(), use):
            pass
    sizes.append((time.perf_counter() - began, path.stat().st_size))
    return arrivals(path, sizes)


def arrivals(path: Path, sizes: Sequence[tuple[float, int]]) -> list[Arrival]:
    """What could be played of a file when it was so many bytes long: (moment, bytes)."""
    ends: dict[str, list[tuple[int, float]]] = {"video": [], "audio": []}
    with av.open(path) as file:
        for packet in file.demux():
            if packet.size:
                end = float((packet.pts + packet.duration) * packet.time_base)
                ends[packet.stream.type].append((packet.pos + packet.size, end))

    def there(kind: str, size: int) -> float:
        return max((end for last, end in ends[kind] if last <= size), default=0.0)

    return [Arrival(at, there("video", size), there("audio", size)) for at, size in sizes]


def watch(stream: Sequence[Arrival], buffer: float) -> Watched:
    """Play a stream; `buffer` seconds must lie ready for it to begin, and to go on.

    Raises:
        ValueError: nothing can be played.
    """
    length = stream[-1].until
    if not length > 0:
        raise ValueError("the clip has no second that can be played")
    head, until, now = 0.0, 0.0, 0.0
    playing, begun, dry_at = False, None, 0.0
    waits, ahead, met, wanted = [], [], 0, 0
    for arrival in stream:
        if playing:
            head += arrival.at - now
            if head >= until:  # ran dry on the way
                dry_at, head, playing = arrival.at - (head - until), until, False
        if begun is not None and arrival.until > until:
            wanted += 1
            met += arrival.at <= begun + until
        now, until = arrival.at, arrival.until
        if not playing and until > head and until - head >= min(buffer, length - head):
            if begun is None:
                begun = now
            else:
                waits.append(now - dry_at)
            playing = True
        if begun is not None:
            ahead.append((now, until - head))
    picture = next(arrival.at for arrival in stream if arrival.pictures > 0)
    return Watched(picture, begun, tuple(waits), met / wanted if wanted else 1.0, tuple(ahead))


def plot(path: Path, ahead: Sequence[tuple[float, float]]) -> None:
    """What lies ready over time, as a PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*ahead, strict=True))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="seconds after Run", ylabel="seconds ready to play")
    figure.savefig(path)


def parser() -> shell.Parser:
    """The command line."""
    p = command.parser(MODULE, __doc__)
    command.add_model_options(p)
    p.add_argument("--seconds", type=shell.whole(1, 3600), default=60, help="of clip (60)")
    p.add_argument("--buffer", type=float, default=1.0, help="seconds that lie ready first (1.0)")
    p.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png as well")
    return p


@torch.no_grad()
def work(args: argparse.Namespace) -> None:
    """Make, watch, print and write.

    Raises:
        ValueError: no such model, or a buffer that is no length.
    """
    if not 0 <= args.buffer <= args.seconds:
        raise ValueError(f"--buffer is {args.buffer}, expected 0 to {args.seconds} seconds")
    bundle, sampler = command.open_model(args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        made(bundle, sampler, 2, path)  # what is only done once is not a viewer's matter
        stream = made(bundle, sampler, args.seconds, path)
    seen = watch(stream, args.buffer)
    between = [later.at - earlier.at for earlier, later in pairwise(stream[:-1])]
    percentiles = {p: float(np.percentile(between, p)) for p in (50, 90, 99, 100)}
    least = min((seconds for at, seconds in seen.ahead if at < stream[-1].at), default=0.0)
    rows = [
        ("first picture", f"{seen.picture:.2f} s"),
        ("first sound", f"{seen.sound:.2f} s"),
        ("between blocks, median", f"{percentiles[50]:.2f} s"),
        (
            "between blocks, 90 / 99 % / most",
            " / ".join(f"{percentiles[p]:.2f}" for p in (90, 99, 100)),
        ),
        ("deadlines met", f"{100 * seen.met:.1f} %"),
        ("underruns", f"{len(seen.waits)}, {sum(seen.waits):.1f} s in all"),
        ("least that lay ready", f"{least:.2f} s"),
        ("times real time", f"{stream[-1].until / stream[-1].at:.2f}"),
    ]
    lines = [
        f"{args.seconds} s of clip, {args.buffer:g} s ready before it plays; times after Run:",
        "",
        *table(["", "found"], rows),
    ]
    results = {
        "buffer": args.buffer,
        "arrivals": [arrival._asdict() for arrival in stream],
        "between": percentiles,
        **seen._asdict(),
    }
    publish(args.out, results, lines)
    if args.out is not None:
        plot(Path(f"{args.out}.png"), seen.ahead)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
