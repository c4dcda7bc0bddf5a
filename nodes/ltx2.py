"""Shelf "LTX-2": a causal LTX-2 checkpoint as a MODEL, and its chunks through LTX-2's own VAEs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..host import ltx2 as compat_ltx2
from ..host.ltx2 import Weights
from ..host.ltx2_model import AUDIO_BINS, stream_clock
from ..model_loaders.catalog import changed_at
from ..model_loaders.ltx2 import Preset
from ..samplers.chunk import chunk_origin, chunk_state, chunk_tensors
from ..samplers.overlap import OVERLAP, decode_pictures, decode_sound, piece_of
from .stream import CHUNK, WHOLE, chunk_wires, origin_of, pictures_and_sound

NO_FILE, NO_BASE = "no LTX-2 checkpoint found", "none"
_POSITIONS: dict[str, Preset | None] = {
    "automatic": None,
    "OmniForcing": "omniforcing",
    "LTX-2": "ltx2_base",
}


class LoadLTX2(io.ComfyNode):
    """Load OmniForcing Model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_LoadLTX2",
            display_name="Load OmniForcing Model",
            category="MutualForcing/LTX-2",
            description="Loads LTX-2 19B made causal, such as OmniForcing's checkpoint. LoRA "
            "loaders and "
            "Sample Chunk go behind it.",
            search_aliases=[
                "ltx-2",
                "ltxav",
                "omniforcing",
                "checkpoint loader",
                "load diffusion model",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(compat_ltx2.generator_files()) or [NO_FILE],
                    tooltip="A file, or a folder of files (as OmniForcing is published), in "
                    "ComfyUI's "
                    "models/diffusion_models, checkpoints or mutual_forcing folder.",
                ),
                io.Combo.Input(
                    "base",
                    options=[*compat_ltx2.base_files(), NO_BASE],
                    tooltip="LTX-2's own file: it has what prepares the prompt, and the VAE.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(compat_ltx2.WEIGHTS),
                    default=compat_ltx2.WEIGHTS[0],
                    tooltip="fp8 halves the memory of a 16-bit file and changes the picture a "
                    "little. fast "
                    "also multiplies in fp8, on cards that can. A file in 8 bits or fewer stays as "
                    "it is.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(_POSITIONS),
                    default="automatic",
                    advanced=True,
                    tooltip="Which numbers the model counts time and place with. automatic goes by "
                    "the file: "
                    "one with LTX-2's header by that, one without as OmniForcing.",
                ),
                io.Boolean.Input(
                    "averaged",
                    default=False,
                    advanced=True,
                    display_name="averaged weights",
                    tooltip="For training checkpoints (.pt) that hold averaged weights as well.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="To a LoRA loader, or to Sample Chunk."),
                io.Vae.Output(
                    "vae",
                    tooltip="LTX-2's VAE for pictures, out of the base file: to encode and decode.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str, base: str) -> bool | str:
        """Say what to do when a file is not there."""
        if file == NO_FILE:
            return (
                "no LTX-2 checkpoint was found: put OmniForcing's folder into ComfyUI's "
                "models/diffusion_models and press R; the notes of the template '4 ltx2 text to "
                "clip' say "
                "where it is published"
            )
        for name, known in (
            (file, compat_ltx2.generator_files()),
            (base, {NO_BASE, *compat_ltx2.base_files()}),
        ):
            if name not in known:
                return f"'{name}' is not there, or is not LTX-2: press R and choose another one"
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, base: str, **_others: object) -> str:
        """Files that were replaced are loaded again."""
        places = compat_ltx2.generator_files().get(file), compat_ltx2.base_files().get(base)
        return " ".join(f"{path} {changed_at(path)}" for path in places if path is not None)

    @classmethod
    def execute(
        cls,
        file: str,
        base: str,
        weights: Weights = compat_ltx2.WEIGHTS[0],
        positions: str = "automatic",
        averaged: bool = False,
    ) -> io.NodeOutput:
        """Load both."""
        path = compat_ltx2.generator_files()[file]
        base_path: Path | None = compat_ltx2.base_files().get(base)
        model = compat_ltx2.load_generator(
            path, base_path, weights, _POSITIONS[positions], ema=averaged
        )
        return io.NodeOutput(model, compat_ltx2.load_video_vae(base_path or path))


class DecodeLTX2(io.ComfyNode):
    """Decode Chunk (LTX-2)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="MF_DecodeLTX2",
            display_name="Decode Chunk (LTX-2)",
            category="MutualForcing/LTX-2",
            description="Turns a chunk of an LTX-2 stream into pictures and sound, together with "
            "what lies "
            "around it, so that chunks can be put one after the other.",
            search_aliases=["vae decode", "audio vae decode", "latent to video", "ltxv"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Load OmniForcing Model or Load VAE."),
                io.Vae.Input("audio_vae", tooltip="From Load LTXV Audio VAE."),
                *chunk_wires(),
                io.Combo.Input(
                    "part",
                    options=[CHUNK, WHOLE],
                    default=CHUNK,
                    tooltip="this chunk: what it adds to what the chunks before it gave. whole "
                    "stream: "
                    "everything from the beginning of the stream to the end of this chunk.",
                ),
                io.Int.Input(
                    "overlap",
                    default=OVERLAP,
                    min=1,
                    max=22,
                    advanced=True,
                    tooltip="How much around the chunk is decoded with it, in latents of 8 frames. "
                    "As much is "
                    "held back at its end until the next chunk. More hides the seam better.",
                ),
                io.Boolean.Input(
                    "last",
                    default=False,
                    display_name="last chunk",
                    tooltip="On for the chunk that nothing follows: it gives what was held back, "
                    "too.",
                ),
            ],
            outputs=pictures_and_sound(),
        )

    @classmethod
    def execute(
        cls,
        vae: object,
        audio_vae: object,
        video: dict[str, object],
        audio: dict[str, object],
        part: str = CHUNK,
        overlap: int = OVERLAP,
        last: bool = False,
    ) -> io.NodeOutput:
        """Decode both."""
        origin = origin_of(video, audio)
        if origin.audio_bins != AUDIO_BINS:
            raise ValueError(
                "the chunk was made by this pack's own kind of model: use Decode Chunk with that "
                "model"
            )
        if vae is None:
            raise ValueError(
                "there is no VAE on the 'vae' wire: choose LTX-2's own file as base in Load "
                "OmniForcing Model, "
                "or connect Load VAE"
            )
        clock = stream_clock(origin.state.layout)
        state = chunk_state(origin, video["samples"], audio["samples"])
        whole = chunk_origin(state, 0, origin.audio_bins)
        if part == WHOLE:
            piece = piece_of(clock, whole, is_last=True)
        else:
            piece = piece_of(
                clock, replace(origin, state=whole.state), overlap=overlap, is_last=last
            )
        pictures, sound = chunk_tensors(whole)
        rate = compat_ltx2.sample_rate_of(audio_vae)
        frames = decode_pictures(clock, pictures, piece, vae.decode)
        waveform = decode_sound(
            clock, sound, piece, rate, lambda latents: compat_ltx2.decode_audio(audio_vae, latents)
        )
        return io.NodeOutput(
            frames.flatten(0, 1), {"waveform": waveform, "sample_rate": rate}, float(clock.fps)
        )
