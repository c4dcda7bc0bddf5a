"""A folder of films of any kind, measured by what needs no model: two tables and a picture of each.

    python launch.py lab.metrics.folder DIR

writes DIR/measured/folder.md and folder.json, and a PNG for every film: its frames over its sound,
motion, offset, seams, loudness and colours (docs/folder.md says what each of them tells).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from ... import shell
from ...measures.film import PERIOD, Film, UnreadableFilmError, read_film
from ...measures.plot import plot
from .. import command
from ..report import publish, table

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
log = logging.getLogger("mutualforcing")

Facts = dict[str, float | int | str | None]

TOGETHER = {
    "picture s": "picture s",
    "sound s": "sound s",
    "frames a second": "fps",
    "uneven ms": "uneven ms",
    "offset ms": "offset ms",
    "agreement": "agreement",
    "drift ms": "drift ms",
    "seams a second": "seams/s",
    "rank picture": "picture",
    "rank click": "click",
    "rank level": "level",
    "rank spectrum": "spectrum",
}
"""Keys of the facts in the first table, and what they are called there."""
APART = {
    "frozen %": "frozen %",
    "repeated s": "repeated s",
    "cuts": "cuts",
    "colours kept": "colours kept",
    "layout kept": "layout kept",
    "loudness LUFS": "LUFS",
    "loudness range LU": "LU",
    "true peak dB": "peak dB",
    "clipped %": "clipped %",
    "silent %": "silent %",
    "clicks": "clicks",
    "gaps s": "gaps s",
}


def facts(film: Film) -> Facts:
    """The numbers of a film; None where there is nothing to measure."""
    seen, heard, found = film.pictures, film.sound, film.offset
    told: Facts = {
        "width": seen.size[0],
        "height": seen.size[1],
        "picture s": seen.length,
        "frames a second": seen.rate,
        "uneven ms": seen.uneven,
        "frozen %": 100 * seen.frozen,
        "repeated s": int(seen.repeated.sum()),
        "cuts": len(seen.cuts),
        "colours kept": float(seen.overlap[-1]),
        "layout kept": float(seen.layout[-1]),
        "offset ms": found.ms,
        "agreement": found.agreement,
        "drift ms": found.drift,
        "seams a second": film.seam_rate,
    }
    for name, seam in film.seams.items():
        told |= {f"rank {name}": seam.rank, f"ratio {name}": seam.ratio, "borders": seam.borders}
    if heard is not None:
        told |= {
            "sound s": heard.length,
            "sound begins s": heard.lead,
            "sample rate": heard.rate,
            "channels": heard.channels,
            "gaps s": heard.gaps,
            "timestamps ms": heard.slip,
            "clicks": len(heard.clicks),
            "silent %": 100 * heard.silent,
            "clipped %": 100 * heard.clipped,
            "loudness LUFS": heard.loudness,
            "loudness range LU": heard.span,
            "true peak dB": heard.peak,
        }
    return {key: None if _strange(value) else value for key, value in told.items()}


def _strange(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def films_of(folder: Path) -> list[Path]:
    """The films below a folder.

    Raises:
        ValueError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    films = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not films:
        raise ValueError(
            f"no films in {folder}: found {len(found)} other files, expected some of "
            f"{', '.join(SUFFIXES)}"
        )
    return films


def report(measured: Mapping[str, Facts], left_out: Mapping[str, str]) -> list[str]:
    """The tables, line by line."""
    lines = []
    for columns in (TOGETHER, APART):
        rows = [[name, *map(told.get, columns)] for name, told in measured.items()]
        lines += [*table(["film", *columns.values()], rows), ""]
    return lines + [f"left out: {name}: {why}" for name, why in left_out.items()]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.folder", __doc__)
    p.add_argument("folder", type=Path, metavar="DIR", help="searched through and through")
    p.add_argument(
        "--period",
        type=float,
        default=PERIOD,
        help="seconds of a block, at whose borders seams are looked for (default: 1)",
    )
    p.add_argument("--out", type=Path, help="a folder (default: DIR/measured)")
    return p


def work(args: argparse.Namespace) -> None:
    """Measure all films."""
    if not 0.1 <= args.period <= 3600:
        raise ValueError(f"--period is {args.period}, expected 0.1 to 3600 seconds")
    out = args.out or args.folder / "measured"
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Facts] = {}
    left_out: dict[str, str] = {}
    for path in shell.progress(films_of(args.folder)):
        name = path.relative_to(args.folder).as_posix()
        try:
            film = read_film(path, args.period)
        except UnreadableFilmError as error:
            left_out[name] = str(error)
            continue
        measured[name] = facts(film)
        plot(film, name).save(out / f"{name.replace('/', '_')}.png")
    results = {"period s": args.period, "films": measured, "left out": left_out}
    publish(out / "folder", results, report(measured, left_out))


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
