"""A checkpoint's tensors, whatever holds them: a folder, an index, safetensors or a .pt.

Nothing is read before it is asked for: every tensor is a view of a mapped file. A tensor that is
kept costs nothing but its own pages. One that is only read on its way to a copy comes from a second
map of the same file, thrown away, pages and all, after every thirty-second part of the checkpoint.
So what a load holds in memory is about what it makes, even where a file of 38 GB is cast or moved.

A .pt is a pickle, and a pickle can run any code: PyTorch's own reader of plain weights opens it,
and refuses whatever needs more. Containers: docs/omniforcing.md, section 2.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from ..networks.checked import quoted, reason_of, some
from ..samplers.tensor_file import (
    LONGEST_HEADER,
    TensorFileError,
    explained,
    is_regular,
    look_at,
    open_tensors,
)
from .identity import Identity, identify

Container = Literal["folder", "index", "safetensors", "pickle"]

REMEDY = "choose another file, or download this one again"
WEIGHTS_ONLY = (
    "save it again with its weights alone (torch.save(model.state_dict())) or as safetensors"
)
INDEX_SUFFIX = ".safetensors.index.json"
_ZIP, _OLD_PICKLE = b"PK\x03\x04", b"\x80"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors$")
# In this order a .pt is searched for its weights; without any of them it is the state dict itself.
EMA, PARTS = "generator_ema", ("generator", "model", "state_dict")
_WINDOWS = 32
# Safetensors' names of what a network can be made of; the rest is for quantised files.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
Described = tuple[tuple[int, ...], torch.dtype]
Reader = Callable[[str], Tensor]


class _Index(BaseModel):
    """What lies beside shards: which tensor is in which of them."""

    weight_map: dict[str, str]


class Checkpoint:
    """Named tensors of one checkpoint.

    Attributes:
        path: what was asked for.
        container: what kind of thing lies there.
        identity: what it is.
        part: which entry of a .pt the weights are; None where there are no entries.
        metadata: of the safetensors files together; empty for a .pt.
        shapes: of every tensor, by the name in the file.
        dtypes: likewise.
        size: bytes of all tensors.
    """

    def __init__(self, path: Path | str, *, ema: bool = False) -> None:
        """Open a checkpoint; reads headers only.

        Args:
            path: folder, `*.safetensors.index.json`, `*.safetensors` or `*.pt`.
            ema: take the averaged weights (`generator_ema`), which only a .pt has.

        Raises:
            TensorFileError: it cannot be used; names the file, what was found and the next step.
        """
        self.path = Path(path)
        self._ema = ema
        self.part: str | None = None
        self.metadata: dict[str, str] = {}
        what = "the checkpoint"
        is_folder = look_at(self.path, what, REMEDY) == "folder"
        with explained(self.path, what, REMEDY):
            self.container, files, promised = _files(self.path, is_folder)
        if ema and self.container != "pickle":
            raise TensorFileError(
                f"the checkpoint {self.path} has no averaged weights of its own: only a .pt can "
                "hold "
                f"{EMA!r}; switch the averaged weights off"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._kept: dict[Path, Reader] = {}
        self._passing: dict[Path, Reader] = {}
        self._passed = 0
        self._place: dict[str, Path] = {}
        for file in files:
            described, self._kept[file] = self._open(file)
            for key, (shape, dtype) in described.items():
                if key in self._place:
                    raise TensorFileError(
                        f"the checkpoint {self.path} has {some([key])} twice, in "
                        f"{self._place[key].name} and in "
                        f"{file.name}; leave one model in the folder, or choose its file"
                    )
                self._place[key], self.shapes[key], self.dtypes[key] = file, shape, dtype
        _check_index(self.path, promised, self._place)
        self.size = sum(self._bytes(key) for key in self._place)
        self.identity: Identity = identify(self.shapes, self.metadata, self.path)

    def tensor(self, key: str, *, keep: bool) -> Tensor:
        """One tensor on the CPU, in the file's dtype: a view of the mapped file, read-only.

        Args:
            keep: whether the view itself will be used on. If not, it must be copied and let go
                before the next one is asked for.
        """
        file = self._place[key]
        if keep:
            return self._kept[file](key)
        if self._passed > self.size // _WINDOWS:
            self._passing.clear()
            self._passed = 0
        self._passed += self._bytes(key)
        if file not in self._passing:
            _, self._passing[file] = self._open(file)
        return self._passing[file](key)

    def _bytes(self, key: str) -> int:
        return math.prod(self.shapes[key]) * self.dtypes[key].itemsize

    def _open(self, file: Path) -> tuple[dict[str, Described], Reader]:
        if self.container == "pickle":
            self.part, tensors = _choose(file, _unpickle(file), self._ema)
            described = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
            return described, tensors.__getitem__
        handle = open_tensors(file, "the checkpoint", REMEDY)
        # Slices know shape and dtype from the header; a tensor would touch its first page on the
        # disk.
        slices = {key: handle.get_slice(key) for key in handle.keys()}
        described = {
            key: (tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype(), torch.uint8))
            for key, piece in slices.items()
        }
        self.metadata = (handle.metadata() or {}) | self.metadata

        def read(key: str) -> Tensor:
            with explained(file, "the checkpoint", REMEDY):
                return handle.get_tensor(key)

        return described, read


def _files(path: Path, is_folder: bool) -> tuple[Container, list[Path], Mapping[str, str]]:
    """What lies at a path, the files with its tensors, and which tensor an index puts where."""
    if is_folder:
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if indices:
            return "folder", *_indexed(indices[0])
        return "folder", _shards(path), {}
    if path.suffix == ".json":
        return "index", *_indexed(path)
    with path.open("rb") as file:
        start = file.read(9)
    # Eight bytes of length and then JSON: a length may well begin with a byte that a pickle has
    # too.
    if start[8:] != b"{" and start.startswith(_ZIP):
        if path.suffix == ".safetensors":
            # PyTorch goes by the name and would take it for safetensors.
            raise TensorFileError(
                f"the checkpoint {path} is a pickled PyTorch file under the name of a safetensors "
                "file; "
                "rename it to .pt if you know where it is from"
            )
        return "pickle", [path], {}
    if start[8:] != b"{" and start.startswith(_OLD_PICKLE):
        raise TensorFileError(
            f"the checkpoint {path} is a pickle without PyTorch's zip archive around it, which is "
            "never "
            f"opened: it could run any code; {WEIGHTS_ONLY}"
        )
    return "safetensors", [path], {}


def _indexed(index: Path) -> tuple[list[Path], Mapping[str, str]]:
    try:
        if not is_regular(index) or index.stat().st_size > LONGEST_HEADER:
            raise ValueError(f"not a file, or larger than {LONGEST_HEADER} bytes")
        weight_map = _Index.model_validate_json(index.read_bytes()).weight_map
    except (OSError, ValueError) as error:
        raise TensorFileError(
            f"the index {index} cannot be read ({reason_of(error)}), expected JSON with a "
            f"'weight_map' from tensor to file; {REMEDY}"
        ) from error
    names = sorted(set(weight_map.values()))
    for name in names:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or ":" in name:
            raise TensorFileError(
                f"the index {index} names {quoted(name)}, expected a file beside it; {REMEDY}"
            )
    missing = [name for name in names if not is_regular(index.parent / name)]
    if missing:
        raise TensorFileError(
            f"the index {index} names {some(missing)}, not found beside it; download every file "
            "that it "
            "names into one folder"
        )
    if not names:
        raise TensorFileError(f"the index {index} names no file; {REMEDY}")
    return [index.parent / name for name in names], weight_map


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        others = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".pt", ".pth")]
        hint = f"choose one of its files: {some(others)}" if others else REMEDY
        raise TensorFileError(
            f"the folder {folder} has no *{INDEX_SUFFIX} and no .safetensors file; {hint}"
        )
    present = {file.name for file in found}
    for shard in filter(None, (_SHARD.match(file.name) for file in found)):
        stem, number, count = shard.groups()
        wanted = (
            f"{stem}-{i:0{len(number)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)
        )
        # Lazily: the count is a number that anybody may have written into a name.
        missing = list(islice((name for name in wanted if name not in present), 4))
        if missing:
            raise TensorFileError(
                f"the folder {folder} lacks {some(missing[:3])}{' and more' * (len(missing) > 3)} "
                "of "
                f"{int(count)} files; download every one of them into it"
            )
    return found


def _check_index(path: Path, promised: Mapping[str, str], place: Mapping[str, Path]) -> None:
    broken = [
        f"{key} in {name}"
        for key, name in promised.items()
        if key not in place or place[key].name != PurePosixPath(name).name
    ]
    if broken:
        raise TensorFileError(
            f"the index of {path} names {some(broken)}, not found there; the index and its files "
            "are not "
            "of one release, download them together"
        )


def _unpickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # A TorchScript archive is announced by a warning and then refused.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        needed = f" ({named.group(1)})" if named else ""
        raise TensorFileError(
            f"the checkpoint {path} needs code to open it{needed}, and code from a file is never "
            "run; "
            f"{WEIGHTS_ONLY}"
        ) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise TensorFileError(
                f"the checkpoint {path} is a TorchScript program, and code from a file is never "
                "run; "
                f"{WEIGHTS_ONLY}"
            ) from error
        raise TensorFileError(
            f"the checkpoint {path} was cut short or is not a PyTorch file ({reason_of(error)}); "
            f"{REMEDY}"
        ) from error
    # PyTorch's reader runs the pickle's own instructions, which can go wrong in any way.
    except Exception as error:
        raise TensorFileError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {reason_of(error)}); "
            f"{REMEDY}"
        ) from error


def _choose(path: Path, content: object, ema: bool) -> tuple[str | None, dict[str, Tensor]]:
    """The entry of a .pt that holds the weights wanted, and its tensors."""
    if not isinstance(content, Mapping):
        raise TensorFileError(
            f"the checkpoint {path} holds a {type(content).__name__}, expected a dictionary of "
            "tensors; "
            f"{WEIGHTS_ONLY}"
        )
    if ema and not isinstance(content.get(EMA), Mapping):
        raise TensorFileError(
            f"the checkpoint {path} has no {EMA!r} (it has {some(map(str, content))}); switch the "
            "averaged "
            "weights off"
        )
    # Where there is nothing else, as in TaoMate's file, they are what is wanted.
    order = (EMA, *PARTS) if ema else (*PARTS, EMA)
    part = next((name for name in order if isinstance(content.get(name), Mapping)), None)
    weights = content if part is None else content[part]
    strange = [str(key) for key, value in weights.items() if not _is_stored(value)]
    if strange or not weights:
        raise TensorFileError(
            f"the checkpoint {path} has no weights where they are looked for"
            f"{f' ({part!r})' if part else ''}: {some(strange) or 'nothing'} found, expected "
            "tensors; "
            f"{WEIGHTS_ONLY}"
        )
    return part, {str(key): value.detach() for key, value in weights.items()}


def _is_stored(value: object) -> bool:
    """Whether each number has its place: a pickle can spread one over any shape."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
