"""Chunks through codecs that look both ways: one after the other they are the whole."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from mutual_forcing.networks.layout import PAPER_LAYOUT, RELEASED_LAYOUT, BlockLayout
from mutual_forcing.samplers.chunk import ChunkOrigin, chunk_origin, chunk_tensors
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.overlap import (
    Growing,
    decode_pictures,
    decode_sound,
    needed_from,
    piece_of,
)
from mutual_forcing.samplers.state import BlockLatents, StreamSettings, StreamState

BINS, RATE = 16, 24000


def stream(layout: BlockLayout, blocks: int) -> StreamState:
    """Random latents of some blocks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latents = tuple(
        BlockLatents(
            draw(1, 3, v1 - v0, 2, 2),
            draw(1, a1 - a0, 2 * BINS),
        )
        for (v0, v1), (a0, a1) in (
            (layout.video_span(i), layout.audio_span(i)) for i in range(blocks)
        )
    )
    return StreamState(StreamSettings(2, 2, 2), "id", layout, latents)


def video_codec(reach: int):
    """Latents to frames, each the mean of the latents up to `reach` around its own."""

    def decode(video: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(video, (0, 0, 0, 0, reach, reach), mode="replicate")
        smooth = padded.unfold(2, 2 * reach + 1, 1).mean(-1)
        frames = smooth.repeat_interleave(8, dim=2)[:, :, 7:]
        place = torch.arange(frames.shape[2])[None, None, :, None, None]
        return (frames + ((place - 1) % 8) / 10).movedim(1, -1)

    return decode


def audio_codec(before: int, after: int):
    """Latents to samples: a running mean over earlier latents and a few later ones."""
    hop = RATE // 100

    def decode(audio: torch.Tensor) -> torch.Tensor:
        flat = audio.mean(-1)
        padded = torch.nn.functional.pad(flat, (before, after), mode="replicate")
        smooth = padded.unfold(2, before + after + 1, 1).mean(-1)
        return smooth.repeat_interleave(4 * hop, dim=2)[:, :, 3 * hop :]

    return decode


def chunks(state: StreamState, ends: tuple[int, ...], clock: Clock) -> list[ChunkOrigin]:
    """The stream cut into chunks that end after these blocks."""
    starts = (0, *ends[:-1])
    return [
        chunk_origin(replace(state, latents=state.latents[:end]), start, clock, BINS)
        for start, end in zip(starts, ends, strict=True)
    ]


LAYOUTS = {
    "paper": (PAPER_LAYOUT, 24),
    "released": (RELEASED_LAYOUT, 24),
    "25 fps": (BlockLayout(4, 25, 3, 24), 25),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_chunks_one_after_the_other_are_the_whole(name: str, overlap: int) -> None:
    layout, fps = LAYOUTS[name]
    clock = Clock(layout, Fraction(fps))
    state = stream(layout, 9)
    origins = chunks(state, (3, 5, 9), clock)
    video, audio = chunk_tensors(chunk_origin(state, 0, clock, BINS))
    pictures, sounds = [], []
    # The codec's first frame is its own: one latent of overlap is needed for it besides the reach.
    decode_video, decode_audio = video_codec(overlap - 1), audio_codec(30, 3)
    for origin in origins:
        piece = piece_of(clock, origin, overlap=overlap, is_last=origin is origins[-1])
        so_far = chunk_tensors(replace(origin, first_block=0))
        pictures.append(decode_pictures(clock, so_far[0], piece, decode_video))
        sounds.append(decode_sound(clock, so_far[1], piece, RATE, decode_audio))
    found, expected = torch.cat(pictures, dim=1), decode_video(video)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)
    found, expected = torch.cat(sounds, dim=-1), decode_audio(audio)
    assert abs(found.shape[-1] - expected.shape[-1]) <= RATE // fps
    length = min(found.shape[-1], expected.shape[-1])
    assert torch.allclose(found[..., :length], expected[..., :length], atol=1e-5)


def test_picture_and_sound_of_a_piece_last_equally_long() -> None:
    clock = Clock(RELEASED_LAYOUT)
    state = stream(RELEASED_LAYOUT, 6)
    first, second = chunks(state, (3, 6), clock)
    for origin, last in ((first, False), (second, False), (second, True)):
        piece = piece_of(clock, origin, is_last=last)
        video, audio = chunk_tensors(replace(origin, first_block=0))
        frames = decode_pictures(clock, video, piece, video_codec(1)).shape[1]
        samples = decode_sound(clock, audio, piece, RATE, audio_codec(3, 3)).shape[-1]
        assert abs(Fraction(frames, 24) - Fraction(samples, RATE)) <= Fraction(1, 24)


def test_a_chunk_that_would_be_held_back_whole_is_refused() -> None:
    clock = Clock(RELEASED_LAYOUT)
    (origin,) = chunks(stream(RELEASED_LAYOUT, 1), (1,), clock)
    assert piece_of(clock, origin, overlap=3).stop == 1
    with pytest.raises(ValueError, match="at least 1"):
        piece_of(clock, origin, overlap=0)
    with pytest.raises(ValueError, match="last chunk"):
        piece_of(clock, origin, overlap=4)
    assert piece_of(clock, origin, overlap=4, is_last=True).stop == 25


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("first", [0, 4, 7])
def test_what_is_shown_of_a_growing_stream_is_the_whole_a_little_late(
    name: str, first: int
) -> None:
    """From its beginning, or from where an earlier clip ended."""
    layout, fps = LAYOUTS[name]
    clock, after = Clock(layout, Fraction(fps)), 2
    (origin,) = chunks(stream(layout, 9), (9,), clock)
    video, audio = chunk_tensors(origin)
    decode_video, decode_audio = video_codec(1), audio_codec(30, 3)
    growing = Growing(clock, first, before=2, after=after)
    pictures, sounds = [], []
    for blocks, is_last in [*((n, False) for n in range(first + 1, 10)), (9, True)]:
        piece = growing.piece(blocks, is_last=is_last)
        if piece is None:  # fewer latents than are held back
            continue
        late = 0 if is_last else after * clock.video_stride
        assert piece.stop == clock.frames(blocks) - late
        # No more of the stream is held than the piece needs.
        part = needed_from(clock, piece, RATE)
        held = replace(origin.state, latents=origin.state.latents[:blocks])
        seen, heard = chunk_tensors(chunk_origin(held, part, clock, BINS))
        skipped = layout.video_span(part)[0], layout.audio_span(part)[0]
        pictures.append(decode_pictures(clock, seen, piece, decode_video, skipped[0]))
        sounds.append(decode_sound(clock, heard, piece, RATE, decode_audio, skipped[1]))
    found, expected = torch.cat(pictures, dim=1), decode_video(video)[:, clock.frames(first) :]
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)
    found = torch.cat(sounds, dim=-1)
    begin = int(clock.frames(first) * RATE / clock.fps)
    expected = decode_audio(audio)[..., begin : begin + found.shape[-1]]
    assert torch.allclose(found, expected, atol=1e-5)
    assert abs(found.shape[-1] / RATE - expected.shape[-1] / RATE) <= 1 / fps
