"""A module of the laboratory in ComfyUI's own Python, in a process of its own.

ComfyUI decides at its start on what and how it works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .command import ROOT

_START = """
import importlib, importlib.util, sys
comfyui, root, cpu, dynamic, module = sys.argv[1:6]
given, sys.argv = sys.argv[6:], sys.argv[:1]
sys.path[0] = comfyui
from comfy.cli_args import args
args.cpu = cpu == "True"
if dynamic == "True":
    import comfy_aimdo.control
    comfy_aimdo.control.init()
    import comfy.memory_management, comfy.model_management, comfy.model_patcher
    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices(device.index for device in devices):
        sys.exit("ComfyUI has no dynamic memory here: choose another --host")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
import comfy.sd, logging
logging.root.handlers.clear()
spec = importlib.util.spec_from_file_location("launch", root + "/launch.py")
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)
launch.register()
sys.exit(importlib.import_module("mutual_forcing." + module).main(given))
"""


def inside_comfyui() -> bool:
    """Whether this process is ComfyUI's."""
    return "comfy.sd" in sys.modules


def run_in_comfyui(
    module: str, argv: Sequence[str], *, cpu: bool = False, dynamic: bool = False
) -> int:
    """A command of this pack in ComfyUI's Python; its exit status.

    Args:
        module: whose `main` takes the arguments.
        dynamic: with the memory of ComfyUI's usual start on NVIDIA.

    Raises:
        ValueError: there is no ComfyUI.
    """
    comfyui = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
    if not (comfyui / "main.py").is_file():
        raise ValueError(f"found no ComfyUI in {comfyui}: name its folder in COMFYUI_PATH")
    places = [folder / name for folder in (comfyui, comfyui.parent) for name in ("venv", ".venv")]
    pythons = [place / "bin" / "python" for place in places]
    python = next(filter(Path.exists, pythons), sys.executable)
    python = os.environ.get("COMFYUI_PYTHON", python)
    facts = comfyui, ROOT, cpu, dynamic, module
    command = [str(python), "-c", _START, *map(str, facts), *argv]
    return subprocess.run(command, check=False).returncode
