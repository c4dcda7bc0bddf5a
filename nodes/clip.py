"""Shelf "Clip": the one big button. A prompt becomes a clip, with a live preview."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from comfy_api.latest import io

from ..host import folders
from ..host.clip_file import ClipFile, clip_writer
from ..host.conditioning import Conditioning
from ..host.page import Progress, graph_notes, show_run
from ..host.stream_model import StreamModel
from ..host.wiring import fingerprint, wired
from ..samplers.decode import Collected, DecodedBlock
from ..samplers.parking import parked
from ..samplers.rollout import GUIDANCE
from ..samplers.schedule import written
from ..samplers.state import BlockLatents, StreamState
from . import request
from .player_file import player_file
from .rescue import Finished, rescue
from .sampling import sample
from .types import StateWire, StreamPlan

IMAGES, AUDIO = 1, 2


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
                *request.vaes(),
                io.Int.Input(
                    "seconds",
                    default=6,
                    min=0,
                    max=3600,
                    display_name="length (seconds)",
                    tooltip="How long the clip is; 0: until you stop it. Made longer, only what is "
                    "new is made. Frames are only kept in memory where 'images' is connected.",
                ),
                *request.widgets(),
            ],
            outputs=[
                io.Video.Output(
                    "video",
                    tooltip="The clip with its sound, for Save Video: a file, copied as "
                    "it is into an mp4. Several clips are side by side, and the first is heard.",
                ),
                io.Image.Output(
                    "images", tooltip="Its frames, for any image node. Made only if connected."
                ),
                io.Audio.Output("audio", tooltip="Its sound, for any audio node."),
                io.Float.Output("fps", tooltip="Frames a second, for Create Video."),
                StateWire.Output(
                    "state", tooltip="Go on from here, with Sample Chunk or another Generate Clip."
                ),
                request.schedule_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, execution: str = request.AUTOMATIC, mode: object = None) -> bool | str:
        """Whether there is such a path; a saved graph may have an old name of one.

        ComfyUI passes `mode` whether it is asked for or not, because it has widgets of its own.
        """
        return request.check_path(execution)

    @classmethod
    def fingerprint_inputs(cls, **_inputs: object) -> str:
        """With what is wired: pictures that nobody wanted before are not in ComfyUI's cache."""
        return fingerprint(cls.hidden.unique_id, IMAGES, AUDIO)

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
        vae: object = None,
        audio_vae: object = None,
        clip: object = None,
    ) -> io.NodeOutput:
        """Sample, decode, show and write block after block."""
        to = wired(cls.hidden.unique_id)
        frames, sound = (to is None or slot in to for slot in (IMAGES, AUDIO))
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
            (vae, audio_vae),
            frames=frames,
            given=given,
            clip=clip,
        )
        decoder, clock, before = asked.decoder, asked.model.clock, asked.state
        first = before.next_block
        progress = Progress(asked.steps)
        working = folders.temporary_file("mp4")
        glimpse = None if asked.glimpse is None else folders.temporary_file("mp4")
        finished = Finished(before, glimpse or working)
        blocks = asked.blocks or request.A_MINUTE
        kept = Collected(clock.frames(first + blocks) - clock.frames(first))
        length = seconds or None
        hidden, remarks, live = cls.hidden, asked.remarks, decoder.live
        shown = show_run(working, length, hidden, remarks, preview=glimpse, live=live)
        with asked.model.fitting_threads(), shown as run, rescue(finished, run, hidden):
            progress.run = run
            graph = graph_notes(hidden)
            with ExitStack() as files:
                writer = files.enter_context(clip_writer(working, clock, before, decoder, graph))
                made = _sketched(sample(asked, progress, run), asked.model, progress)
                if glimpse is not None:
                    file = player_file(glimpse, asked, asked.glimpse, run, graph)
                    made = asked.glimpse.seen(made, before, files.enter_context(file))

                def use(decoded: DecodedBlock | None, after: StreamState) -> None:
                    if decoded is not None:
                        finished.clip = working
                        writer.tag(written(after.schedule))
                        writer.write(decoded)
                        progress.show(decoded)
                        if frames:
                            kept.add(decoded)
                        elif sound:
                            kept.add(decoded._replace(video=decoded.video[:, :0]))
                    finished.state = after
                    run.add(asked.seconds_to(after), begun=glimpse is None and writer.growing)

                decoder.follow(made, before, use)
            state = request.keep(asked, run, parked(finished.state, before))
        images = audio = None
        if frames or sound:
            whole = kept.whole()
            images = whole.video.flatten(0, 1) if frames else None
            audio = {"waveform": whole.audio, "sample_rate": decoder.sample_rate}
        video, schedule = ClipFile(working), written(state.schedule)
        return io.NodeOutput(video, images, audio, float(clock.fps), state, schedule)


def _sketched(
    made: Iterator[tuple[BlockLatents, StreamState]], model: StreamModel, progress: Progress
) -> Iterator[tuple[BlockLatents, StreamState]]:
    for latents, state in made:
        progress.sketch(model.sketches(latents))
        yield latents, state
