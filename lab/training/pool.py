"""Rendered clips on disk: rendering costs more than a training step, so it is done once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from ...samplers.atomic_file import replacing

log = logging.getLogger("mutualforcing")


def rendered(
    base: Path, names: Sequence[str], clips: int, make: Callable[[], Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Memory maps of BASE.NAME.npy, a row a clip, made first where not of `clips` clips.

    Args:
        make: the next clip's row of each array; all rows of an array are alike in shape.
    """
    paths = [base.with_name(f"{base.name}.{name}.npy") for name in names]
    if not all(path.exists() and len(np.load(path, mmap_mode="r")) == clips for path in paths):
        log.info("rendering %d clips into %s", clips, base)
        with ExitStack() as files:
            arrays: list[np.ndarray] = []
            for index in range(clips):
                rows = [np.asarray(row) for row in make()]
                if not arrays:
                    parts = [files.enter_context(replacing(path)) for path in paths]
                    arrays = [
                        open_memmap(part, "w+", dtype=row.dtype, shape=(clips, *row.shape))
                        for part, row in zip(parts, rows, strict=True)
                    ]
                for array, row in zip(arrays, rows, strict=True):
                    array[index] = row
            for array in arrays:
                array.flush()
    return [np.load(path, mmap_mode="r") for path in paths]


def crops(
    arrays: Sequence[np.ndarray],
    units: Sequence[int],
    clips: np.ndarray,
    length: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """A random part of `length` of each of these clips, from every array at the same place.

    Args:
        units: steps of each array in one of `length`.

    Raises:
        ValueError: the clips are shorter.
    """
    total = arrays[0].shape[1] // units[0]
    if length > total:
        raise ValueError(
            f"found rendered clips of length {total}, expected at least {length}; delete the "
            "pool's files so that they are rendered anew"
        )
    starts = rng.integers(0, total - length + 1, len(clips))
    return [
        np.stack([array[c, s * n : (s + length) * n] for c, s in zip(clips, starts, strict=True)])
        for array, n in zip(arrays, units, strict=True)
    ]
