"""What a measurement found, for people and for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from ...samplers.atomic_file import write_whole
from ..metrics.record import record


def said(value: object) -> str:
    """A number, or several by name, in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(number)}" for key, number in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def write(out: Path | None, summary: Mapping[str, object], text: str) -> None:
    """Print the text; with `out`, write it to OUT.md and the numbers to OUT.json."""
    sys.stdout.write(text)
    if out is None:
        return
    values = {"record": record(), **summary}
    write_whole(f"{out}.json", json.dumps(values, indent=1) + "\n")
    write_whole(f"{out}.md", text)
