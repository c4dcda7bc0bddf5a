"""A safetensors file read and written with care: nothing unpickled, nothing left half-written.

Used for stream states and for the pack's own models, so that both fail with the same clear
sentences. Whatever lies at a path, only a regular file is ever opened: a pipe would wait for ever.
"""

from __future__ import annotations

import errno
import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..networks.checked import one_line, reason_of
from .atomic_file import replacing

# A header of LTX-2's 5,000 tensors is 1 MB; the same again in Python's objects is twenty times
# that.
LONGEST_HEADER = 16 * 1024 * 1024
_ATTEMPTS = 100
PIECE = 4 * 1024 * 1024
"""Numbers that are put together at a time while a file is written."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PICKLED = (b"PK\x03\x04", b"\x80")
# The second is a user's quota; Windows may not name it.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_CUT_SHORT = ("incomplete", "IncompleteBuffer", "invalid header length", "InvalidHeaderLength")


class TensorFileError(ValueError):
    """A file is not what it should be; one line says what was found and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def is_regular(path: Path) -> bool:
    """Whether a file lies there that may be opened; no for whatever else, or nothing, does.

    What lies in /proc calls itself a file without bytes, and reading it may wait for ever.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def read_header(path: Path) -> dict[str, object]:
    """The JSON header of a safetensors file, nothing else of it read.

    Raises:
        ValueError: not a regular file, no safetensors, or a header that is no object or too long.
        OSError: it cannot be read.
    """
    if not is_regular(path):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= LONGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        try:
            found = json.loads(file.read(size))
        except (RecursionError, MemoryError) as error:
            raise ValueError(f"a header that nests too deep ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise ValueError("a header that is no object")
    return found


def read_tensors(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file.

    The tensors are views of the mapped file. Whoever keeps them makes copies: should somebody cut
    the file while it is mapped, the whole process dies of the next look at it.

    Args:
        what: what the file should be, for messages: "the model file".
        remedy: the next step, for messages: "download it again".

    Raises:
        TensorFileError: no such file, cut short, or not safetensors.
    """
    file = open_tensors(path, what, remedy)
    with explained(path, what, remedy):
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def open_tensors(path: Path, what: str, remedy: str) -> safe_open:
    """The mapped file behind `read_tensors`, its header read; arguments and errors likewise."""
    if look_at(path, what, remedy) == "folder":
        raise TensorFileError(f"{what} {path} is a folder, expected a .safetensors file; {remedy}")
    with explained(path, what, remedy):
        with path.open("rb") as file:
            start = file.read(9)
        # Eight bytes of length and then JSON: a length may well begin with a byte that a pickle has
        # too.
        if start[8:] != b"{" and start.startswith(_PICKLED):
            raise TensorFileError(
                f"{what} {path} is a pickled PyTorch file, expected safetensors: opening a pickle "
                f"can run any code, so it is never done; {remedy}"
            )
        if len(start) < 9:
            raise TensorFileError(f"{what} {path} is empty or was cut short; {remedy}")
        size = int.from_bytes(start[:8], "little")
        if start[8:] == b"{" and LONGEST_HEADER < size < path.stat().st_size:
            raise TensorFileError(
                f"{what} {path} has a header of {size} bytes, expected at most {LONGEST_HEADER}; "
                f"{remedy}"
            )
        return _open_once(path)


def _open_once(path: Path) -> safe_open:
    """The library opens a path twice, for the header and for the map; both must be of one file."""
    for attempt in range(_ATTEMPTS):
        before = _identity(path)
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError, RuntimeError):
            if attempt == _ATTEMPTS - 1 or _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return opened
    raise OSError(errno.EBUSY, "it is replaced all the time")


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def look_at(path: Path, what: str, remedy: str) -> str:
    """Whether there is a "file" or a "folder" at a path; arguments as for `read_tensors`.

    Raises:
        TensorFileError: neither, it is empty, or it cannot be reached.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TensorFileError(f"{what} {path} is not there; {remedy}") from error
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise TensorFileError(f"{what} {path} cannot be read ({reason}); {remedy}") from error
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    if not stat.S_ISREG(status.st_mode):
        raise TensorFileError(
            f"{what} {path} is a device, a pipe or a socket, expected a file; {remedy}"
        )
    if not status.st_size:
        raise TensorFileError(f"{what} {path} is empty or was cut short; {remedy}")
    return "file"


@contextmanager
def explained(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Make what goes wrong with a file inside one sentence; arguments as for `read_tensors`.

    Raises:
        TensorFileError: instead of what the libraries raise.
    """
    try:
        yield
    except TensorFileError:
        raise
    except SafetensorError as error:
        reason = reason_of(error)
        if any(text in str(error) for text in _CUT_SHORT):
            raise TensorFileError(f"{what} {path} was cut short ({reason}); {remedy}") from error
        raise TensorFileError(
            f"{what} {path} is not a safetensors file ({reason}); {remedy}"
        ) from error
    # A RuntimeError is PyTorch's, of a file that was cut while it was opened.
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        reason = reason_of(error)
        raise TensorFileError(f"{what} {path} cannot be read ({reason}); {remedy}") from error


class Joined(NamedTuple):
    """Tensors that will be one, put together along `dim`, in a file and not in memory before."""

    parts: Sequence[Tensor]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        first = tuple(self.parts[0].shape)
        if len(self.parts) == 1:
            return first
        length = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], length, *first[self.dim + 1 :])

    def pieces(self) -> Iterator[Tensor]:
        """The whole in the order of its numbers, a piece of at most `PIECE` at a time."""
        if len(self.parts) == 1:
            yield self.parts[0]
            return
        outer = math.prod(self.shape[: self.dim])
        flat = [part.reshape(outer, *part.shape[self.dim :]) for part in self.parts]
        row = math.prod(self.shape[self.dim :])
        step = max(1, PIECE // max(1, row))
        for start in range(0, outer, step):
            yield torch.cat([part[start : start + step] for part in flat], dim=1)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Joined], metadata: Mapping[str, str], what: str
) -> None:
    """Write a safetensors file; until it is whole, what was at `path` before stays.

    The library's writers hold everything once or twice more while they write. A long stream is as
    large as the memory that is left, so this goes through it piece by piece.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; says so.
    """
    joined = {
        name: value if isinstance(value, Joined) else Joined((value,), 0)
        for name, value in tensors.items()
    }
    # Numbers of many bytes first, so that all lie where processors like them.
    order = sorted(joined, key=lambda name: (-joined[name].parts[0].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        part, shape = joined[name].parts[0], joined[name].shape
        start, end = end, end + math.prod(shape) * part.element_size()
        header[name] = {
            "dtype": _DTYPES[part.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        with replacing(path) as whole, whole.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                for piece in joined[name].pieces():
                    flat = piece.detach().cpu().contiguous().reshape(-1)
                    file.write(memoryview(flat.view(torch.uint8).numpy()))
    except OSError as error:
        size = 8 + len(head) + end
        raise OSError(error.errno, writing_failed(error, what, size), str(path)) from error


def writing_failed(error: OSError, what: str, size: int | None = None) -> str:
    """One sentence on why a file was not written, and the next step."""
    needed = f" ({size / 1e6:.1f} MB)" if size else ""
    if error.errno in _FULL:
        failed = f"the disk is full: {what}{needed} was not written whole"
        return f"{failed}; make room or choose another folder"
    reason = error.strerror or error
    return f"{what}{needed} cannot be written ({reason}); choose another folder or name"
