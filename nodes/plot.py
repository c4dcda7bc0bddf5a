"""Shelf "Clip", second half: what can be measured of a clip, as a picture in the graph."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import io

from ..host.encoding import Clip
from ..host.plots import measured_clip, measured_video, plotted
from . import limits


class PlotClip(io.ComfyNode):
    """Plot Clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_PlotClip",
            display_name="Plot Clip",
            category="MutualForcing/Clip",
            description="Measures any clip and draws it over time: frames, sound, whether both go "
            "together, seams between seconds, loudness, and how colours drift.",
            search_aliases=["audio sync", "waveform", "loudness", "seams", "drift", "analyse"],
            inputs=[
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="The clip. From Generate Clip or Load Video, for instance.",
                ),
                io.Image.Input("images", optional=True, tooltip="Or its frames by themselves ..."),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="... and its sound, from the first frame on.",
                ),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=240.0,
                    step=0.01,
                    tooltip="Frames a second of 'images'. A video knows its own.",
                ),
                io.Float.Input(
                    "period",
                    default=1.0,
                    min=0.1,
                    max=3600.0,
                    step=0.1,
                    advanced=True,
                    display_name="seam every (seconds)",
                    tooltip="Where seams are looked for: streams of this pack are made second by "
                    "second.",
                ),
            ],
            outputs=[io.Image.Output("plot", tooltip="To Preview Image or Save Image.")],
        )

    @classmethod
    def execute(
        cls,
        video: object = None,
        images: object = None,
        audio: dict[str, object] | None = None,
        fps: float = 24.0,
        period: float = 1.0,
    ) -> io.NodeOutput:
        """Measure it, and draw."""
        limits.check(cls, fps=fps, period=period)
        if (video is None) == (images is None):
            found = "both are" if video is not None else "neither is"
            raise ValueError(
                f"{found} connected, 'video' and 'images': connect one of them, and with 'images' "
                "their sound to 'audio'"
            )
        if video is None:
            film = measured_clip(Clip(images, audio, Fraction(fps).limit_denominator(1001)), period)
        elif audio is not None:
            raise ValueError("a video has its own sound: connect 'audio' with 'images' only")
        else:
            film = measured_video(video, period)
        return io.NodeOutput(plotted(film))
