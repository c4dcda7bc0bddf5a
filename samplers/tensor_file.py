"""A safetensors file read and written with care: nothing unpickled, nothing left half-written.

Used for stream states and for the pack's own models, so that both fail with the same clear
sentences.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_PICKLED = (b"PK\x03\x04", b"\x80")
# The second is a user's quota; Windows may not name it.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_CUT_SHORT = ("incomplete", "IncompleteBuffer", "invalid header length", "InvalidHeaderLength")


class TensorFileError(ValueError):
    """A file is not what it should be; the message says what was found and what to do."""


def read_tensors(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file.

    Args:
        what: what the file should be, for messages: "the model file".
        remedy: the next step, for messages: "download it again".

    Raises:
        TensorFileError: no such file, cut short, or not safetensors.
    """
    file = open_tensors(path, what, remedy)
    with _explained(path, what, remedy):
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def open_tensors(path: Path, what: str, remedy: str) -> safe_open:
    """The mapped file behind `read_tensors`, only its header read; errors likewise."""
    if not path.exists():
        raise TensorFileError(f"{what} {path} is not there; {remedy}")
    if not path.is_file():
        raise TensorFileError(f"{what} {path} is a folder, expected a .safetensors file; {remedy}")
    with _explained(path, what, remedy):
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
        return safe_open(path, framework="pt")


@contextmanager
def _explained(path: Path, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        if any(text in str(error) for text in _CUT_SHORT):
            raise TensorFileError(f"{what} {path} was cut short ({error}); {remedy}") from error
        raise TensorFileError(
            f"{what} {path} is not a safetensors file ({error}); {remedy}"
        ) from error
    except OSError as error:
        raise TensorFileError(
            f"{what} {path} cannot be read ({error.strerror}); {remedy}"
        ) from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str
) -> None:
    """Write a safetensors file; until it is whole, what was at `path` before stays.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; says so.
    """
    partial = path.with_name(f".{path.name}.part")
    # One tensor may be a slice of another; the format wants each on its own.
    content = save(
        {key: value.contiguous().clone() for key, value in tensors.items()}, dict(metadata)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, writing_failed(error, what, len(content)), str(path)) from error


def writing_failed(error: OSError, what: str, size: int | None = None) -> str:
    """One sentence on why a file was not written, and the next step."""
    needed = f" ({size / 1e6:.1f} MB)" if size else ""
    if error.errno in _FULL:
        failed = f"the disk is full: {what}{needed} was not written whole"
        return f"{failed}; make room or choose another folder"
    reason = error.strerror or error
    return f"{what}{needed} cannot be written ({reason}); choose another folder or name"
