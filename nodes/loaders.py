"""Shelf "Model": a model file to a model and a CLIP."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import comfy as compat
from ..host.conditioning import StreamClip
from ..model_loaders.catalog import changed_at
from .types import ModelWire

NO_MODEL = "no model found"


class LoadModel(io.ComfyNode):
    """Load Mutual Forcing Model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_LoadModel",
            display_name="Load Mutual Forcing Model",
            category="MutualForcing/Model",
            description="Loads a model that makes video and sound together, second by second.",
            search_aliases=[
                "checkpoint loader",
                "self forcing",
                "omniforcing",
                "audio video model",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(compat.model_files()) or [NO_MODEL],
                    tooltip="The small model comes with the pack. Other models go into ComfyUI's "
                    "models/mutual_forcing folder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["automatic", "float32", "bfloat16", "float16"],
                    default="automatic",
                    display_name="precision",
                    advanced=True,
                    tooltip="automatic suits your machine. float32 is the most exact; the others "
                    "take "
                    "half the memory.",
                ),
                io.Combo.Input(
                    "attention",
                    options=["automatic", "PyTorch"],
                    default="automatic",
                    advanced=True,
                    tooltip="automatic uses what your ComfyUI was started with, such as xFormers. "
                    "PyTorch is the one to try if pictures look wrong.",
                ),
            ],
            outputs=[
                ModelWire.Output("model", tooltip="To Generate Clip or Sample Chunk."),
                io.Clip.Output("clip", tooltip="To CLIP Text Encode, where the prompt is written."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Say what to do when the file is not there."""
        if file in compat.model_files():
            return True
        if file == NO_MODEL:
            return (
                "no Mutual Forcing model was found: install this pack again, or put a model into "
                "ComfyUI's models/mutual_forcing folder and press R"
            )
        return (
            f"the model '{file}' is not there, or is not a whole Mutual Forcing model: choose "
            "another "
            "one from the list, or put it into ComfyUI's models/mutual_forcing folder and press R"
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_others: object) -> str:
        """A file that was replaced is loaded again."""
        path = compat.model_files().get(file)
        return "" if path is None else f"{path} {changed_at(path)}"

    @classmethod
    def execute(
        cls, file: str, dtype: str = "automatic", attention: str = "automatic"
    ) -> io.NodeOutput:
        """Load it."""
        model = compat.load_model(compat.model_files()[file], dtype, attention)
        return io.NodeOutput(model, StreamClip(model.bundle, model.make_ready))
