"""What every command of this pack does alike: arguments, output files, progress, and being stopped.

A mistake is told in one sentence before any work (exit status 2), a terminal that breaks costs
nothing but what would have been shown, and the signals that ask a program to end let it keep what
it has made.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

from tqdm import tqdm

from .networks.execution import cores, device_named

STOPPED = 128
"""Exit status of a command that a signal stopped, less the signal's number (130 for Ctrl-C)."""
_REPEATED = 1.0
"""Seconds after which another Ctrl-C is another wish: some programs send one twice."""


def clean(text: object, length: int = 60) -> str:
    """What somebody else wrote, fit for a sentence of ours: printable and short."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text)[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"found {clean(text)!r}, expected a whole number from {least} to {most}"
            )
        return value

    return read


def threads(text: str) -> int:
    """The type of --threads: as many as this machine has cores, at most."""
    return whole(1, cores())(text)


def shares(text: str) -> tuple[float, ...]:
    """The type of --shares: a number for each process, such as "2:1"."""
    try:
        found = tuple(float(share) for share in text.split(":"))
    except ValueError:
        found = ()
    if not found or not all(0 <= share < float("inf") for share in found) or not any(found):
        raise argparse.ArgumentTypeError(
            f"found {clean(text)!r}, expected a number for each process, such as 2:1"
        )
    return found


def device(text: str) -> str:
    """The type of --device: one that this machine has."""
    try:
        return str(device_named(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Output:
    """The type of an argument that names a file to write."""

    def __init__(self, suffix: str | None = None) -> None:
        self.suffix = suffix

    def __call__(self, text: str) -> Path:
        path = Path(text)
        if self.suffix and path.suffix.lower() != self.suffix:
            raise argparse.ArgumentTypeError(
                f"found {clean(text)!r}, expected a name that ends in {self.suffix}"
            )
        return path


class Input:
    """The type of an argument that names a file to read."""

    def __call__(self, text: str) -> Path:
        return Path(text)


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, and looks at every `Output` before any work."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with 2."""
        tell(f"{self.prog}: {clean(message, 400)}\n", sys.stderr)
        raise SystemExit(2)

    def parse_args(self, *arguments: object, **options: object) -> argparse.Namespace:
        """As argparse does; ends with 2 as well if something cannot be written."""
        parsed = super().parse_args(*arguments, **options)

        def paths(kind: type) -> dict[str, Path]:
            found = {
                (action.option_strings or [action.dest])[-1]: getattr(parsed, action.dest)
                for action in self._actions
                if isinstance(action.type, kind)
            }
            return {name: path for name, path in found.items() if path is not None}

        try:
            check_outputs(paths(Output), paths(Input))
        except ValueError as error:
            self.error(str(error))
        return parsed


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Refuse, before the work, files that could not be written after it, or would destroy another.

    Nothing is left behind: that a file can be made is tried in a folder that is removed again. An
    input may be the output of the same name with `-in` for `-out` (a state that goes on in place).

    Args:
        outputs, inputs: the argument's name and its path.

    Raises:
        ValueError: saying which and why.
    """
    for name, path in outputs.items():
        _check_writable(name, path)
        for other, taken in (*inputs.items(), *outputs.items()):
            if other == name or other == name.replace("-out", "-in"):
                continue
            if _same(path, taken):
                raise ValueError(
                    f"{name} and {other} are both {path}, and one would destroy the other; "
                    "choose another name"
                )
            if _resolved(taken) in _resolved(path).parents and not taken.is_dir():
                raise ValueError(
                    f"{name} is {path}, which lies under the file of {other}; choose another folder"
                )


def _check_writable(name: str, path: Path) -> None:
    place = _resolved(path)  # which it may name through links and folders that are not there
    try:
        if place.is_dir():
            raise ValueError(f"{name}: {path} is a folder, expected the name of a file")
        if place.exists() and not place.is_file():
            raise ValueError(f"{name}: {path} is not an ordinary file; choose another name")
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(13, "it is read-only")
        if any(step.is_symlink() for step in (place, *place.parents)):  # then it leads in a circle
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        there = next(folder for folder in place.parents if folder.exists())
        rest = place.relative_to(there)
        with tempfile.TemporaryDirectory(prefix=".", dir=there) as trial:
            tried = Path(trial) / rest
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.touch()
    except OSError as error:
        raise ValueError(
            f"{name}: {clean(path)} cannot be written ({error.strerror}); choose another folder "
            "or name"
        ) from error


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        if path.samefile(other):
            return True
    return _resolved(path) == _resolved(other)


def hold_standard_streams() -> None:
    """Give closed standard streams back their numbers, before a file that is opened takes one.

    A clip that got number 2 would have every library's warnings in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.open(os.devnull, os.O_RDWR)


def silence() -> None:
    """Say nothing from now on, for a process beside one that speaks; but where it crashes, why."""
    sys.excepthook = lambda *raised: traceback.print_exception(*raised, file=sys.__stderr__)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # to the end


def tell(text: str, stream: IO[str] | None) -> None:
    """Write to the terminal, if it is still there."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        # Python flushes once more at its end, and would complain and change the exit status.
        with suppress(OSError, ValueError, AttributeError):
            number = stream.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)


class _Cosmetic(io.TextIOBase):
    """A terminal that takes everything, whether or not it is still there."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        tell(text, self._stream)
        return len(text)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("no terminal")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "ascii"


def progress(*arguments: object, **options: object) -> tqdm:
    """tqdm's bar; that the terminal is closed, full or gone does not reach the work."""
    return tqdm(*arguments, file=_Cosmetic(sys.stderr), **options)


class Stop:
    """Whether a signal has asked to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """What people call it."""
        return "Ctrl-C" if self.signal is signal.SIGINT else self.signal.name

    @property
    def status(self) -> int:
        """The exit status of a command that it stopped."""
        return STOPPED + self.signal

    def note(self, number: int, frame: object) -> None:
        """A signal has come."""
        now = time.monotonic()
        if self and number == signal.SIGINT and now - self._at > _REPEATED:
            raise KeyboardInterrupt
        if not self:
            self.signal, self._at = signal.Signals(number), now


@contextmanager
def stoppable(names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")) -> Iterator[Stop]:
    """While inside, Ctrl-C and its like only fill what is given; a second Ctrl-C interrupts."""
    stop = Stop()
    before = {}
    for name in names:
        number = getattr(signal, name, None)
        # What the caller has switched off (nohup) stays off.
        if number is not None and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            before[number] = signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
