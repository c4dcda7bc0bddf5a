"""ComfyUI-MutualForcing: video and sound that stream together, in ComfyUI.

ComfyUI calls `comfy_entrypoint`; nothing is imported before that, so the engine below also works
where ComfyUI is not installed.
"""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # noqa: ANN201 - the return type is ComfyUI's and not importable here
    """Return the extension that lists this pack's nodes (ComfyUI's V3 API)."""
    from .nodes import MutualForcingExtension

    return MutualForcingExtension()
