"""A film, from a file or from frames and samples in memory, and all that is measured of it.

f frames, h w pixels, c channels, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from .novelty import HOP
from .offset import Offset, offset
from .pictures import PictureCourse, Pictures
from .seams import Seam, Steps, picture_steps, seams
from .sound import RATE, Sound, SoundCourse

Curve = NDArray[np.float64]
PERIOD = 1.0
"""Seconds of a block; a stream's first frame stands before its first block (samplers/clock.py)."""
STANDS_OUT = 0.99  # of the steps elsewhere that a border's step exceeds
_PIECE = RATE
# A playlist called clip.mp4 would make FFmpeg open the addresses in it.
_OPTIONS = {"format_whitelist": "mov,matroska", "protocol_whitelist": "file"}


class UnreadableFilmError(ValueError):
    """A file that is no film; the message says why, without naming the file."""


@dataclass(frozen=True)
class Film:
    """What was seen and heard, and how both go together.

    Attributes:
        steps: at the borders of blocks and elsewhere, of the picture and of the sound.
        borders: seconds at which those are, for each kind of step.
    """

    pictures: Pictures
    sound: Sound | None
    period: float
    offset: Offset
    steps: dict[str, Steps]
    borders: dict[str, Curve]

    @property
    def seams(self) -> dict[str, Seam]:
        """How much the borders of blocks stand out, by kind of step."""
        return seams([self.steps])

    def standing_out(self) -> dict[str, NDArray[np.bool_]]:
        """Of each kind of step, which borders stand out of everything else in the film."""
        return {
            name: step.border > np.quantile(step.elsewhere, STANDS_OUT)
            for name, step in self.steps.items()
            if len(step.elsewhere)
        }

    @property
    def seam_rate(self) -> float | None:
        """Borders a second that stand out, each kind by itself; None without a border."""
        found = list(self.standing_out().values())
        borders = max(map(len, found), default=0)
        return sum(int(one.sum()) for one in found) / (borders * self.period) if borders else None


def read_film(
    file: Path | BinaryIO | str,
    period: float = PERIOD,
    on_frame: Callable[[], None] = lambda: None,
) -> Film:
    """Measure a file.

    Args:
        file: MP4, MOV, MKV or WebM.
        period: seconds of a block, at whose borders seams are looked for.
        on_frame: called before each frame; what it raises ends the reading.

    Raises:
        UnreadableFilmError: it cannot be read, or has no pictures.
    """
    pictures = PictureCourse()
    try:
        with opened(file) as container:
            stream = next((s for s in container.streams.video if s.codec_context), None)
            if stream is None:
                raise UnreadableFilmError("no pictures: found no video that can be decoded")
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                on_frame()
                if frame.time is not None:
                    pictures.add(frame, frame.time)
        seen = pictures.result()
        if seen is None:
            raise UnreadableFilmError("no pictures: found no frame with a timestamp")
        sound = SoundCourse(seen.first, period, seen.length - period / 2)
        with opened(file) as container:
            stream = next((s for s in container.streams.audio if s.codec_context), None)
            for frame in () if stream is None else container.decode(stream):
                if frame.time is not None:
                    sound.add(frame, frame.time)
    except (OSError, av.error.FFmpegError) as error:
        raise UnreadableFilmError(f"unreadable: {error.strerror or error}") from error
    return _film(seen, sound.result(), period)


def film_of(
    frames: Iterable[NDArray[np.uint8]],
    fps: float,
    wave: NDArray[np.float32] | None = None,
    sample_rate: int = RATE,
    period: float = PERIOD,
) -> Film:
    """Measure frames (h, w, 3) and samples (c, n), which begin together.

    Raises:
        UnreadableFilmError: no frame.
    """
    pictures = PictureCourse()
    for index, frame in enumerate(frames):
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        pictures.add(picture, index / fps)
    seen = pictures.result()
    if seen is None:
        raise UnreadableFilmError("no pictures: found no frame, expected at least one")
    sound = SoundCourse(0.0, period, seen.length - period / 2)
    layout = "stereo" if wave is not None and len(wave) > 1 else "mono"
    wave = np.zeros((1, 0), np.float32) if wave is None else wave[:2]
    for begin in range(0, wave.shape[1], _PIECE):
        part = np.ascontiguousarray(wave[:, begin : begin + _PIECE], np.float32)
        frame = AudioFrame.from_ndarray(part, "fltp", layout)
        frame.sample_rate = sample_rate
        sound.add(frame, begin / sample_rate)
    return _film(seen, sound.result(), period)


def opened(file: Path | BinaryIO | str) -> av.container.InputContainer:
    """A film to be read, and nothing else that its name or its content leads to."""
    if not isinstance(file, Path | str):
        file.seek(0)
        return av.open(file, options=_OPTIONS)
    # A folder is other people's: a name such as "concat:a" must stay a file's name.
    return av.open(str(Path(file).resolve()), options=_OPTIONS)


def _film(pictures: Pictures, sound: Sound | None, period: float) -> Film:
    times = pictures.times
    at = np.arange(period, pictures.length - period / 2, period)
    frames = np.searchsorted(times, at + 0.5 * pictures.step)
    # Of a film whose frames stand long, few are there when a block begins.
    there = (frames >= 3) & (frames < len(times) - 2)
    there[there] = times[frames[there]] < at[there] + 2 * pictures.step
    steps = {"picture": picture_steps(pictures.moved, frames[there].tolist())}
    borders, found = {"picture": at[there]}, Offset()
    if sound is not None:
        found = offset(*pictures.abrupt, pictures.step, sound.rise, HOP, sound.lead)
        steps |= sound.steps
        borders |= dict.fromkeys(sound.steps, sound.borders)
    return Film(pictures, sound, period, found, steps, borders)
