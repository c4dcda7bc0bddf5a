"""Real videos as training clips: a folder of files with captions beside them, or webdataset shards.

A clip is a random part of a file (see `lab.training.clip_reader`). The order is the seed's, and new
in every epoch. A file that cannot be used is named once in the log and left out from then on; one
of which a part cannot be read is named, and asked for other parts.
"""

from __future__ import annotations

import io
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from .captioned_clip import CaptionedClip
from .clip_reader import (
    PREFIX,
    RATE,
    UnusableClipError,
    UnusablePartError,
    Video,
    Wave,
    read_clip,
)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")
CAPTION_SUFFIXES = (".txt", ".json")
EXPECTED_FOLDER = (
    "a folder of .mp4, .mkv, .mov or .webm files, each with its captions in a .txt (one a line) or "
    ".json "
    '(key "caption") of the same name'
)
EXPECTED_SHARDS = (
    "webdataset shards on this machine (a .tar file, or a pattern such as clips-{000..012}.tar), "
    "each sample "
    "with a video (mp4, mkv, mov, webm) and captions (txt or json)"
)
PLACES = 3
"""Parts of a file that are tried, one after another, before it is passed over until the next
epoch."""
SHUFFLED = 32
"""Samples of shards held in memory, out of which the next one is drawn."""

logger = logging.getLogger("mutualforcing")


@dataclass(frozen=True)
class _Entry:
    """A video that may be usable: its file or content, and its first caption file by suffix."""

    name: str
    video: Path | bytes
    captions: tuple[str, Path | bytes] | None

    def opened(self) -> Path | BinaryIO:
        """What `clip_reader` reads; a new one each time."""
        return io.BytesIO(self.video) if isinstance(self.video, bytes) else self.video


_Epoch: TypeAlias = Callable[[np.random.Generator | None], Iterator[_Entry]]
"""Entries in the order of a generator; without one, in their own."""


def clips_from_files(
    source: str, seconds: int, seed: int, captions: int, size: int = 64
) -> Iterator[CaptionedClip]:
    """Endless clips of `seconds` seconds (1 + 24 s frames, 160 + 16000 s samples) of real videos.

    A file without sound gives silence; one that is too short, unreadable or without a caption is
    left out.

    Args:
        source: a folder (searched through and through) or webdataset shards: a .tar or a brace
            pattern.
        seed: fixes the order, the parts taken and the captions chosen.
        captions: variants per clip; fewer in the file are repeated, of more a random choice is
            taken.
        size: side of the square pictures in pixels.

    Raises:
        ValueError: nothing usable there, at once or, if only reading shows it, at the end of an
            epoch.
        ImportError: shards without the package webdataset, or sound without torchaudio.
    """
    if seconds < 1 or captions < 1 or size < 1:
        raise ValueError(
            f"found {seconds=}, {captions=}, {size=}; expected whole numbers of at least 1"
        )
    epoch, expected = _films(source)
    return _clips(epoch, source, expected, seconds, seed, captions, size)


def films_of(source: str) -> Iterator[_Entry]:
    """Every video of a source (`clips_from_files`) in an order that stays.

    Raises:
        ValueError, ImportError: as there.
    """
    return _films(source)[0](None)


def _films(source: str) -> tuple[_Epoch, str]:
    """The videos of a source, and what was expected there."""
    if Path(source).is_dir():
        return _folder(Path(source)), EXPECTED_FOLDER
    if "{" in source or source.endswith(".tar"):
        return _shards(source), EXPECTED_SHARDS
    found = "a file" if Path(source).exists() else "nothing"
    raise ValueError(
        f"no clips in {source}: found {found}, expected {EXPECTED_FOLDER}; or {EXPECTED_SHARDS}"
    )


def _clips(
    epoch: _Epoch, source: str, expected: str, seconds: int, seed: int, captions: int, size: int
) -> Iterator[CaptionedClip]:
    refused: dict[str, UnusableClipError] = {}
    silent: set[str] = set()
    for number in count():
        rng = np.random.default_rng([seed, number])
        usable = 0
        for entry in epoch(rng):
            before = refused.get(entry.name)
            if before is not None and not isinstance(before, UnusablePartError):
                continue
            try:
                texts = _variants(captions_of(entry), captions, rng)
                video, sound = _some_part(entry, seconds, size, rng)
            except UnusableClipError as error:
                if before is None:
                    logger.warning("skipped %s: %s", entry.name, error)
                refused[entry.name] = error
                continue
            if sound is None:
                if entry.name not in silent:
                    logger.warning("no sound in %s: silence is used", entry.name)
                silent.add(entry.name)
                sound = np.zeros(PREFIX + RATE * seconds, dtype=np.float32)
            usable += 1
            yield CaptionedClip(video, sound, texts)
        if not usable:
            some = "; ".join(f"{name}: {reason}" for name, reason in islice(refused.items(), 3))
            found = (
                f"{len(refused)} videos, none of them usable ({some})" if refused else "no video"
            )
            raise ValueError(f"no clips in {source}: found {found}, expected {expected}")


def _some_part(
    film: _Entry, seconds: int, size: int, rng: np.random.Generator
) -> tuple[Video, Wave | None]:
    """A random part; where it cannot be read, another: of PLACES the last one's error is raised."""
    for _ in range(PLACES):
        try:
            return read_clip(film.opened(), seconds, size, rng.random())
        except UnusablePartError as error:
            unreadable = error
    raise unreadable


def _folder(folder: Path) -> _Epoch:
    """The videos below a folder that have a caption file.

    Raises:
        ValueError: there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    # Cameras and old systems write endings in capitals.
    ends = ((path, path.suffix.lower()) for path in files)
    texts = {path.with_suffix(end): path for path, end in ends if end in CAPTION_SUFFIXES}
    entries = []
    for path in videos:
        beside = (texts.get(path.with_suffix(suffix)) for suffix in CAPTION_SUFFIXES)
        caption = next((file for file in beside if file is not None), None)
        if caption is None:
            names = " or ".join(path.with_suffix(suffix).name for suffix in CAPTION_SUFFIXES)
            logger.warning(
                "skipped %s: no caption: found neither, expected %s beside it", path, names
            )
        else:
            entries.append(_Entry(str(path), path, (caption.suffix.lower(), caption)))
    if not entries:
        kinds = Counter(
            path.suffix.lower() or "no suffix" for path in files if path not in set(videos)
        )
        others = (
            ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5)) or "nothing else"
        )
        raise ValueError(
            f"no clips in {folder}: found {len(videos)} videos, none with captions beside it "
            f"({others}); "
            f"expected {EXPECTED_FOLDER}"
        )
    return lambda rng: (entries[index] for index in _order(rng, len(entries)))


def _order(rng: np.random.Generator | None, count: int) -> Iterable[int]:
    return range(count) if rng is None else rng.permutation(count)


def _shards(source: str) -> _Epoch:
    """The samples of webdataset shards.

    Raises:
        ValueError: a shard is not there.
        ImportError: the package webdataset is not installed.
    """
    try:
        import webdataset
        from braceexpand import braceexpand
    except ImportError as error:
        raise ImportError(
            f"{source} needs the package webdataset; pip install webdataset"
        ) from error
    shards = [Path(name) for name in braceexpand(source, escape=False)]
    missing = [str(path) for path in shards if not path.is_file()]
    if missing:
        raise ValueError(
            f"no clips in {source}: found no file {missing[0]} ({len(missing)} of {len(shards)} "
            "shards are "
            f"missing), expected {EXPECTED_SHARDS}"
        )
    broken: set[Path] = set()

    def entries(rng: np.random.Generator | None) -> Iterator[_Entry]:
        shuffle = None if rng is None else random.Random(int(rng.integers(2**32)))
        order = (shards[index] for index in _order(rng, len(shards)))
        found = (entry for shard in order for entry in _samples(shard, broken))
        if shuffle is None:
            return found
        return iter(webdataset.shuffle(SHUFFLED, SHUFFLED, rng=shuffle)(found))

    return entries


def _samples(shard: Path, broken: set[Path]) -> Iterator[_Entry]:
    """The samples of one shard that have a video; a shard that breaks off is logged once."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def broke(error: Exception) -> bool:
        if shard not in broken:
            logger.warning("skipped the rest of %s: unreadable: %s", shard, error.args[0])
        broken.add(shard)
        return True

    def wanted(name: str) -> bool:
        return name.lower().endswith(VIDEO_SUFFIXES + CAPTION_SUFFIXES)

    # The stream is opened here, because webdataset would also run commands ("pipe:") and open
    # addresses.
    with shard.open("rb") as stream:
        opened = [{"url": str(shard), "stream": stream}]
        for sample in group_by_keys(tar_file_expander(opened, broke, wanted), handler=broke):
            parts = {f".{key}": part for key, part in sample.items() if isinstance(part, bytes)}
            videos = [part for key, part in parts.items() if key.endswith(VIDEO_SUFFIXES)]
            texts = [
                (end, parts[key]) for end in CAPTION_SUFFIXES for key in parts if key.endswith(end)
            ]
            if videos:
                yield _Entry(f"{shard}:{sample['__key__']}", videos[0], texts[0] if texts else None)


def captions_beside(video: Path) -> list[str]:
    """Every caption of a video of a folder.

    Raises:
        UnusableClipError: there is none.
    """
    for suffix in CAPTION_SUFFIXES:
        for file in map(video.with_suffix, (suffix, suffix.upper())):
            if file.is_file():
                return captions_of(_Entry(str(video), video, (suffix, file)))
    raise UnusableClipError(f"no caption: found no {' or '.join(CAPTION_SUFFIXES)} beside it")


def captions_of(entry: _Entry) -> list[str]:
    """Every caption of a video.

    Raises:
        UnusableClipError: there is none.
    """
    if entry.captions is None:
        raise UnusableClipError(
            "no caption: found no txt or json in its sample, expected one of them"
        )
    suffix, text = entry.captions
    try:
        text = (text if isinstance(text, bytes) else text.read_bytes()).decode("utf-8-sig")
        if suffix == ".txt":
            found: object = text.splitlines()
        else:
            value = json.loads(text)
            found = value.get("caption") if isinstance(value, dict) else None
    # JSON that nests too deep is a RecursionError.
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableClipError(f"no caption: its {suffix} cannot be read ({error})") from error
    lines = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    usable = [line.strip() for line in lines if isinstance(line, str) and line.strip()]
    if not usable:
        wanted = (
            "one a line"
            if suffix == ".txt"
            else 'text (or a list of texts) under the key "caption"'
        )
        raise UnusableClipError(f"no caption: found none in its {suffix}, expected {wanted}")
    return usable


def _variants(texts: list[str], number: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`number` captions: all of them, over and over; of more, a random choice in their order."""
    if len(texts) > number:
        texts = [texts[index] for index in sorted(rng.permutation(len(texts))[:number])]
    return tuple(islice(cycle(texts), number))
