"""Shelf "State": keep a stream and go on from it another day."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..host import folders
from ..model_loaders.catalog import changed_at
from ..samplers.state import StreamState
from ..samplers.state_file import load_state, save_state
from .types import StateWire

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
            ],
            outputs=[StateWire.Output("state", tooltip="The same stream, to go on right away.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A name is needed."""
        if name is not None and not name.strip(" /\\"):
            return "the name is empty: write a name for the file"
        return True

    @classmethod
    def execute(
        cls, state: StreamState, name: str = "stream", memory: bool = True
    ) -> io.NodeOutput:
        """Write it."""
        path = folders.output_file(name, "safetensors")
        save_state(path, state, keys=memory)
        logger.info("stream saved: %s", path)
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
        return io.NodeOutput(load_state(folders.saved_stream(file)))
