"""Files that are written whole or not at all, however many write them at once."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a new, empty file to write to, which takes `path`'s place after the body.

    Its name is this writer's alone, so that two writers of one path never meet in it: each replaces
    the file in one step, a reader finds one whole file or the other, and the last one stays.
    Whatever fails, what was at `path` stays as it was and nothing is left beside it.

    Raises:
        OSError: it cannot be written.
    """
    # Through a link, so that the link stays and what it names is replaced.
    path = Path(os.path.realpath(path))
    _refuse_what_is_no_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not made of the file's own name, to which nothing may be added if it is as long as names can
    # be.
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.open("xb").close()
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        # A failure here would hide the one that counts.
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes.

    Raises:
        OSError: it cannot be written; what was at `path` stays as it was.
    """
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _refuse_what_is_no_file(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        # Else the rename would put a file in the place of /dev/null.
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket", str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
