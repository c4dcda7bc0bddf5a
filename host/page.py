"""What an artist sees in ComfyUI's page while a node works: its bar, its pictures, and Cancel.

H W frame size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..samplers.decode import DecodedBlock
from ..samplers.rollout import Step

_PREVIEW_PIXELS, _LARGEST_PREVIEW = 256, 512


def stop_if_asked() -> None:
    """Raise ComfyUI's interruption if the artist has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def executing() -> tuple[str, str]:
    """Ids of the prompt and of the node that ComfyUI is executing; empty outside its executor."""
    context = get_executing_context()
    return ("", "") if context is None else (context.prompt_id, context.node_id)


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
