"""A folder of films of any kind, measured by what needs no model: two tables and a picture of each.

    python launch.py lab.metrics.folder DIR

writes DIR/measured/folder.md and folder.json, and a PNG for every film: its frames over its sound,
motion, offset, seams, loudness and colours (docs/folder.md says what each of them tells). With
weights of CLIP and CLAP, or embeddings of other networks, JavisBench's numbers are a third table.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ... import shell
from ...measures.film import PERIOD, Film, UnreadableFilmError, read_film
from ...measures.plot import plot
from .. import command
from ..report import publish, table
from ..training.media import UnusableClipError, captions_beside
from .javisbench import averages, distances, read_embeddings, scores
from .text_scores import TextScores

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
JAVISBENCH = ("TV-IB", "TA-IB", "CLIP", "CLAP", "AV-IB", "AVHScore", "JavisScore", "DeSync")
"""Scores of single films, in the benchmark's order."""
UNHELD = {
    "imagebind": "ImageBind",
    "synchformer": "Synchformer",
    "i3d": "I3D",
    "audioclip": "AudioCLIP",
}
"""Networks that no kept library holds, by the option that would name their weights."""


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


class Javis:
    """What of JavisBench can be said of films, by the options.

    Raises:
        ImportError, ValueError: weights or embeddings that cannot be read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        for option, name in UNHELD.items():
            if getattr(args, option):
                raise ValueError(
                    f"--{option}: no library that is kept holds {name}; run it where you have it, "
                    "and give what it says of each film with --embeddings (docs/folder.md)"
                )
        given = args.clip or args.clap
        self.texts = TextScores(args.clip, args.clap) if given else None
        self.folder = args.embeddings
        self.real: Mapping[str, Tensor] = {}
        if args.real:
            self.real = read_embeddings(args.real, dict.fromkeys(("i3d", "audioclip"), 2))
        self.made: list[Mapping[str, Tensor]] = []

    def of(self, path: Path, name: str, film: Film) -> Facts:
        """Scores of a film; those of networks that nobody gave are left out."""
        found: Facts = {}
        if self.texts is not None:
            try:
                text, *_ = captions_beside(path)
                found |= self.texts.of(path, len(film.pictures.times), text)
            except UnusableClipError as error:
                log.warning("%s has no CLIP and no CLAP: %s", name, error)
        file = self.folder and self.folder / f"{name}.safetensors"
        if file and file.exists():
            self.made.append(read_embeddings(file))
            found |= scores(self.made[-1], film.pictures.rate)
        return found

    def overall(self, measured: Mapping[str, Facts]) -> dict[str, float]:
        """Of all films together."""
        return averages(list(measured.values()), JAVISBENCH) | distances(self.made, self.real)


def report(
    measured: Mapping[str, Facts], left_out: Mapping[str, str], overall: Mapping[str, float]
) -> list[str]:
    """The tables, line by line."""
    lines = []
    for columns in (TOGETHER, APART):
        rows = [[name, *map(told.get, columns)] for name, told in measured.items()]
        lines += [*table(["film", *columns.values()], rows), ""]
    if overall:
        rows = [[name, *map(told.get, overall)] for name, told in measured.items()]
        lines += [*table(["film", *overall], [*rows, ["all", *overall.values()]]), ""]
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
    p.add_argument("--clip", type=Path, help="folder of CLIP's weights, as transformers saves them")
    p.add_argument("--clap", type=Path, help="likewise CLAP's")
    p.add_argument("--embeddings", type=Path, help="folder with FILM.safetensors for each film")
    p.add_argument("--real", type=Path, help="file of the same of real films, for FVD and FAD")
    for option, name in UNHELD.items():
        why = f"refused: no library that is kept holds {name}; see --embeddings"
        p.add_argument(f"--{option}", type=Path, help=why)
    p.add_argument("--out", type=Path, help="a folder (default: DIR/measured)")
    return p


def work(args: argparse.Namespace) -> None:
    """Measure all films."""
    if not 0.1 <= args.period <= 3600:
        raise ValueError(f"--period is {args.period}, expected 0.1 to 3600 seconds")
    javis = Javis(args)
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
        measured[name] = facts(film) | javis.of(path, name, film)
        plot(film, name).save(out / f"{name.replace('/', '_')}.png")
    overall = javis.overall(measured)
    results = {"period s": args.period, "films": measured, "left out": left_out, "all": overall}
    publish(out / "folder", results, report(measured, left_out, overall))


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
