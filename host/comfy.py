"""The seam to ComfyUI: every import of its internals lies here or, for LTX-2, in `compat_ltx2.py`.

b batch, a heads, n query tokens, m key tokens, d head dim, F H W pixel frames and size.
When ComfyUI moves something, this is the file that changes. Classes that ComfyUI swaps at start-up
(`CoreModelPatcher`) and kernels that depend on its options are looked up when they are needed.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor, nn

from ..model_loaders.bundle import Bundle, StreamDefaults, load_bundle, shipped_model_path
from ..model_loaders.catalog import list_models, list_streams
from ..networks.attention import AttentionKernel, sdpa
from ..networks.layout import BlockLayout
from ..samplers.clock import Clock
from ..samplers.decode import DecodedBlock
from ..samplers.rollout import Mode, Prompt, SamplerSettings, Step, sampler_settings
from ..samplers.state import BlockLatents
from ..samplers.tensor_file import is_regular
from .conditioning import Conditioning, prompt_of

logger = logging.getLogger("mutualforcing")

FOLDER = "mutual_forcing"
_MODEL_FOLDERS = (FOLDER, "diffusion_models", "checkpoints")
_PREVIEW_PIXELS, _LARGEST_PREVIEW = 256, 512

Precision = Literal["automatic", "float32", "bfloat16", "float16"]
AttentionChoice = Literal["automatic", "PyTorch"]


class MutualForcing(nn.ModuleDict):
    """All parts of a model as one module, so that ComfyUI moves and counts them together."""


class _EagerOperations(comfy.ops.disable_weight_init):
    """ComfyUI's operations, with weights that exist (on the meta device) before the file is read.

    Where ComfyUI manages memory dynamically its own Linear has no weight until it is loaded, and a
    model file could not be checked against it. It is left out for classes that bring their own
    loading.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        """ComfyUI's Linear, loaded as torch.nn's."""

        def _load_from_state_dict(self, *arguments: object) -> None:
            nn.Linear._load_from_state_dict(self, *arguments)


@dataclass(frozen=True)
class HostModel:
    """A model of this pack in ComfyUI's care: a `StreamModel`.

    Attributes:
        bundle: the model.
        patcher: ComfyUI's handle of its memory; the name is what ComfyUI's caches look for.
        like: empty tensor with the device and dtype to compute in.
    """

    bundle: Bundle = field(repr=False)
    patcher: object = field(repr=False)
    like: Tensor
    audio_bins: int = 1

    @property
    def transformer(self) -> nn.Module:
        """The network."""
        return self.bundle.transformer

    @property
    def text_tokens(self) -> int:
        """Places in a prompt."""
        return self.bundle.text_encoder.config.length

    @property
    def model_id(self) -> str:
        """Fingerprint of the file."""
        return self.bundle.model_id

    @property
    def title(self) -> str:
        """What its makers call it."""
        return self.bundle.title

    @property
    def clock(self) -> Clock:
        """Blocks, latents, frames and samples."""
        return self.bundle.clock

    @property
    def defaults(self) -> StreamDefaults:
        """What a stream is unless told otherwise."""
        return self.bundle.stream

    def at_rate(self, fps: float | Fraction | None) -> HostModel:
        """See `StreamModel`: this model has one rate."""
        if fps is not None and fps != self.clock.fps:
            raise ValueError(
                f"the frame rate is {float(fps):g}, and this model makes {float(self.clock.fps):g} "
                "frames a "
                "second: take LTXVConditioning out of the way"
            )
        return self

    def for_layout(self, _layout: BlockLayout) -> HostModel:
        """See `StreamModel`."""
        return self

    def sampler(self, mode: Mode, steps: int | None, guidance: float | None) -> SamplerSettings:
        """See `StreamModel`."""
        return sampler_settings(mode, steps, guidance)

    def make_ready(self, memory_required: int = 0) -> None:
        """See `StreamModel`; ComfyUI moves other models out of the way."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory_required)

    def prompt_of(
        self, positive: Conditioning, negative: Conditioning | None, *, guided: bool
    ) -> Prompt:
        """See `StreamModel`."""
        return prompt_of(self.bundle, positive, negative, guided=guided, like=self.like)

    def sketches(self, _latents: BlockLatents) -> list[Image.Image]:
        """See `StreamModel`: only its decoder can make pictures of this model's latents."""
        return []


def register_model_folder() -> None:
    """Let ComfyUI know models/mutual_forcing, for files that artists add."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    _, extensions = folder_paths.folder_names_and_paths[FOLDER]
    extensions |= {".safetensors", ".pt", ".pth"}


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


def load_model(path: Path, precision: Precision, attention: AttentionChoice) -> HostModel:
    """Load a model file and hand its memory to ComfyUI."""
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    dtype = _dtype(precision, load_device)
    bundle = load_bundle(path, dtype=dtype, device=offload_device, operations=_EagerOperations)
    bundle.transformer.kernel = attention_kernel(attention, load_device)
    whole = MutualForcing(
        {
            "transformer": bundle.transformer,
            "text_encoder": bundle.text_encoder,
            "video_codec": bundle.video_codec,
            "audio_codec": bundle.audio_codec,
        }
    )
    patcher = comfy.model_patcher.CoreModelPatcher(
        whole, load_device=load_device, offload_device=offload_device
    )
    like = torch.empty(0, device=load_device, dtype=dtype)
    return HostModel(replace(bundle, device=load_device), patcher, like)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "automatic":
        half = comfy.model_management.should_use_bf16(device)
        return torch.bfloat16 if half else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        precision
    ]


def attention_kernel(
    choice: AttentionChoice, device: torch.device, options: Mapping[str, object] | None = None
) -> AttentionKernel:
    """PyTorch's attention, or on a graphics card the one that ComfyUI was started with.

    On a CPU ComfyUI's own choice is slower than PyTorch's and saves memory that is not short there.

    Args:
        options: a MODEL's own, in which another node may have named a kernel.
    """
    if choice == "PyTorch" or comfy.model_management.is_device_cpu(device):
        return sdpa
    return partial(comfy_attention, options=dict(options or {}))


def comfy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Mapping[str, object] | None = None,
) -> Tensor:
    """The kernel that ComfyUI was started with (Sage, xFormers, ...); (b, a, n, d) as `sdpa`."""
    if mask is not None:
        # Not every kernel of ComfyUI's reads booleans as PyTorch does; all of them add numbers to
        # the scores.
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
            ~mask, float("-inf")
        )
    return comfy.ldm.modules.attention.optimized_attention(
        q,
        k,
        v,
        heads=q.shape[1],
        mask=mask,
        skip_reshape=True,
        skip_output_reshape=True,
        transformer_options=options or {},
    )


def stop_if_asked() -> None:
    """Raise ComfyUI's interruption if the artist has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class Progress:
    """The bar on a node, with the clip playing in small as it grows.

    While a block is sampled, each step shows one frame of the block before it, so the preview moves
    at about the speed at which the clip is made, and nothing has to be decoded twice.

    Args:
        steps: sampling steps in all.
    """

    def __init__(self, steps: int) -> None:
        self._bar = comfy.utils.ProgressBar(steps)
        self._steps, self._done = steps, 0
        self._picture_at: Callable[[float], Image.Image] | None = None

    def step(self, step: Step) -> None:
        """Count a sampling step; raises ComfyUI's interruption if the artist has pressed Cancel."""
        stop_if_asked()
        self._done += 1
        self._update(step.step / step.steps)

    def rebuild(self, _done: int, _blocks: int) -> None:
        """Called while a saved stream gets its memory back."""
        stop_if_asked()

    def show(self, decoded: DecodedBlock) -> None:
        """Preview this block (its first clip) from now on."""
        frames = decoded.video[0]
        self._play(lambda position: _picture(frames[_index(position, len(frames))]))

    def sketch(self, pictures: Sequence[Image.Image]) -> None:
        """Preview these pictures of a block from now on; none of them leaves things as they are."""
        if pictures:
            self._play(lambda position: pictures[_index(position, len(pictures))])

    def _play(self, picture_at: Callable[[float], Image.Image]) -> None:
        self._picture_at = picture_at
        if self._done >= self._steps:
            self._update(1.0)

    def _update(self, position: float) -> None:
        preview = None
        if self._picture_at is not None:
            preview = ("JPEG", self._picture_at(position), None)
        self._bar.update_absolute(self._done, self._steps, preview)


def _index(position: float, count: int) -> int:
    return min(int(position * count), count - 1)


def _picture(frame: Tensor) -> Image.Image:
    """A frame (H, W, 3) in 0..1 as a picture that is large enough to look at, and not larger."""
    picture = Image.fromarray((frame * 255).round().byte().numpy())
    picture.thumbnail((_LARGEST_PREVIEW, _LARGEST_PREVIEW))
    scale = max(1, -(-_PREVIEW_PIXELS // min(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def output_file(name: str, extension: str) -> Path:
    """The next free file `name_00001_.extension` in output/mutual_forcing; its folder is made.

    Raises:
        ValueError: the name leads out of the output folder.
    """
    try:
        directory, stem, counter, _, _ = folder_paths.get_save_image_path(
            f"{FOLDER}/{name}", folder_paths.get_output_directory()
        )
    except Exception as error:  # ComfyUI raises a bare Exception here
        raise ValueError(
            f"{name!r} lies outside ComfyUI's output folder; use a plain name, or one in a "
            "subfolder"
        ) from error
    return Path(directory) / f"{stem}_{counter:05}_.{extension}"


def temporary_file(extension: str) -> Path:
    """A new file in ComfyUI's temporary folder, which is emptied when ComfyUI starts."""
    return Path(folder_paths.get_temp_directory()) / f"{FOLDER}_{uuid.uuid4().hex}.{extension}"


def saved_streams() -> dict[str, Path]:
    """Saved streams below output/mutual_forcing and, as `name [input]`, input; newest first."""
    output = Path(folder_paths.get_output_directory()) / FOLDER
    return list_streams({"": output, "input": Path(folder_paths.get_input_directory())})


def saved_stream(name: str) -> Path | None:
    """The saved stream of this name; older graphs name those of the input folder without it."""
    streams = saved_streams()
    return streams.get(name, streams.get(f"{name} [input]"))
