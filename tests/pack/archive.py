"""The registry's archive as `comfy node pack` makes it: tracked files less .comfyignore's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from pathspec import PathSpec

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> list[str]:
    """Paths that git tracks, relative to the root; skips where this is no checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [path for path in listed.stdout.decode().split("\0") if (ROOT / path).is_file()]


def archived() -> list[str]:
    """Those of them that go into the archive."""
    lines = (ROOT / ".comfyignore").read_text().splitlines()
    ignored = PathSpec.from_lines("gitwildmatch", [x for x in lines if x and x[0] != "#"])
    return [path for path in tracked() if not ignored.match_file(path)]


def unpack(folder: Path) -> Path:
    """The archive's files in a folder of their own, with this environment as its .venv."""
    for path in archived():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder
