"""A folder where clips and streams are kept: on this machine, or wherever fsspec reaches."""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..samplers.atomic_file import replacing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class Storage:
    """Files by their names under one address.

    Args:
        address: a folder, or an address that fsspec knows (`s3://bucket/clips`).

    Raises:
        ValueError: an address that fsspec cannot open here.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self.files, self.root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{address} cannot be opened ({error}); expected a folder, or an address whose "
                "fsspec package is installed"
            ) from error
        self.is_local = isinstance(self.files, LocalFileSystem)

    @contextmanager
    def for_one(self) -> Iterator[Storage]:
        """Itself, for one run at a time where that can be told: on this machine.

        Raises:
            OSError: another run has it.
        """
        if not self.is_local or fcntl is None:
            yield self
            return
        Path(self.root).mkdir(parents=True, exist_ok=True)
        number = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another run has {self.address}; wait for it, or choose another folder"
            raise OSError(error.errno, message) from error
        else:
            yield self
        finally:
            os.close(number)

    def _place(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.files.isfile(self._place(name))

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing where there is none."""
        self.files.invalidate_cache()
        place = self._place(folder)
        if not self.files.isdir(place):
            return []
        return sorted(posixpath.basename(path) for path in self.files.ls(place, detail=False))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file to write, which takes the name's place whole after the body, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        place = self._place(name)
        if self.is_local:
            with replacing(place) as path:
                yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            yield path
            self.files.makedirs(posixpath.dirname(place), exist_ok=True)
            self.files.put_file(str(path), place)

    def move(self, name: str, other: str) -> None:
        """Give a file another name, in the place of what has that name.

        Raises:
            OSError: it cannot be moved.
        """
        if self.is_local:
            os.replace(self._place(name), self._place(other))  # noqa: PTH105 - in one step
        else:
            self.files.mv(self._place(name), self._place(other))

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A file to read, as it is now.

        Raises:
            OSError: it cannot be read.
        """
        if self.is_local:
            yield Path(self._place(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            self.files.get_file(self._place(name), str(path))
            yield path

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        with suppress(FileNotFoundError):
            self.files.rm(self._place(name), recursive=True)
