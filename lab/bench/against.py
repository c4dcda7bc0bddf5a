"""Two commands timed in turn, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from statistics import median


def finished(command: Sequence[str]) -> str:
    """What a command printed.

    Raises:
        ValueError: it cannot be started or fails; says how.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise ValueError(
            f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return done.stdout


def in_turn(commands: Sequence[Sequence[str]], rounds: int) -> list[list[float]]:
    """Seconds on the clock of every run of every command, started as processes one after another.

    Raises:
        ValueError: a command cannot be started or fails; says how.
    """
    seconds: list[list[float]] = [[] for _ in commands]
    for _ in range(rounds):
        for command, took in zip(commands, seconds, strict=True):
            start = time.perf_counter()
            finished(command)
            took.append(time.perf_counter() - start)
    return seconds


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, object]:
    """Medians and their ratio; more than 1 means that ours is faster."""
    return {
        "our seconds": list(ours),
        "their seconds": list(theirs),
        "our median": median(ours),
        "their median": median(theirs),
        "theirs over ours": median(theirs) / median(ours),
    }
