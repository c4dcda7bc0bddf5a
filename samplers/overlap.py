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


def added_by(clock: Clock, origin: ChunkOrigin) -> Piece:
    """All frames of a chunk that nothing follows and before which nothing was held back."""
    layout = origin.state.layout
    begin = layout.video_span(origin.first_block)[0]
    end = layout.video_latents(origin.state.next_block)
    return Piece(max(0, begin - REACH), end, _frames(clock, begin), _frames(clock, end))


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


def decode_pictures(clock: Clock, video: Tensor, piece: Piece, decoder: VideoDecoder) -> Tensor:
    """Frames (b, F, H, W, 3) of a piece of the whole stream's video latents (b, c, f, h, w)."""
    # The decoder takes the first latent that it is given for the stream's first, which is a single
    # frame.
    before = _frames(clock, piece.first + 1) - 1 if piece.first else 0
    frames = decoder(video[:, :, piece.first : piece.last])
    return frames[:, piece.start - before : piece.stop - before]


def decode_sound(
    clock: Clock, audio: Tensor, piece: Piece, sample_rate: int, decoder: AudioDecoder
) -> Tensor:
    """Sound (b, channels, n) of a piece's time, from all audio latents (b, c, s, q)."""
    per_latent = Fraction(
        sample_rate * clock.audio_stride * clock.samples_per_audio_frame, clock.sample_rate
    )
    start, stop = (int(frame * sample_rate / clock.fps) for frame in (piece.start, piece.stop))
    first = max(0, int(start / per_latent) - _AUDIO_BEFORE)
    last = min(audio.shape[2], int(stop / per_latent) + 1 + _AUDIO_AFTER)
    sound = decoder(audio[:, :, first:last])
    begin = int(first * per_latent)
    return sound[..., max(0, start - begin) : max(0, stop - begin)]
