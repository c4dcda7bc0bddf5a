"""Reading pictures: colours of places, what stands out from the background, and things in motion.

Every picture is first brought to a grid of 64 x 64, so places mean the same at every size. Letters:
f frames, h rows, w columns. Colours are RGB 0..255.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .reference import COLOURS, IVORY, NONE, SKINS, WOOD, Colour, nearest_colour

GRID = 64
Picture = NDArray[np.float32]  # (f, 64, 64, 3)
Curve = NDArray[np.float64]  # (f)
Place = tuple[int, int, int, int]  # left, top, right, bottom

# Where a colour is seen pure at all times, whatever the scene's own displacement.
HAIR: Place = (25, 8, 39, 17)
SHIRT: Place = (17, 58, 47, 64)
DRUM: Place = (22, 46, 42, 51)
DRUM_SKIN: Place = (22, 31, 42, 36)
YOKE: Place = (18, 6, 46, 10)
FACE: tuple[Place, ...] = ((25, 31, 39, 34), (30, 23, 34, 31))
BORDER: tuple[Place, ...] = ((0, 0, 20, 4), (44, 0, 64, 4), (0, 4, 3, 40), (61, 4, 64, 40))
GROUND = 53  # first row that the floor and shadows may touch


def on_grid(video: NDArray[np.uint8]) -> Picture:
    """(f, h, w, 3) uint8 -> (f, 64, 64, 3) float32: mean over boxes, or the nearest pixels.

    Raises:
        ValueError: not a colour video in uint8, or smaller than the grid.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(
            f"found video {video.shape} of {video.dtype}, expected (frames, rows, columns, 3) of "
            "uint8; convert it first"
        )
    _, height, width, _ = video.shape
    if height < GRID or width < GRID:
        raise ValueError(f"found pictures of {height} x {width}, expected at least 64 x 64")
    if height == width == GRID:
        return video.astype(np.float32)
    if height % GRID == 0 and width % GRID == 0:
        boxes = video.reshape(len(video), GRID, height // GRID, GRID, width // GRID, 3)
        return boxes.mean((2, 4), dtype=np.float32)
    rows = (np.arange(GRID) + 0.5) * height / GRID
    columns = (np.arange(GRID) + 0.5) * width / GRID
    return video[:, rows.astype(int)][:, :, columns.astype(int)].astype(np.float32)


def colour_at(picture: Picture, *places: Place) -> NDArray[np.float32]:
    """The median colour (3) over all frames of some places."""
    parts = [picture[:, t:b, left:r].reshape(-1, 3) for left, t, r, b in places]
    return np.median(np.concatenate(parts), axis=0)


def background_of(picture: Picture) -> NDArray[np.float32]:
    """The background's colour (3), from the edges of the picture that nothing crosses for long."""
    return colour_at(picture, *BORDER)


def standing_out(picture: Picture, background: NDArray[np.floating]) -> Picture:
    """How surely each pixel is not background: (f, 64, 64), 0..1."""
    away = np.sqrt(np.square(picture - background.astype(np.float32)).sum(-1))
    return np.clip((away - 35.0) / 45.0, 0.0, 1.0)


def thing_colour(picture: Picture, background: NDArray[np.floating]) -> str:
    """The colour that most of a moving thing's pixels have; NONE if next to nothing stands out.

    Looks at the picture above the ground, and not where the bell's yoke hangs.
    """
    part = picture[:, 14:GROUND, 6:58]
    sure = standing_out(part, background) > 0.9
    if sure.sum() < 20 * len(picture):
        return NONE
    names = list(COLOURS)
    pixels = part[sure]
    away = [np.square(pixels - np.array(COLOURS[n], np.float32)).sum(-1) for n in names]
    return names[int(np.bincount(np.argmin(away, axis=0), minlength=len(names)).argmax())]


def place_colour(picture: Picture, place: Place) -> str:
    """The palette's name for the colour of a place."""
    return nearest_colour(colour_at(picture, place), COLOURS)


def skin_colour(picture: Picture) -> str:
    """The skin's name."""
    return nearest_colour(colour_at(picture, *FACE), SKINS)


def kind_of(picture: Picture) -> str:
    """Which of the four kinds of scene a video shows, from what only that kind has.

    A bell hangs on a wooden yoke; a face has hair above and a shirt below; a drum has an ivory skin
    and nothing above; a ball has none of these.
    """
    background = background_of(picture)

    def unlike(place: Place, colour: Colour | NDArray[np.floating]) -> Curve:
        left, top, right, bottom = place
        colours = np.median(picture[:, top:bottom, left:right], axis=(1, 2))
        return np.linalg.norm(colours - np.array(colour), axis=1)

    def differs(place: Place) -> float:  # nearly always: what only passes by does not count
        return min(float(np.quantile(unlike(place, background), 0.15)) / 75.0, 1.0)

    above = differs(HAIR)
    evidence = {
        "bell": 1.0 - float(np.median(unlike(YOKE, WOOD))) / 90.0,
        "speech": min(above, differs(SHIRT)),
        "drum": min(1.0 - float(np.median(unlike(DRUM_SKIN, IVORY))) / 90.0, differs(DRUM)) - above,
        "ball": 0.3,
    }
    return max(evidence, key=lambda kind: evidence[kind])


# ------------------------------------------------------------------------------------ trajectories


def hit_course(picture: Picture, kind: str) -> Curve:
    """A number per frame that is largest when the thing hits: (f), in about pixels.

    ball: how low it is. drum: how little of the stick is above the skin. bell: how far it is swung
    to either side.

    Raises:
        ValueError: a kind that hits nothing.
    """
    seen = standing_out(picture, background_of(picture)).astype(np.float64)
    rows, columns = np.arange(GRID) + 0.5, np.arange(GRID) + 0.5
    if kind == "ball":
        part = seen[:, :GROUND]
        mass = part.sum((1, 2))
        low = (part.sum(2) * rows[:GROUND]).sum(1) / np.maximum(mass, 1e-6)
        return np.where(mass > 20, low, np.nan)
    if kind == "drum":
        above = 27
        return -(seen[:, :above].sum(2) * (above - rows[:above])).sum(1) / 60.0
    if kind == "bell":
        part = seen[:, 20:58]
        mass = part.sum((1, 2))
        across = (part.sum(1) * columns).sum(1) / np.maximum(mass, 1e-6)
        across = np.where(mass > 60, across, np.nan)
        if np.isnan(across).all():
            return across
        left, right = np.nanpercentile(across, (2, 98))
        return np.abs(across - (left + right) / 2)
    raise ValueError(f"found kind {kind!r}, expected ball, bell or drum; speech has no hits")


def mouth_opening(picture: Picture) -> Curve:
    """Height of the dark inside of the mouth per frame: (f), in pixels.

    The inside is told from lips and skin by its green, under 45 % of the skin's.
    """
    left, top, bottom = 22, 31, 48
    skin = float(colour_at(picture, *FACE)[1])
    limit = 0.45 * skin
    green = picture[:, top:bottom, left : GRID - left, 1]
    dark = np.clip((limit - green) / max(0.6 * limit, 1.0), 0.0, 1.0).astype(np.float64)
    x = np.abs(np.arange(left, GRID - left) + 0.5 - 32)[None, :]
    y = (np.arange(top, bottom) + 0.5)[:, None]
    dark *= (x <= np.where(y < 42, 10.0, 7.0)) & (y >= 31)  # not the hair beside the chin
    heights = dark.sum(1)
    three = (heights[:, :-2] + heights[:, 1:-1] + heights[:, 2:]) / 3
    return three.max(1)
