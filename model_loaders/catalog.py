"""Which files on disk are models or saved streams: told from the header of a safetensors file alone.

A folder of checkpoints may hold hundreds of gigabytes that belong to other packs. The first bytes of each
file say what it is; nothing else of it is read, and the answer is remembered until the file changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ..samplers.state_file import FORMAT as STREAM_FORMAT
from .bundle import FORMAT as MODEL_FORMAT

MODEL_VARIABLE = "MUTUAL_FORCING_MODEL"
_LONGEST_HEADER = 64 * 1024 * 1024


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for anything that is not one."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= _LONGEST_HEADER:
                return {}
            found = json.loads(file.read(size)).get("__metadata__", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def is_model(path: Path) -> bool:
    """Whether this file says that it is a Mutual Forcing model."""
    return _format(path) == MODEL_FORMAT


def is_stream(path: Path) -> bool:
    """Whether this file says that it is a saved stream."""
    return _format(path) == STREAM_FORMAT


def _format(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _format_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _format_of(path: Path, _changed: int, _size: int) -> str | None:
    return metadata_of(path).get("format")


def list_models(shipped: Path, folders: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Names to show and the files behind them: the shipped model first, then those found in folders.

    Args:
        shipped: the model that comes with the pack; left out while it is missing. The environment variable
            MUTUAL_FORCING_MODEL may name another file to stand in its place.
        folders: pairs (name relative to its folder, file), in the order in which they should win.
    """
    shipped_file = Path(os.environ.get(MODEL_VARIABLE) or shipped)
    found = {shipped.name: shipped_file} if shipped_file.is_file() else {}
    for name, path in folders:
        if path.suffix == ".safetensors" and name not in found and is_model(path):
            found[name] = path
    return found
