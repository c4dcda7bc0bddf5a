"""Shelf "Stream": several prompts on one wire, each with its time."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.conditioning import START, Conditioning, at_time, encoded, encoder_of
from ..samplers.schedule import MOST_BLOCKS, Transition, parse_schedule
from . import limits

KEEP, REREAD, BLEND = "keep", "read again", "blend"
_NAMES = {REREAD: "reread", BLEND: "blend"}
_SECONDS = {REREAD: 1, BLEND: 2}
_EXAMPLE = """0: a red ball bounces on a white background
5: a blue ball bounces on a white background
"""


class PromptSchedule(io.ComfyNode):
    """Prompt Schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""

        def seconds(default: int, tooltip: str) -> io.Input:
            return io.Int.Input("seconds", default=default, min=1, max=MOST_BLOCKS, tooltip=tooltip)

        return io.Schema(
            node_id="MF_PromptSchedule",
            display_name="Prompt Schedule",
            category="MutualForcing/Stream",
            description="Several prompts for one stream, each from its second on.",
            search_aliases=["prompt travel", "timeline", "multi prompt", "prompt switch", "story"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Reads the lines: from the model's loader, or with LTX-2 from its text "
                    "encoder's. Not needed without lines.",
                ),
                io.String.Input(
                    "lines",
                    multiline=True,
                    default=_EXAMPLE,
                    tooltip="A line for each prompt: the second of the stream that it begins with, "
                    "a colon, what to see and hear. A line that begins with a space goes on with "
                    "the prompt above it. '5 reread 3: ...' or '5 blend 2: ...' chooses for one "
                    "line what is chosen below for all.",
                ),
                io.DynamicCombo.Input(
                    "past",
                    options=[
                        io.DynamicCombo.Option(
                            REREAD,
                            [
                                seconds(
                                    _SECONDS[REREAD],
                                    "How many of the last seconds the model reads again.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(KEEP, []),
                        io.DynamicCombo.Option(
                            BLEND, [seconds(_SECONDS[BLEND], "How many seconds the change takes.")]
                        ),
                    ],
                    tooltip="What happens to the past where a new prompt begins. read again: the "
                    "model looks at the last seconds anew, knowing the new prompt. keep: it stays "
                    "as it was. blend: the new prompt comes in slowly.",
                ),
                io.Conditioning.Input(
                    "append",
                    optional=True,
                    tooltip="More prompts, from any node that makes one, or from another Prompt "
                    "Schedule.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.5,
                    display_name="start of append (seconds)",
                    tooltip="The second from which on 'append' is followed, if it has no times of "
                    "its own.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", tooltip="To 'positive' of Generate Clip or Sample Chunk."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, lines: str, past: object = None) -> bool | str:
        """Whether the lines can be read."""
        try:
            parse_schedule(lines or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        lines: str,
        past: dict[str, object] | None = None,
        start: float = 0.0,
        clip: object = None,
        append: Conditioning | None = None,
    ) -> io.NodeOutput:
        """Encode every line."""
        if not isinstance(past, dict):  # over a wire its widgets do not come along
            past = {"past": past}
        limits.check(cls, past=past, start=start)
        choice = past["past"]
        seconds = past.get("seconds", _SECONDS.get(choice))
        how = Transition(**({} if choice == KEEP else {_NAMES[choice]: seconds}))
        asked = parse_schedule(lines, how)
        if asked and clip is None:
            raise ValueError(
                "there are lines and no 'clip' to read them: connect the one of the model's loader"
            )
        named = ((f"line {n} of the schedule", line) for n, line in enumerate(asked, start=1))
        entries = encoded(named, encoder_of(clip))
        if append is not None:
            entries += at_time(append, start, how)
        if not entries:
            raise ValueError(
                "the schedule is empty: write a line such as '0: a red ball', or connect 'append'"
            )
        return io.NodeOutput(sorted(entries, key=lambda entry: entry[1][START]))
