"""Shelf "Stream": settle what a stream is, sample it chunk by chunk, and see and hear a chunk."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import comfy as compat
from ..host.comfy import HostModel
from ..host.conditioning import Conditioning
from ..networks.video_codec import SPACE_STRIDE
from ..samplers.chunk import ChunkOrigin, chunk_origin, chunk_state, chunk_tensors
from ..samplers.decode import joined
from ..samplers.parking import parked
from ..samplers.start import start_of
from ..samplers.state import StreamState, check_state
from . import request
from .rescue import Finished, rescue
from .types import ORIGIN, ModelWire, SettingsWire, StateWire, StreamPlan

CHUNK, WHOLE = "this chunk", "whole stream"


class StreamSettingsNode(io.ComfyNode):
    """Stream Settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        size = (
            "of the picture in pixels. The small model that comes with the pack was made for 64 x "
            "64 "
            "(enlarge its frames afterwards), OmniForcing for 768 x 512."
        )
        return io.Schema(
            node_id="MF_StreamSettings",
            display_name="Stream Settings",
            category="MutualForcing/Stream",
            description="What stays the same for a whole stream: size, how far back it remembers, "
            "seed.",
            search_aliases=["empty latent video", "size", "resolution", "seed"],
            inputs=[
                io.Int.Input(
                    "width",
                    default=64,
                    min=SPACE_STRIDE,
                    max=4096,
                    step=SPACE_STRIDE,
                    tooltip=f"Width {size}",
                ),
                io.Int.Input(
                    "height",
                    default=64,
                    min=SPACE_STRIDE,
                    max=4096,
                    step=SPACE_STRIDE,
                    tooltip=f"Height {size}",
                ),
                io.Int.Input(
                    "window",
                    default=3,
                    min=1,
                    max=60,
                    display_name="memory (seconds)",
                    tooltip="How many seconds back the stream looks while it goes on. More holds "
                    "together longer, and takes more time and memory per second. The small model "
                    "has learned with 3.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another number, another clip. The same number gives the same clip, "
                    "however it is cut into chunks.",
                ),
                io.Latent.Input(
                    "start",
                    optional=True,
                    tooltip="Image to video: a picture that the stream begins with, encoded by the "
                    "model's VAE (VAE Encode, or LTXVImgToVideo) at the size given here.",
                ),
            ],
            outputs=[
                SettingsWire.Output(
                    "settings", tooltip="To Generate Clip, or to the first Sample Chunk."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, width: int, height: int) -> bool | str:
        """Say which sizes can be made."""
        # A value that comes over a wire is not known yet; it is checked when the node runs.
        known = [SPACE_STRIDE if value is None else value for value in (width, height)]
        try:
            StreamPlan(*known, window=1, seed=0)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        width: int,
        height: int,
        window: int,
        seed: int,
        start: dict[str, object] | None = None,
    ) -> io.NodeOutput:
        """Wrap them."""
        given = None if start is None else start_of(start["samples"], start.get("noise_mask"))
        return io.NodeOutput(StreamPlan(width, height, window, seed, given))


class SampleChunk(io.ComfyNode):
    """Sample Chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_SampleChunk",
            display_name="Sample Chunk",
            category="MutualForcing/Stream",
            description="Makes the next seconds of a stream. Connect its state to another Sample "
            "Chunk to go on, or to several to see several futures of the same past.",
            search_aliases=[
                "sampler",
                "extend video",
                "long video",
                "continue",
                "self forcing",
                "branch",
            ],
            inputs=[
                *request.wires(
                    io.MultiType.Input(
                        "model",
                        types=[ModelWire, io.Model],
                        tooltip="From Load Mutual Forcing Model, Load OmniForcing Model, or a LoRA "
                        "loader "
                        "after it.",
                    )
                ),
                io.Int.Input(
                    "seconds",
                    default=2,
                    min=1,
                    max=600,
                    display_name="length (seconds)",
                    tooltip="How many seconds this chunk adds.",
                ),
                *request.widgets(),
            ],
            outputs=[
                StateWire.Output(
                    "state", tooltip="The stream up to here: to the next chunk, or to Save Stream."
                ),
                io.Latent.Output("video", tooltip="Pictures of this chunk, for Decode Chunk."),
                io.Latent.Output("audio", tooltip="Sound of this chunk, for Decode Chunk."),
            ],
        )

    @classmethod
    def validate_inputs(cls, execution: str = request.PATHS[0]) -> bool | str:
        """Whether there is such a path; a saved graph may have an old name of one."""
        return request.check_path(execution)

    @classmethod
    def execute(
        cls,
        model: object,
        positive: Conditioning,
        seconds: int,
        mode: dict[str, object],
        variation: int = 0,
        negative: Conditioning | None = None,
        settings: StreamPlan | None = None,
        state: StreamState | None = None,
        execution: str = request.PATHS[0],
    ) -> io.NodeOutput:
        """Sample the blocks; what is finished survives an interruption."""
        asked = request.read(
            model, positive, negative, settings, state, seconds, mode, variation, execution
        )
        progress = compat.Progress(asked.blocks * asked.sampler.steps)
        finished = Finished(asked.state)
        with rescue(finished):
            for latents, finished.state in request.sample(asked, progress):
                progress.sketch(asked.model.sketches(latents))
        state = parked(finished.state, asked.state)
        origin = chunk_origin(state, asked.state.next_block, asked.model.audio_bins)
        video, audio = chunk_tensors(origin)
        return io.NodeOutput(
            state,
            {"samples": video, ORIGIN: origin},
            {"samples": audio, "type": "audio", ORIGIN: origin},
        )


def chunk_wires() -> list[io.Input]:
    """Inputs that take a chunk from Sample Chunk (`origin_of` reads them)."""
    return [
        io.Latent.Input("video", tooltip="From Sample Chunk."),
        io.Latent.Input("audio", tooltip="From the same Sample Chunk."),
    ]


def pictures_and_sound() -> list[io.Output]:
    """What a decoded chunk comes out as."""
    return [
        io.Image.Output("images", tooltip="Frames, for Create Video or any image node."),
        io.Audio.Output("audio", tooltip="Sound, for Create Video or any audio node."),
        io.Float.Output("fps", tooltip="Frames a second, for Create Video."),
    ]


class DecodeChunk(io.ComfyNode):
    """Decode Chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_DecodeChunk",
            display_name="Decode Chunk",
            category="MutualForcing/Stream",
            description="Turns a chunk into pictures and sound. Chunks that are put one after the "
            "other have no seam, neither to the eye nor to the ear.",
            search_aliases=["vae decode", "audio decode", "latent to image", "latent to video"],
            inputs=[
                ModelWire.Input("model", tooltip="From Load Mutual Forcing Model."),
                *chunk_wires(),
                io.Combo.Input(
                    "part",
                    options=[CHUNK, WHOLE],
                    default=CHUNK,
                    tooltip="this chunk: only the seconds that it added. whole stream: everything "
                    "from the beginning of the stream to the end of this chunk.",
                ),
            ],
            outputs=pictures_and_sound(),
        )

    @classmethod
    def execute(
        cls, model: HostModel, video: dict[str, object], audio: dict[str, object], part: str = CHUNK
    ) -> io.NodeOutput:
        """Decode both."""
        bundle = model.bundle
        origin = origin_of(video, audio)
        check_state(origin.state, bundle)
        model.make_ready()
        state = chunk_state(origin, video["samples"], audio["samples"])
        first = origin.first_block if part == CHUNK else 0
        decoded = joined(_watched(bundle.decoder().decode_from(state, first)))
        return io.NodeOutput(
            decoded.video.flatten(0, 1),
            {"waveform": decoded.audio, "sample_rate": bundle.clock.sample_rate},
            float(bundle.clock.fps),
        )


def origin_of(video: dict[str, object], audio: dict[str, object]) -> ChunkOrigin:
    """Where the chunk on these two LATENT wires belongs.

    Raises:
        ValueError: they are not one chunk.
    """
    origins = video.get(ORIGIN), audio.get(ORIGIN)
    for name, origin in zip(("video", "audio"), origins, strict=True):
        if origin is None:
            raise ValueError(
                f"the '{name}' input did not come from Sample Chunk: connect Sample Chunk's {name} "
                "output"
            )
    if origins[0] is not origins[1]:
        raise ValueError(
            "video and audio come from two different chunks: connect both of one Sample Chunk"
        )
    return origins[0]


def _watched(blocks):  # noqa: ANN001, ANN202 - passes an iterator through
    for block in blocks:
        compat.stop_if_asked()
        yield block
