"""Run by test_comfyui_ltx2 in ComfyUI's own Python: LTX-2 as its MODEL against this pack's own network.

python inside_comfyui_ltx2.py COMFYUI MODELS

Prints one line `NAME number` per quantity and `ok`, or fails. MODELS is what shrunken_ltx2.py wrote.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

COMFYUI, MODELS = sys.argv[1], Path(sys.argv[2])
ROOT = Path(__file__).resolve().parents[1]
sys.argv = sys.argv[:1]
sys.path[0] = COMFYUI

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

_spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launch)
launch.register()

from mutual_forcing.model_loaders import compat_ltx2  # noqa: E402
from mutual_forcing.model_loaders.generator import CONNECTORS, assemble  # noqa: E402
from mutual_forcing.model_loaders.ltx2 import load_transformer  # noqa: E402
from mutual_forcing.networks.transformer import text_keys  # noqa: E402
from mutual_forcing.samplers.rollout import (  # noqa: E402
    Prompt,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import StreamSettings  # noqa: E402

BASE = MODELS / "checkpoints" / "ltx-2-19b-dev-fp8.safetensors"
CAUSAL = MODELS / "diffusion_models" / "omniforcing-ltx2-5s-causal"
STOCK = MODELS / "diffusion_models" / "stock.safetensors"
SCALED = MODELS / "diffusion_models" / "scaled-fp8.safetensors"
LORA = MODELS / "loras" / "lora.safetensors"
HEADS = {"num_attention_heads": 4, "audio_num_attention_heads": 4}
CONTEXT = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
CONDITIONING = [[CONTEXT, {"unprocessed_ltxav_embeds": True}]]
SETTINGS = StreamSettings(2, 3, window=2, seeds=(5,))


def stream(model: object, prompt: Prompt, blocks: int = 4) -> torch.Tensor:
    """Latents of a few blocks, so that the window rolls, in one row."""
    network, identity, like = model.transformer, model.model_id, model.like
    rolled = rollout(
        network,
        prompt,
        new_stream(network, identity, SETTINGS),
        blocks,
        sampler_settings("few", 2, method="renoise"),
        model_id=identity,
        like=like,
    )
    made = [block for block, _ in rolled]
    return torch.cat([x.flatten() for block in made for x in block])


def from_model(patcher: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The stream of a MODEL, as Sample Chunk makes it."""
    patcher = patcher.clone()
    patcher.set_model_compute_dtype(dtype)
    model = compat_ltx2.stream_model(patcher)
    assert model.like.dtype == dtype
    model.make_ready()
    return stream(model, model.prompt_of(CONDITIONING, None, guided=False))


def plain(patcher: object, path: Path = CAUSAL) -> torch.Tensor:
    """The same from this pack's own network over the same file; the connectors are the MODEL's."""
    network = load_transformer(path, overrides=HEADS).transformer
    context = patcher.model.diffusion_model.preprocess_text_embeds(CONTEXT, unprocessed=True)

    class Own:
        transformer, model_id, like = network, "own", torch.empty(0)

    return stream(Own, Prompt(text_keys(network, *context.chunk(2, dim=-1))))


def dequantised(path: Path) -> Path:
    """The quantised file multiplied out."""
    tensors = load_file(SCALED)
    save_file(
        {
            name: value.float() * tensors.get(f"{name}_scale", 1.0)
            for name, value in tensors.items()
            if not name.endswith("_scale")
        },
        path,
    )
    return path


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def said(name: str, number: float) -> float:
    sys.stdout.write(f"{name} {number:.3e}\n")
    return number


def with_lora(patcher: object, strength: float) -> object:
    """The stock LoRA loader's own call."""
    return comfy.sd.load_lora_for_models(
        patcher, None, comfy.utils.load_torch_file(str(LORA)), strength, 0.0
    )[0]


with torch.inference_mode():
    model = compat_ltx2.load_generator(CAUSAL, BASE)
    expected = plain(model)
    found = from_model(model)
    assert said("our_loader_vs_own_network", difference(found, expected)) < 1e-4

    stock = comfy.sd.load_diffusion_model(str(STOCK))
    # Core's norms of queries and keys add 1e-5 where LTX-2's own code adds 1e-6; our loader sets that right.
    assert said("stock_loader_vs_own_network", difference(from_model(stock), plain(stock))) < 1e-4

    changed = from_model(with_lora(model, 1.0))
    assert said("lora_changes_it_by", difference(changed, found)) > 1e-3
    half = from_model(with_lora(model, 0.5))
    assert 0 < difference(half, found) < difference(changed, found)
    assert torch.equal(from_model(model), found), "a LoRA that was taken away left something behind"

    eight = compat_ltx2.load_generator(CAUSAL, BASE, "fp8")
    weight = eight.model.diffusion_model.transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.float8_e4m3fn
    in_bf16 = from_model(model, torch.bfloat16)
    rounding = said("bf16_vs_fp32", difference(in_bf16, found))
    eighth = said("fp8_weights_vs_bf16", difference(from_model(eight, torch.bfloat16), in_bf16))
    assert 0 < rounding < eighth < 1

    quantised = compat_ltx2.load_generator(SCALED, BASE)
    unpacked = plain(quantised, dequantised(MODELS / "dequantised.safetensors"))
    assert said("quantised_vs_dequantised", difference(from_model(quantised), unpacked)) < 1e-4
    assert difference(from_model(with_lora(quantised, 1.0)), unpacked) > 1e-3

    generator = assemble(CAUSAL, BASE)
    assert generator.from_base and all(n.startswith(CONNECTORS) for n in generator.from_base)
    assert compat_ltx2.load_video_vae(BASE).latent_channels == 128
sys.stdout.write("ok\n")
