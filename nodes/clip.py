"""Shelf "Clip": the one big button. A prompt becomes a clip, with a live preview."""

from __future__ import annotations

from comfy_api.latest import InputImpl, Types, io

from ..host import comfy as compat
from ..host.comfy import HostModel
from ..host.conditioning import Conditioning
from ..networks.video_codec import SPACE_STRIDE
from ..samplers.clip_writer import ClipWriter
from ..samplers.decode import DecodedBlock, joined
from ..samplers.live import decoded_live
from ..samplers.parking import parked
from ..samplers.state import StreamState
from . import request
from .rescue import Finished, rescue
from .types import ModelWire, StateWire, StreamPlan


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
                *request.wires(ModelWire.Input("model", tooltip="From Load Mutual Forcing Model.")),
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
        )

    @classmethod
    def validate_inputs(cls, execution: str = request.PATHS[0]) -> bool | str:
        """Whether there is such a path; a saved graph may have an old name of one."""
        return request.check_path(execution)

    @classmethod
    def execute(
        cls,
        model: HostModel,
        positive: Conditioning,
        seconds: int,
        mode: dict[str, object],
        variation: int = 0,
        negative: Conditioning | None = None,
        settings: StreamPlan | None = None,
        state: StreamState | None = None,
        execution: str = request.PATHS[0],
    ) -> io.NodeOutput:
        """Sample, decode, show and write block after block."""
        asked = request.read(
            model, positive, negative, settings, state, seconds, mode, variation, execution
        )
        bundle, size = model.bundle, asked.state.settings
        progress = compat.Progress(asked.blocks * asked.sampler.steps)
        finished = Finished(asked.state, compat.temporary_file("mp4"))
        made = request.sample(asked, progress)
        blocks = []

        def use(decoded: DecodedBlock, after: StreamState) -> None:
            writer.write(decoded)
            progress.show(decoded)
            blocks.append(decoded)
            finished.state = after

        with (
            rescue(finished),
            ClipWriter(
                finished.clip, bundle.clock, size.height * SPACE_STRIDE, size.width * SPACE_STRIDE
            ) as writer,
        ):
            for _ in decoded_live(made, bundle.decoder(), asked.state, use):
                pass
        whole = joined(blocks)
        images = whole.video.flatten(0, 1)
        audio = {"waveform": whole.audio, "sample_rate": bundle.clock.sample_rate}
        video = InputImpl.VideoFromComponents(
            Types.VideoComponents(images=images, audio=audio, frame_rate=bundle.clock.fps)
        )
        state = parked(finished.state, asked.state)
        return io.NodeOutput(video, images, audio, float(bundle.clock.fps), state)
