"""ComfyUI's folders: where models, saved streams, outputs and working files lie."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ..model_loaders.bundle import shipped_model_path
from ..model_loaders.catalog import list_bases, list_ltx2, list_models, list_streams
from ..model_loaders.identity import what_is
from ..samplers.tensor_file import is_regular

FOLDER = "mutual_forcing"
_LONGEST = 255  # bytes of a file's name, on all usual disks
_TINY = "taeltx_2"
_MODEL_FOLDERS = (FOLDER, "diffusion_models", "checkpoints")
# Connectors are published as a file for the text encoders' folder.
_BASE_FOLDERS = (*_MODEL_FOLDERS, "text_encoders")
_EVERYWHERE = (*_BASE_FOLDERS, "loras", "vae", "latent_upscale_models")


def register_model_folder() -> None:
    """Let ComfyUI know models/mutual_forcing, for files that artists add."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    _, extensions = folder_paths.folder_names_and_paths[FOLDER]
    extensions |= {".safetensors", ".pt", ".pth"}


def tiny_decoder() -> Path | None:
    """LTX-2's tiny decoder among ComfyUI's approximate VAEs, where its own VAE loader has it."""
    for name in folder_paths.get_filename_list("vae_approx"):
        path = folder_paths.get_full_path("vae_approx", name)
        if Path(name).name.startswith(_TINY) and path is not None and is_regular(Path(path)):
            return Path(path)
    return None


def model_files() -> dict[str, Path]:
    """Names and paths of the models that can be loaded, the shipped one first."""
    return list_models(shipped_model_path(), files_in_model_folders())


def files_in_model_folders(folders: Iterable[str] = _MODEL_FOLDERS) -> Iterator[tuple[str, Path]]:
    """Names and paths of everything in these of ComfyUI's model folders."""
    for folder in folders:
        if folder not in folder_paths.folder_names_and_paths:
            continue
        for name in folder_paths.get_filename_list(folder):
            # extra_model_paths.yaml may name several places, which may have files of one name.
            for place in folder_paths.get_folder_paths(folder):
                if is_regular(path := Path(place) / name):
                    yield name, path


def generator_files() -> dict[str, Path]:
    """Names and places of LTX-2 checkpoints in ComfyUI's model folders."""
    return list_ltx2(files_in_model_folders())


def base_files() -> dict[str, Path]:
    """Names and paths of files that hold LTX-2's connectors."""
    return list_bases(files_in_model_folders(_BASE_FOLDERS))


def refusal_of(name: str) -> str:
    """What a file is that a list does not offer, and what to do with it; empty for no such file."""
    found = (path for known, path in files_in_model_folders(_EVERYWHERE) if known == name)
    path = next(found, None)
    if path is None:
        return ""
    identity = what_is(path)
    return identity.refusal() if identity.is_known else "it cannot be read, or is no such model"


def output_file(name: str, extension: str) -> Path:
    """The next free file `name_00001_.extension` in output/mutual_forcing; its folder is made.

    Raises:
        ValueError: the name leads out of that folder, or is longer than a disk takes.
    """
    own = Path(folder_paths.get_output_directory(), FOLDER).resolve()
    if not Path(own, name).resolve().is_relative_to(own):
        raise ValueError(
            f"the name {name!r} leads out of output/{FOLDER}, where Load Stream would not find it; "
            "use a plain name, or one in a subfolder"
        )
    longest = _LONGEST - len(f"_00001_.{extension}")
    if any(len(part.encode()) > longest for part in Path(name).parts):
        raise ValueError(
            f"the name is {len(name.encode())} bytes long, expected at most {longest} between two "
            "slashes: use a shorter one"
        )
    try:
        directory, stem, counter, _, _ = folder_paths.get_save_image_path(
            f"{FOLDER}/{name}", folder_paths.get_output_directory()
        )
    except Exception as error:  # ComfyUI raises a bare Exception here
        raise ValueError(
            f"the name {name!r} cannot be used in ComfyUI's output folder; use a plain name, or "
            "one in a subfolder"
        ) from error
    return Path(directory) / f"{stem}_{counter:05}_.{extension}"


def shown(path: Path) -> str:
    """A file of the output folder, short enough for a node."""
    output = Path(folder_paths.get_output_directory())
    return f"output/{path.relative_to(output).as_posix()}"


def temporary_folder() -> Path:
    """ComfyUI's temporary folder, which is emptied when ComfyUI starts."""
    return Path(folder_paths.get_temp_directory())


def temporary_file(extension: str) -> Path:
    """A new file in the temporary folder."""
    return temporary_folder() / f"{FOLDER}_{uuid.uuid4().hex}.{extension}"


def saved_streams() -> dict[str, Path]:
    """Saved streams below output/mutual_forcing and, as `name [input]`, input; newest first."""
    output = Path(folder_paths.get_output_directory()) / FOLDER
    return list_streams({"": output, "input": Path(folder_paths.get_input_directory())})


def saved_stream(name: str) -> Path | None:
    """The saved stream of this name; older graphs name those of the input folder without it."""
    streams = saved_streams()
    return streams.get(name, streams.get(f"{name} [input]"))
