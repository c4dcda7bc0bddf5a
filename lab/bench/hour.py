"""An hour in one stream: memory, the file, picture against sound, and what going on costs then.

    python launch.py lab.bench.hour --seconds 3600 --out docs/measured/hour

writes OUT.json and OUT.md. The clip is made, decoded and written as `generate.py` does it. Memory
is what the process holds at minute 2 and at the end. The file is played from its beginning to
its end, and hits seen are held against hits heard in its first and in its last ENDS seconds. Going
on is measured in processes of their own, in turn, that load the stream, as it is saved at minute
EARLY and at the end, and make two seconds more: its time from the file to the last of them, and its
most memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from ... import shell
from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.clip_writer import ClipWriter
from ...samplers.live import live_clip
from ...samplers.parking import spooled
from ...samplers.rollout import sampler_settings
from ...samplers.state import StreamState
from ...samplers.state_file import load_state, save_state
from .. import command
from ..metrics.longrun import peak_mb, resident_mb
from ..metrics.sync import hit_sync
from ..report import publish, said

MODULE = "lab.bench.hour"
PROMPT, KIND = "a red drum beats fast on a white background", "drum"
EARLY, ENDS, FURTHER, REPEATS = 1, 20, 2, 5


def make(bundle: Bundle, seconds: int, folder: Path) -> tuple[dict[str, float], dict[str, Path]]:
    """Make the clip; memory in MB by moment, and the streams of minute EARLY and of the end."""
    sampler = sampler_settings(bundle.stream.default_mode)
    prompt = bundle.prompt(PROMPT, guided=sampler.guidance != 1)
    blocks, early = bundle.clock.blocks_for(seconds), bundle.clock.blocks_for(60 * EARLY)
    warm = min(blocks, bundle.clock.blocks_for(120))
    files = {name: folder / f"{name}.state" for name in ("early", "late", "late, whole")}
    memory, began = {}, time.perf_counter()
    with ClipWriter(folder / "clip.mp4", bundle.clock, *bundle.pixel_size) as writer:
        made = live_clip(
            bundle,
            prompt,
            bundle.begin((0,)),
            blocks,
            sampler,
            bundle.decoder(),
            lambda decoded, _: writer.write(decoded),
            settle=lambda state: spooled(state, folder),
        )
        state: StreamState
        for _, state in shell.progress(made, total=blocks):
            if state.next_block == early:
                save_state(files["early"], state.trimmed())
            if state.next_block == warm:
                memory["minute 2"] = resident_mb()
    memory["the end"] = resident_mb()
    save_state(files["late"], state.trimmed())
    save_state(files["late, whole"], state)
    memory["times real time"] = seconds / (time.perf_counter() - began)
    return memory, files


def played(path: Path) -> dict[str, object]:
    """How long a file's picture and sound are, played through, and how far apart hits are."""
    counts: dict[str, int] = {"video": 0, "audio": 0}
    ends: dict[str, list[np.ndarray]] = {"video": [], "audio": []}
    firsts = {"video": [], "audio": []}
    rates = {}
    for kind in counts:
        with av.open(str(path)) as file:
            stream = file.streams.get({kind: 0})[0]
            rates[kind] = float(stream.average_rate if kind == "video" else stream.rate)
            for frame in file.decode(stream):
                number = 1 if kind == "video" else frame.samples
                short = counts[kind] < ENDS * rates[kind]
                last = ends[kind]
                content = (
                    frame.to_ndarray(format="rgb24") if kind == "video" else frame.to_ndarray()[0]
                )
                counts[kind] += number
                if short:
                    firsts[kind].append(content)
                last.append(content)
                held = 1 if kind == "video" else number
                # Packets of sound do not begin with a picture, and the last one ends later.
                more = 0 if kind == "video" else 3
                del last[: max(0, len(last) - int(ENDS * rates[kind] / held) - more)]
    seconds = {kind: counts[kind] / rates[kind] for kind in counts}
    found: dict[str, object] = {f"{kind}, s": value for kind, value in seconds.items()}
    for name, (pictures, sounds) in (
        ("first", (firsts["video"], firsts["audio"])),
        ("last", (ends["video"], ends["audio"])),
    ):
        sound = np.concatenate(sounds)
        if name == "last":  # both end together but for what fills the last packet of sound
            begin = seconds["video"] - len(pictures) / rates["video"]
            sound = sound[round((begin - seconds["audio"]) * rates["audio"]) + len(sound) :]
        sync = hit_sync(np.stack(pictures), sound, int(rates["audio"]), rates["video"], KIND)
        found[f"hits seen in the {name} {ENDS} s"] = len(sync.seen)
        offset = sync.median_offset
        found[f"median |offset| there ({name}), ms"] = offset if np.isfinite(offset) else None
    return found


def go_on(model: Path, state: Path) -> dict[str, float]:
    """Load a stream and make two more seconds of it: seconds and MB, in this process."""
    bundle = load_bundle(model)
    began, before = time.perf_counter(), resident_mb()
    loaded = load_state(state)
    sampler = sampler_settings(bundle.stream.default_mode)
    prompt = bundle.prompt(PROMPT, guided=sampler.guidance != 1)
    for _ in live_clip(bundle, prompt, loaded, FURTHER, sampler, bundle.decoder()):
        pass
    return {"seconds": time.perf_counter() - began, "MB": peak_mb(), "more MB": peak_mb() - before}


def costs(model: Path, states: dict[str, Path]) -> dict[str, dict[str, float]]:
    """The least of several processes that go on from each state, in turn: a busy machine is busy
    for all of them."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    for _ in range(REPEATS):
        for name, state in states.items():
            asked = command.started(MODULE, "--model", model, "--go-on", state)
            told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
            runs[name].append(json.loads(told.splitlines()[-1]))
    return {
        name: {key: min(run[key] for run in taken) for key in taken[0]}
        for name, taken in runs.items()
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(MODULE, __doc__)
    p.add_argument("--model", type=shell.Input(), default=shipped_model_path())
    p.add_argument("--seconds", type=int, default=3600)
    p.add_argument("--threads", type=shell.threads, default=1)
    p.add_argument("--go-on", type=shell.Input(), help=argparse.SUPPRESS)
    p.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    p.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return p


def work(args: argparse.Namespace) -> int:
    """Make, play, go on, print and write. Returns the exit status."""
    if args.go_on:
        sys.stdout.write(json.dumps(go_on(args.model, args.go_on)) + "\n")
        return 0
    if args.seconds < 120:
        raise ValueError(f"--seconds is {args.seconds}, expected at least 120")
    bundle = load_bundle(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory, files = make(bundle, args.seconds, folder)
        file = played(folder / "clip.mp4")
        going = costs(args.model, files)
        sizes = {name: path.stat().st_size / 2**20 for name, path in files.items()}
    ratios = {name: going["late"][name] / going["early"][name] for name in ("seconds", "MB")}
    grown = memory["the end"] / memory["minute 2"]
    frame = 1 / float(bundle.clock.fps)
    apart = abs(file["video, s"] - file["audio, s"])
    late = file["median |offset| there (last), ms"]
    met = {
        "memory within 5 % of minute 2": grown <= 1.05,
        "picture and sound end within a frame and a packet": apart <= frame + 1024 / 16000,
        "hits at the end within a frame": late is not None and late <= 1000 * frame,
        "going on at most 1.2 times": max(ratios.values()) <= 1.2,
    }
    results = {
        "model": {"file": args.model.name, "id": bundle.model_id},
        "seconds": args.seconds,
        "memory, MB": memory,
        "file": file,
        "going on": going,
        "size of the saved stream, MB": sizes,
        "going on at the end over minute 1": ratios,
        "met": met,
    }
    publish(args.out, results, [f"- {key}: {said(value)}" for key, value in results.items()])
    return int(args.check and not all(met.values()))


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
