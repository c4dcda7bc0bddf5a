"""What an artist sees in ComfyUI's page while a node works: its bar, its player, and Cancel.

H W frame size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch import Tensor, nn

from ..samplers.decode import DecodedBlock
from ..samplers.rollout import Step
from .live import LiveRun, live_run

EVENT = "mutual_forcing.run"
"""Name of the page's event with the status of a `LiveRun`; web/js listens to it."""
_PREVIEW_PIXELS, _LARGEST_PREVIEW = 256, 512
_BETWEEN = 0.5
"""Seconds between two steps that a page hears of while it plays the clip."""


def stop_if_asked() -> None:
    """Raise ComfyUI's interruption if the artist has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_open() -> bool:
    """Whether the page that queued this prompt is there; nobody sees what an API run shows."""
    server = PromptServer.instance
    return server.client_id is not None and server.client_id in server.sockets


def show_run(
    clip: Path | None,
    asked: float | None,
    hidden: io.HiddenHolder,
    remarks: Sequence[str] = (),
    *,
    preview: Path | None = None,
    live: bool = True,
) -> AbstractContextManager[LiveRun]:
    """The run of the node that ComfyUI is executing, shown in the page until the body ends.

    Args:
        clip, asked, preview, live: see `LiveRun`.
        hidden: the node's; of it, what ComfyUI knows of the page's workflow.
        remarks: what an artist should know from the start.
    """
    context, server = get_executing_context(), PromptServer.instance
    key = ("", "") if context is None else (context.prompt_id, context.node_id)
    workflow = _workflow(hidden).get("id")

    def tell(status: dict[str, object]) -> None:
        server.send_sync(EVENT, status, server.client_id)

    run = LiveRun(key, clip, asked, tell=tell, workflow=workflow, preview=preview, live=live)
    run.words += [*remarks, *_bypassed(hidden, key[1])]
    return live_run(run)


def say(text: str) -> None:
    """Put a text on the node that ComfyUI is executing, by ComfyUI's own means."""
    context, server = get_executing_context(), PromptServer.instance
    if context is not None and is_open():
        server.send_progress_text(text, context.node_id, server.client_id)


def graph_notes(hidden: io.HiddenHolder) -> dict[str, str]:
    """The graph that made a file, as ComfyUI writes it into files; nothing if it may not be."""
    if args.disable_metadata:
        return {}
    # What ComfyUI notes in a prompt while it runs names files of this machine.
    prompt = hidden.prompt and {
        name: {key: value for key, value in node.items() if key != "is_changed"}
        for name, node in hidden.prompt.items()
    }
    notes = {"prompt": prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in notes.items() if value is not None}


def _workflow(hidden: io.HiddenHolder) -> Mapping[str, object]:
    workflow = (hidden.extra_pnginfo or {}).get("workflow")
    return workflow if isinstance(workflow, dict) else {}


def _bypassed(hidden: io.HiddenHolder, node_id: str) -> list[str]:
    """A wire into 'state' that is drawn in the page and carries nothing: its node is bypassed."""
    here = ((hidden.prompt or {}).get(node_id) or {}).get("inputs", {})
    for node in _workflow(hidden).get("nodes", ()):
        drawn = any(x.get("name") == "state" and x.get("link") for x in node.get("inputs", ()))
        if str(node.get("id")) == node_id and drawn and "state" not in here:
            return [
                "the chunk before this one is bypassed: a new stream begins here, and Stream "
                "Settings count only if they are connected to this node"
            ]
    return []


def free_memory() -> int:
    """Bytes of the machine's own memory that are free."""
    return int(comfy.model_management.get_free_memory(torch.device("cpu")))


@contextmanager
def stoppable(*modules: nn.Module) -> Iterator[None]:
    """In the body, Cancel is looked for before every layer of these modules, in any thread.

    ComfyUI forgets that Cancel was pressed as soon as somebody was told; this leaves it to be told
    to whoever samples meanwhile.
    """

    def look(*_: object) -> None:
        if comfy.model_management.processing_interrupted():
            raise comfy.model_management.InterruptProcessingException

    layers = {layer for module in modules for layer in module.modules()}
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Progress:
    """The bar on a node, with the clip playing in small as it grows.

    While a block is sampled, each step shows one frame of the block before it, so the preview moves
    at about the speed at which the clip is made, and nothing has to be decoded twice.

    Args:
        steps: sampling steps in all; the bar begins again where more are made.

    Attributes:
        run: whose clip is being made; while somebody plays that, no pictures are sent.
    """

    run: LiveRun | None = None

    def __init__(self, steps: int) -> None:
        self._bar = comfy.utils.ProgressBar(steps)
        self._steps, self._done = steps, 0
        self._picture_at: Callable[[float], Image.Image] | None = None
        self._told = 0.0

    def step(self, step: Step) -> None:
        """Count a sampling step; raises ComfyUI's interruption if the artist has pressed Cancel."""
        stop_if_asked()
        self._done = self._done % self._steps + 1
        self._update(step.step / step.steps)

    def known(self, steps: int) -> None:
        """Count the steps of a block that was there already."""
        stop_if_asked()
        self._done += steps

    def again(self, steps: int) -> None:
        """Take back so many steps, which were not the last ones of a block."""
        self._done -= steps

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
        run = self.run
        # Before a clip has begun it is not known yet whether the page plays it.
        played = run is not None and (run.watchers or (run.plays and not run.begun))
        if played:
            # The page draws all of its canvas for every step it hears of, on cores that the next
            # second may need.
            if time.monotonic() - self._told < _BETWEEN and self._done < self._steps:
                return
        elif self._picture_at is not None:
            preview = ("JPEG", self._picture_at(position), None)
        self._told = time.monotonic()
        self._bar.update_absolute(self._done, self._steps, preview)


def _index(position: float, count: int) -> int:
    return min(int(position * count), count - 1)


def _picture(frame: Tensor) -> Image.Image:
    """A frame (H, W, 3) in 0..1 as a picture that is large enough to look at, and not larger."""
    picture = Image.fromarray((frame * 255).round().byte().numpy())
    picture.thumbnail((_LARGEST_PREVIEW, _LARGEST_PREVIEW))
    scale = max(1, -(-_PREVIEW_PIXELS // min(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
