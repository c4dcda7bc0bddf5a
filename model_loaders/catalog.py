"""Which files are models, LTX-2 files or saved streams: told from their headers alone.

A folder of checkpoints may hold hundreds of gigabytes that belong to other packs, and anything else
beside them. The first bytes of each regular file say what it is; nothing else of it is read, and
the answer is remembered until the file changes. What cannot be read is left out; it never stops the
rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..samplers.state_file import FORMAT as STREAM_FORMAT
from ..samplers.tensor_file import is_regular, read_header
from .bundle import FORMAT as MODEL_FORMAT
from .bundle import PACKED_HEADER

MODEL_VARIABLE = "MUTUAL_FORCING_MODEL"
# Every shard of a transformer of LTX-2 has the one (a LoRA has not), what prepares its prompts the
# other.
_LTX2_KEY, _CONNECTOR_KEY = ".audio_to_video_attn.to_q.bias", "_embeddings_connector."
_SHARD = re.compile(r"(.*)-\d+-of-\d+\.safetensors$")
_PICKLED = (".pt", ".pth")

Entry = tuple[str, Path]
"""The name of a file in the folder that is listed (`sub/x.safetensors`), and the file."""


class Traits(NamedTuple):
    """What a header says: the format that the file names, and which parts of LTX-2 are in it."""

    format: str | None
    ltx2: bool
    connectors: bool


_NOTHING = Traits(None, False, False)


def header_of(path: Path) -> dict[str, object]:
    """The header of a safetensors file; empty for anything that is not one."""
    try:
        return read_header(path)
    except (OSError, ValueError):
        return {}


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
    changed = changed_at(path)
    return _NOTHING if changed is None else _traits(path, *changed)


def changed_at(path: Path) -> tuple[int, int] | None:
    """When a regular file was written (nanoseconds) and its bytes; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_mtime_ns, status.st_size) if is_regular(path) else None


@lru_cache(maxsize=4096)
def _traits(path: Path, _changed: int, _size: int) -> Traits:
    header = header_of(path)
    metadata = header.pop("__metadata__", {})
    named = metadata.get("format") if isinstance(metadata, dict) else None
    return Traits(
        # A host's saving node writes no metadata of ours.
        MODEL_FORMAT if PACKED_HEADER in header else named if isinstance(named, str) else None,
        any(_LTX2_KEY in key for key in header),
        any(_CONNECTOR_KEY in key for key in header),
    )


def told_apart(entries: Iterable[Entry]) -> dict[str, Path]:
    """Every file under a name of its own; where it is taken, with the file's folder."""
    found: dict[str, Path] = {}
    for name, path in entries:
        # The folder that was listed is what stands before the name.
        folder = path.parents[min(len(Path(name).parts), len(path.parents)) - 1]
        choices = (name, f"{name} [{folder.name}]", f"{name} [{folder}]")
        for choice in choices:
            if found.setdefault(choice, path) == path:
                break
    return found


def list_models(shipped: Path, entries: Iterable[Entry]) -> dict[str, Path]:
    """Names to show and the files behind them: the shipped model first, then those found.

    Args:
        shipped: the model that comes with the pack; left out while it is missing. The environment
        variable
            MUTUAL_FORCING_MODEL may name another file to stand in its place.
    """

    def models() -> Iterator[Entry]:
        own = Path(os.environ.get(MODEL_VARIABLE) or shipped)
        if is_regular(own):
            yield shipped.name, own
        for name, path in entries:
            if path.suffix == ".safetensors" and is_model(path):
                yield name, path

    return told_apart(models())


def list_ltx2(entries: Iterable[Entry], *, own_folders: Iterable[Path]) -> dict[str, Path]:
    """Checkpoints of LTX-2's transformer: files, folders of shards, indices of loose shards.

    Args:
        own_folders: where every .pt is taken for one; elsewhere those belong to others.
    """
    own = tuple(own_folders)

    def checkpoints() -> Iterator[Entry]:
        for name, path in entries:
            shard = _SHARD.match(path.name)
            if path.suffix in _PICKLED and any(map(path.is_relative_to, own)):
                if is_regular(path):
                    yield name, path
            elif path.suffix != ".safetensors" or not traits_of(path).ltx2 or is_model(path):
                continue
            elif shard is None:
                yield name, path
            elif Path(name).parent != Path():
                yield Path(name).parent.as_posix(), path.parent
            else:
                index = path.with_name(f"{shard[1]}.safetensors.index.json")
                if is_regular(index):
                    yield index.name, index

    return told_apart(checkpoints())


def list_bases(entries: Iterable[Entry]) -> dict[str, Path]:
    """Files that hold LTX-2's connectors."""
    return told_apart((name, path) for name, path in entries if traits_of(path).connectors)


def list_streams(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Saved streams, newest first.

    Args:
        folders: where to look, with what lies below; what to add to the names from each, in
        brackets
            (ComfyUI's own way of writing `x.safetensors [input]`), or "" for plain names.
    """
    found = []
    for label, folder in folders.items():
        for place, _, names in os.walk(folder):
            for path in (Path(place, name) for name in names if name.endswith(".safetensors")):
                changed = changed_at(path)
                if changed is not None and is_stream(path):
                    name = path.relative_to(folder).as_posix()
                    found.append((changed, f"{name} [{label}]" if label else name, path))
    return {name: path for _, name, path in sorted(found, reverse=True)}
