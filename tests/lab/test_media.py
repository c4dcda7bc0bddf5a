"""Clips of real files: lengths, sound and picture in step, a clear word on what is unusable."""

from __future__ import annotations

import io
import json
import logging
import struct
import tarfile
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("torchaudio.functional", exc_type=(ImportError, OSError))

from mutual_forcing.lab.training import media
from mutual_forcing.lab.training.captioned_clip import CaptionedClip
from mutual_forcing.lab.training.clip_reader import (
    UnusableClipError,
    UnusablePartError,
    read_clip,
)
from mutual_forcing.lab.training.media import clips_from_files
from mutual_forcing.lab.training.sources import clips_from

EVENT = 1.5
"""Seconds into a file at which it flashes and beeps, for a quarter of a second."""


def film(
    file: Path | io.BytesIO,
    seconds: float = 3.0,
    fps: Fraction = Fraction(24),
    rate: int | None = 44100,
    codecs: tuple[str, str] = ("mpeg4", "aac"),
    shape: tuple[int, int] = (64, 96),
    kind: str = "mp4",
) -> None:
    """Grey that brightens slowly, a flash and a beep. `rate` None: without sound."""
    with av.open(file, "w", format=kind) as out:
        video = out.add_stream(codecs[0], rate=fps, options={"g": "10"})
        video.height, video.width, video.pix_fmt = *shape, "yuv420p"
        video.bit_rate = 2_000_000
        if rate is not None:
            audio = out.add_stream(codecs[1], rate=rate, layout="stereo")
        for index in range(round(seconds * fps)):
            flash = 0 <= index / fps - EVENT < 0.25
            level = 255 if flash else round(20 + 48 * index / fps)
            frame = av.VideoFrame.from_ndarray(np.full((*shape, 3), level, np.uint8), "rgb24")
            frame.pts, frame.time_base = index, 1 / fps
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if rate is not None:
            t = np.arange(round(seconds * rate)) / rate
            wave = 0.5 * np.sin(2 * np.pi * 440 * t) * ((t >= EVENT) & (t < EVENT + 0.25))
            piece = audio.codec_context.frame_size or 1024
            for begin in range(0, len(wave), piece):
                part = np.tile(wave[begin : begin + piece].astype(np.float32), (2, 1))
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", "stereo")
                frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
                out.mux(audio.encode(frame))
            out.mux(audio.encode(None))


def onsets(clip: CaptionedClip) -> tuple[float, float]:
    """When the flash is seen and when the beep is heard, in seconds of the clip."""
    seen = np.argmax(clip.video.mean(axis=(1, 2, 3)) > 200) / 24
    heard = np.argmax(np.abs(clip.audio) > 0.2) / 16000
    return float(seen), float(heard)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two usable films, one silent and deeper, one with the captions in a json."""
    path = tmp_path_factory.mktemp("films")
    film(path / "one.mp4")
    (path / "one.txt").write_text("a flash\n\n a flash and a beep \n")
    (path / "deeper").mkdir()
    film(path / "deeper/mute.mp4", rate=None)
    (path / "deeper/mute.json").write_text(json.dumps({"caption": "a silent flash"}))
    return path


@pytest.mark.parametrize(
    ("kind", "codecs", "fps", "rate"),
    [
        ("mp4", ("mpeg4", "aac"), Fraction(24), 44100),
        ("mp4", ("mpeg4", "aac"), Fraction(30000, 1001), 16000),
        ("mov", ("mpeg4", "pcm_s16le"), Fraction(12), 22050),
        ("matroska", ("mpeg4", "aac"), Fraction(60), 48000),
        ("webm", ("libvpx", "libopus"), Fraction(25), 48000),
    ],
)
def test_flash_and_beep_stay_together(
    tmp_path: Path, kind: str, codecs: tuple[str, str], fps: Fraction, rate: int
) -> None:
    path = tmp_path / "film"
    film(path, fps=fps, rate=rate, codecs=codecs, kind=kind)
    for at in (0.0, 0.37, 1.0):
        check_step(path, fps, at)


def check_step(path: Path, fps: Fraction, at: float) -> None:
    video, audio = read_clip(path, 2, 64, at)
    assert video.shape == (49, 64, 64, 3) and video.dtype == np.uint8
    assert audio.shape == (160 + 32000,) and audio.dtype == np.float32
    seen, heard = onsets(CaptionedClip(video, audio, ()))
    # Frames at 24 fps are not moved at all; others are seen at the next instant. WebM rounds to ms.
    assert abs(seen - heard) < (0.005 if fps == 24 else 1 / 24 + 0.001)
    # The clip starts where it was asked to: the file's last frame is at 3 s less one frame.
    assert heard == pytest.approx(EVENT - at * (1 - 1 / fps), abs=1.1 / min(fps, 24))
    assert np.abs(audio).max() == pytest.approx(0.5, abs=0.1)


def test_frames_of_24_fps_are_kept_as_they_are(tmp_path: Path) -> None:
    film(tmp_path / "film", codecs=("ffv1", "pcm_s16le"), kind="matroska", shape=(64, 64))
    with av.open(tmp_path / "film") as file:
        whole = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    video, _ = read_clip(tmp_path / "film", 2, 64, 0.5)
    begin = next(i for i, frame in enumerate(whole) if abs(frame.astype(int) - video[0]).max() <= 1)
    assert begin in (11, 12)
    assert abs(np.stack(whole[begin : begin + 49]).astype(int) - video).max() <= 1


def changing(path: Path, times: list[float], end: float) -> None:
    """A film of variable rate, a frame at each of `times`: dark, but for the last, and a beep with
    it."""
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width = video.height = 64
        video.codec_context.time_base = Fraction(1, 1000)
        audio = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for time, until in zip(times, [*times[1:], end], strict=True):
            level = 255 if time == times[-1] else 20
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            for packet in video.encode(frame):
                packet.duration = round((until - time) / packet.time_base)
                out.mux(packet)
        out.mux(video.encode(None))
        wave = np.zeros((1, round(16000 * end)), np.int16)
        wave[:, round(16000 * times[-1]) :] = 16000
        frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))


def test_a_picture_stands_until_the_next_and_the_last_to_its_end(tmp_path: Path) -> None:
    changing(tmp_path / "film.mov", [0, EVENT], 4)
    for at in (0.0, 0.3, 0.7, 1.0):
        video, audio = read_clip(tmp_path / "film.mov", 2, 16, at)
        seen, heard = onsets(CaptionedClip(video, audio, ()))
        start = at * (4 - 1 / 24 - 2)
        assert heard == pytest.approx(max(EVENT - start, 0), abs=1 / 24)
        assert 0 <= seen - heard <= 1 / 24


def test_a_film_of_variable_rate_can_be_read_anywhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum([0, *rng.uniform(0.01, 0.4, 14)]).round(3).tolist()
    changing(tmp_path / "film.mkv", times, times[-1] + 0.1)
    for at in np.linspace(0, 1, 60):
        video, audio = read_clip(tmp_path / "film.mkv", 1, 16, at)
        seen = video.mean(axis=(1, 2, 3)) > 200
        if seen.any():
            assert 0 <= np.argmax(seen) / 24 - np.argmax(audio > 0.2) / 16000 <= 1 / 24


def test_of_two_sound_tracks_the_first_that_can_be_decoded_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "film.mov"
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width = video.height = 64
        tracks = [out.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        for index in range(49):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 24)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for track, level in zip(tracks, (4000, 8000), strict=True):
            wave = np.full((1, 33600), level, np.int16)
            frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    for heard in (4000, 8000, None):
        _, sound = read_clip(path, 1, 16, 0)
        if heard is None:
            assert sound is None
        else:
            assert abs(sound - heard / 32768).max() < 1e-3
        # The next track's kind becomes one that FFmpeg knows and cannot decode (Apple's APAC).
        path.write_bytes(path.read_bytes().replace(b"sowt", b"apac", 1))


def test_a_part_that_cannot_be_read_does_not_cost_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    film(tmp_path / "FILM.MP4", 1.5)
    (tmp_path / "FILM.TXT").write_text("a film")
    asked = []

    def read(file: Path, seconds: int, size: int, at: float) -> tuple[np.ndarray, np.ndarray]:
        asked.append(at)
        if len(asked) in (1, 3, 4, 5):
            raise UnusablePartError("unreadable")
        return read_clip(file, seconds, size, at)

    monkeypatch.setattr(media, "read_clip", read)
    clips = clips_from_files(str(tmp_path), 1, 0, 1, size=16)
    assert next(clips).captions == ("a film",)  # at the second place
    with pytest.raises(ValueError, match="none of them usable"):  # an epoch of three bad places
        next(clips)
    assert len(set(asked)) == 5
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped {tmp_path / 'FILM.MP4'}: unreadable"
    ]


def test_captions_that_nest_without_end_are_no_captions() -> None:
    with pytest.raises(UnusableClipError, match=r"its \.json cannot be read"):
        media.captions_of(media._Entry("x", b"", (".json", b"[" * 100_000)))


def test_pictures_are_the_middle_smoothed_and_upright(tmp_path: Path) -> None:
    # Columns of pixels that alternate would alias; the green sides lie outside of the middle
    # square.
    picture = np.zeros((256, 512, 3), np.uint8)
    picture[..., 1] = 255
    picture[:, 128:384] = np.where(np.arange(256)[None, :, None] % 2, 255, 0)
    picture[:64, 128:384] = (200, 0, 0)
    picture[64:96, 128:160] = (0, 0, 200)  # no way to lay the square looks like another
    path = tmp_path / "film.mov"
    with av.open(path, "w") as out:
        stream = out.add_stream("png", rate=24)
        stream.width, stream.height, stream.pix_fmt = 512, 256, "rgb24"
        for _ in range(25):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))
    frame = read_clip(path, 1, 64, 0)[0][3].astype(int)
    assert abs(frame[26:] - 128).max() <= 8
    assert abs(frame[:12] - (200, 0, 0)).max() <= 8
    # The same film with each display matrix [[a, b], [c, d]]: (x, y) is shown at (x, y) times it.
    matrix = struct.Struct(">9i")
    upright = 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30
    data = path.read_bytes()
    place = data.index(matrix.pack(*upright), data.index(b"tkhd"))
    shown = {
        (0, 1, -1, 0): np.rot90(frame, -1),  # by 90 degrees clockwise: the top is on the right
        (-1, 0, 0, -1): np.rot90(frame, 2),
        (0, -1, 1, 0): np.rot90(frame),
        (-1, 0, 0, 1): frame[:, ::-1],
        (1, 0, 0, -1): frame[::-1],
        (0, 1, 1, 0): frame.swapaxes(0, 1),
        (0, -1, -1, 0): np.rot90(frame, 2).swapaxes(0, 1),
    }
    for (a, b, c, d), right in shown.items():
        turned = a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
        path.write_bytes(data[:place] + matrix.pack(*turned) + data[place + matrix.size :])
        assert abs(read_clip(path, 1, 64, 0)[0][3] - right).max() <= 1


def test_sound_that_starts_late_is_heard_late(tmp_path: Path) -> None:
    """A track shifted by half a second, as timestamps tell, not sample counts."""
    path = tmp_path / "film.mkv"
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width = video.height = 64
        audio = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for index in range(49):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 24)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for index in range(10):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 8000, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = (
                16000,
                8000 + 1600 * index,
                Fraction(1, 16000),
            )
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    _, sound = read_clip(path, 2, 64, 0)
    assert abs(np.argmax(sound > 0.1) - 8000) < 16
    assert abs(sound[8100:23900] - 8000 / 32768).max() < 1e-3  # no holes between the pieces
    assert not sound[24100:].any()


def test_folder_gives_the_same_clips_for_the_same_seed_without_end(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mutualforcing"):
        first = list(islice(clips_from(str(folder), 1, 3, 4), 6))
    assert [record.getMessage() for record in caplog.records] == [
        f"no sound in {folder / 'deeper/mute.mp4'}: silence is used"
    ]
    again = list(islice(clips_from(str(folder), 1, 3, 4), 6))
    for a, b in zip(first, again, strict=True):
        assert a.captions == b.captions and len(a.captions) == 4
        assert np.array_equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
        assert a.video.shape == (25, 64, 64, 3) and a.audio.shape == (16160,)
    # Every epoch has every film, with its own captions; only one has sound.
    for epoch in (first[:2], first[2:4], first[4:]):
        assert {clip.captions for clip in epoch} == {
            ("a flash", "a flash and a beep") * 2,
            ("a silent flash",) * 4,
        }
    assert not any(clip.audio.any() for clip in first if clip.captions[0] == "a silent flash")
    other = list(islice(clips_from(str(folder), 1, 4, 4), 6))
    assert any(not np.array_equal(a.video, b.video) for a, b in zip(first, other, strict=True))


def test_more_captions_than_asked_for_are_drawn_from(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 1.5, rate=None)
    (tmp_path / "a.txt").write_text("\n".join("abcdef"))
    drawn = [
        clip.captions for clip in islice(clips_from_files(str(tmp_path), 1, 0, 2, size=16), 12)
    ]
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert {text for pair in drawn for text in pair} == set("abcdef")


def test_what_cannot_be_used_is_skipped_with_one_line_each(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (folder / "one.mp4").read_bytes()
    contents = {"good": data, "broken": b"no film at all" * 99, "lonely": data, "empty": data}
    for name, content in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        if name != "lonely":
            (tmp_path / f"{name}.txt").write_text("" if name == "empty" else name)
    (tmp_path / "deep.mp4").write_bytes(data)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    film(tmp_path / "short.mp4", 1.5)
    (tmp_path / "short.txt").write_text("short")
    # A playlist would open whatever it names.
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text("list")
    with caplog.at_level(logging.WARNING, "mutualforcing"):
        clips = list(islice(clips_from_files(str(tmp_path), 2, 0, 1), 3))
    assert {clip.captions for clip in clips} == {("good",)}
    lines = sorted(record.getMessage() for record in caplog.records)
    names = [line.split(": ")[0] for line in lines]
    bad = ("broken", "deep", "empty", "list", "lonely", "short")
    assert names == [f"skipped {tmp_path / name}.mp4" for name in bad]
    reasons = [line.split(": ")[1] for line in lines]
    unread, uncaptioned = "unreadable", "no caption"
    assert reasons == [unread, uncaptioned, uncaptioned, unread, uncaptioned, "too short"]
    assert "1.46 s" in lines[-1] and "at least 2 s" in lines[-1]


def test_file_cut_short_still_gives_its_beginning(tmp_path: Path) -> None:
    whole = io.BytesIO()
    film(whole, kind="matroska")
    (tmp_path / "cut.mkv").write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    for at in (0.0, 1.0):
        video, _ = read_clip(tmp_path / "cut.mkv", 1, 64, at)
        assert len(video) == 25


def test_nothing_usable_says_what_was_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes((folder / "one.mp4").read_bytes())
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"found 1 videos, none with captions .*1 \.tar.*expected a folder"
    ):
        clips_from_files(str(tmp_path), 1, 0, 1)
    (tmp_path / "a.txt").write_text("a flash")
    with pytest.raises(
        ValueError, match=r"1 videos, none of them usable .*a\.mp4: too short: found 2\.96 s"
    ):
        next(clips_from_files(str(tmp_path), 9, 0, 1))
    with pytest.raises(ValueError, match="found nothing, expected a folder"):
        clips_from_files(str(tmp_path / "nowhere"), 1, 0, 1)
    with pytest.raises(UnusableClipError, match="unreadable"):
        read_clip(io.BytesIO(b""), 1, 64, 0)


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))


def test_shards_are_read_with_webdataset(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("webdataset")
    data = (folder / "one.mp4").read_bytes()
    caption = json.dumps({"caption": ["x", "y"]}).encode()
    first = {"in/a.mp4": data, "in/a.txt": b"a", "in/b.mp4": b"broken", "in/b.txt": b"b"}
    second = {"c.txt": b"c", "c.MP4": data, "d.json": caption, "d.mp4": data, "e.mp4": data}
    shard(tmp_path / "s-00.tar", first)
    shard(tmp_path / "s-01.tar", second)
    source = str(tmp_path / "s-{00..01}.tar")
    with caplog.at_level(logging.WARNING, "mutualforcing"):
        clips = list(islice(clips_from_files(source, 1, 5, 2), 9))
    for epoch in (clips[:3], clips[3:6], clips[6:]):
        assert {clip.captions for clip in epoch} == {("a", "a"), ("c", "c"), ("x", "y")}
    assert all(
        clip.audio.shape == (16160,) and clip.video.shape == (25, 64, 64, 3) for clip in clips
    )
    assert sorted(record.getMessage().split(": ")[0] for record in caplog.records) == [
        f"skipped {tmp_path / 's-00.tar'}:in/b",
        f"skipped {tmp_path / 's-01.tar'}:e",
    ]
    again = islice(clips_from_files(source, 1, 5, 2), 9)
    assert all(np.array_equal(a.video, b.video) for a, b in zip(clips, again, strict=True))


def test_shards_that_are_missing_or_broken_are_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(ValueError, match=r"s-0\.tar \(2 of 2 shards are missing\)"):
        clips_from_files(str(tmp_path / "s-{0..1}.tar"), 1, 0, 1)
    with pytest.raises(ValueError, match="found no file pipe:"):
        clips_from_files(f"pipe:touch {tmp_path}/made.tar", 1, 0, 1)
    data = (folder / "one.mp4").read_bytes()
    shard(tmp_path / "s.tar", {"a.mp4": data, "a.txt": b"a", "b.mp4": data, "b.txt": b"b"})
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: len(data) + 9000])
    with caplog.at_level(logging.WARNING, "mutualforcing"):
        clips = list(islice(clips_from_files(str(tmp_path / "s.tar"), 1, 0, 1), 3))
    assert {clip.captions for clip in clips} == {("a",)}
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"skipped the rest of {tmp_path / 's.tar'}"
    ]
    (tmp_path / "s.tar").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match="found no video"):
        next(clips_from_files(str(tmp_path / "s.tar"), 1, 0, 1))
