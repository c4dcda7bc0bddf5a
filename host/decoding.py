"""A stream's latents to pictures and sound, through whatever VAEs are wired in.

b batch, c channels, f h w video latent grid, s audio latents, q frequency bins of an audio latent.
This pack's codecs look back only: each block is decoded as soon as it is made, and what the
decoders remember goes on to the next. LTX-2's VAEs look ahead as well: a chunk is decoded together
with some of its neighbourhood, and a clip when all of it is there; until then it can be looked at,
a little late and less exactly (`Glimpse`). Which of the two it is shows here and not in the menu.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import comfy.model_management
import comfy.sd
import comfy.utils
from torch import Tensor

from ..samplers.chunk import ChunkOrigin, chunk_origin, chunk_tensors
from ..samplers.clock import Clock
from ..samplers.decode import DecodedBlock, StreamDecoder, joined
from ..samplers.encode import in_phase
from ..samplers.live import decoded_live
from ..samplers.overlap import (
    GLIMPSE,
    OVERLAP,
    Growing,
    Piece,
    decode_pictures,
    decode_sound,
    needed_from,
    piece_of,
    pieces,
)
from ..samplers.state import BlockLatents, StreamState
from . import folders
from .codecs import CodecVAE
from .model_wire import known_of
from .page import stoppable
from .room import has_room

logger = logging.getLogger("mutualforcing")

Made = Iterable[tuple[BlockLatents, StreamState]]
Use = Callable[[DecodedBlock | None, StreamState], None]


class ClipDecoder(Protocol):
    """A VAE for pictures and one for sound, over a stream.

    Attributes:
        sample_rate, channels: of the sound.
        live: whether a block can be decoded as soon as it is made.
        beside: ModelPatchers that must be ready while the stream is sampled.
    """

    sample_rate: int
    channels: int
    live: bool
    beside: list[object]

    def chunk(self, origin: ChunkOrigin, *, overlap: int, is_last: bool) -> DecodedBlock:
        """What a chunk adds to what the chunks before it gave.

        Args:
            overlap: where decoders look ahead, latents on either side that are decoded along, and
                that are held back at the chunk's end.
            is_last: nothing follows, so nothing is held back.
        """
        ...

    def blocks(self, origin: ChunkOrigin, last: int) -> Iterator[DecodedBlock]:
        """A stream from a chunk's first block to the one before `last`, as little as can be decoded
        at once after the other.
        """
        ...

    def in_phase(self, state: StreamState, sound: Tensor) -> StreamState:
        """A stream that was encoded, with what decoders that look back remember of it.

        Args:
            sound: (b, 1, n) that it was encoded from, up to the end of its last block.
        """
        ...

    def follow(self, made: Made, before: StreamState, use: Use) -> None:
        """Decode what a rollout from `before` yields, as it comes or all of it at the end.

        Args:
            use: called for every block with the state after it, and with what can be decoded by
                then; None where that is nothing yet.
        """
        ...


def clip_decoder(
    vae: object,
    audio_vae: object,
    clock: Clock,
    *,
    channels: tuple[int, int],
    model: object | None = None,
) -> ClipDecoder:
    """The decoder of two VAE wires.

    Args:
        vae: a VAE; or a MODEL, whose own VAEs are then taken where no other is connected.
        channels: of the stream's video and audio latents.
        model: the same as for `vae`, from a wire of its own.

    Raises:
        ValueError: a VAE is missing, in the other's place or made for another model.
    """
    if known_of(vae) is not None:
        vae, model = None, vae
    own = None if model is None else known_of(model)
    vae = vae or (own and own.vae)
    audio_vae = audio_vae or (own and own.audio_vae)
    for name, wire in (("vae", vae), ("audio_vae", audio_vae)):
        if wire is None:
            raise ValueError(
                f"there is no VAE for '{name}': connect the one of Load Mutual Forcing Model or "
                "Load OmniForcing Model (with LTX-2's own file as base), or a VAE loader"
            )
        if not hasattr(wire, "first_stage_model"):
            raise ValueError(
                f"'{name}' is a {type(wire).__name__} without a VAE of its own: connect a VAE"
            )
    if sample_rate_of(vae) is not None:
        raise ValueError(
            "a VAE for sound is connected to 'vae': connect the one for pictures there, and the "
            "one for sound to 'audio_vae'"
        )
    if sample_rate_of(audio_vae) is None:
        raise ValueError(
            "'audio_vae' is not a VAE for sound: connect the audio VAE of the model's loader, or "
            "Load LTXV Audio VAE with LTX-2's own file"
        )
    bins = getattr(audio_vae.first_stage_model, "latent_frequency_bins", 1)
    decoded = vae.latent_channels, audio_vae.latent_channels * bins
    for name, found, wanted in zip(("vae", "audio_vae"), decoded, channels, strict=True):
        if found != wanted:
            raise ValueError(
                f"'{name}' decodes latents of {found} channels and this stream's have {wanted}: "
                "connect the VAE of the model that makes the stream"
            )
    kind = LookBack if isinstance(vae, CodecVAE) and isinstance(audio_vae, CodecVAE) else LookAhead
    return kind(vae, audio_vae, clock)


def live_decoder(
    model: object,
    clock: Clock,
    channels: tuple[int, int],
    stream: int,
    vaes: tuple[object, object] = (None, None),
) -> ClipDecoder | None:
    """What shows a stream while it is made: two VAE wires or, without them, a MODEL's own VAEs.

    Where they look ahead it is a `Glimpse`, whose pictures a tiny decoder makes, if there is one
    for this model (TAEHV, among ComfyUI's models/vae_approx).

    Args:
        stream: bytes that the stream needs beside the weights.

    Returns:
        None where there are no VAEs, or no room for theirs beside the network.
    """
    own = known_of(model)
    if None in (vaes[0] or (own and own.vae), vaes[1] or (own and own.audio_vae)):
        return None
    decoder = clip_decoder(*vaes, clock, channels=channels, model=model)
    if decoder.live:
        return decoder
    tiny = _tiny_decoder(channels[0])
    glimpse = Glimpse(tiny or decoder.vae, decoder.audio_vae, clock, 1 if tiny else GLIMPSE)
    held = sum(patcher.model_size() for patcher in (model, *glimpse.beside))
    return glimpse if tiny or has_room(held, stream, model.load_device) else None


def _tiny_decoder(channels: int) -> object | None:
    """The tiny decoder of LTX-2 that the user has; None where there is none, or it is another's."""
    path = folders.tiny_decoder()
    tiny = None if path is None else _loaded(path, path.stat().st_mtime_ns)
    return tiny if tiny is not None and tiny.latent_channels == channels else None


@lru_cache(maxsize=1)
def _loaded(path: Path, _changed: int) -> object | None:
    try:
        vae = comfy.sd.VAE(comfy.utils.load_torch_file(str(path), safe_load=True))
        vae.throw_exception_if_invalid()
    except Exception as error:  # a stranger's file, through the host's own loaders
        logger.warning("%s is no decoder for previews: %s", path, error)
        return None
    return vae


def sample_rate_of(vae: object) -> int | None:
    """Samples a second that a VAE for sound makes; None for one for pictures."""
    rate = getattr(vae.first_stage_model, "output_sample_rate", None)
    return None if rate is None else int(rate)


@dataclass(frozen=True)
class LookBack:
    """Two codecs of this pack."""

    vae: CodecVAE
    audio_vae: CodecVAE
    clock: Clock
    channels = 1
    live = True

    @property
    def sample_rate(self) -> int:
        """See `ClipDecoder`."""
        return sample_rate_of(self.audio_vae)

    @property
    def beside(self) -> list[object]:
        """See `ClipDecoder`."""
        return [self.vae.patcher, self.audio_vae.patcher]

    @property
    def _decoder(self) -> StreamDecoder:
        return StreamDecoder(
            self.vae.first_stage_model.video_codec, self.audio_vae.first_stage_model.audio_codec
        )

    def chunk(self, origin: ChunkOrigin, *, overlap: int, is_last: bool) -> DecodedBlock:
        """See `ClipDecoder`; nothing is ever held back."""
        comfy.model_management.load_models_gpu(self.beside, force_full_load=True)
        with self._stoppable():
            return joined(self._decoder.decode_from(origin.state, origin.first_block))

    def blocks(self, origin: ChunkOrigin, last: int) -> Iterator[DecodedBlock]:
        """See `ClipDecoder`."""
        comfy.model_management.load_models_gpu(self.beside, force_full_load=True)
        made = self._decoder.decode_from(origin.state, origin.first_block)
        with self._stoppable():
            yield from islice(made, last - origin.first_block)

    def follow(self, made: Made, before: StreamState, use: Use) -> None:
        """See `ClipDecoder`."""
        with self._stoppable():
            for _ in decoded_live(iter(made), self._decoder, before, use):
                pass

    def in_phase(self, state: StreamState, sound: Tensor) -> StreamState:
        """See `ClipDecoder`."""
        comfy.model_management.load_models_gpu(self.beside, force_full_load=True)
        return in_phase(self._decoder, state, sound)

    def _stoppable(self) -> AbstractContextManager[None]:
        return stoppable(self.vae.first_stage_model, self.audio_vae.first_stage_model)


@dataclass(frozen=True)
class LookAhead:
    """A VAE for pictures that sees what comes next, and any for sound."""

    vae: object
    audio_vae: object
    clock: Clock
    live = False
    beside = ()

    @property
    def channels(self) -> int:
        """See `ClipDecoder`."""
        return self.audio_vae.output_channels

    @property
    def sample_rate(self) -> int:
        """See `ClipDecoder`."""
        return sample_rate_of(self.audio_vae)

    def chunk(self, origin: ChunkOrigin, *, overlap: int, is_last: bool) -> DecodedBlock:
        """See `ClipDecoder`."""
        return self._decoded(origin, piece_of(self.clock, origin, overlap=overlap, is_last=is_last))

    def blocks(self, origin: ChunkOrigin, last: int) -> Iterator[DecodedBlock]:
        """See `ClipDecoder`."""
        for piece in pieces(self.clock, origin, last):
            yield self._decoded(origin, piece)

    def follow(self, made: Made, before: StreamState, use: Use) -> None:
        """See `ClipDecoder`."""
        state = before
        for _, state in made:
            use(None, state)
        origin = chunk_origin(state, before.next_block, self.clock)
        for piece in pieces(self.clock, origin):
            use(self._decoded(origin, piece), state)

    def in_phase(self, state: StreamState, sound: Tensor) -> StreamState:
        """See `ClipDecoder`."""
        return state

    def _decoded(self, origin: ChunkOrigin, piece: Piece) -> DecodedBlock:
        bins = self.audio_vae.first_stage_model.latent_frequency_bins
        first = needed_from(self.clock, piece, self.sample_rate)
        video, audio = chunk_tensors(replace(origin, first_block=first, audio_bins=bins))
        layout, rate = self.clock.layout, self.sample_rate
        seen, heard = layout.video_span(first)[0], layout.audio_span(first)[0]
        with stoppable(self.vae.first_stage_model, self.audio_vae.first_stage_model):
            pictures = decode_pictures(self.clock, video, piece, self._pictures, seen)
            sound = decode_sound(self.clock, audio, piece, rate, self._sound, heard)
        return DecodedBlock(pictures, sound)

    def _pictures(self, latents: Tensor) -> Tensor:
        """Latents (b, c, f, h, w) to pictures (b, F, H, W, 3) in 0..1."""
        return self.vae.decode(latents)

    def _sound(self, latents: Tensor) -> Tensor:
        """Latents (b, c, s, q) to sound (b, channels, n), as ComfyUI's own node does it."""
        return self.audio_vae.decode(latents).movedim(-1, 1)


@dataclass(frozen=True)
class Glimpse(LookAhead):
    """What a stream of decoders that look ahead is like, while it is made.

    Each block adds what can be decoded by then, together with its neighbourhood, but for the last
    `after` latents. So it is seen and heard that much late, and a little off where a decoder sees
    further. Pictures may be a tiny decoder's, which looks back only.
    """

    after: int
    live = True

    @property
    def beside(self) -> list[object]:
        """See `ClipDecoder`."""
        return [self.vae.patcher, self.audio_vae.patcher]

    def seen(self, made: Made, before: StreamState, use: Use) -> Made:
        """What a rollout from `before` yields, passed on, after `use` of what it adds."""
        growing = Growing(self.clock, before.next_block, before=OVERLAP, after=self.after)
        state = before
        for latents, state in made:
            use(self._added(state, growing.piece(state.next_block)), state)
            yield latents, state
        if state is not before:
            use(self._added(state, growing.piece(state.next_block, is_last=True)), state)

    def follow(self, made: Made, before: StreamState, use: Use) -> None:
        """See `ClipDecoder`."""
        for _ in self.seen(made, before, use):
            pass

    def _added(self, state: StreamState, piece: Piece | None) -> DecodedBlock | None:
        if piece is None:
            return None
        return self._decoded(chunk_origin(state, state.next_block - 1, self.clock), piece)

    def _pictures(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).clamp(0, 1)
