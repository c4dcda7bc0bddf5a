"""ComfyUI's view of the pack, a file a shelf of the menu; nodes check, call the engine, wrap."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host import comfy as compat
from .clip import GenerateClip
from .loaders import LoadModel
from .ltx2 import DecodeLTX2, LoadLTX2
from .state import LoadState, SaveState
from .stream import DecodeChunk, SampleChunk, StreamSettingsNode

NODES: list[type[io.ComfyNode]] = [
    LoadModel,
    StreamSettingsNode,
    GenerateClip,
    SampleChunk,
    DecodeChunk,
    SaveState,
    LoadState,
    LoadLTX2,
    DecodeLTX2,
]


class MutualForcingExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def on_load(self) -> None:
        """Register models/mutual_forcing."""
        compat.register_model_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return list(NODES)
