"""What a file is: the one place that says so, from its header, its names and its own name alone.

The loaders' lists, loading, every refusal, the notes on the nodes and README's table "what I have,
what to choose" all ask here. Of a file only the beginning is read, of a .pt only the list of what
is in it, which is never run. How the files that are known here are built: docs/omniforcing.md,
section 2; docs/ltx23.md, section 2.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..networks.few_step import FEW_STEP
from ..networks.memory_branch import is_memory
from ..samplers.state_file import FORMAT as STREAM_FORMAT
from ..samplers.tensor_file import LONGEST_HEADER, is_regular, read_header
from .keymap import CAUSAL_MARK

Role = Literal["model", "stream", "file", "base"]
"""What a list offers it as: of Load Mutual Forcing Model, of Load Stream, of Load OmniForcing
Model."""
Preset = Literal["omniforcing", "taomate", "ltx2_base"]
"""Whose positions a network counts with."""

MODEL_FORMAT, PACKED_HEADER = "mutual-forcing", "mutual_forcing_header"
"""What a model of this pack says in its header, or in a tensor where a host's node saved it."""
BASE, LATER_BASE = "ltx-2-19b-dev.safetensors", "ltx-2.3-22b-dev.safetensors"
CONNECTORS = ("video_embeddings_connector", "audio_embeddings_connector")
SINKS, MEMORY = "audio_sink_tokens", "learned_memory_video_encoder.weight"
PICKLED = (".pt", ".pth")
_OMNIFORCING = f"`{BASE}` or its fp8 version"


@dataclass(frozen=True)
class Kind:
    """One thing that people have.

    Attributes:
        have: as they know it: names of published files.
        name: "this is ...".
        choose: what to do with it, "choose it as ..." or another sentence without its subject.
        roles: which lists offer it.
        causal: whether it makes streams; None where that cannot be known.
    """

    have: str
    name: str
    choose: str
    roles: frozenset[Role] = frozenset()
    causal: bool | None = None


def _kind(have: str, name: str, choose: str, *roles: Role, causal: bool | None = None) -> Kind:
    return Kind(have, name, choose, frozenset(roles), causal)


KINDS: dict[str, Kind] = {
    "ours": _kind(
        "`mutual_forcing_small.safetensors`, or a model of your own training",
        "a Mutual Forcing model",
        "choose it in Load Mutual Forcing Model, from models/mutual_forcing",
        "model",
        causal=True,
    ),
    "taomate": _kind(
        "TaoMate's `model.pt`",
        "LTX-2.3 made causal by TaoMate",
        "choose it as file in Load OmniForcing Model, from models/mutual_forcing, with "
        f"`{LATER_BASE}` as base",
        "file",
        causal=True,
    ),
    "omniforcing": _kind(
        "OmniForcing's generator: a folder of files with an index, or a `.pt` of its training",
        "LTX-2 19B made causal by OmniForcing",
        "choose it as file in Load OmniForcing Model, from models/diffusion_models (a `.pt` from "
        f"models/mutual_forcing), with {_OMNIFORCING} as base",
        "file",
        causal=True,
    ),
    "causal": _kind(
        "a causal LTX-2 that Save Model wrote behind Load OmniForcing Model, or "
        "`lab.training.adapters`",
        "a causal LTX-2 that says itself how it is run",
        "choose it as file in Load OmniForcing Model; as base none, if its connectors are in it, "
        "or the base that it was made with",
        "file",
        causal=True,
    ),
    "ltx2": _kind(
        f"{_OMNIFORCING}",
        "LTX-2 19B's own file, which was not made causal",
        "choose it as base in Load OmniForcing Model, from models/checkpoints, and in Load LTXV "
        "Audio Text Encoder",
        "file",
        "base",
        causal=False,
    ),
    "ltx2 distilled": _kind(
        "`ltx-2-19b-distilled.safetensors` or its fp8 version",
        "LTX-2 19B's distilled file, which was not made causal",
        f"choose {_OMNIFORCING} as base instead: the distilled one prepares prompts otherwise than "
        "OmniForcing learned them",
        "file",
        "base",
        causal=False,
    ),
    "ltx23": _kind(
        f"`{LATER_BASE}`",
        "LTX-2.3's own file, which was not made causal",
        "choose it as base in Load OmniForcing Model beside TaoMate, from models/checkpoints, and "
        "in Load LTXV Audio Text Encoder",
        "file",
        "base",
        causal=False,
    ),
    "ltx23 distilled": _kind(
        "`ltx-2.3-22b-distilled-1.1.safetensors`",
        "LTX-2.3's distilled file, which was not made causal",
        f"choose `{LATER_BASE}` as base instead: TaoMate's page says that others do not replace it",
        "file",
        "base",
        causal=False,
    ),
    "transformer": _kind(
        "LTX-2's transformer alone (`..._transformer_only...`), or a causal one that somebody "
        "converted",
        "a transformer of LTX-2 of which nothing says that it was made causal",
        "if it is OmniForcing's, choose it as file and set positions to OmniForcing; if it is not "
        "causal, a stream of it is noise: choose a causal one",
        "file",
    ),
    "connectors": _kind(
        "`ltx-2-19b-embeddings_connector_dev_bf16.safetensors`",
        "LTX-2's connectors alone",
        "choose it as base in Load OmniForcing Model, from models/text_encoders or "
        "models/checkpoints, and connect both VAEs from loaders of their own",
        "base",
    ),
    "projection": _kind(
        "`ltx-2.3_text_projection_bf16.safetensors`",
        "the text projection of LTX-2",
        "load it beside Gemma in ComfyUI's DualCLIPLoader (type ltxv), from models/text_encoders",
    ),
    "text encoder": _kind(
        "`gemma_3_12B_it_fp4_mixed.safetensors`",
        "a text encoder",
        "choose it as text_encoder in Load LTXV Audio Text Encoder, from models/text_encoders",
    ),
    "video VAE": _kind(
        "LTX-2's VAE for pictures by itself",
        "a VAE for pictures",
        "choose it in Load VAE, from models/vae, and connect that to 'vae'",
    ),
    "audio VAE": _kind(
        "LTX-2's VAE for sound by itself",
        "a VAE for sound",
        "choose it in Load LTXV Audio VAE, from models/checkpoints, and connect that to "
        "'audio_vae'",
    ),
    "lora": _kind(
        "a LoRA for LTX-2",
        "a LoRA",
        "choose it in Load LoRA, from models/loras, behind Load OmniForcing Model",
    ),
    "upsampler": _kind(
        "`ltx-2-spatial-upscaler-x2-1.0.safetensors`",
        "an upscaler of latents",
        "choose it in Load Latent Upscale Model, from models/latent_upscale_models",
    ),
    "diffusers": _kind(
        "a folder `transformer` of a Diffusers release",
        "LTX-2 under Diffusers' names",
        "choose the release as one file, or with an index, under LTX-2's own names",
    ),
    "gguf": _kind(
        "a `.gguf`",
        "a GGUF file, which ComfyUI-GGUF reads",
        "load it with that pack's Unet Loader (GGUF) and connect its MODEL to Sample Chunk; this "
        "was never tried here",
    ),
    "lightx2v": _kind(
        "LightX2V's `ltx2_3_ar`",
        "by its name LightX2V's ltx2_3_ar, whose modalities see only the second of each other that "
        "they are in, and which this network cannot run",
        "choose TaoMate's model.pt for a causal LTX-2.3",
    ),
    "later": _kind(
        "LTX-2.5 and later",
        "a later version of LTX-2 than 2.3, which no causal checkpoint exists for",
        f"choose OmniForcing's generator with {_OMNIFORCING}, or TaoMate's model.pt with "
        f"`{LATER_BASE}`",
    ),
    "ltxv": _kind(
        "LTX-Video (0.9)",
        "LTX-Video, which makes no sound",
        "choose OmniForcing's generator or TaoMate's model.pt",
    ),
    "stream": _kind(
        "a saved stream",
        "a saved stream",
        "choose it in Load Stream, from output/mutual_forcing or input",
        "stream",
    ),
}
OTHER = _kind("", "nothing that this pack knows", "choose another file, or download this one again")

_OTHER_CAUSALITY = re.compile(r"ltx[-_.]?2[-_.]3[-_.]ar", re.IGNORECASE)
_CAUSAL_NAME = re.compile(r"omni[-_ ]?forcing", re.IGNORECASE)
_LORA = re.compile(r"\.(lora_[AB]|lora_up|lora_down|lokr_w\d|hada_w\d_[ab]|diff_b?)(\.|$)")
_FEED_FORWARD = re.compile(r"transformer_blocks\.\d+\.ff\.net\.2\.(weight|bias)$")
_VIDEO_VAE = ("vae.", "decoder.up_blocks.0.res_blocks.0.conv1.conv.")
_AUDIO_VAE = ("audio_vae.", "vocoder.")
_TEXT_ENCODER = ("model.layers.0.self_attn.", "language_model.model.layers.0.", "spiece_model")
_OWN_PART = "video_codec."
# What only this pack's headers have, whose networks are all causal.
_OWN_HEADER = ("video_first_block", "video_blocks", "step_size_embedding")


@dataclass(frozen=True)
class Identity:
    """What a file is.

    Attributes:
        key: its entry in `KINDS`; "other" for anything else.
        is_later: of LTX-2.3 and not of LTX-2 19B.
        has_connectors: whether what prepares the prompt is in it.
        preset: whose positions it is run with, unless it says so itself.
        guessed: a sentence on what of this is taken from circumstances; empty for nothing.
    """

    key: str
    is_later: bool = False
    has_connectors: bool = False
    preset: Preset = "omniforcing"
    guessed: str = ""

    @property
    def is_known(self) -> bool:
        """Whether anything is said of such files."""
        return self.key in KINDS

    @property
    def kind(self) -> Kind:
        """What is said of such files."""
        return KINDS.get(self.key, OTHER)

    def fits(self, role: Role) -> bool:
        """Whether a list offers it."""
        return role in self.kind.roles

    @property
    def advice(self) -> str:
        """What to do with it, in a message."""
        return self.kind.choose.replace("`", "")

    def refusal(self) -> str:
        """What it is and what to do with it, to follow what it was expected to be."""
        return f"it is {self.kind.name}; {self.advice}"

    def remarks(self, name: str, role: Role) -> list[str]:
        """What an artist should know who has chosen it: not causal, the wrong base, guesses."""
        told = []
        if role == "base" and "distilled" in self.key:
            told.append(f"{name} is {self.kind.name}: {self.advice}")
        if role == "file" and not self.kind.causal:
            told.append(f"expect noise: {name} is {self.kind.name}; {self.advice}")
        return [*told, *([f"{name}: {self.guessed}"] if self.guessed and role == "file" else [])]


NOTHING = Identity("other")


def is_later(names: Iterable[str]) -> bool:
    """Whether tensors of a transformer or of connectors are LTX-2.3's: their heads have gates."""
    return any(".to_gate_logits." in name for name in names)


def identify(names: Collection[str], metadata: Mapping[str, str], path: Path) -> Identity:
    """What a file with tensors of these names is.

    Args:
        names: of its tensors, or of the shard's that it is one of.
        metadata: of its header.
        path: where it lies; its name and its folder's count only where nothing else tells.
    """
    ours = PACKED_HEADER in names or any(name.startswith(_OWN_PART) for name in names)
    if ours or metadata.get("format") == MODEL_FORMAT:
        return Identity("ours")
    if metadata.get("format") == STREAM_FORMAT:
        return Identity("stream")
    if any(_LORA.search(name) for name in names):
        return Identity("lora")
    later = is_later(names)
    connectors = any(f"{part}." in name for name in names for part in CONNECTORS)
    if any(".audio_to_video_attn." in name for name in names):
        return _transformer(names, metadata, path, later, connectors)
    return Identity(_part(names, connectors), later, connectors)


def _transformer(
    names: Collection[str], metadata: Mapping[str, str], path: Path, later: bool, connectors: bool
) -> Identity:
    written = " ".join(path.parts[-2:])
    header = transformer_header(metadata)
    beside = any(name.startswith((*_VIDEO_VAE, *_AUDIO_VAE)) for name in names)
    beside = beside or any("text_embedding_projection." in name for name in names)
    # Who keeps no header is OmniForcing or TaoMate; LTX-2's own files all have one.
    preset: Preset = "ltx2_base" if header or beside or later else "omniforcing"
    known, guessed = "omniforcing", ""
    if _OTHER_CAUSALITY.search(written):
        known = "lightx2v"
    elif any(".norm_q." in name for name in names):
        known = "diffusers"
    elif _is_newer(names):
        known = "later"
    elif any(name.endswith(CAUSAL_MARK) for name in names) or _says_causal(names, header):
        known = "causal"
    elif any(map(is_memory, names)):
        known, preset = "taomate", "taomate"
    elif _CAUSAL_NAME.search(written) and not later:
        guessed = "taken for OmniForcing's by its name" if preset != "omniforcing" else ""
        preset = "omniforcing"
    elif beside:
        known = "ltx23" if later else "ltx2"
        known += " distilled" if "distilled" in path.name.lower() else ""
    elif header or later:
        known = "transformer"
    elif connectors:
        guessed = "taken for OmniForcing's, for it holds connectors and does not say what it is"
    return Identity(known, later, connectors, preset, guessed)


def _is_newer(names: Collection[str]) -> bool:
    """Later than LTX-2.3: positions of key frames, or feed-forwards without biases."""
    if any("keyframes_abs_pos_embedding" in name for name in names):
        return True
    # Of a shard the biases may lie in another one.
    whole = any(name.endswith("patchify_proj.weight") for name in names)
    return whole and {x[1] for x in map(_FEED_FORWARD.search, names) if x} == {"weight"}


def _says_causal(names: Collection[str], header: Mapping[str, object]) -> bool:
    if any(name.endswith(SINKS) or ".step_size_embedder." in name for name in names):
        return True
    own = any(FEW_STEP in name for name in names) or any(key in header for key in _OWN_HEADER)
    return own or header.get("av_ca_timestep_scale_multiplier") == 1


def of_network(header: Mapping[str, object]) -> Identity:
    """What a transformer is that a host loaded, of which only its header is left.

    Args:
        header: as far as the file had one.
    """
    if _says_causal((), header):
        return Identity("causal", preset="ltx2_base")
    if header:
        return Identity("transformer", preset="ltx2_base")
    return Identity("omniforcing", guessed="taken for OmniForcing's, for its file says nothing")


def _part(names: Collection[str], connectors: bool) -> str:
    """One part of LTX-2, or something around it."""

    def begins(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if connectors:
        return "connectors"
    if begins(*_TEXT_ENCODER):
        return "text encoder"
    if any("text_embedding_projection." in name for name in names):
        return "projection"
    if begins(*_VIDEO_VAE) or begins(*_AUDIO_VAE):
        return "video VAE" if begins(*_VIDEO_VAE) else "audio VAE"
    if begins("initial_conv.") and begins("upsampler."):
        return "upsampler"
    # Video alone.
    if any(name.endswith("patchify_proj.weight") for name in names):
        return "ltxv"
    return "other"


def transformer_header(metadata: Mapping[str, str]) -> dict[str, object]:
    """LTX-2's own description of the transformer; empty where there is none that can be read."""
    try:
        found = json.loads(metadata["config"])["transformer"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, as far as it is text; empty for anything else."""
    try:
        found = read_header(path).get("__metadata__", {})
    except (OSError, ValueError):
        return {}
    return _texts(found)


def _texts(metadata: object) -> dict[str, str]:
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in entries if isinstance(value, str)}


def changed_at(path: Path) -> tuple[int, int] | None:
    """When a regular file was written (nanoseconds) and its bytes; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_mtime_ns, status.st_size) if is_regular(path) else None


def what_is(path: Path) -> Identity:
    """What a file is; "other" for one that cannot be read. Remembered until it changes."""
    changed = changed_at(path)
    return NOTHING if changed is None else _what_is(path, *changed)


@lru_cache(maxsize=4096)
def _what_is(path: Path, _changed: int, _size: int) -> Identity:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"GGUF":
            return Identity("gguf")
        if path.suffix in PICKLED:
            return identify(names_in_pickle(path), {}, path)
        header = read_header(path)
    except (OSError, ValueError):
        return NOTHING
    metadata = _texts(header.pop("__metadata__", {}))
    return identify(header.keys(), metadata, path)


def names_in_pickle(path: Path) -> set[str]:
    """Every word in a .pt, the names of its tensors among them. Nothing of it is run.

    Raises:
        ValueError: it is no zip archive with a pickle of usual size in it.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(x for x in archive.infolist() if x.filename.endswith("/data.pkl"))
            # PyTorch never packs it, and unpacking what somebody else did may take any time.
            if entry.file_size > LONGEST_HEADER or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"a list of {entry.file_size} bytes, or packed")
            code = archive.read(entry)
        return {word for _, word, _ in pickletools.genops(code) if isinstance(word, str)}
    # A hostile archive, or one of a kind that Python's reader does not know, fails in many ways.
    except (zipfile.BadZipFile, StopIteration, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"no PyTorch archive ({type(error).__name__})") from error


def table() -> list[str]:
    """The lines of README's table "what I have, what to choose"."""
    head = ["| what I have | what it is | what to do |", "|---|---|---|"]
    return head + [f"| {x.have} | {x.name} | {x.choose} |" for x in KINDS.values()]
