"""A model that several devices share: this process has a part of it, others beside it the rest."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP

from ..samplers.side_ranks import Load, SideRanks, devices_named
from .page import stop_if_asked


def shares(devices: str) -> bool:
    """Whether these are several; errors as for `side_ranks`."""
    return len(devices_named(devices, comfy.model_management.get_torch_device())) > 1


def side_ranks(devices: str, load: Load) -> SideRanks | None:
    """The processes for all devices but ComfyUI's own, which begin to load; None if that is all.

    Args:
        devices: see `devices_named`.
        load: a part of the model.

    Raises:
        ValueError: devices that can't share a model.
    """
    found = devices_named(devices, comfy.model_management.get_torch_device())
    if len(found) == 1:
        return None
    ranks = SideRanks(found, load)
    ranks.start()
    return ranks


def along(ranks: SideRanks, patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have the others ready, leave their devices when ComfyUI unloads this part, and refuse to save
    it as if it were the whole.

    Raises:
        ValueError: one can't load its part.
    """

    def unloaded(_patcher: object, unpatched: bool) -> None:
        if unpatched:  # else a clone takes its place
            ranks.park()

    patcher.model.state_dict_for_saving = _refused
    patcher.add_callback(CallbacksMP.ON_DETACH, unloaded)
    ranks.ready(stop_if_asked)


def _refused(*_arguments: object, **_options: object) -> dict[str, object]:
    raise ValueError(
        "this model is shared out to several devices, and only a whole one can be saved: choose "
        "'one' under devices in its loader"
    )
