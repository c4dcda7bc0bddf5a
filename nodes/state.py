"""Shelf "State": keep a stream and go on from it another day."""

from __future__ import annotations

import logging
from fractions import Fraction

from comfy_api.latest import io

from ..host import folders
from ..host.encoding import Clip, end_of_video, stream_of_clip
from ..host.model_wire import stream_model
from ..host.page import say
from ..host.streams import notes_of
from ..model_loaders.identity import changed_at
from ..samplers.state import StreamState, clock_of, rewound, take_of
from ..samplers.state_file import load_state, save_state, summary_of
from . import limits, request
from .types import SettingsWire, StateWire, StreamPlan

logger = logging.getLogger("mutualforcing")
NO_STREAM = "no saved stream"


class SaveState(io.ComfyNode):
    """Save Stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_SaveState",
            display_name="Save Stream",
            category="MutualForcing/State",
            description="Saves a stream in output/mutual_forcing, so that Load Stream can go on "
            "from it.",
            search_aliases=["save state", "save latent", "checkpoint", "resume"],
            inputs=[
                StateWire.Input("state", tooltip="From Sample Chunk or Generate Clip."),
                io.String.Input(
                    "name",
                    default="stream",
                    tooltip="Name of the file in output/mutual_forcing. A number is added.",
                ),
                io.Boolean.Input(
                    "memory",
                    default=True,
                    advanced=True,
                    tooltip="On: also saves what the model remembers, and the stream goes on at "
                    "once and exactly, even if the prompt changed on the way. Off: a much smaller "
                    "file, remembered anew when it goes on.",
                ),
                io.Boolean.Input(
                    "history",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Off: only what going on needs, as small at any age of the stream. It "
                    "can't be rewound then, nor decoded from its beginning.",
                ),
            ],
            outputs=[StateWire.Output("state", tooltip="The same stream, to go on right away.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A name is needed."""
        if name is not None and not name.strip(" /\\"):
            return "the name is empty: write a name for the file"
        try:
            if name is not None:
                folders.output_file(name, "safetensors")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, state: StreamState, name: str = "stream", memory: bool = True, history: bool = True
    ) -> io.NodeOutput:
        """Write it."""
        path = folders.output_file(name, "safetensors")
        if not (memory or history):
            raise ValueError(
                "'memory' and 'history' are both off, and one is made of the other: keep one"
            )
        kept = state if history else state.trimmed()
        save_state(path, kept, keys=memory, notes=notes_of(state, cls.hidden))
        logger.info("stream saved: %s", path)
        say(f"saved: {folders.shown(path)}")
        return io.NodeOutput(state)


class LoadState(io.ComfyNode):
    """Load Stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_LoadState",
            display_name="Load Stream",
            category="MutualForcing/State",
            description="Loads a stream that was saved, to go on from it with the model that made "
            "it.",
            search_aliases=["load state", "load latent", "resume", "continue"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(folders.saved_streams()) or [NO_STREAM],
                    tooltip="Streams in output/mutual_forcing, the newest first, and in the input "
                    "folder. Press R if a new one is missing.",
                )
            ],
            outputs=[StateWire.Output("state", tooltip="To Sample Chunk or Generate Clip.")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Say what to do when the file is not there."""
        if folders.saved_stream(file) is not None:
            return True
        if file == NO_STREAM:
            return "there is no saved stream yet: make one with Save Stream, then press R"
        return f"the stream '{file}' is not there any more: press R and choose another one"

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """A file that was replaced is loaded again."""
        path = folders.saved_stream(file)
        return "" if path is None else f"{path} {changed_at(path)}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read it."""
        state = load_state(folders.saved_stream(file))
        said = summary_of(state)
        say(f"{said.facts}\n{said.schedule}".strip())
        return io.NodeOutput(state)


class RewindStream(io.ComfyNode):
    """Rewind Stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_Rewind",
            display_name="Rewind Stream",
            category="MutualForcing/State",
            description="Goes back to an earlier second of a stream, or chooses one of its takes, "
            "to go on from there.",
            search_aliases=["undo", "trim", "cut stream", "choose take", "batch select"],
            inputs=[
                StateWire.Input(
                    "state", tooltip="From Sample Chunk, Generate Clip, or Load Stream."
                ),
                io.Int.Input(
                    "second",
                    default=-1,
                    min=-1,
                    max=86400,
                    tooltip="The second of the stream to go back to. -1: its end.",
                ),
                io.Int.Input(
                    "take",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Which of several clips side by side to go on with, counted from the "
                    "upper left. 0: all of them.",
                ),
            ],
            outputs=[StateWire.Output("state", tooltip="To Sample Chunk or Generate Clip.")],
        )

    @classmethod
    def execute(cls, state: StreamState, second: int = -1, take: int = 0) -> io.NodeOutput:
        """Go back, and choose."""
        limits.check(cls, second=second, take=take)
        if take:
            state = take_of(state, take - 1)
        if second >= 0:
            clock = clock_of(state.layout)
            there = float(clock.seconds(state.next_block))
            if second > there:
                raise ValueError(
                    f"second {second} is not there: the stream has {there:.1f} s, expected one of "
                    "them, or -1 for its end"
                )
            state = rewound(state, clock.block_at(second))
        return io.NodeOutput(state)


class StreamFromClip(io.ComfyNode):
    """Stream from Clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_StreamFromClip",
            display_name="Stream from Clip",
            category="MutualForcing/State",
            description="Makes any clip a stream, so that Generate Clip or Sample Chunk goes on "
            "where it ends, in picture and in sound.",
            search_aliases=["video to video", "extend video", "continue clip", "encode"],
            inputs=[
                io.Model.Input("model", tooltip="That goes on with it."),
                io.Video.Input(
                    "video", optional=True, tooltip="The clip. From Load Video, for instance."
                ),
                io.Image.Input("images", optional=True, tooltip="Or its frames by themselves ..."),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="... and its sound, from the first frame on. Silence without it.",
                ),
                *request.vaes(),
                SettingsWire.Input(
                    "settings",
                    optional=True,
                    tooltip="Size, memory and seed. Without it the model's own size: the clip is "
                    "scaled to it, and cut to its shape.",
                ),
                io.Int.Input(
                    "seconds",
                    default=10,
                    min=2,
                    max=600,
                    tooltip="How much of the clip's end the stream begins with, in whole seconds.",
                ),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=240.0,
                    optional=True,
                    advanced=True,
                    tooltip="Frames a second of 'images'. A video knows its own.",
                ),
            ],
            outputs=[StateWire.Output("state", tooltip="To Sample Chunk or Generate Clip.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        video: object = None,
        images: object = None,
        audio: dict[str, object] | None = None,
        vae: object = None,
        audio_vae: object = None,
        settings: StreamPlan | None = None,
        seconds: int = 10,
        fps: float = 24.0,
    ) -> io.NodeOutput:
        """Encode it."""
        limits.check(cls, seconds=seconds, fps=fps)
        if (video is None) == (images is None):
            raise ValueError("connect the clip to 'video', or its frames to 'images', not both")
        rate = Fraction(fps).limit_denominator(1001)
        if video is not None:
            images, sound, rate = end_of_video(video, seconds + 1)
            audio = sound if audio is None else audio
        streams, plan = stream_model(model), settings or StreamPlan()
        if plan.start is not None:
            raise ValueError(
                "Stream Settings has a start image, and the stream begins with a clip: disconnect "
                "one of them"
            )
        clip, vaes = Clip(images, audio, rate), (vae, audio_vae)
        return io.NodeOutput(
            stream_of_clip(model, streams, plan.begin(streams), vaes, clip, seconds)
        )
