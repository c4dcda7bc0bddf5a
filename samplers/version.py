"""This pack's version, which the files that it writes name."""

from __future__ import annotations

import re
from pathlib import Path

_FOUND = re.search(
    r'^version = "(.+)"',
    (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"),
    re.M,
)
VERSION = _FOUND[1]
NOTE = "mutual_forcing_version"
"""Its name among a file's metadata."""
