"""A stream's latents to pictures and sound, through whatever VAEs are wired in.

b batch, c channels, f h w video latent grid, s audio latents, q frequency bins of an audio latent.
This pack's codecs look back only: each block is decoded as soon as it is made, and what the
decoders remember goes on to the next. LTX-2's VAEs look ahead as well: a chunk is decoded together
with some of its neighbourhood, and a clip when all of it is there. Which of the two it is shows
here and not in the menu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import comfy.model_management
from torch import Tensor

from ..samplers.chunk import ChunkOrigin, chunk_origin, chunk_tensors
from ..samplers.clock import Clock
from ..samplers.decode import DecodedBlock, StreamDecoder, joined
from ..samplers.encode import in_phase
from ..samplers.live import decoded_live
from ..samplers.overlap import Piece, decode_pictures, decode_sound, piece_of, pieces
from ..samplers.state import BlockLatents, StreamState
from .codecs import CodecVAE
from .model_wire import known_of
from .page import stoppable

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


def live_decoder(model: object, clock: Clock, channels: tuple[int, int]) -> ClipDecoder | None:
    """The decoder of a MODEL's own VAEs; None where it has none, or they cannot decode live."""
    own = known_of(model)
    if own is None or own.vae is None or own.audio_vae is None:
        return None
    decoder = clip_decoder(None, None, clock, channels=channels, model=model)
    return decoder if decoder.live else None


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
        whole = replace(origin, first_block=0, audio_bins=bins)
        video, audio = chunk_tensors(whole)
        with stoppable(self.vae.first_stage_model, self.audio_vae.first_stage_model):
            pictures = decode_pictures(self.clock, video, piece, self.vae.decode)
            sound = decode_sound(self.clock, audio, piece, self.sample_rate, self._sound)
        return DecodedBlock(pictures, sound)

    def _sound(self, latents: Tensor) -> Tensor:
        """Latents (b, c, s, q) to sound (b, channels, n), as ComfyUI's own node does it."""
        return self.audio_vae.decode(latents).movedim(-1, 1)
