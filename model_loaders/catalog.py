"""Which files are models, LTX-2 files or saved streams, under names of their own.

A folder of checkpoints may hold hundreds of gigabytes that belong to other packs, and anything else
beside them. `identity.py` says what each one is from its first bytes. What cannot be read is left
out; it never stops the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..samplers.tensor_file import is_regular
from .identity import PICKLED, changed_at, what_is

MODEL_VARIABLE = "MUTUAL_FORCING_MODEL"
_SHARD = re.compile(r"(.*)-\d+-of-\d+\.safetensors$")
_READ = (".safetensors", *PICKLED)

Entry = tuple[str, Path]
"""The name of a file in the folder that is listed (`sub/x.safetensors`), and the file."""


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
            if path.suffix == ".safetensors" and what_is(path).fits("model"):
                yield name, path

    return told_apart(models())


def list_ltx2(entries: Iterable[Entry]) -> dict[str, Path]:
    """Checkpoints of LTX-2's transformer: files, folders of shards, indices of loose shards."""

    def checkpoints() -> Iterator[Entry]:
        for name, path in entries:
            shard = _SHARD.match(path.name)
            if path.suffix not in _READ or not what_is(path).fits("file"):
                continue
            if shard is None:
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

    def bases() -> Iterator[Entry]:
        for name, path in entries:
            found = what_is(path)
            if path.suffix == ".safetensors" and found.has_connectors and not found.fits("model"):
                yield name, path

    return told_apart(bases())


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
                if changed is not None and what_is(path).fits("stream"):
                    name = path.relative_to(folder).as_posix()
                    found.append((changed, f"{name} [{label}]" if label else name, path))
    return {name: path for _, name, path in sorted(found, reverse=True)}
