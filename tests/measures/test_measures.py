"""What is measured of films, on films of which it is known."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from mutual_forcing.lab.world.render import render
from mutual_forcing.lab.world.scene import sample_scene
from mutual_forcing.measures import sound
from mutual_forcing.measures.film import Film, UnreadableFilmError, film_of, read_film
from mutual_forcing.measures.plot import HIGHEST, WIDTH, plot

FPS, RATE = 24, 16_000
RNG = np.random.default_rng


def events(seconds: float, apart: float = 0.7) -> np.ndarray:
    """Times that do not come at one pace."""
    return np.cumsum(RNG(3).uniform(0.5 * apart, 1.5 * apart, int(seconds / apart)))


def flashes(times: np.ndarray, seconds: float, size: int = 16) -> np.ndarray:
    """Grey frames that are white for a quarter of a second from each of the times on."""
    at = np.arange(round(seconds * FPS)) / FPS
    lit = ((at[:, None] >= times - 1e-6) & (at[:, None] < times + 1 / 4)).any(1)
    levels = np.where(lit, 255, 60).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (len(at), size, size, 3))


def beeps(times: np.ndarray, seconds: float) -> np.ndarray:
    at = np.arange(round(seconds * RATE)) / RATE
    wave = np.zeros(len(at), np.float32)
    for time in times:
        wave += 0.5 * np.sin(2 * np.pi * 440 * at) * (at >= time) * (at < time + 1 / 4)
    return wave[None].astype(np.float32)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Soft hiss, the same at all times."""
    return RNG(seed).normal(0, 0.05, (1, round(seconds * RATE))).astype(np.float32)


def waves(seconds: float, seed: int = 0) -> np.ndarray:
    """A picture of hills that wander, never the same twice."""
    generator = RNG(seed)
    speeds, places = generator.uniform(0.3, 2, (2, 6)), generator.uniform(0, 6, (3, 6))
    time = np.arange(round(seconds * FPS))[:, None, None, None] / FPS
    x, y = np.meshgrid(np.linspace(0, 3, 24), np.linspace(0, 3, 16))
    grid = sum(
        np.sin(speeds[0, i] * time * 2 + places[0, i] * x[None, :, :, None] + places[1, i])
        * np.cos(speeds[1, i] * time + places[2, i] * y[None, :, :, None] + np.arange(3))
        for i in range(6)
    )
    return (128 + 20 * grid).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("late", [-0.2, 0.0, 0.1])
def test_the_offset_is_how_late_the_sound_is(late: float) -> None:
    times = np.round(events(8) * FPS) / FPS
    found = film_of(flashes(times, 9), FPS, beeps(times + late, 9), RATE).offset
    assert found.ms == pytest.approx(1000 * late, abs=8)
    assert found.agreement > 0.6


def test_sound_that_plays_too_slowly_drifts_and_unrelated_sound_has_no_offset() -> None:
    times = np.round(events(19) * FPS) / FPS
    found = film_of(flashes(times, 20), FPS, beeps(times * 1.01, 20), RATE).offset
    assert found.drift == pytest.approx(200, abs=30) and len(found.parts) >= 3
    assert film_of(flashes(times, 20), FPS, noise(20), RATE).offset.ms is None
    assert film_of(waves(9), FPS, beeps(times[:12], 9), RATE).offset.ms is None


@pytest.mark.parametrize("kind", ["ball", "bell", "drum"])
def test_true_clips_are_nearly_in_time(kind: str) -> None:
    """What hits moves before it is heard, and each kind in its own way: docs/folder.md says so."""
    clip = render(sample_scene(RNG([7, 1]), kind), 8)
    for late in (0, 1600):
        wave = np.pad(clip.audio, (late, 0))[: len(clip.audio)]
        found = film_of(clip.video, FPS, wave[None], RATE).offset
        assert found.ms == pytest.approx(late / 16, abs=70)


def test_loudness_is_that_of_the_standard() -> None:
    """EBU Tech 3341, case 1: a stereo sine of 1 kHz at -23 dBFS reads -23 LUFS, within 0.1."""
    tone = 10 ** (-23 / 20) * np.sin(2 * np.pi * 1000 * np.arange(20 * 48_000) / 48_000)
    wave = np.stack([tone, tone]).astype(np.float32)
    heard = film_of(flashes(np.zeros(1), 20), FPS, wave, 48_000).sound
    assert heard.loudness == pytest.approx(-23, abs=0.1) and heard.span < 0.1
    assert heard.peak == pytest.approx(-23, abs=0.2) and heard.channels == 2
    assert np.median(heard.momentary) == pytest.approx(-23, abs=0.1)
    assert heard.silent == heard.clipped == 0 and not len(heard.clicks)


def test_clipping_silence_and_clicks_are_counted() -> None:
    wave = 0.5 * np.sin(2 * np.pi * 200 * np.arange(8 * RATE) / RATE)[None].astype(np.float32)
    wave[:, 4 * RATE : 6 * RATE] = 0
    wave[:, RATE : RATE + 800] = 1  # entered and left by a jump
    heard = film_of(flashes(np.zeros(1), 8), FPS, wave, RATE).sound
    assert heard.silent == pytest.approx(0.25, abs=0.01)
    assert heard.clipped == pytest.approx(799 / (8 * RATE), rel=1e-6)
    # A wave that is cut off at nought only bends.
    assert heard.clicks == pytest.approx([1, 1 + 800 / RATE], abs=0.005)
    nothing = film_of(flashes(np.zeros(1), 2), FPS, np.zeros((1, 2 * RATE)), RATE).sound
    assert nothing.silent == 1 and nothing.loudness is None and nothing.peak is None


def test_in_pieces_sound_measures_as_it_does_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    wave, frames = noise(7.3), flashes(np.zeros(1), 7)
    wave[:, 3 * RATE :] *= 3
    whole = film_of(frames, FPS, wave, RATE).sound
    monkeypatch.setattr(sound, "PIECE", 2 * RATE)
    pieces = film_of(frames, FPS, wave, RATE).sound
    assert np.array_equal(whole.borders, pieces.borders) and len(whole.borders) == 6
    for name, steps in whole.steps.items():
        np.testing.assert_allclose(steps.border, pieces.steps[name].border, rtol=1e-6)
    assert np.array_equal(whole.lows, pieces.lows) and len(whole.rise) == len(pieces.rise)
    assert np.corrcoef(whole.rise, pieces.rise)[0, 1] > 0.99


def test_seams_stand_out_where_blocks_were_joined_and_nowhere_else() -> None:
    frames, wave = waves(12), noise(12)
    whole = film_of(frames, FPS, wave, RATE)
    assert {seam.borders for seam in whole.seams.values()} == {11}
    assert all(0.2 < seam.rank < 0.8 for seam in whole.seams.values())
    joined, torn = frames.astype(int), wave.copy()
    for second in range(1, 12):
        joined[1 + second * FPS :] += 25 * (-1) ** second
        torn[:, 160 + second * RATE :] *= (0.3, 1 / 0.3)[second % 2]
    film = film_of(joined.clip(0, 255).astype(np.uint8), FPS, torn, RATE)
    assert film.seams["picture"].rank > 0.98 and film.seams["level"].rank > 0.98
    assert film.seam_rate > 1.8 > 0.6 > whole.seam_rate
    assert film_of(frames[:48], FPS, wave[:, : 2 * RATE], RATE, 0.5).seams["level"].borders == 3


def test_frozen_repeated_cut_and_drifting_pictures_are_told_apart() -> None:
    plain = waves(6)
    seen = film_of(plain, FPS).pictures
    assert seen.frozen == 0 and not seen.repeated.any() and not len(seen.cuts)
    loop = film_of(np.concatenate([plain[:48], plain[:48]]), FPS).pictures
    assert loop.repeated.tolist() == [False, False, True, True]
    stuck = np.concatenate([plain[:48], plain[47:48].repeat(24, 0), plain[48:72]])
    assert film_of(stuck, FPS).pictures.frozen == pytest.approx(25 / 96, abs=0.01)
    cut = np.concatenate([plain[:48], 255 - plain[48:96]])
    assert film_of(cut, FPS).pictures.cuts.tolist() == [48]
    faded = (plain * np.linspace(1, 0.5, len(plain))[:, None, None, None]).astype(np.uint8)
    drifted = film_of(faded, FPS).pictures
    assert drifted.overlap[0] == drifted.layout[0] == 1
    assert drifted.overlap[-1] < 0.5 * seen.overlap[-1]
    assert drifted.colours[-1].mean() == pytest.approx(0.54 * seen.colours[-1].mean(), rel=0.05)
    mirrored = film_of(np.concatenate([plain[:24], plain[:24, :, ::-1]]), FPS).pictures
    assert mirrored.overlap[-1] > 0.99 and mirrored.layout[-1] < 0.5


def written(path: Path, times: np.ndarray, seconds: float, lead: float, gap: float) -> None:
    """A file whose sound begins late, and lacks `gap` seconds in its middle."""
    wave = (32767 * beeps(times, seconds)).astype(np.int16)
    with av.open(path, "w") as out:
        video = out.add_stream("ffv1", rate=FPS)
        video.width, video.height, video.pix_fmt = 32, 16, "bgr0"
        audio = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for index, picture in enumerate(flashes(times, seconds, 32)[:, :16]):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for begin in range(round(lead * RATE), wave.shape[1], 1600):
            if 3 <= begin / RATE < 3 + gap:
                continue
            part = np.ascontiguousarray(wave[:, begin : begin + 1600])
            frame = av.AudioFrame.from_ndarray(part, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, begin, Fraction(1, RATE)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))


def test_a_file_is_measured_by_its_timestamps(tmp_path: Path) -> None:
    path, times = tmp_path / "film.mkv", np.round(events(7) * FPS) / FPS
    written(path, times, 8, lead=0.5, gap=0.5)
    film = read_film(path)
    seen, heard = film.pictures, film.sound
    assert (seen.size, len(seen.times)) == ((32, 16), 8 * FPS)
    assert seen.rate == pytest.approx(FPS, abs=0.01) and seen.uneven < 1.1  # MKV rounds to ms
    assert (heard.lead, heard.gaps) == pytest.approx((0.5, 0.5), abs=0.002)
    assert heard.lead + heard.length == pytest.approx(8, abs=0.002) and abs(heard.slip) < 2
    assert film.offset.ms == pytest.approx(0, abs=8)
    with path.open("rb") as file:
        assert read_film(file).offset == film.offset
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:9,\nfilm.mkv\n#EXT-X-ENDLIST\n")
    with pytest.raises(UnreadableFilmError, match="unreadable"):
        read_film(tmp_path / "list.mp4")


def colours(film: Film, top: int, bottom: int) -> set[tuple[int, ...]]:
    picture = np.array(plot(film, "ü 电影"), np.int64)
    assert picture.shape[1] == WIDTH and picture.shape[0] < 700 + HIGHEST
    packed = np.unique(picture[top:bottom] @ (1 << 16, 1 << 8, 1))
    return {(one >> 16, one >> 8 & 255, one & 255) for one in packed.tolist()}


def test_a_plot_is_drawn_of_any_film() -> None:
    times = events(7)
    frames = np.tile(np.array([200, 30, 90], np.uint8), (8 * FPS, 16, 32, 1))
    full = film_of(frames, FPS, beeps(times, 8), RATE)
    assert (200, 30, 90) in colours(full, 16, 80)  # the frames lie on top
    for film in (
        film_of(frames[:1], FPS),
        film_of(frames[:5, :, :3], FPS, np.zeros((1, 9)), RATE),
        film_of(frames[:, :2, :2], 5, noise(2), 1000),
    ):
        assert len(colours(film, 0, 9999)) > 3
    with pytest.raises(UnreadableFilmError, match="found no frame"):
        film_of([], FPS)
