"""ComfyUI's view of the pack, a file a shelf of the menu; nodes check, call the engine, wrap."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, ComfyExtension, io

from ..host import folders, routes
from .clip import GenerateClip
from .decode import DecodeChunk
from .loaders import LoadLTX2, LoadModel
from .plot import PlotClip
from .prompts import PromptSchedule
from .replaced import REPLACED
from .state import LoadState, RewindStream, SaveState, StreamFromClip
from .stream import SampleChunk, StreamSettingsNode

NODES: list[type[io.ComfyNode]] = [
    LoadModel,
    LoadLTX2,
    PromptSchedule,
    StreamSettingsNode,
    GenerateClip,
    SampleChunk,
    DecodeChunk,
    SaveState,
    LoadState,
    RewindStream,
    StreamFromClip,
    PlotClip,
]


class MutualForcingExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def on_load(self) -> None:
        """Register models/mutual_forcing, the player's routes, and what became of gone nodes."""
        folders.register_model_folder()
        routes.register()
        for replacement in REPLACED:
            await ComfyAPI().node_replacement.register(replacement)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return list(NODES)
