"""Shelf "Clip": the one big button. A prompt becomes a clip, with a live preview."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from comfy_api.latest import InputImpl, Types, io

from ..host import folders
from ..host.conditioning import Conditioning
from ..host.page import Progress, show_run
from ..host.stream_model import StreamModel
from ..networks.video_codec import SPACE_STRIDE
from ..samplers.clip_writer import ClipWriter
from ..samplers.decode import DecodedBlock, joined
from ..samplers.parking import parked
from ..samplers.rollout import GUIDANCE
from ..samplers.state import BlockLatents, StreamState
from . import request
from .rescue import Finished, rescue
from .types import StateWire, StreamPlan


class GenerateClip(io.ComfyNode):
    """Generate Clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_GenerateClip",
            display_name="Generate Clip",
            category="MutualForcing/Clip",
            description="Makes a clip with sound from a prompt and shows it growing. If you cancel "
            "it, the seconds that are finished are kept in output/mutual_forcing.",
            search_aliases=[
                "text to video",
                "text to video with sound",
                "t2v",
                "long video",
                "self forcing",
            ],
            inputs=[
                *request.wires(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For pictures, from the model's loader. Without it the model's own.",
                ),
                io.Vae.Input(
                    "audio_vae",
                    optional=True,
                    tooltip="For sound, from the model's loader. Without it the model's own.",
                ),
                io.Int.Input(
                    "seconds",
                    default=6,
                    min=1,
                    max=3600,
                    display_name="length (seconds)",
                    tooltip="How long the clip is. Frames are kept in memory until the clip is "
                    "saved.",
                ),
                *request.widgets(),
            ],
            outputs=[
                io.Video.Output("video", tooltip="The clip with its sound, for Save Video."),
                io.Image.Output("images", tooltip="Its frames, for any image node."),
                io.Audio.Output("audio", tooltip="Its sound, for any audio node."),
                io.Float.Output("fps", tooltip="Frames a second, for Create Video."),
                StateWire.Output(
                    "state", tooltip="Go on from here, with Sample Chunk or another Generate Clip."
                ),
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, execution: str = request.PATHS[0], mode: object = None) -> bool | str:
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
        mode: dict[str, object],
        variation: int = 0,
        negative: Conditioning | None = None,
        settings: StreamPlan | None = None,
        state: StreamState | None = None,
        execution: str = request.PATHS[0],
        few_step_guidance: float = GUIDANCE,
        vae: object = None,
        audio_vae: object = None,
    ) -> io.NodeOutput:
        """Sample, decode, show and write block after block."""
        asked = request.read(
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
            (vae, audio_vae),
        )
        decoder, clock, before = asked.decoder, asked.model.clock, asked.state
        size = before.settings
        progress = Progress(asked.blocks * asked.sampler.steps)
        # What is decoded at the end only has no clip to keep before.
        working = folders.temporary_file("mp4") if decoder.live else None
        finished = Finished(before, working)
        blocks = []
        with rescue(finished), ExitStack() as open_files:
            run = open_files.enter_context(show_run(working, seconds, cls.hidden.extra_pnginfo))
            progress.run = run
            if working is not None:
                height, width = size.height * SPACE_STRIDE, size.width * SPACE_STRIDE
                writer = open_files.enter_context(ClipWriter(working, clock, height, width))
            blocks_made = _sketched(request.sample(asked, progress, run), asked.model, progress)

            def use(decoded: DecodedBlock | None, after: StreamState) -> None:
                if decoded is not None:
                    blocks.append(decoded)
                    if working is not None:
                        writer.write(decoded)
                        progress.show(decoded)
                finished.state = after
                run.add(asked.seconds_to(after), begun=working is not None and writer.growing)

            decoder.follow(blocks_made, before, use)
        whole = joined(blocks)
        images = whole.video.flatten(0, 1)
        audio = {"waveform": whole.audio, "sample_rate": decoder.sample_rate}
        video = InputImpl.VideoFromComponents(
            Types.VideoComponents(images=images, audio=audio, frame_rate=clock.fps)
        )
        state = parked(finished.state, before)
        return io.NodeOutput(video, images, audio, float(clock.fps), state)


def _sketched(
    made: Iterator[tuple[BlockLatents, StreamState]], model: StreamModel, progress: Progress
) -> Iterator[tuple[BlockLatents, StreamState]]:
    for latents, state in made:
        progress.sketch(model.sketches(latents))
        yield latents, state
