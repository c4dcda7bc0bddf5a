"""Films with captions to what LTX-2 is trained on, by its own encoders as ComfyUI loads them.

k clips, v caption variants, m tokens, c channels, f h w video latent grid, s audio latents.

    python launch.py lab.training.ltx2_latents --source films --out data/ltx2 \
        --base ltx-2-19b-dev.safetensors --text-encoder gemma_3_12B_it.safetensors

Every film is cut into clips of whole seconds, one after the other. What is made of them is a folder
as `lab.training.train` reads it: video.npy (k, c, f, h, w), audio.npy (k, s, c), captions.npy
(k, v, m, 2, c: for video and for audio), empty.npy (m, 2, c: of the empty prompt), all float16,
and about.json, which also says what was left out and why. One film is in memory at a time. A killed
run goes on at the clip that it was at. It runs in ComfyUI's Python (COMFYUI_PATH).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ... import shell
from ...samplers.atomic_file import write_whole
from .. import command
from ..comfyui import inside_comfyui, run_in_comfyui
from .clip_reader import (
    PREFIX,
    RATE,
    UnusableClipError,
    UnusablePartError,
    film_length,
    read_clip,
)
from .media import captions_of, films_of

MODULE = "lab.training.ltx2_latents"
ARRAYS = ("video", "audio", "captions")
GRID = 32
"""Pixels of a latent, each way."""
log = logging.getLogger("mutualforcing")


class GrowingArray:
    """An .npy of float16 to which rows are added; whole on disk whenever `keep` was called.

    Args:
        rows: that it has; what lies beyond them is cut off.

    Raises:
        ValueError: fewer are there.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        self.shape: tuple[int, ...] | None = None
        if not rows:
            self.file = path.open("wb")
            return
        self.file = path.open("r+b")
        npy.read_magic(self.file)
        (_, *self.shape), _, _ = npy.read_array_header_1_0(self.file)
        end = self.file.tell() + rows * 2 * int(np.prod(self.shape))
        if path.stat().st_size < end:
            raise ValueError(f"{path} lacks some of its {rows} rows: make the folder anew")
        self.file.truncate(end)
        self.file.seek(end)

    def add(self, row: NDArray[np.float16]) -> None:
        """One row more.

        Raises:
            ValueError: of another shape than the others.
        """
        if self.shape is None:
            self.shape = list(row.shape)
            self._head()
        if list(row.shape) != list(self.shape):
            raise ValueError(f"{self.path.name} has rows of {self.shape}, found {row.shape}")
        self.file.write(np.ascontiguousarray(row).tobytes())
        self.rows += 1

    def _head(self) -> None:
        self.file.seek(0)
        facts = {"descr": "<f2", "fortran_order": False, "shape": (self.rows, *self.shape)}
        npy.write_array_header_1_0(self.file, facts)  # as long for any number of rows

    def keep(self) -> None:
        """Say on disk how many rows there are."""
        end = self.file.tell()
        self._head()
        self.file.seek(end)
        self.file.flush()


class LatentFolder:
    """A set of encoded clips on disk: arrays, and how far it has come.

    Attributes:
        films: names of those that are done.
        next: name of a film that was begun, and its clip that comes next.
        left_out: why, by the film's name.
        silent: films, or seconds of one, in which there was no sound.

    Raises:
        ValueError: the folder holds a set made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.record, self.settings = folder / "about.json", dict(settings)
        self.films, self.next = [], ("", 0)
        self.left_out, self.silent, done = {}, [], 0
        if self.record.exists():
            found = json.loads(self.record.read_text(encoding="utf-8"))
            if found["settings"] != self.settings:
                raise ValueError(
                    f"{folder} holds a set made with {found['settings']}, expected "
                    f"{self.settings}; choose another folder"
                )
            self.films, self.next = found["films"], tuple(found["next"])
            self.left_out, self.silent = found["left out"], found["silent"]
            done = found["done"]
        self.arrays = [GrowingArray(folder / f"{name}.npy", done) for name in ARRAYS]

    def add(self, rows: Sequence[NDArray[np.float16]]) -> None:
        """One clip more."""
        for array, row in zip(self.arrays, rows, strict=True):
            array.add(row)

    def keep(self, film: str = "", clip: int = 0, *, finished: bool = False) -> None:
        """Put on disk what there is; it goes on with this clip of this film."""
        self.next, done = (film, clip), self.arrays[0].rows
        if done:
            for array in self.arrays:
                array.keep()
        # Training refuses a set that has fewer clips than it says.
        about = {"clips": done + (not finished), "done": done, "settings": self.settings}
        about |= {"left out": self.left_out, "silent": self.silent}
        about |= {"next": self.next, "films": self.films}
        write_whole(self.record, json.dumps(about, indent=1) + "\n")


def starts_of(length: float, seconds: int, most: int | None) -> list[float]:
    """Where the clips of a film begin: 0 is its beginning, 1 the latest place.

    Args:
        length: of the film, in seconds.
        most: clips, evenly apart; None: as many as there are, one after the other.
    """
    room = max(length - seconds, 0.0)
    count = int((length + 1e-3) / seconds)
    if most is not None and most < count:
        return np.linspace(0, 1, most + 2)[1:-1].tolist() if most > 1 else [0.5]
    return [min(1.0, part * seconds / room) if room else 0.0 for part in range(count)]


def encode_films(args: argparse.Namespace, encoders: object) -> LatentFolder:
    """Encode every film of the source.

    Args:
        encoders: a `host.encoders.LTX2Encoders`.

    Raises:
        ValueError: no film is usable, or the folder holds something else.
    """
    width, height = args.size
    settings = {"source": args.source, "seconds": args.seconds, "size": [width, height]}
    settings |= {"captions": args.captions, "clips a film": args.parts}
    settings |= {"base": args.base, "text encoder": args.text_encoder}
    folder = LatentFolder(args.out, settings)
    np.save(args.out / "empty.npy", _half(encoders.caption("")))
    for film in shell.progress(films_of(args.source), unit=" films"):
        if film.name in folder.films:
            continue
        begun, clip = folder.next
        clip = clip if film.name == begun else 0
        try:
            texts = list(islice(cycle(captions_of(film)), args.captions))
            captions = np.stack([_half(encoders.caption(text)) for text in texts])
            starts = starts_of(film_length(film.opened()), args.seconds, args.parts)
            if not starts:
                raise UnusableClipError(f"too short: expected at least {args.seconds} s")
        except ValueError as error:
            folder.left_out[film.name], starts = str(error), []
        for number, at in islice(enumerate(starts), clip, None):
            name = f"{film.name}, clip {number + 1}"
            try:
                pictures, sound = read_clip(
                    film.opened(), args.seconds, (height, width), at, stereo=True
                )
            except UnusablePartError as error:
                folder.left_out[name] = str(error)
            except UnusableClipError as error:
                folder.left_out[film.name] = str(error)
                break
            else:
                if sound is None:
                    folder.silent.append(name)
                    sound = np.zeros((2, PREFIX + RATE * args.seconds), np.float32)
                latents = encoders.pictures(pictures), encoders.sound(sound, args.seconds)
                folder.add([*map(_half, latents), captions])
            folder.keep(film.name, number + 1)
        folder.films.append(film.name)
        folder.keep()
    if not folder.arrays[0].rows:
        why = "; ".join(f"{name}: {reason}" for name, reason in islice(_items(folder), 3))
        raise ValueError(
            f"no clips in {args.source}: found {len(folder.films)} films, none usable ({why}), "
            f"expected some of at least {args.seconds} s with captions"
        )
    folder.keep(finished=True)
    return folder


def _items(folder: LatentFolder) -> Iterator[tuple[str, str]]:
    return iter(folder.left_out.items())


def _half(values: object) -> NDArray[np.float16]:
    return values.half().numpy()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(MODULE, __doc__)
    p.add_argument("--source", required=True, help="a folder of films, or webdataset shards")
    p.add_argument("--base", required=True, help="LTX-2's own file: path, or ComfyUI's name")
    p.add_argument("--text-encoder", required=True, help="Gemma's file: the same")
    p.add_argument("--seconds", type=int, default=5, help="of a clip: its blocks (default: 5)")
    p.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(768, 512),
        metavar=("WIDTH", "HEIGHT"),
        help="in pixels; the middle of a film is taken (default: 768 512)",
    )
    p.add_argument(
        "--captions", type=int, default=1, help="caption variants of a film (default: 1)"
    )
    p.add_argument(
        "--parts", type=int, help="clips of a film at most, evenly apart (default: all of it)"
    )
    p.add_argument("--cpu", action="store_true", help="ComfyUI's --cpu")
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> int | None:
    """Encode the films, in ComfyUI's process."""
    if any(side < GRID or side % GRID for side in args.size):
        raise ValueError(f"--size is {args.size}, expected multiples of {GRID}")
    if not inside_comfyui():
        return run_in_comfyui(MODULE, args.given, cpu=args.cpu)
    from ...host.encoders import LTX2Encoders, model_file

    base = model_file(args.base, "checkpoints")
    encoders = LTX2Encoders(base, model_file(args.text_encoder, "text_encoders"))
    made = encode_films(args, encoders)
    log.info("%d clips in %s", made.arrays[0].rows, args.out)
    for name, why in _items(made):
        log.info("left out: %s: %s", name, why)
    for name in made.silent:
        log.info("no sound in %s: silence is used", name)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = parser()
    p.set_defaults(given=sys.argv[1:] if argv is None else argv)
    return command.run(p, work, argv)


if __name__ == "__main__":
    sys.exit(main())
