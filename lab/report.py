"""What was measured, for people and for programs: tables, numbers, and with what they were made."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..samplers.atomic_file import write_whole
from .command import ROOT

log = logging.getLogger("mutualforcing")


def said(value: object, digits: int | None = None) -> str:
    """A value for a reader: a number in three figures or with `digits`, "-" for none."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(number, digits)}" for key, number in value.items())
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown, line by line; cells as they are said."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(said(cell) for cell in line) + " |" for line in lines]


def write_json(path: Path, results: Mapping[str, object]) -> None:
    """Write results whole or not at all, so that a killed run leaves nothing half-written behind.

    Raises:
        ValueError: a number that is not finite.
        OSError: it cannot be written.
    """
    write_whole(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def publish(out: Path | None, results: Mapping[str, object], lines: Sequence[str]) -> None:
    """Show lines; with `out`, write them to OUT.md, and numbers and their record to OUT.json, in
    eight figures and one line an entry: there are thousands.

    Raises:
        ValueError: a number that is not finite.
        OSError: they cannot be written.
    """
    text = "\n".join(lines)
    log.info("%s", text)
    if out is not None:
        entries = {"record": record(), **_in_eight_figures(results)}.items()
        compact = partial(json.dumps, allow_nan=False, separators=(",", ":"))
        text_of = ",\n".join(f"{compact(name)}:{compact(value)}" for name, value in entries)
        write_whole(Path(f"{out}.json"), f"{{{text_of}}}\n")
        write_whole(Path(f"{out}.md"), text + "\n")
        log.info("wrote %s.json and %s.md", out, out)


def _in_eight_figures(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _in_eight_figures(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_in_eight_figures(one) for one in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def record() -> dict[str, str | int]:
    """Facts about this run, for the head of a file of results."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory()}, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": "python launch.py " + " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
    return f"{size / 2**30:.0f} GiB"


def _commit() -> str:
    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
