"""One clip out of one video file: pictures at 24 a second and sound at 16 kHz, on one clock.

f frames, h w pixels, n samples.
Pictures and sound are both placed by the file's timestamps, never by counting, so variable frame
rates, late sound tracks and rounded timestamps do not pull them apart. A picture stands until the
next one, the last to its end. Only the part that is asked for is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

Video: TypeAlias = NDArray[np.uint8]
Wave: TypeAlias = NDArray[np.float32]
Size: TypeAlias = int | tuple[int, int]
"""Side of square pictures, or rows and columns of others, in pixels."""

FPS = 24
RATE = 16000
PREFIX = 160
"""Samples before the first second's: those of the first frame (see `networks.layout`)."""

# A playlist called clip.mp4 would make FFmpeg open the addresses in it; only real containers are
# let in.
_OPTIONS = {"format_whitelist": "mov,matroska", "protocol_whitelist": "file"}
# Area averaging, and (SWS_FULL_CHR_H_INT, which older PyAV does not name) colour as sharp as
# brightness.
_SCALING = int(Interpolation.AREA) | 0x2000
# Seek points go by decoding time, which runs ahead of display, and sound decoders need a moment to
# settle.
_PREROLL = 0.5
# Matroska and WebM round timestamps to whole ms; without this, ties between two frames would
# flicker.
_TIE = 0.0015
# Sound that lies further than this (half a frame) from where it should follow is a real gap.
_GAP = 0.5 / FPS
# Source sound on either side of the clip, so that the resampling filter meets no edge.
_MARGIN = 0.05


class UnusableClipError(ValueError):
    """A file that no clip can be taken from; the message says why, without naming the file."""


class UnusablePartError(UnusableClipError):
    """No clip can be taken from this part of the file; another part may do."""


def read_clip(
    file: Path | BinaryIO, seconds: int, size: Size, at: float, *, stereo: bool = False
) -> tuple[Video, Wave | None]:
    """Frames and sound of `seconds` seconds after the first frame.

    The clip starts on a frame of the file, or within one that stands for longer than 1/24 s; sample
    0 is heard when frame 0 is shown.

    Args:
        file: MP4, MOV, MKV or WebM.
        size: of the pictures: the middle of the frame, scaled.
        at: where to start: 0 is the first frame of the file, 1 the latest start that leaves enough.
        stereo: two channels, the same twice where the file has one.

    Returns:
        video (1 + 24 s, rows, columns, 3) RGB, and sound (160 + 16000 s), of two channels (2, ...),
        or None if this part has none that can be decoded.

    Raises:
        UnusablePartError: this part cannot be read.
        UnusableClipError: the file is too short, without pictures, or not to be read.
    """
    unreadable = UnusableClipError
    try:
        with _opened(file) as container:
            stream, first, last, length = _film(container)
            if length - seconds < -_TIE:
                raise UnusableClipError(
                    f"too short: found {length:.2f} s from the first frame to the last, "
                    f"expected at least {seconds} s"
                )
            unreadable = UnusablePartError
            start = first + at * max(length - seconds, 0)
            start, video = _pictures(container, stream, start, last, seconds, size)
            heard = start - _MARGIN, seconds + PREFIX / RATE + 2 * _MARGIN
            wave, rate = _heard(container, *heard, "stereo" if stereo else "mono")
    except (OSError, av.error.FFmpegError) as error:
        raise unreadable(f"unreadable: {error.strerror or error}") from error
    if wave is None:
        return video, None
    skip = round(_MARGIN * RATE)
    wave = _resample(wave, rate)[:, skip : skip + PREFIX + RATE * seconds]
    return video, wave if stereo else wave[0]


def film_length(file: Path | BinaryIO) -> float:
    """Seconds of a file in which clips can lie.

    Raises:
        UnusableClipError: as `read_clip`.
    """
    try:
        with _opened(file) as container:
            return _film(container)[3]
    except (OSError, av.error.FFmpegError) as error:
        raise UnusableClipError(f"unreadable: {error.strerror or error}") from error


def _opened(file: Path | BinaryIO) -> InputContainer:
    # A folder of data is other people's: a name such as "concat:a" must stay a file's name.
    return av.open(str(file.resolve()) if isinstance(file, Path) else file, options=_OPTIONS)


def _film(container: InputContainer) -> tuple[VideoStream, float, float, float]:
    """The pictures' stream, when its first frame and its last are shown, and its length."""
    stream = next(iter(_decodable(container, "video")), None)
    if stream is None:
        raise UnusableClipError("no pictures: found no video that can be decoded")
    # Parts are short and loaders run side by side: threads would cost more than they give.
    stream.codec_context.thread_count = 1
    first, last, end = _span(container, stream)
    return stream, first, last, max(last, end - 1 / FPS) - first


def _decodable(container: InputContainer, kind: str) -> Sequence[VideoStream | AudioStream]:
    """The streams "video" or "audio" that this FFmpeg has a decoder for, its own choice first."""
    best = container.streams.best(kind)
    streams = [one for one in getattr(container.streams, kind) if one.codec_context is not None]
    return sorted(streams, key=lambda one: one is not best)


def _seek(container: InputContainer, stream: VideoStream | AudioStream, seconds: float) -> None:
    """To the last seek point before a time of the file's clock.

    A time before the file's start counts: what a sound decoder needs to start with lies there.
    """
    container.seek(math.floor(seconds / stream.time_base), stream=stream, backward=True)


def _span(container: InputContainer, stream: VideoStream) -> tuple[float, float, float]:
    """When the first frame and the last are shown, and until when: seconds of the file's clock.

    Nothing is decoded. The header is not trusted: its length may be the sound's, and files get cut
    short.
    """

    def shown() -> Iterator[tuple[float, float]]:
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                end = packet.pts + (packet.duration or 0)
                yield float(packet.pts * packet.time_base), float(end * packet.time_base)

    first = next(shown(), None)
    if first is None:
        raise UnusableClipError("unreadable: found no frame with a timestamp")
    last = None
    if container.duration is not None:
        end = (container.duration + (container.start_time or 0)) / av.time_base
        _seek(container, stream, end)
        last = max(shown(), default=None)
    if last is None:  # no length in the header, or the file ends before it
        _seek(container, stream, first[0])
        last = max(shown(), default=first)
    return first[0], *last


def _pictures(
    container: InputContainer,
    stream: VideoStream,
    start: float,
    last: float,
    seconds: int,
    size: Size,
) -> tuple[float, Video]:
    """What is shown at 24 instants a second, and the first instant: about `start`.

    Args:
        last: when the file's last frame is shown, which stands for all instants after it.
    """
    _seek(container, stream, start - _PREROLL)
    count = 1 + FPS * seconds
    pictures: list[Video] = []
    scaler = VideoReformatter()
    shown: VideoFrame | None = None

    def keep(until: float) -> None:
        """`shown` stands for every instant before `until`."""
        nonlocal start
        if not pictures and start < until and start - shown.time < 1 / FPS:
            # From here on, the frame's own clock: a source at 24 fps is kept as it is.
            start = shown.time
        missing = min(math.ceil((until - start) * FPS), count) - len(pictures)
        if missing > 0:
            pictures.extend([_picture(shown, stream, size, scaler)] * missing)

    for frame in container.decode(stream):
        if frame.pts is None or (shown is not None and frame.time <= shown.time):
            continue
        if shown is not None:
            keep(frame.time - _TIE)
        shown = frame
        if len(pictures) == count:
            break
    else:
        if shown is not None:
            whole = shown.time > last - _TIE
            keep(max(start, shown.time) + seconds + 1 if whole else shown.time + 0.5 / FPS)
    if len(pictures) < count:
        raise UnusablePartError(
            f"unreadable: found {len(pictures)} frames from {start:.2f} s on, expected {count}"
        )
    return start, np.stack(pictures)


def _picture(frame: VideoFrame, stream: VideoStream, size: Size, scaler: VideoReformatter) -> Video:
    """(rows, columns, 3): the middle, averaged over the area of each pixel, upright."""
    rows, columns = (size, size) if isinstance(size, int) else size
    lies, down, across = _laid(frame)
    if lies:
        rows, columns = columns, rows
    aspect = frame.width / frame.height * float(stream.sample_aspect_ratio or 1)
    width, height = max(columns, round(rows * aspect)), max(rows, round(columns / aspect))
    scaled = scaler.reformat(frame, width, height, "rgb24", interpolation=_SCALING).to_ndarray()
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = scaled[top : top + rows, left : left + columns]
    return (middle.swapaxes(0, 1) if lies else middle)[::down, ::across]


def _laid(frame: VideoFrame) -> tuple[bool, int, int]:
    """How a frame lies by its display matrix: telephones store films turned or mirrored.

    The matrix takes (x, y) to (a x + c y, b x + d y); of it the nearest of the eight ways to lay a
    square is taken (ISO/IEC 14496-12, section 6.2.2).

    Returns:
        whether rows are columns; and then, 1 or -1, which way rows and columns run.
    """
    data = next((side for side in frame.side_data if side.type == Type.DISPLAYMATRIX), None)
    if data is None:
        return False, 1, 1
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5]
    lies = abs(int(b)) + abs(int(c)) > abs(int(a)) + abs(int(d))
    across, down = (c, b) if lies else (a, d)
    return lies, -1 if down < 0 else 1, -1 if across < 0 else 1


def _heard(
    container: InputContainer, start: float, seconds: float, layout: str
) -> tuple[Wave | None, int]:
    """The sound of the first track that can be decoded, as `_sound`; None if there is no such."""
    for stream in _decodable(container, "audio"):
        try:
            return _sound(container, stream, start, seconds, layout)
        except av.error.FFmpegError:  # a variant that the decoder does not know
            continue
    return None, RATE


def _sound(
    container: InputContainer, stream: AudioStream, start: float, seconds: float, layout: str
) -> tuple[Wave | None, int]:
    """Sound (c, n) from `start` on at the file's own rate, silent where the file is, and that rate.

    None if nothing at all is heard in this part.

    Args:
        layout: "mono" or "stereo".
    """
    _seek(container, stream, start - _PREROLL)
    wave: Wave | None = None
    rate, position, heard = 0, 0, False
    mixer, mixes = None, None
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        if wave is None:
            rate = frame.sample_rate
            channels = 1 if layout == "mono" else 2
            wave = np.zeros((channels, math.ceil(seconds * rate)), dtype=np.float32)
            position = round((frame.time - start) * rate)
        if frame.sample_rate != rate:
            raise UnusablePartError(
                f"unreadable: its sound changes from {rate} to {frame.sample_rate} Hz"
            )
        due = round((frame.time - start) * rate)
        # Short of a gap, samples follow each other: rounded timestamps would tear holes of some
        # samples.
        position = due if abs(due - position) > _GAP * rate else position
        if mixes != (kind := (frame.format.name, frame.layout.name)):
            # Mixed as whole numbers: to floats FFmpeg would add the channels up, louder than they
            # were.
            # One channel twice is as loud as it was; FFmpeg would share it between the two.
            mix = layout if frame.layout.nb_channels > 1 else "mono"
            mixer, mixes = AudioResampler("s16p", mix, rate), kind
        mixed = np.concatenate(
            [part.to_ndarray() for part in mixer.resample(frame)], axis=1
        ) / np.float32(32768)
        count, length = mixed.shape[1], wave.shape[1]
        inside = slice(max(position, 0), max(min(position + count, length), 0))
        if inside.start < inside.stop:
            wave[:, inside] = mixed[:, inside.start - position : inside.stop - position]
            heard = True
        position += count
        if position >= length:
            break
    return (wave if heard else None), rate


def _resample(wave: Wave, rate: int) -> Wave:
    """(c, n) at `rate` to 16 kHz; sample 0 stays where it is."""
    try:
        from torchaudio.functional import resample
    except (ImportError, OSError) as error:
        raise ImportError(
            f"sound of real videos needs torchaudio, which cannot be imported ({error}); install "
            "the version "
            "of your torch, or beside a torch without CUDA delete the libraries in torchaudio/lib"
        ) from error
    # The filter has a tap set for every phase: at a rate such as 22255 Hz that would be gigabytes.
    # Up to 0.15 % off at such rates, in no usual one.
    rate = max(round(rate / 25), 1) * 25
    return resample(torch.from_numpy(wave), rate, RATE).numpy()
