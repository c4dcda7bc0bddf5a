"""Shelf "Stream": settle what a stream is, and sample it chunk by chunk."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import folders
from ..host.conditioning import Conditioning
from ..host.page import Progress, graph_notes, show_run
from ..networks.kept_keys import AS_COMPUTED, KEPT, Kept
from ..networks.video_codec import SPACE_STRIDE
from ..samplers.chunk import chunk_origin, chunk_tensors
from ..samplers.decode import DecodedBlock
from ..samplers.parking import parked
from ..samplers.rollout import GUIDANCE
from ..samplers.schedule import written
from ..samplers.start import start_of
from ..samplers.state import StreamState
from . import limits, request
from .player_file import player_file
from .rescue import Finished, rescue
from .sampling import sample
from .types import ORIGIN, OWN_SIZE, SettingsWire, StateWire, StreamPlan


class StreamSettingsNode(io.ComfyNode):
    """Stream Settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        size = f"of the picture in pixels. {OWN_SIZE}: as the model was made for."
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
                    default=OWN_SIZE,
                    min=OWN_SIZE,
                    max=4096,
                    step=SPACE_STRIDE,
                    tooltip=f"Width {size}",
                ),
                io.Int.Input(
                    "height",
                    default=OWN_SIZE,
                    min=OWN_SIZE,
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
                    "together longer, and takes more time and memory per second. Both models have "
                    "learned with 3.",
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
                io.Int.Input(
                    "takes",
                    default=1,
                    min=1,
                    max=16,
                    optional=True,  # prompts of an earlier version do not have it
                    tooltip="How many clips are made at once, of this seed and those that follow "
                    "it, side by side in one video. Rewind Stream goes on with one of them.",
                ),
                io.Combo.Input(
                    "kept",
                    options=list(KEPT),
                    default=AS_COMPUTED,
                    optional=True,
                    advanced=True,
                    display_name="keys and values",
                    tooltip="How the stream's memory lies on a graphics card, for one that is too "
                    "small. 8 bit: half of it; ten seconds of the small model changed by 0.2 % in "
                    "the picture and 0.9 % in the sound. in the computer's memory: none of it, and "
                    "nothing changes; slower, because it comes over in every step.",
                ),
                io.Latent.Input(
                    "start",
                    optional=True,
                    tooltip="Image to video: a picture that the stream begins with, encoded by the "
                    "model's VAE (VAE Encode, or LTXVImgToVideo) at the stream's size.",
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
        known = [OWN_SIZE if value is None else value for value in (width, height)]
        try:
            limits.check(cls, width=width, height=height)
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
        takes: int = 1,
        kept: Kept = AS_COMPUTED,
        start: dict[str, object] | None = None,
    ) -> io.NodeOutput:
        """Wrap them."""
        numbers = {"width": width, "height": height, "window": window, "seed": seed}
        limits.check(cls, **numbers, takes=takes, kept=kept)
        given = None if start is None else start_of(start["samples"], start.get("noise_mask"))
        return io.NodeOutput(StreamPlan(width, height, window, seed, given, takes, kept))


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
                *request.wires(),
                io.Int.Input(
                    "seconds",
                    default=2,
                    min=0,
                    max=600,
                    display_name="length (seconds)",
                    tooltip="How many seconds this chunk adds; 0: until you stop it.",
                ),
                *request.widgets(),
            ],
            outputs=[
                StateWire.Output(
                    "state", tooltip="The stream up to here: to the next chunk, or to Save Stream."
                ),
                io.Latent.Output("video", tooltip="Pictures of this chunk, for Decode Chunk."),
                io.Latent.Output("audio", tooltip="Sound of this chunk, for Decode Chunk."),
                request.schedule_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, execution: str = request.AUTOMATIC, mode: object = None) -> bool | str:
        """Whether there is such a path; a saved graph may have an old name of one.

        ComfyUI passes `mode` whether it is asked for or not, because it has widgets of its own.
        """
        return request.check_path(execution)

    @classmethod
    def execute(
        cls,
        model: object,
        positive: Conditioning,
        seconds: int,
        mode: dict[str, object] | None = None,
        variation: int = 0,
        negative: Conditioning | None = None,
        settings: StreamPlan | None = None,
        state: StreamState | None = None,
        execution: str = request.AUTOMATIC,
        few_step_guidance: float = GUIDANCE,
        given: dict[str, object] | None = None,
        clip: object = None,
    ) -> io.NodeOutput:
        """Sample the blocks; what is finished survives an interruption."""
        asked = request.read(
            cls,
            model,
            positive,
            negative,
            settings,
            state,
            seconds,
            mode,
            variation,
            execution,
            few_step_guidance,
            given=given,
            clip=clip,
        )
        progress = Progress(asked.steps)
        finished = Finished(asked.state)
        working = None if asked.decoder is None else folders.temporary_file("mp4")
        finished.clip = working
        shown = show_run(working, seconds or None, cls.hidden, asked.remarks)
        with asked.model.fitting_threads(), shown as run, rescue(finished, run, cls.hidden):
            progress.run = run
            made = sample(asked, progress, run)
            if asked.decoder is None:
                for latents, finished.state in made:
                    progress.sketch(asked.model.sketches(latents))
                    run.add(asked.seconds_to(finished.state))
            else:
                graph = graph_notes(cls.hidden)
                with player_file(working, asked, asked.decoder, run, graph) as show:

                    def use(decoded: DecodedBlock | None, after: StreamState) -> None:
                        finished.state = after
                        show(decoded, after)

                    asked.decoder.follow(made, asked.state, use)
        state = request.keep(asked, run, parked(finished.state, asked.state))
        model = asked.model
        origin = chunk_origin(state, asked.state.next_block, model.clock, model.audio_bins)
        video, audio = chunk_tensors(origin)
        return io.NodeOutput(
            state,
            {"samples": video, ORIGIN: origin},
            {"samples": audio, "type": "audio", ORIGIN: origin},
            written(state.schedule),
        )
