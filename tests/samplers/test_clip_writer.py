"""The clip on disk: both streams equally long, playable at any moment, clear when it is full."""

from __future__ import annotations

import errno
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from mutual_forcing.networks.layout import PAPER_LAYOUT
from mutual_forcing.samplers import clip_writer
from mutual_forcing.samplers.clip_writer import ClipWriter
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.contact_sheet import ContactSheet
from mutual_forcing.samplers.decode import DecodedBlock
from PIL import Image

CLOCK = Clock(PAPER_LAYOUT)
FRAME = Fraction(1, 24)


def block(index: int, size: int = 32, clips: int = 1) -> DecodedBlock:
    """A square that moves to the right by a pixel a frame, and a tone of 500 Hz."""
    first, end = CLOCK.frame_span(index)
    video = torch.full((clips, end - first, size, size, 3), 0.2)
    for frame in range(first, end):
        at = frame % (size - 8)
        video[:, frame - first, 8:16, at : at + 8] = torch.tensor([0.9, 0.3, 0.1])
    samples = torch.arange(*CLOCK.sample_span(index)) / CLOCK.sample_rate
    return DecodedBlock(video, (0.5 * torch.sin(samples * 500 * 2 * torch.pi)).expand(clips, 1, -1))


def written(path: Path, blocks: int) -> Path:
    with ClipWriter(path, CLOCK, 32, 32) as writer:
        for index in range(blocks):
            writer.write(block(index))
    return path


def playable(path: Path) -> tuple[int, int]:
    """How many frames and samples a player gets before the file ends or is broken."""
    counts = {"video": 0, "audio": 0}
    for kind in counts:
        with av.open(str(path)) as file:
            try:
                for frame in file.decode(**{kind: 0}):
                    counts[kind] += 1 if kind == "video" else frame.samples
            except av.error.FFmpegError:
                pass
    return counts["video"], counts["audio"]


def test_what_was_played_stands_in_the_file_at_any_moment(tmp_path: Path) -> None:
    path, said = tmp_path / "clip.mp4", "0: a"

    def tag() -> str:
        with av.open(str(path)) as file:
            return file.metadata[clip_writer.SCHEDULE].strip()

    with ClipWriter(path, CLOCK, 32, 32) as writer:
        for index in range(4):
            writer.tag(said)
            writer.write(block(index))
            assert index == 0 or tag() == said
            said += f"\n{index + 1} keep: ein roter Würfel →"
        writer.tag(said + "\n9: " + "x" * 10_000)
    # Whole lines, as many as there is room for.
    assert tag() == said and playable(path)[0] == CLOCK.frames(4)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_both_streams_are_whole_and_equally_long(tmp_path: Path, blocks: int) -> None:
    path = written(tmp_path / "clip.mp4", blocks)
    frames, samples = playable(path)
    assert frames == CLOCK.frames(blocks)
    assert 0 <= samples - CLOCK.samples(blocks) < 1024  # AAC ends with a whole packet
    with av.open(str(path)) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert (video.width, video.height, video.average_rate) == (256, 256, 24) or blocks == 1
        assert (audio.rate, audio.channels) == (16000, 1)
        lengths = [stream.duration * stream.time_base for stream in (video, audio)]
        starts = [stream.start_time * stream.time_base for stream in (video, audio)]
    assert abs(lengths[0] - lengths[1]) <= FRAME or blocks == 1
    assert starts == [0, 0]


def test_what_was_written_is_what_is_seen_and_heard(tmp_path: Path) -> None:
    path = written(tmp_path / "clip.mp4", 3)
    with av.open(str(path)) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    expected = torch.cat([block(i).video[0] for i in range(3)]).numpy() * 255
    found = np.stack(pictures)[:, 4::8, 4::8]  # the middle of each enlarged pixel
    assert np.abs(found - expected).mean() < 4
    with av.open(str(path)) as file:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    spectrum = np.abs(np.fft.rfft(sound[:16000]))
    assert spectrum.argmax() == 500 and np.abs(sound[1000:30000]).max() == pytest.approx(
        0.5, abs=0.06
    )


def test_a_file_that_is_cut_short_still_plays(tmp_path: Path) -> None:
    data = written(tmp_path / "clip.mp4", 5).read_bytes()
    for share in (0.3, 0.6, 0.9):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(data[: int(len(data) * share)])
        frames, samples = playable(cut)
        assert frames > 0.6 * share * CLOCK.frames(5) and samples > 0.6 * share * CLOCK.samples(5)


def test_the_file_plays_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    writer = ClipWriter(path, CLOCK, 32, 32)
    for index in range(4):
        writer.write(block(index))
    frames, _ = playable(path)
    writer.close()
    assert frames >= CLOCK.frames(3)


def test_the_file_is_at_most_a_second_behind_what_was_handed_over(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    writer = ClipWriter(path, CLOCK, 32, 32)
    for index in range(4):
        writer.write(block(index))
        # As a kill would leave it, from the single frame of block 0 on.
        frames, samples = playable(path)
        assert frames >= max(1, CLOCK.frames(index + 1) - 24)
        assert samples >= max(160, CLOCK.samples(index + 1) - 16000)
    writer.close()
    assert playable(path)[0] == CLOCK.frames(4)


def test_an_older_clip_stays_until_the_first_block(tmp_path: Path) -> None:
    old = written(tmp_path / "old.mp4", 4).read_bytes()
    path, new = tmp_path / "clip.mp4", tmp_path / "new.mp4"
    path.write_bytes(old)
    with ClipWriter(path, CLOCK, 32, 32), ClipWriter(new, CLOCK, 32, 32):
        assert path.read_bytes() == old
    assert path.read_bytes() == old and not new.exists()
    assert playable(written(path, 1)) == (1, 1024)
    path.write_bytes(old)
    assert playable(written(path, 2))[0] == CLOCK.frames(2)


def test_a_second_writer_of_a_file_is_refused_while_the_first_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with ClipWriter(path, CLOCK, 32, 32) as first:
        first.write(block(0))
        with pytest.raises(OSError, match=r"another run is writing .*choose another name"):
            ClipWriter(path, CLOCK, 32, 32)
        first.write(block(1))
    assert playable(path)[0] == CLOCK.frames(2)
    written(path, 3)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """An FFmpeg that was built without some encoders."""
    plain = av.open

    class Container:
        def __init__(self, container: object) -> None:
            self._container = container

        def __getattr__(self, name: str) -> object:
            return getattr(self._container, name)

        def add_stream(self, name: str, **options: object) -> object:
            if name in missing:
                raise av.codec.codec.UnknownCodecError(name)
            return self._container.add_stream(name, **options)

    def opened(file: object, mode: str = "r", **options: object) -> object:
        container = plain(file, mode, **options)
        return Container(container) if mode == "w" else container

    monkeypatch.setattr(clip_writer.av, "open", opened)


def test_without_h264_another_encoder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "libx264", "libopenh264")
    path = written(tmp_path / "clip.mp4", 3)
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == "mpeg4"
    assert playable(path)[0] == CLOCK.frames(3)


@pytest.mark.parametrize("missing", [("aac",), ("libx264", "libopenh264", "mpeg4")])
def test_without_any_encoder_the_older_clip_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    without(monkeypatch, *missing)
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"an older clip")
    with pytest.raises(ValueError, match=r"none of the encoders .*install PyAV"):
        ClipWriter(path, CLOCK, 32, 32)
    assert path.read_bytes() == b"an older clip"


def test_an_encoder_that_fails_is_told_and_what_was_written_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object) -> None:
        raise av.error.ExternalError(1, "Generic error in an external library")

    path = tmp_path / "clip.mp4"
    writer = ClipWriter(path, CLOCK, 32, 32)
    for index in range(3):
        writer.write(block(index))
    monkeypatch.setattr(clip_writer._Encoder, "write", fails)
    with pytest.raises(OSError, match=r"encoded \(Generic.*install PyAV.*stays and plays"):
        writer.write(block(3))
    assert playable(path)[0] == CLOCK.frames(3)


def test_a_full_disk_is_told_and_what_was_written_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tmp_path / "whole.mp4", 5).stat().st_size
    room, plain = [whole // 2], clip_writer._File.write

    class SmallDisk:
        @staticmethod
        def write(self: clip_writer._File, data: bytes) -> int:
            if len(data) > room[0]:
                plain(self, bytes(data)[: room[0]])
                room[0] = 0
                self.error = OSError(errno.ENOSPC, "No space left on device")
                raise self.error
            room[0] -= len(data)
            return plain(self, data)

    monkeypatch.setattr(clip_writer._File, "write", SmallDisk.write)
    path = tmp_path / "clip.mp4"
    with pytest.raises(OSError, match=r"disk is full: the clip.*make room.*stays and plays"):
        written(path, 5)
    frames, _ = playable(path)
    assert frames >= 24


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
def test_a_disk_that_is_really_full_is_told() -> None:
    with pytest.raises(OSError, match="disk is full"):
        written(Path("/dev/full"), 3)


def test_a_short_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw write may take only a part of what it is given."""
    path = tmp_path / "f"
    with clip_writer._File(path) as file:
        file.begin()
        data = bytes(range(256)) * 100
        assert file.write(data) == len(data)
    assert path.read_bytes() == data


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot be written.*choose another folder or name"):
        ClipWriter(tmp_path, CLOCK, 32, 32)
    with pytest.raises(ValueError, match="odd side"):
        ClipWriter(tmp_path / "a.mp4", CLOCK, 33, 33, scale=1)
    writer = ClipWriter(tmp_path / "b.mp4", CLOCK, 32, 32)
    with pytest.raises(ValueError, match=r"found 2 clips.*one writer per clip"):
        writer.write(block(0, clips=2))
    with pytest.raises(ValueError, match=r"64x64 pixels.*expected 1 of 32x32"):
        writer.write(block(0, size=64))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="a closed writer"):
        writer.write(block(0))


def test_the_contact_sheet_shows_frames_over_the_waveform(tmp_path: Path) -> None:
    sheet = ContactSheet(CLOCK, CLOCK.frames(4), columns=5)
    with pytest.raises(ValueError, match="no frame to show"):
        sheet.save(tmp_path / "sheet.png")
    for index in range(4):
        sheet.add(*block(index))
    assert [frame for frame, _ in sheet.pictures] == [0, 18, 36, 54, 72]
    assert len(np.concatenate(sheet.highs)) == CLOCK.samples(4) // 160
    assert np.concatenate(sheet.highs).max() == pytest.approx(0.5, abs=0.01)
    sheet.save(tmp_path / "sheet.png", "a moving square")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > image.height > 200
        assert np.asarray(image.convert("RGB")).std() > 10


@pytest.mark.parametrize("scale", [2, 4, 3])
def test_enlarged_pictures_have_the_colours_of_theirs(scale: int) -> None:
    """By an even number exactly but for rounding: of four pixels none is of another colour."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    frames = list(clip_writer._frames(pictures, scale))
    shown = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    wanted = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    assert np.abs(shown.astype(int) - wanted).max() <= 6
