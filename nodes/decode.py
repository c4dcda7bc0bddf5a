"""Shelf "Stream", second half: see and hear a chunk, through the VAEs of whatever model made it."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..host.decoding import clip_decoder
from ..samplers.chunk import ChunkOrigin, chunk_state
from ..samplers.overlap import OVERLAP
from .types import ORIGIN

CHUNK, WHOLE = "this chunk", "whole stream"


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
            "it, so that chunks can be put one after the other.",
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
                io.Latent.Input("video", tooltip="From Sample Chunk."),
                io.Latent.Input("audio", tooltip="From the same Sample Chunk."),
                io.Combo.Input(
                    "part",
                    options=[CHUNK, WHOLE],
                    default=CHUNK,
                    tooltip="this chunk: what it adds to what the chunks before it gave. whole "
                    "stream: everything from the beginning of the stream to the end of this "
                    "chunk.",
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
            ],
            outputs=[
                io.Image.Output("images", tooltip="Frames, for Create Video or any image node."),
                io.Audio.Output("audio", tooltip="Sound, for Create Video or any audio node."),
                io.Float.Output("fps", tooltip="Frames a second, for Create Video."),
            ],
        )

    @classmethod
    def execute(
        cls,
        vae: object,
        video: dict[str, object],
        audio: dict[str, object],
        audio_vae: object = None,
        part: str = CHUNK,
        overlap: int = OVERLAP,
        last: bool = False,
    ) -> io.NodeOutput:
        """Decode both."""
        origin = origin_of(video, audio)
        first = origin.state.latents[0]
        channels = first.video.shape[1], first.audio.shape[2]
        decoder = clip_decoder(vae, audio_vae, origin.clock, channels=channels)
        state = chunk_state(origin, video["samples"], audio["samples"])
        origin = replace(origin, state=state)
        if part == WHOLE:
            decoded = decoder.whole(origin)
        else:
            decoded = decoder.chunk(origin, overlap=overlap, is_last=last)
        return io.NodeOutput(
            decoded.video.flatten(0, 1),
            {"waveform": decoded.audio, "sample_rate": decoder.sample_rate},
            float(origin.clock.fps),
        )


def origin_of(video: dict[str, object], audio: dict[str, object]) -> ChunkOrigin:
    """Where the chunk on these two LATENT wires belongs.

    Raises:
        ValueError: they are not one chunk.
    """
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
