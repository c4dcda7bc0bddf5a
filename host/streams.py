"""What the page shows of saved streams: a list of them in which each can be recognised."""

from __future__ import annotations

import base64
import io
import re
import time
import weakref
from pathlib import Path

from PIL import Image

from ..model_loaders.identity import changed_at, metadata_of
from ..samplers.state import StreamState
from ..samplers.state_file import saved_summary
from .codecs import CodecVAE
from .folders import saved_streams
from .page import graph_notes
from .stream_model import CausalModel

PICTURE = "mutual_forcing_picture"
"""Entry of a stream file's metadata: its first picture, a JPEG in base64."""
_SIDE, _LARGEST, _PROMPT = 128, 2**16, 40
_LOADED: weakref.WeakValueDictionary[str, CausalModel] = weakref.WeakValueDictionary()


def remember(model: CausalModel) -> None:
    """Know a model for as long as it is loaded: a stream is saved without one on its wire."""
    _LOADED[model.model_id] = model


def notes_of(state: StreamState, hidden: object) -> dict[str, str]:
    """What goes into a stream's file beside it: the graph, and its first picture if it can."""
    notes = graph_notes(hidden)
    model = _LOADED.get(state.model_id)
    if state.next_block and model is not None and isinstance(model.vae, CodecVAE):
        frame = model.vae.decode(state.block(0).video[:1, :, :1]).flatten(0, -4)[0]
        picture = Image.fromarray((frame.cpu() * 255).round().byte().numpy())
        picture.thumbnail((_SIDE, _SIDE))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=80)
        notes[PICTURE] = base64.b64encode(content.getvalue()).decode()
    return notes


def listed() -> dict[str, dict[str, str]]:
    """Saved streams by their names in Load Stream: what each is, short and long, and a picture.

    `label` is a line, `facts` some more, `picture` a data URL where the file has one. What can't be
    read is not there; its name alone says what it is.
    """
    found = {}
    for name, path in saved_streams().items():
        try:
            found[name] = _shown(name, path, metadata_of(path))
        except (OSError, ValueError):
            continue
    return found


def _shown(name: str, path: Path, metadata: dict[str, str]) -> dict[str, str]:
    summary = saved_summary(metadata)
    saved = time.localtime(changed_at(path)[0] / 1e9)
    prompt = re.sub(r"^\S+: ", "", summary.schedule.partition("\n")[0])
    short = prompt if len(prompt) <= _PROMPT else f"{prompt[:_PROMPT]}…"
    facts = {
        "label": f"{name} · {summary.seconds:.1f} s · {short} · {time.strftime('%x', saved)}",
        "facts": f"{summary.facts}\n{time.strftime('%x %X', saved)}\n{summary.schedule}".strip(),
    }
    picture = metadata.get(PICTURE, "")
    if picture and len(picture) < _LARGEST and re.fullmatch(r"[A-Za-z0-9+/]+=*", picture):
        facts["picture"] = f"data:image/jpeg;base64,{picture}"
    return facts
