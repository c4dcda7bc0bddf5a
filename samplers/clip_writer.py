"""A clip written while it is made: H.264 and AAC in a fragmented MP4 that plays at any moment.

F H W pixel frames and size, n samples.
Fragments are closed all along, so a file that is cut short (power lost, disk full) still plays up
to its last fragment; nothing is kept back for an index at the end.
"""

from __future__ import annotations

import io
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import av
import numpy as np
from einops import repeat

from .clock import Clock
from .decode import DecodedBlock
from .tensor_file import writing_failed

Buffer: TypeAlias = bytes | bytearray | memoryview

SHORT_SIDE = 256
"""Pixels that the shorter side gets at least: players refuse or blur smaller pictures."""
_ERRORS = (OSError, av.error.FFmpegError)
_MOVFLAGS = "frag_keyframe+delay_moov+default_base_moof"
_FRAGMENT_MICROSECONDS = "500000"


class _File(io.FileIO):
    """An unbuffered file: what was written is out of our hands, and errors come at once."""

    error: OSError | None = None

    def write(self, data: Buffer) -> int:
        # A raw write may take only a part, on a full disk above all, and the muxer would not
        # notice.
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            # The muxer passes it on as an error of its own, or not before the next packet.
            self.error = self.error or error
            raise
        return done


class ClipWriter:
    """Writes decoded blocks to one mp4, as they come.

    Args:
        path: the file; an older one is replaced.
        clock: frame rate and sample rate.
        height, width: of the pictures that will come.
        scale: whole number to enlarge them by (nearest); by default enough for a shorter side of
            256.

    Raises:
        OSError: the file cannot be written, here and in `write` and `close`; what was written
            stays.
        ValueError: sizes that cannot be encoded.
    """

    def __init__(
        self, path: Path | str, clock: Clock, height: int, width: int, scale: int | None = None
    ) -> None:
        self.path, self.clock = Path(path), clock
        self.size = height, width
        self.scale = scale or max(1, -(-SHORT_SIDE // min(height, width)))
        if height * self.scale % 2 or width * self.scale % 2:
            raise ValueError(
                f"pictures of {width}x{height} times {self.scale} have an odd side, which H.264 "
                "cannot store; choose an even scale"
            )
        self.frames = self.samples = 0
        self._open = True
        self._file: _File | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _File(self.path, "wb")
        except OSError as error:
            raise self._failed(error) from error
        self._container = av.open(
            self._file,
            "w",
            format="mp4",
            options={
                "movflags": _MOVFLAGS,
                "frag_duration": _FRAGMENT_MICROSECONDS,
                "flush_packets": "1",
            },
        )
        rate = Fraction(clock.fps)
        self._video = self._container.add_stream("libx264", rate=rate)
        self._video.width, self._video.height = width * self.scale, height * self.scale
        self._video.pix_fmt = "yuv420p"
        self._video.codec_context.time_base = 1 / rate
        self._video.gop_size = round(rate)
        # Without frames held back for later, every block is in the file as soon as it was given.
        self._video.options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
        self._audio = self._container.add_stream("aac", rate=clock.sample_rate, layout="mono")
        self._audio.bit_rate = 96_000

    def write(self, decoded: DecodedBlock) -> None:
        """Append a block: pictures (1, F, H, W, 3) in 0..1 and sound (1, 1, n) in -1..1.

        Raises:
            ValueError: several clips at once, another size, or a closed writer.
            OSError: the disk is full; the file is closed and plays up to here.
        """
        pictures = (decoded.video[0] * 255).round().byte().numpy()
        sound = decoded.audio[0].float().numpy()
        if len(decoded.video) != 1 or pictures.shape[1:3] != self.size or not self._open:
            raise ValueError(
                f"found {len(decoded.video)} clips of {pictures.shape[2]}x{pictures.shape[1]} "
                f"pixels for {'an open' if self._open else 'a closed'} writer, expected 1 of "
                f"{self.size[1]}x{self.size[0]} for an open one; use one writer per clip"
            )
        try:
            for picture in pictures:
                self._write_picture(picture)
            self._write_sound(sound)
        except _ERRORS as error:
            self._abandon()
            raise self._failed(error) from error

    def close(self) -> None:
        """Finish the file; closing twice does nothing more."""
        if not self._open:
            return
        self._open = False
        try:
            if self.frames:
                self._container.mux(self._video.encode(None))
                self._container.mux(self._audio.encode(None))
            self._container.close()
        except _ERRORS as error:
            self._abandon()
            raise self._failed(error) from error
        self._file.close()

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write_picture(self, picture: np.ndarray) -> None:
        larger = repeat(picture, "h w rgb -> (h y) (w x) rgb", y=self.scale, x=self.scale)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(larger), format="rgb24")
        frame.pts, frame.time_base = self.frames, 1 / Fraction(self.clock.fps)
        self.frames += 1
        self._container.mux(self._video.encode(frame))

    def _write_sound(self, sound: np.ndarray) -> None:
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(sound), format="fltp", layout="mono"
        )
        frame.sample_rate = self.clock.sample_rate
        frame.pts, frame.time_base = self.samples, Fraction(1, self.clock.sample_rate)
        self.samples += sound.shape[1]
        self._container.mux(self._audio.encode(frame))

    def _abandon(self) -> None:
        """Let go of a file that can take no more."""
        self._open = False
        with suppress(*_ERRORS):  # the same error again: the trailer could not be written either
            self._container.close()
        self._file.close()

    def _failed(self, error: Exception) -> OSError:
        error = (self._file and self._file.error) or error
        if not isinstance(error, OSError):
            raise error
        message = writing_failed(error, "the clip")
        if self.frames:
            message += "; what is in the file already stays and plays"
        return OSError(error.errno, message, str(self.path))
