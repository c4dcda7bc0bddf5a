"""The network that users have: ComfyUI's module tree of LTX-2 under our pass, in its memory modes.

It runs in ComfyUI's own Python, in a process of its own, because ComfyUI decides at its start on
what and how. This is the one place of the laboratory that asks for the host's rooms, and only when
it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...model_loaders.generator import Generator, header_of, is_addition
from ...networks.attention import sdpa
from ...samplers.model import BareModel, StreamModel
from ..command import ROOT
from .setups import Setup

if TYPE_CHECKING:
    from .measure import HostMode

_START = """
import importlib.util, sys
comfyui, root, cpu, dynamic = sys.argv[1:5]
sys.argv = sys.argv[:1] + sys.argv[5:]
given, sys.argv = sys.argv[1:], sys.argv[:1]
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
from mutual_forcing.lab.bench.rollout import main
sys.exit(main(given))
"""


def inside_comfyui() -> bool:
    """Whether this process is ComfyUI's."""
    return "comfy.sd" in sys.modules


def run_in_comfyui(argv: Sequence[str], device: torch.device, mode: HostMode) -> int:
    """The same command in ComfyUI's Python; its exit status.

    Raises:
        ValueError: there is no ComfyUI, or no dynamic memory on a CPU.
    """
    comfyui = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
    if not (comfyui / "main.py").is_file():
        raise ValueError(f"found no ComfyUI in {comfyui}: name its folder in COMFYUI_PATH")
    dynamic = mode in ("dynamic", "usual")
    if dynamic and device.type == "cpu":
        raise ValueError("ComfyUI's memory is never dynamic on a CPU: choose --host whole or low")
    places = [folder / name for folder in (comfyui, comfyui.parent) for name in ("venv", ".venv")]
    pythons = [place / "bin" / "python" for place in places]
    python = next(filter(Path.exists, pythons), sys.executable)
    python = os.environ.get("COMFYUI_PYTHON", python)
    facts = comfyui, ROOT, device.type == "cpu", dynamic
    command = [str(python), "-c", _START, *map(str, facts), *argv]
    return subprocess.run(command, check=False).returncode


def hosted_model(
    setup: Setup, dtype: torch.dtype, device: torch.device, mode: HostMode, weights: str
) -> StreamModel:
    """A network with random weights as ComfyUI holds it, ready to run.

    Its positions are interleaved, unless it is LTX-2.3.

    Args:
        weights: an option of Load OmniForcing Model.
    """
    later = setup.config.cross_attention_adaln
    config = replace(setup.config, rope_type="split" if later else "interleaved")
    if mode == "view":
        from ...host.transformer_view import TransformerView

        own = setup.model(dtype, device)
        view = TransformerView(own, config, sdpa)
        return BareModel(view, setup.name, next(own.parameters()).new_empty(0))
    from ...host import load_ltx2
    from ...host.model_wire import stream_model

    tensors = setup.model(dtype, torch.device("cpu")).state_dict()
    additions = {name: tensors.pop(name) for name in list(tensors) if is_addition(name)}
    header = header_of(config) | {"connector_num_layers": 0}
    generator = Generator(tensors, additions, config, header, setup.name, ())
    whole = {"dynamic": False, "whole": True}.get(mode)
    patcher = load_ltx2.hosted(generator, weights, setup.name, whole=whole)
    patcher.set_model_compute_dtype(dtype)
    made = stream_model(patcher)
    made.load(load_ltx2.stream_bytes_of(generator))
    if mode == "low":
        patcher.detach()
        patcher.load(patcher.load_device, lowvram_model_memory=1)
    return made
