"""Films to what LTX-2 is trained on: what is cut, kept, left out and gone on with.

With LTX-2's own encoders, and killed, in ComfyUI: `films_to_checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

pytest.importorskip("torchaudio.functional", exc_type=(ImportError, OSError))

from mutual_forcing.lab.training import ltx2_latents
from mutual_forcing.lab.training.clip_reader import film_length, read_clip
from mutual_forcing.lab.training.data import LatentSet
from mutual_forcing.lab.training.ltx2_latents import GrowingArray, encode_films, starts_of
from mutual_forcing.networks.config import TransformerConfig


class Encoders:
    """In the place of LTX-2's: numbers that tell what was given."""

    def pictures(self, video: np.ndarray) -> torch.Tensor:
        frames = torch.from_numpy(video).float()[::8].mean((1, 2, 3))
        return frames.expand(128, 2, 3, -1).movedim(-1, 1)

    def sound(self, wave: np.ndarray, blocks: int) -> torch.Tensor:
        assert wave.shape == (2, 160 + 16000 * blocks)
        return torch.from_numpy(wave).abs().mean(1).repeat(26 + 25 * (blocks - 1), 64)

    def caption(self, text: str) -> torch.Tensor:
        if len(text) > 20:
            raise ValueError("its caption has 21 tokens, expected at most 20")
        return torch.full((4, 2, 8), float(len(text)))


def film(path: Path, seconds: float, caption: str, channels: str = "stereo") -> Path:
    """Left dark and right bright, 64 x 32; heard in the left ear, or in the only one."""
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width, video.height = 64, 32
        audio = out.add_stream("pcm_s16le", rate=16000, layout=channels)
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, 32:] = 200
        for _ in range(round(24 * seconds)):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(video.encode(None))
        wave = np.zeros((1, round(16000 * seconds) * (1 + (channels == "stereo"))), np.int16)
        wave[:, :: 1 + (channels == "stereo")] = 8000
        frame = av.AudioFrame.from_ndarray(wave, "s16", channels)
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    path.with_suffix(".txt").write_text(caption)
    return path


def test_clips_may_be_wide_and_stereo(tmp_path: Path) -> None:
    wide, sound = read_clip(film(tmp_path / "a.mov", 1.2, "x"), 1, (16, 48), 0, stereo=True)
    assert wide.shape == (25, 16, 48, 3) and sound.shape == (2, 16160)
    assert wide[0, :, :20].max() < 20 and wide[0, :, 28:].min() > 180
    assert abs(sound[0, 99:-99] - 8000 / 32768).max() < 1e-3 and not sound[1].any()
    tall, _ = read_clip(tmp_path / "a.mov", 1, (32, 8), 0)
    assert tall.shape == (25, 32, 8, 3) and tall[0, :, :3].max() < 20 < 180 < tall[0, :, 5:].min()
    one, both = (
        read_clip(film(tmp_path / "b.mov", 1.2, "x", "mono"), 1, 16, 0, stereo=stereo)[1]
        for stereo in (False, True)
    )
    assert np.array_equal(both, np.stack([one, one])) and one[5000] > 0.2
    assert film_length(tmp_path / "a.mov") == pytest.approx(27 / 24, abs=0.05)


def test_films_are_cut_one_clip_after_the_other() -> None:
    assert starts_of(4.9, 5, None) == []
    assert starts_of(5.0, 5, None) == [0]
    assert starts_of(14.0, 4, None) == pytest.approx([0, 0.4, 0.8])
    assert starts_of(14.0, 4, 1) == [0.5] and starts_of(14.0, 4, 9) == starts_of(14.0, 4, None)
    assert starts_of(14.0, 4, 2) == pytest.approx([1 / 3, 2 / 3])


def test_an_array_grows_and_is_cut_back_to_what_was_kept(tmp_path: Path) -> None:
    path, rows = tmp_path / "x.npy", np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    array = GrowingArray(path, 0)
    for row in rows[:2]:
        array.add(row)
    array.keep()
    array.add(rows[2] + 100)  # never kept
    array.file.flush()
    again = GrowingArray(path, 2)
    for row in rows[2:]:
        again.add(row)
    again.keep()
    assert np.array_equal(np.load(path, mmap_mode="r"), rows)
    with pytest.raises(ValueError, match=r"rows of \[2, 3\], found \(1, 3\)"):
        again.add(rows[0, :1])
    with pytest.raises(ValueError, match="lacks some of its 9 rows"):
        GrowingArray(path, 9)


def options(tmp_path: Path, *more: str) -> argparse.Namespace:
    given = ["--source", str(tmp_path / "in"), "--base", "b", "--text-encoder", "t"]
    given += ["--seconds", "1", "--size", "96", "64", "--out", str(tmp_path / "out")]
    return ltx2_latents.parser().parse_args([*given, *more])


def test_a_folder_is_what_training_reads_and_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    film(tmp_path / "in/a.mov", 3.2, "one\ntwo 2")
    film(tmp_path / "in/b.mov", 1.2, "a caption that is longer than that")
    film(tmp_path / "in/c.mov", 0.5, "short")
    made = encode_films(options(tmp_path, "--captions", "3"), Encoders())
    assert {Path(k).name: v.split(":")[0][:11] for k, v in made.left_out.items()} == {
        "b.mov": "its caption",
        "c.mov": "too short",
    }
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert about["clips"] == about["done"] == 3 and about["left out"] == made.left_out
    captions = np.load(tmp_path / "out/captions.npy")
    assert captions[..., 0, 0, 0].tolist() == [[3, 5, 3]] * 3
    config = TransformerConfig(video_first_block=4, audio_first_block=26)
    assert LatentSet([tmp_path / "out"], config, {}).blocks == [1]
    # A film that comes later is taken in; the others are not read again.
    film(tmp_path / "in/0.mov", 2.2, "new")
    more = encode_films(options(tmp_path, "--captions", "3"), Encoders())
    assert more.arrays[0].rows == 5 and len(more.films) == 4
    with pytest.raises(ValueError, match="holds a set made with"):
        encode_films(options(tmp_path), Encoders())
    for path in (tmp_path / "in").glob("[0a]*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"found 2 films, none usable \(.*too short"):
        encode_films(options(tmp_path, "--out", str(tmp_path / "new")), Encoders())
