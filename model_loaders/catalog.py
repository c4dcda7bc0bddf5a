"""Which files are models, LTX-2 files or saved streams: told from their headers alone.

A folder of checkpoints may hold hundreds of gigabytes that belong to other packs. The first bytes
of each file say what it is; nothing else of it is read, and the answer is remembered until the file
changes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..samplers.state_file import FORMAT as STREAM_FORMAT
from .bundle import FORMAT as MODEL_FORMAT

MODEL_VARIABLE = "MUTUAL_FORCING_MODEL"
_LONGEST_HEADER = 64 * 1024 * 1024
# Every shard of a transformer of LTX-2 has the one (a LoRA has not), what prepares its prompts the
# other.
_LTX2_KEY, _CONNECTOR_KEY = ".audio_to_video_attn.to_q.bias", "_embeddings_connector."
_SHARD = re.compile(r"(.*)-\d+-of-\d+\.safetensors$")
_PICKLED = (".pt", ".pth")


class Traits(NamedTuple):
    """What a header says: the format that the file names, and which parts of LTX-2 are in it."""

    format: str | None
    ltx2: bool
    connectors: bool


def header_of(path: Path) -> dict[str, object]:
    """The header of a safetensors file; empty for anything that is not one."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= _LONGEST_HEADER:
                return {}
            found = json.loads(file.read(size))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for anything that is not one."""
    found = header_of(path).get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def is_model(path: Path) -> bool:
    """Whether this file says that it is a Mutual Forcing model."""
    return traits_of(path).format == MODEL_FORMAT


def is_stream(path: Path) -> bool:
    """Whether this file says that it is a saved stream."""
    return traits_of(path).format == STREAM_FORMAT


def traits_of(path: Path) -> Traits:
    """What a file is; nothing at all for one that cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return Traits(None, False, False)
    return _traits(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _traits(path: Path, _changed: int, _size: int) -> Traits:
    header = header_of(path)
    metadata = header.pop("__metadata__", {})
    return Traits(
        metadata.get("format") if isinstance(metadata, dict) else None,
        any(_LTX2_KEY in key for key in header),
        any(_CONNECTOR_KEY in key for key in header),
    )


def list_models(shipped: Path, folders: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Names to show and the files behind them: the shipped model first, then those found.

    Args:
        shipped: the model that comes with the pack; left out while it is missing. The environment
            variable MUTUAL_FORCING_MODEL may name another file to stand in its place.
        folders: pairs (name relative to its folder, file), in the order in which they should win.
    """
    shipped_file = Path(os.environ.get(MODEL_VARIABLE) or shipped)
    found = {shipped.name: shipped_file} if shipped_file.is_file() else {}
    for name, path in folders:
        if path.suffix == ".safetensors" and name not in found and is_model(path):
            found[name] = path
    return found


def list_ltx2(files: Iterable[tuple[str, Path]], *, own_folder: Path) -> dict[str, Path]:
    """Checkpoints of LTX-2's transformer: files, folders of shards, indices of loose shards.

    Args:
        files: pairs (name relative to its folder, file).
        own_folder: where every .pt is taken for one; elsewhere those belong to others.
    """
    found: dict[str, Path] = {}
    for name, path in files:
        shard = _SHARD.match(path.name)
        if path.suffix in _PICKLED and path.is_relative_to(own_folder):
            found.setdefault(name, path)
        elif path.suffix != ".safetensors" or not traits_of(path).ltx2 or is_model(path):
            continue
        elif shard is None:
            found.setdefault(name, path)
        elif Path(name).parent != Path():
            found.setdefault(Path(name).parent.as_posix(), path.parent)
        else:
            index = path.with_name(f"{shard[1]}.safetensors.index.json")
            if index.is_file():
                found.setdefault(index.name, index)
    return found


def list_bases(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Files that hold LTX-2's connectors."""
    return {name: path for name, path in files if traits_of(path).connectors}
