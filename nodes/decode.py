"""Shelf "Stream", second half: see and hear a chunk, through the VAEs of whatever model made it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from comfy_api.latest import io

from ..host import folders
from ..host.clip_file import ClipFile, clip_writer
from ..host.decoding import clip_decoder
from ..host.model_wire import known_of, stream_model
from ..host.wiring import fingerprint, wired
from ..samplers.chunk import ChunkOrigin, chunk_origin, chunk_state
from ..samplers.decode import Collected
from ..samplers.overlap import OVERLAP
from ..samplers.state import StreamState, check_state
from . import limits
from .request import check_frames
from .types import ORIGIN, StateWire

CHUNK, WHOLE, SPAN = "this chunk", "whole stream", "span"
IMAGES, AUDIO, VIDEO = 0, 1, 3


class DecodeChunk(io.ComfyNode):
    """Decode Chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        ahead = "Only for VAEs that look ahead, as LTX-2's do. "
        return io.Schema(
            node_id="MF_Decode",
            display_name="Decode Chunk",
            category="MutualForcing/Stream",
            description="Turns a chunk into pictures and sound, together with what lies around "
            "it, so that chunks can be put one after the other; or any seconds of a stream, with "
            "all of its joints.",
            search_aliases=[
                "vae decode",
                "audio vae decode",
                "latent to image",
                "latent to video",
                "ltxv",
            ],
            inputs=[
                io.MultiType.Input(
                    "vae",
                    types=[io.Vae, io.Model],
                    tooltip="The VAE for pictures, from the model's loader. A model does as well: "
                    "its own VAEs are used.",
                ),
                io.Vae.Input(
                    "audio_vae",
                    optional=True,
                    tooltip="The VAE for sound, from the model's loader. Not needed where a model "
                    "is connected to 'vae'.",
                ),
                io.Latent.Input("video", optional=True, tooltip="From Sample Chunk."),
                io.Latent.Input("audio", optional=True, tooltip="From the same Sample Chunk."),
                StateWire.Input(
                    "state",
                    optional=True,
                    tooltip="Instead of a chunk: a stream, for its whole or for a span of it. The "
                    "model is connected to 'vae' then.",
                ),
                io.Combo.Input(
                    "part",
                    options=[CHUNK, WHOLE, SPAN],
                    default=CHUNK,
                    tooltip="this chunk: what it adds to what the chunks before it gave. whole "
                    "stream: everything from the beginning of the stream to the end of this "
                    "chunk. span: the seconds from 'begin' to 'end'.",
                ),
                io.Int.Input(
                    "overlap",
                    default=OVERLAP,
                    min=1,
                    max=22,
                    advanced=True,
                    tooltip=f"{ahead}How much around the chunk is decoded with it, in latents of 8 "
                    "frames. As much is held back at its end until the next chunk. More hides the "
                    "seam better.",
                ),
                io.Boolean.Input(
                    "last",
                    default=False,
                    advanced=True,
                    display_name="last chunk",
                    tooltip=f"{ahead}On for the chunk that nothing follows: it gives what was held "
                    "back, too.",
                ),
                io.Int.Input(
                    "begin",
                    default=0,
                    min=0,
                    max=86400,
                    optional=True,
                    advanced=True,
                    tooltip="Of a span: its first second.",
                ),
                io.Int.Input(
                    "end",
                    default=-1,
                    min=-1,
                    max=86400,
                    optional=True,
                    advanced=True,
                    tooltip="Of a span: the second that it ends at. -1: the stream's end.",
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="Frames, for Create Video or any image node."),
                io.Audio.Output("audio", tooltip="Sound, for Create Video or any audio node."),
                io.Float.Output("fps", tooltip="Frames a second, for Create Video."),
                io.Video.Output(
                    "video",
                    tooltip="Both, for Save Video: a file, of any length. Made only if connected.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: object) -> str:
        """With what is wired: what nobody wanted before is not in ComfyUI's cache."""
        return fingerprint(cls.hidden.unique_id, IMAGES, AUDIO, VIDEO)

    @classmethod
    def execute(
        cls,
        vae: object,
        video: dict[str, object] | None = None,
        audio: dict[str, object] | None = None,
        audio_vae: object = None,
        state: StreamState | None = None,
        part: str = CHUNK,
        overlap: int = OVERLAP,
        last: bool = False,
        begin: int = 0,
        end: int = -1,
    ) -> io.NodeOutput:
        """Decode it, block by block where it may be long."""
        limits.check(cls, part=part, overlap=overlap, begin=begin, end=end)
        if state is not None:
            origin = _of_stream(vae, state, (video, audio))
        else:
            origin = origin_of(video, audio)
            changed = chunk_state(origin, video["samples"], audio["samples"])
            origin = replace(origin, state=changed)
        state, clock = origin.state, origin.clock
        prefix = state.block(0)
        channels = prefix.video.shape[1], prefix.audio.shape[2]
        decoder = clip_decoder(vae, audio_vae, clock, channels=channels)
        to = wired(cls.hidden.unique_id)
        frames, sound, file = (to is None or slot in to for slot in (IMAGES, AUDIO, VIDEO))
        first, stop = origin.first_block, state.next_block
        if part == SPAN:
            first = clock.block_at(begin)
            stop = stop if end < 0 else min(stop, clock.block_at(end))
            if not first < stop:
                seconds = float(clock.seconds(state.next_block))
                raise ValueError(
                    f"the span begins at {begin} s and ends at "
                    f"{'the end' if end < 0 else f'{end} s'} of {seconds:.1f} s: let it begin "
                    "before its end, and within the stream"
                )
        elif part == WHOLE:
            first = 0
        if frames:
            check_frames(clock, state, first, stop - first)
        if part == CHUNK and video is not None:
            made = iter([decoder.chunk(origin, overlap=overlap, is_last=last)])
        else:
            made = decoder.blocks(replace(origin, first_block=first), stop)
        # Where decoders look ahead, what was held back before comes as well.
        kept = Collected(clock.frames(stop) - clock.frames(first) + overlap * clock.video_stride)
        clip = folders.temporary_file("mp4") if file else None
        with ExitStack() as files:
            if clip is not None:
                writer = clip_writer(clip, clock, state, decoder)
                files.enter_context(writer)
            for decoded in made:
                if clip is not None:
                    writer.write(decoded)
                kept.add(decoded if frames else decoded._replace(video=decoded.video[:, :0]))
        whole = kept.whole()
        return io.NodeOutput(
            whole.video.flatten(0, 1) if frames else None,
            {"waveform": whole.audio, "sample_rate": decoder.sample_rate} if sound else None,
            float(clock.fps),
            None if clip is None else ClipFile(clip),
        )


def _of_stream(model: object, state: StreamState, latents: tuple[object, object]) -> ChunkOrigin:
    """A stream by itself, as one chunk.

    Raises:
        ValueError: a chunk is connected as well, or no model.
    """
    if latents != (None, None):
        raise ValueError("connect a stream to 'state' or a chunk to 'video' and 'audio', not both")
    if known_of(model) is None:
        raise ValueError(
            "a stream is connected to 'state': connect the model that made it to 'vae', whose own "
            "VAEs are used"
        )
    streams = stream_model(model).for_layout(state.layout)
    check_state(state, streams)
    return chunk_origin(state, 0, streams.clock, streams.audio_bins)


def origin_of(video: dict[str, object] | None, audio: dict[str, object] | None) -> ChunkOrigin:
    """Where the chunk on these two LATENT wires belongs.

    Raises:
        ValueError: they are not one chunk.
    """
    if video is None or audio is None:
        raise ValueError(
            "nothing is there to decode: connect Sample Chunk's video and audio, or a stream to "
            "'state' and its model to 'vae'"
        )
    origins = video.get(ORIGIN), audio.get(ORIGIN)
    for name, wire, origin in zip(("video", "audio"), (video, audio), origins, strict=True):
        if getattr(wire["samples"], "is_nested", False):
            raise ValueError(
                f"the '{name}' input is video and audio in one: put LTXV Separate AV Latent before "
                "it"
            )
        if origin is None:
            raise ValueError(
                f"the '{name}' input did not come from Sample Chunk: connect Sample Chunk's {name} "
                "output"
            )
    if (video["samples"].ndim, audio["samples"].ndim) != (5, 4):
        raise ValueError(
            "video and audio are not in their places: connect Sample Chunk's video output to "
            "'video' and its audio output to 'audio'"
        )
    if origins[0] is not origins[1]:
        raise ValueError(
            "video and audio come from two different chunks: connect both of one Sample Chunk"
        )
    return origins[0]
