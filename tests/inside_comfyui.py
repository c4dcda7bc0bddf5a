"""Run by test_comfyui in ComfyUI's own Python: the seam to its internals. Prints `ok`, or fails.

python inside_comfyui.py COMFYUI MODEL
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

COMFYUI, MODEL = sys.argv[1:3]
ROOT = Path(__file__).resolve().parents[1]
sys.argv = sys.argv[:1]
sys.path[0] = COMFYUI  # in place of this folder, whose parent has a `nodes` of its own

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True  # before anything asks for a device

import comfy.memory_management  # noqa: E402
import torch  # noqa: E402

_spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launch)
launch.register()

from mutual_forcing.host import comfy as compat  # noqa: E402
from mutual_forcing.model_loaders.bundle import load_bundle  # noqa: E402
from mutual_forcing.networks.attention import sdpa  # noqa: E402


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules hold the same numbers under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def attention_is_the_same_attention() -> None:
    """ComfyUI's kernel, with its own layout and options, gives what torch's gives."""
    q, k, v = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30, 16)
    mask = torch.rand(10, 30) > 0.3
    for visible in (None, mask):
        found, expected = compat.comfy_attention(q, k, v, visible), sdpa(q, k, v, visible)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5


def weights_arrive_whole() -> None:
    """The same numbers as without ComfyUI, also where it loads weights lazily (dynamic memory)."""
    plain = load_bundle(Path(MODEL))
    for dynamic in (False, True):
        comfy.memory_management.aimdo_enabled = dynamic
        try:
            hosted = compat.load_model(Path(MODEL), "float32", "automatic")
        finally:
            comfy.memory_management.aimdo_enabled = False
        assert hosted.bundle.model_id == plain.model_id
        for part in ("transformer", "text_encoder", "video_codec", "audio_codec"):
            assert same_weights(getattr(hosted.bundle, part), getattr(plain, part)), (part, dynamic)
        hosted.make_ready()
        assert hosted.patcher.model_size() > 0


attention_is_the_same_attention()
weights_arrive_whole()
sys.stdout.write("ok\n")
