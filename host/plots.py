"""A clip on ComfyUI's wires as a picture of what is measured of it.

F H W pixel frames and size, n samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from comfy_api.latest import InputImpl
from numpy.typing import NDArray
from torch import Tensor

from ..measures.film import Film, UnreadableFilmError, film_of, read_film
from ..measures.plot import plot
from .encoding import Clip, Sound
from .page import stop_if_asked


def measured_video(video: object, period: float) -> Film:
    """A VIDEO, frame by frame out of its file if it is a whole one.

    Raises:
        ValueError: it cannot be read.
    """
    whole = isinstance(video, InputImpl.VideoFromFile)
    if whole and video.get_active_trim_window() == (0.0, 0.0):
        try:
            return read_film(video.get_stream_source(), period, stop_if_asked)
        except UnreadableFilmError as error:
            raise ValueError(f"the clip on the wire to 'video' is {error}") from error
    found = video.get_components()
    return measured_clip(Clip(found.images, found.audio, found.frame_rate), period)


def measured_clip(clip: Clip, period: float) -> Film:
    """Pictures and sound in memory."""
    wave, rate = _wave(clip.sound)
    return film_of(_frames(clip.pictures), float(clip.fps), wave, rate, period)


def plotted(film: Film) -> Tensor:
    """The plot on an IMAGE wire: (1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.array(plot(film), np.float32) / 255)[None]


def _frames(pictures: Tensor) -> Iterator[NDArray[np.uint8]]:
    for picture in pictures:
        stop_if_asked()
        yield (picture[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()


def _wave(sound: Sound | None) -> tuple[NDArray[np.float32] | None, int]:
    if sound is None:
        return None, 1
    return sound["waveform"][0].float().cpu().numpy(), sound["sample_rate"]
