"""Shelf "Model": files to what a model is in ComfyUI: MODEL, CLIP, VAE, and a VAE for sound."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..host import folders
from ..host.load_ltx2 import WEIGHTS, Weights, load_generator, load_vaes
from ..host.load_mutual_forcing import (
    ATTENTIONS,
    PRECISIONS,
    Attention,
    Precision,
    load_mutual_forcing,
)
from ..host.model_wire import known_of
from ..host.page import say
from ..model_loaders.identity import BASE, LATER_BASE, Preset, changed_at
from ..samplers.side_ranks import ONE

NO_MODEL, NO_FILE, NO_BASE = "no model found", "no LTX-2 checkpoint found", "none"
_POSITIONS: dict[str, Preset | None] = {
    "automatic": None,
    "OmniForcing": "omniforcing",
    "TaoMate": "taomate",
    "LTX-2": "ltx2_base",
}

_PUBLISHED = {
    "file": "download the whole folder https://huggingface.co/Exploration/omniforcing-ltx2-5s-causal"
    " into ComfyUI's models/diffusion_models, or model.pt from "
    "https://huggingface.co/TaoLiveAIGC/TaoMate into models/mutual_forcing/taomate",
    "base": "download ltx-2-19b-dev-fp8.safetensors from https://huggingface.co/Lightricks/LTX-2 "
    "(for TaoMate ltx-2.3-22b-dev.safetensors from https://huggingface.co/Lightricks/LTX-2.3) into "
    "ComfyUI's models/checkpoints",
}
"""Where the files that the templates name come from; nothing here ever asks a network."""


def devices() -> io.Input:
    """Which devices share a model."""
    return io.String.Input(
        "devices",
        default=ONE,
        optional=True,
        advanced=True,
        tooltip="one: the model is on ComfyUI's own device. Several share it, each with a part: "
        "all (cards), or their names, ComfyUI's own first, such as 'cuda:0, cuda:1'. Without "
        "LoRAs, and not with weights in 8 bits.",
    )


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
                    options=list(folders.model_files()) or [NO_MODEL],
                    tooltip="The small model comes with the pack. Other models go into ComfyUI's "
                    "models/mutual_forcing folder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    display_name="precision",
                    advanced=True,
                    tooltip="automatic suits your machine. float32 is the most exact; the others "
                    "take half the memory.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default=ATTENTIONS[0],
                    advanced=True,
                    tooltip="automatic uses what your ComfyUI was started with, such as xFormers. "
                    "PyTorch is the one to try if pictures look wrong.",
                ),
                devices(),
            ],
            outputs=[
                io.Model.Output(
                    "model", tooltip="To Generate Clip, Sample Chunk, or a LoRA loader."
                ),
                io.Clip.Output("clip", tooltip="To CLIP Text Encode, where the prompt is written."),
                io.Vae.Output(
                    "vae", tooltip="For pictures: to decode, and to encode a start image."
                ),
                io.Vae.Output("audio_vae", display_name="audio VAE", tooltip="For sound."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Say what to do when the file is not there."""
        if file in folders.model_files():
            return True
        if file == NO_MODEL:
            return (
                "no Mutual Forcing model was found: install this pack again, or put a model into "
                "ComfyUI's models/mutual_forcing folder and press R"
            )
        if found := folders.refusal_of(file):
            return f"'{file}' is no Mutual Forcing model: {found}"
        return (
            f"the model '{file}' is not there: choose another one from the list, or put it into "
            "ComfyUI's models/mutual_forcing folder and press R"
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_others: object) -> str:
        """A file that was replaced is loaded again."""
        path = folders.model_files().get(file)
        return "" if path is None else f"{path} {changed_at(path)}"

    @classmethod
    def execute(
        cls,
        file: str,
        dtype: Precision = PRECISIONS[0],
        attention: Attention = ATTENTIONS[0],
        devices: str = ONE,
    ) -> io.NodeOutput:
        """Load it."""
        loaded = load_mutual_forcing(folders.model_files()[file], dtype, attention, devices)
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, loaded.audio_vae)


class LoadLTX2(io.ComfyNode):
    """Load OmniForcing Model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_LoadLTX2",
            display_name="Load OmniForcing Model",
            category="MutualForcing/Model",
            description="Loads LTX-2 made causal: OmniForcing's checkpoint of LTX-2 19B, or "
            "TaoMate's of LTX-2.3. LoRA loaders and Sample Chunk go behind it.",
            search_aliases=[
                "ltx-2",
                "ltxav",
                "omniforcing",
                "taomate",
                "ltx-2.3",
                "checkpoint loader",
                "load diffusion model",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(folders.generator_files()) or [NO_FILE],
                    tooltip="A file, or a folder of files (as OmniForcing is published), in "
                    "ComfyUI's models/diffusion_models, checkpoints or mutual_forcing folder; it "
                    "may be a .pt, as TaoMate is.",
                ),
                io.Combo.Input(
                    "base",
                    options=[*folders.base_files(), NO_BASE],
                    tooltip="LTX-2's own file: it has what prepares the prompt, and both VAEs. "
                    f"For OmniForcing {BASE}, for TaoMate {LATER_BASE}. Its connectors alone will "
                    "do, too; none: where the text encoder has them.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default=WEIGHTS[0],
                    tooltip="int8 halves the memory of a 16-bit file and hardly changes the "
                    "picture (numbers of two random networks by about 1 %, where 16 bits are off "
                    "by 0.6 %). fp8: as much memory, 2 to 6 % off. fp8, fast also multiplies in "
                    "fp8, on cards that can, and is a third further off. A file in 8 bits or fewer "
                    "stays as it is.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(_POSITIONS),
                    default="automatic",
                    advanced=True,
                    tooltip="Which numbers the model counts time and place with. automatic goes "
                    "by the file: one with a memory as TaoMate, one with LTX-2's header by that, "
                    "one without as OmniForcing.",
                ),
                io.Boolean.Input(
                    "averaged",
                    default=False,
                    advanced=True,
                    display_name="averaged weights",
                    tooltip="For training checkpoints (.pt) that hold averaged weights as well.",
                ),
                devices(),
            ],
            outputs=[
                io.Model.Output(
                    "model", tooltip="To Generate Clip, Sample Chunk, or a LoRA loader."
                ),
                io.Vae.Output("vae", tooltip="LTX-2's VAE for pictures, out of the base file."),
                io.Vae.Output(
                    "audio_vae",
                    display_name="audio VAE",
                    tooltip="LTX-2's VAE for sound, out of the base file.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str, base: str) -> bool | str:
        """Say what to do when a file is not there."""
        if file == NO_FILE:
            return f"no causal LTX-2 checkpoint was found: {_PUBLISHED['file']}, and press R"
        # ComfyUI shows a refusal at both inputs, so it says which one it is about.
        for widget, name, known in (
            ("file", file, folders.generator_files()),
            ("base", base, {NO_BASE, *folders.base_files()}),
        ):
            if name in known:
                continue
            if found := folders.refusal_of(name):
                return f"the {widget} '{name}' does not fit here: {found}"
            return (
                f"the {widget} '{name}' is not there: choose another one, or {_PUBLISHED[widget]}, "
                "and press R"
            )
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, base: str, **_others: object) -> str:
        """Files that were replaced are loaded again."""
        places = folders.generator_files().get(file), folders.base_files().get(base)
        return " ".join(f"{path} {changed_at(path)}" for path in places if path is not None)

    @classmethod
    def execute(
        cls,
        file: str,
        base: str,
        weights: Weights = WEIGHTS[0],
        positions: str = "automatic",
        averaged: bool = False,
        devices: str = ONE,
    ) -> io.NodeOutput:
        """Load all three."""
        path = folders.generator_files()[file]
        base_path: Path | None = folders.base_files().get(base)
        vae, audio_vae = load_vaes(base_path or path)
        model = load_generator(
            path,
            base_path,
            weights,
            _POSITIONS[positions],
            ema=averaged,
            vae=vae,
            audio_vae=audio_vae,
            devices=devices,
        )
        words = list(known_of(model).remarks)
        if not known_of(model).connected:
            words.append(
                "no base: prompts must come from a text encoder that has LTX-2's connectors in it"
            )
        for what, found in (("pictures", vae), ("sound", audio_vae)):
            if found is None:
                words.append(f"no VAE for {what} in {base if base_path else file}: connect another")
        if words:
            say("\n".join(words))
        return io.NodeOutput(model, vae, audio_vae)
