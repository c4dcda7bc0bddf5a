"""A clip written while it is made: H.264 and AAC in a fragmented MP4 that plays at any moment.

F H W pixel frames and size, n samples.
Fragments are closed all along, so a file that is cut short (killed, power lost, disk full) still
plays up to its last fragment, at most a second behind what was handed over; nothing is kept back
for an index at the end.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TypeAlias

import av
import numpy as np
from einops import rearrange, repeat

from ..networks.checked import reason_of
from . import version
from .clock import Clock
from .decode import DecodedBlock
from .tensor_file import writing_failed

try:
    import fcntl
except ImportError:  # not on Windows, where two writers of one file are not told apart
    fcntl = None

Buffer: TypeAlias = bytes | bytearray | memoryview

SHORT_SIDE = 256
"""Pixels that the shorter side gets at least: players refuse or blur smaller pictures."""
_ERRORS = (OSError, av.error.FFmpegError)
_MOVFLAGS = "frag_keyframe+delay_moov+default_base_moof+use_metadata_tags"
SCHEDULE = "mutual_forcing_schedule"
"""Tag of the mp4 with the prompts that its stream followed, as the text of a schedule."""
_ROOM = 8192  # bytes of that tag: it stands before the pictures, and what is played is said later
_FRAGMENT_MICROSECONDS = "100000"
_SMALL = 512**2
"""Pixels up to which a frame is encoded sooner than threads have found to each other."""
# Without frames held back for later, every block is in the file as soon as it was given.
# What small pictures take at libx264's preset "ultrafast" is a third of the time, at the same error
# and fewer bytes; large ones get larger.
_ENCODERS: Mapping[str, Mapping[str, str]] = {
    "libx264": {"crf": "18", "preset": "veryfast", "tune": "zerolatency"},
    "libopenh264": {"b": "2000000"},
    "mpeg4": {"qscale": "3"},
}
"""The first that this machine's FFmpeg has is taken; the last is part of FFmpeg itself."""
_REMEDY = "install PyAV from PyPI (pip install --force-reinstall av)"


class _File(io.FileIO):
    """An unbuffered file: what was written is out of our hands, and errors come at once.

    What was in it stays until `begin`, and until then what is written waits in `held`.
    """

    error: OSError | None = None

    def __init__(self, path: Path) -> None:
        self.is_new = not path.exists()
        self.held: bytearray | None = bytearray()
        super().__init__(
            path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)
        )
        if fcntl is not None:
            try:
                fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise
            except OSError:  # a file system that has no locks
                pass

    def replace(self, content: Buffer) -> None:
        """Be this file from now on."""
        with suppress(OSError):  # what cannot be sought or cut is no ordinary file (/dev/full)
            self.seek(0)
        self._put(content)
        with suppress(OSError):
            self.truncate()

    def begin(self) -> None:
        """Give up what was in the file for what was held, and hold nothing any more."""
        held, self.held = self.held, None
        self.replace(held)

    def put_over(self, old: bytes, new: bytes) -> bool:
        """Overwrite bytes of the file's beginning by as many others, if they are there."""
        end = self.tell()
        try:
            self.seek(0)
            place = self.read(len(old) + 2**16).find(old) if old else -1
            if place >= 0:
                self.seek(place)
                self._put(new)
        finally:
            self.seek(end)
        return place >= 0

    def write(self, data: Buffer) -> int:
        if self.held is None:
            return self._put(data)
        self.held += bytes(data)
        return len(data)

    def _put(self, data: Buffer) -> int:
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
        path: the file; an older one is replaced by the first block, not before.
        clock: frame rate and sample rate.
        height, width: of the pictures that will come.
        scale: whole number to enlarge them by (nearest); by default enough for a shorter side of
            256.
        clips: of a batch, which are shown side by side; what is heard is the first.
        channels: of the sound.
        sample_rate: of the sound, if it is not the clock's.
        notes: further tags of the file, such as the graph that makes it.

    Raises:
        OSError: the file cannot be written or another writer has it, here and in `write` and
            `close`; what was written stays.
        ValueError: sizes that cannot be encoded, or this machine's FFmpeg lacks the encoders.
    """

    def __init__(
        self,
        path: Path | str,
        clock: Clock,
        height: int,
        width: int,
        scale: int | None = None,
        *,
        clips: int = 1,
        channels: int = 1,
        sample_rate: int | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self._notes = {version.NOTE: version.VERSION, **(notes or {})}
        self.path, self.clock = Path(path), clock
        self.size, self.clips = (height, width), clips
        self.sound = channels, sample_rate or clock.sample_rate
        self.columns = math.ceil(math.sqrt(clips))
        height, width = height * -(-clips // self.columns), width * self.columns
        self.scale = scale or max(1, -(-SHORT_SIDE // min(height, width)))
        if height * self.scale % 2 or width * self.scale % 2:
            raise ValueError(
                f"pictures of {width}x{height} times {self.scale} have an odd side, which H.264 "
                "cannot store; choose an even scale"
            )
        self.frames = self.samples = 0
        self._open = True
        self._schedule = self._tagged = b""
        self._file: _File | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _File(self.path)
        except BlockingIOError as error:
            message = f"another run is writing {self.path}; wait for it, or choose another name"
            raise OSError(error.errno, message, str(self.path)) from error
        except OSError as error:
            raise self._failed(error) from error
        try:
            size = height * self.scale, width * self.scale
            self._encoder = _Encoder(self._file, clock.fps, *size, *self.sound)
        except ValueError:
            self._close_file()
            raise

    @property
    def growing(self) -> bool:
        """Whether what is in the file stays there; until then all of it may be replaced."""
        return self._file.held is None

    def tag(self, schedule: str) -> None:
        """Say which prompts the stream followed so far: before the first block, and then any time.

        They are in the file with the next block. Of more than 8 kB only the first lines are kept.
        """
        self._schedule = schedule.strip().encode()

    def write(self, decoded: DecodedBlock) -> None:
        """Append a block: pictures (b, F, H, W, 3) in 0..1 and sound (b, channels, n) in -1..1.

        Raises:
            ValueError: another number of clips, another size, or a closed writer.
            OSError: the disk is full, or an encoder fails; the file is closed and plays up to here.
        """
        pictures = (decoded.video * 255).round().byte().numpy()
        sound = decoded.audio[0].float().numpy()
        clips, size = len(pictures), pictures.shape[2:4]
        if (clips, size) != (self.clips, self.size) or not self._open:
            raise ValueError(
                f"found {clips} clips of {size[1]}x{size[0]} pixels for "
                f"{'an open' if self._open else 'a closed'} writer, expected {self.clips} of "
                f"{self.size[1]}x{self.size[0]} for an open one; use one writer per clip"
            )
        pictures = side_by_side(pictures, self.columns)
        try:
            if not self.frames:
                self._tagged = self._fitting() if self._schedule else b""
                self._encoder.tag(self._tagged.decode(), self._notes)
            self._encoder.write(pictures, sound)
            self.frames += len(pictures)
            self.samples += sound.shape[1]
            if self._file.held is not None:
                if self._file.held:
                    self._file.begin()
                else:
                    # Too little for a fragment, as a prefix of one frame is: a clip of its own,
                    # until more has come.
                    self._file.replace(self._alone(pictures, sound))
            self._rewrite_tag()
        except _ERRORS as error:
            self._abandon()
            raise self._failed(error) from error

    def _rewrite_tag(self) -> None:
        """Put what was said last over the tag in the file, where that has been written."""
        new, old = self._fitting(), self._tagged
        if new != old and self._file.held is None and self._file.put_over(old, new):
            self._tagged = new

    def _fitting(self) -> bytes:
        lines = self._schedule.splitlines(keepends=True)
        while sum(map(len, lines)) > _ROOM:
            lines.pop()
        return b"".join(lines).ljust(_ROOM)

    def close(self) -> None:
        """Finish the file; closing twice does nothing more."""
        if not self._open:
            return
        self._open = False
        try:
            if self.frames:
                self._encoder.close()
                if self._file.held is not None:
                    self._file.begin()
                self._rewrite_tag()
        except _ERRORS as error:
            self._abandon()
            raise self._failed(error) from error
        self._close_file()

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _alone(self, pictures: np.ndarray, sound: np.ndarray) -> bytes:
        content = io.BytesIO()
        size = (side * self.scale for side in pictures.shape[1:3])
        encoder = _Encoder(content, self.clock.fps, *size, *self.sound)
        encoder.write(pictures, sound)
        encoder.close()
        return content.getvalue()

    def _close_file(self) -> None:
        self._file.close()
        if not self.frames and self._file.is_new:  # nothing came of it
            self.path.unlink(missing_ok=True)

    def _abandon(self) -> None:
        """Let go of a file that can take no more."""
        self._open = False
        with suppress(*_ERRORS):  # the same error again: the trailer could not be written either
            self._encoder.close()
        self._close_file()

    def _failed(self, error: Exception) -> OSError:
        error = (self._file and self._file.error) or error
        if isinstance(error, OSError):
            message = writing_failed(error, "the clip")
        else:  # an encoder's own
            message = f"the clip cannot be encoded ({reason_of(error)}); {_REMEDY}"
        if self.frames:
            message += "; what is in the file already stays and plays"
        return OSError(error.errno, message, str(self.path))


def side_by_side(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Clips (b, F, H, W, 3) in rows of so many: one clip, black where none is."""
    missing = np.zeros_like(pictures[: -len(pictures) % columns])
    whole = np.concatenate((pictures, missing))
    return rearrange(whole, "(y x) f h w rgb -> f (y h) (x w) rgb", x=columns)


class _Encoder:
    """Pictures (F, H, W, 3) uint8 and sound (channels, n) to packets in a file.

    Raises:
        ValueError: no encoder for pictures or for sound on this machine.
    """

    def __init__(
        self,
        file: IO[bytes] | _File,
        fps: Fraction,
        height: int,
        width: int,
        channels: int,
        sample_rate: int,
    ) -> None:
        self._rate, self._sample_rate = Fraction(fps), sample_rate
        self._layout = {1: "mono", 2: "stereo"}[channels]
        self._frames = self._samples = 0
        for name in _ENCODERS:
            self._container = av.open(
                file,
                "w",
                format="mp4",
                options={
                    "movflags": _MOVFLAGS,
                    "frag_duration": _FRAGMENT_MICROSECONDS,
                    "flush_packets": "1",
                },
            )
            # Nothing reaches the file before the first packet, so one that fails leaves no trace.
            with suppress(*_ERRORS, ValueError):
                self._add_streams(name, height, width, channels)
                return
        raise ValueError(
            f"this machine's FFmpeg has none of the encoders {', '.join(_ENCODERS)} with aac; "
            f"{_REMEDY}"
        )

    def _add_streams(self, name: str, height: int, width: int, channels: int) -> None:
        self._video = self._container.add_stream(name, rate=self._rate)
        self._video.width, self._video.height = width, height
        self._video.pix_fmt = "yuv420p"
        self._video.codec_context.time_base = 1 / self._rate
        self._video.gop_size = round(self._rate)
        self._video.options = dict(_ENCODERS[name])
        if height * width <= _SMALL:
            self._video.codec_context.thread_count = 1
            if "preset" in self._video.options:
                self._video.options |= {"preset": "ultrafast"}
        self._audio = self._container.add_stream("aac", rate=self._sample_rate, layout=self._layout)
        self._audio.bit_rate = 96_000 * channels
        # At such a rate the other one takes twice as long for more noise.
        self._audio.options = {"aac_coder": "fast"}
        for stream in (self._video, self._audio):
            stream.codec_context.open()

    def tag(self, schedule: str, notes: Mapping[str, str]) -> None:
        """Before anything is written; the schedule first, where it is looked for."""
        if schedule:
            self._container.metadata[SCHEDULE] = schedule
        for name, note in notes.items():
            self._container.metadata[name] = note

    def write(self, pictures: np.ndarray, sound: np.ndarray) -> None:
        """Pictures of its size, or so much smaller as they are enlarged."""
        for frame in _frames(pictures, self._video.height // pictures.shape[1]):
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            self._frames += 1
            self._container.mux(self._video.encode(frame))
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(sound), format="fltp", layout=self._layout
        )
        frame.sample_rate = self._sample_rate
        frame.pts, frame.time_base = self._samples, Fraction(1, self._sample_rate)
        self._samples += sound.shape[1]
        self._container.mux(self._audio.encode(frame))

    def close(self) -> None:
        self._container.mux(self._video.encode(None))
        self._container.mux(self._audio.encode(None))
        self._container.close()


def _frames(pictures: np.ndarray, scale: int) -> Iterator[av.VideoFrame]:
    """Pictures (F, H, W, 3) uint8, enlarged (nearest)."""
    if scale % 2:
        large = repeat(pictures, "f h w rgb -> f (h y) (w x) rgb", y=scale, x=scale)
        for picture in large:
            yield av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        return
    # H.264 has a colour for four pixels, and here they have the same: it is found before they are
    # enlarged.
    count, height, width, _ = pictures.shape
    one = av.VideoFrame.from_ndarray(
        rearrange(pictures, "f h w rgb -> (f h) w rgb"), format="rgb24"
    )
    luma, *chroma = rearrange(
        one.reformat(format="yuv444p").to_ndarray(), "yuv (f h) w -> yuv f h w", f=count
    )
    planes = [repeat(luma, "f h w -> f (h y w x)", y=scale, x=scale)]
    half = scale // 2
    planes += [repeat(plane, "f h w -> f (h y w x)", y=half, x=half) for plane in chroma]
    rows = np.concatenate(planes, axis=1).reshape(count, height * scale * 3 // 2, width * scale)
    for picture in rows:
        yield av.VideoFrame.from_ndarray(picture, format="yuv420p")
