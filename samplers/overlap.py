"""A chunk of a stream decoded by a codec that looks both ways, with what lies on either side of it.

b batch, c channels, f h w video latent grid, s audio latents, q frequency bins, F H W pixel frames
and size, n samples.
LTX-2's video decoder sees latents before and after the one that it decodes, its audio decoder what
came before and its vocoder a little of what comes. So a chunk is decoded together with `OVERLAP`
latents on either side and cut out. The far side of its last latents is not there yet: they are held
back and come with the next chunk, or at the end of the stream. Once the decoder's reach lies within
the overlap this is exactly the whole, decoded. Reach of the decoders: docs/omniforcing.md, section
1, VAEs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from torch import Tensor

from .chunk import ChunkOrigin
from .clock import Clock

OVERLAP = 6
"""Video latents on either side, by default: two seconds of LTX-2. With random weights at its real
depth the worst frame is then 0.03 of a standard deviation off; with half as many it is 0.37."""
REACH = 22
"""Video latents before a moment that LTX-2's decoder may see; real weights see less far."""
GLIMPSE = 3
"""Latents on either side where a clip is only looked at while it is made: a second of LTX-2."""
AT_ONCE = 90
"""Video latents that come out of one decoding of a long stream: half a minute of LTX-2."""
_AUDIO_BEFORE, _AUDIO_AFTER = 36, 4

VideoDecoder = Callable[[Tensor], Tensor]
"""(b, c, f, h, w) to (b, F, H, W, 3), F = 8f - 7."""
AudioDecoder = Callable[[Tensor], Tensor]
"""(b, c, s, q) to (b, channels, n)."""


@dataclass(frozen=True)
class Piece:
    """Latents [first, last) that are decoded, and frames [start, stop) that come out."""

    first: int
    last: int
    start: int
    stop: int


def piece_of(
    clock: Clock, origin: ChunkOrigin, *, overlap: int = OVERLAP, is_last: bool = False
) -> Piece:
    """What a chunk settles: from its predecessor's stop to `overlap` latents before its end.

    Args:
        overlap: at least 1: at its live end a stream's sound is a little shorter than its pictures,
            and a decoder makes a single frame of the latent that it is given first.
        is_last: nothing follows, so nothing is held back.

    Raises:
        ValueError: no overlap, or a chunk so short that all of it is held back.
    """
    if overlap < 1:
        raise ValueError(f"overlap is {overlap} latents, expected at least 1")
    layout, total = origin.state.layout, origin.state.next_block
    begin, end = layout.video_span(origin.first_block)[0], layout.video_latents(total)
    settled = max(0, begin - overlap)
    settles = end if is_last else max(0, end - overlap)
    if settles <= settled:
        raise ValueError(
            f"the chunk adds {end - begin} video latents and {overlap} are held back until the "
            "next one: make the chunk longer or the overlap smaller, or switch 'last chunk' on"
        )
    return Piece(
        max(0, settled - overlap),
        min(end, settles + overlap),
        _frames(clock, settled),
        _frames(clock, settles),
    )


class Growing:
    """What can be shown of a stream that grows, piece after piece: up to `after` latents before its
    end.

    Args:
        first_block: where it is shown from.
        before, after: latents that are decoded along on either side, at least 1 each.
    """

    def __init__(self, clock: Clock, first_block: int, *, before: int, after: int) -> None:
        self.clock, self.before, self.after = clock, before, after
        self._shown = clock.layout.video_latents(first_block)

    def piece(self, blocks: int, *, is_last: bool = False) -> Piece | None:
        """What a stream of so many blocks adds to the pieces before; None where that is nothing.

        Args:
            is_last: nothing follows, so nothing is held back.
        """
        shown, end = self._shown, self.clock.layout.video_latents(blocks)
        settles = end if is_last else end - self.after
        if settles <= shown:
            return None
        self._shown = settles
        return Piece(
            max(0, shown - self.before),
            min(end, settles + self.after),
            _frames(self.clock, shown),
            _frames(self.clock, settles),
        )


def needed_from(clock: Clock, piece: Piece, sample_rate: int) -> int:
    """The latest block that, with those after it, holds all that a piece is decoded from."""
    layout, sound = clock.layout, _audio_span(clock, piece, sample_rate)[0]
    video_block = 1 + (piece.first - layout.video_first) // layout.video_next
    audio_block = 1 + (sound - layout.audio_first) // layout.audio_next
    return max(0, min(video_block, audio_block))


def pieces(clock: Clock, origin: ChunkOrigin, last: int | None = None) -> Iterator[Piece]:
    """All frames of a chunk, or of its blocks before `last`, a piece at a time, so that no more is
    held of a long one. Exact where the stream goes on far enough behind them.
    """
    layout, total = origin.state.layout, origin.state.next_block
    begin = layout.video_span(origin.first_block)[0]
    end, there = (layout.video_latents(n) for n in (total if last is None else last, total))
    # What little would be left over stays with the last piece.
    starts = range(begin, max(begin + 1, end - AT_ONCE // 2), AT_ONCE)
    for start, stop in pairwise((*starts, end)):
        yield Piece(
            max(0, start - REACH),
            min(there, stop + REACH),
            _frames(clock, start),
            _frames(clock, stop),
        )


def _frames(clock: Clock, latents: int) -> int:
    return 1 + (latents - 1) * clock.video_stride if latents else 0


def decode_pictures(
    clock: Clock, video: Tensor, piece: Piece, decoder: VideoDecoder, skipped: int = 0
) -> Tensor:
    """Frames (b, F, H, W, 3) of a piece, from the stream's video latents (b, c, f, h, w).

    Args:
        skipped: latents of the stream's beginning that are not among them.
    """
    # The decoder takes the first latent that it is given for the stream's first, which is a single
    # frame.
    before = _frames(clock, piece.first + 1) - 1 if piece.first else 0
    frames = decoder(video[:, :, piece.first - skipped : piece.last - skipped])
    return frames[:, piece.start - before : piece.stop - before]


def decode_sound(
    clock: Clock,
    audio: Tensor,
    piece: Piece,
    sample_rate: int,
    decoder: AudioDecoder,
    skipped: int = 0,
) -> Tensor:
    """Sound (b, channels, n) of a piece's time, from the stream's audio latents (b, c, s, q).

    Args:
        skipped: latents of the stream's beginning that are not among them.
    """
    first, last = _audio_span(clock, piece, sample_rate)
    sound = decoder(audio[:, :, first - skipped : last - skipped])
    begin = int(first * _samples_per_latent(clock, sample_rate))
    start, stop = _samples(clock, piece, sample_rate)
    return sound[..., max(0, start - begin) : max(0, stop - begin)]


def _audio_span(clock: Clock, piece: Piece, sample_rate: int) -> tuple[int, int]:
    """Audio latents that a piece's sound is decoded from, where the stream has so many."""
    per_latent = _samples_per_latent(clock, sample_rate)
    start, stop = _samples(clock, piece, sample_rate)
    first = max(0, int(start / per_latent) - _AUDIO_BEFORE)
    return first, int(stop / per_latent) + 1 + _AUDIO_AFTER


def _samples(clock: Clock, piece: Piece, sample_rate: int) -> tuple[int, int]:
    start, stop = (int(frame * sample_rate / clock.fps) for frame in (piece.start, piece.stop))
    return start, stop


def _samples_per_latent(clock: Clock, sample_rate: int) -> Fraction:
    return Fraction(
        sample_rate * clock.audio_stride * clock.samples_per_audio_frame, clock.sample_rate
    )
