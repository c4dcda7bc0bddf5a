"""A clip on disk as ComfyUI's VIDEO: saved as it stands, gone when nothing holds it any more."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path

from comfy_api.latest import InputImpl

from ..samplers.clip_writer import ClipWriter
from ..samplers.clock import Clock
from ..samplers.state import StreamState
from .decoding import ClipDecoder


class ClipFile(InputImpl.VideoFromFile):
    """A working file that is a VIDEO. Save Video copies its H.264 and AAC into a file of that kind.

    It is deleted with the last VIDEO that is made of it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        weakref.finalize(self, path.unlink, missing_ok=True)

    def as_trimmed(self, *arguments: object, **options: object) -> InputImpl.VideoFromFile | None:
        """See ComfyUI's."""
        part = super().as_trimmed(*arguments, **options)
        if part is not None:
            part.whole = self  # its file stays for as long as the part does
        return part


def clip_writer(
    path: Path,
    clock: Clock,
    state: StreamState,
    decoder: ClipDecoder,
    graph: Mapping[str, str] | None = None,
) -> ClipWriter:
    """A writer of a stream's pictures, pixel for pixel, and of what its decoder makes of the sound.

    The file says what model and seeds made it, and of what graph (`graph_notes`).

    Raises:
        OSError, ValueError: as `ClipWriter`.
    """
    settings = state.settings
    model = {"id": state.model_id, "title": state.model_title, "seeds": settings.seeds}
    return ClipWriter(
        path,
        clock,
        *settings.pixels,
        scale=1,
        clips=len(settings.seeds),
        channels=decoder.channels,
        sample_rate=decoder.sample_rate,
        notes={"mutual_forcing_model": json.dumps(model), **(graph or {})},
    )
