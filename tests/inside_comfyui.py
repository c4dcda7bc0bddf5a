"""Run by test_comfyui in ComfyUI's own Python: what our loader gives, against the engine by itself.

python inside_comfyui.py COMFYUI MODEL

Prints one line `NAME number` per quantity and `ok`, or fails.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
from pathlib import Path

COMFYUI, MODEL = sys.argv[1], Path(sys.argv[2])
ROOT = Path(__file__).resolve().parents[1]
sys.argv = sys.argv[:1]
sys.path[0] = COMFYUI  # in place of this folder, whose parent has a `nodes` of its own

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True  # before anything asks for a device

import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_multigpu import _retarget_patcher  # noqa: E402
from einops import rearrange  # noqa: E402

_spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launch)
launch.register()

from mutual_forcing.host.attention import comfy_attention  # noqa: E402
from mutual_forcing.host.conditioning import encoder_of  # noqa: E402
from mutual_forcing.host.decoding import clip_decoder  # noqa: E402
from mutual_forcing.host.load_mutual_forcing import load_mutual_forcing  # noqa: E402
from mutual_forcing.host.model_wire import stream_model  # noqa: E402
from mutual_forcing.model_loaders.bundle import load_bundle  # noqa: E402
from mutual_forcing.networks.attention import sdpa  # noqa: E402
from mutual_forcing.samplers.rollout import new_stream, rollout, sampler_settings  # noqa: E402
from mutual_forcing.samplers.state import StreamSettings  # noqa: E402

TEXT = "red ball"
SETTINGS = StreamSettings(2, 2, window=2, seeds=(5,))


def said(name: str, number: float) -> float:
    """Print a quantity."""
    sys.stdout.write(f"{name} {number:.3e}\n")
    return number


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def flat(made: object) -> torch.Tensor:
    """Latents of a rollout, in one row."""
    return torch.cat([x.flatten() for block, _ in made for x in block])


def engine(path: Path) -> torch.Tensor:
    """A stream of a few blocks, so that the window rolls, without ComfyUI."""
    bundle = load_bundle(path)
    state = new_stream(bundle, SETTINGS)
    return flat(rollout(bundle, bundle.prompt(TEXT), state, 4, sampler_settings("few", 2)))


def from_wires(model: object, clip: object) -> torch.Tensor:
    """The same over MODEL and CLIP, as Sample Chunk makes it."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    streams = stream_model(model)
    streams.load()
    return unloaded(streams, conditioning)


def unloaded(streams: object, conditioning: list) -> torch.Tensor:
    """The same with the weights where they are."""
    prompt = streams.prompt_of(conditioning, None, guided=False)
    state = new_stream(streams, SETTINGS)
    return flat(rollout(streams, prompt, state, 4, streams.sampler("few", 2, None)))


def attention_is_the_same_attention() -> None:
    """ComfyUI's kernel, with its own layout and options, gives what torch's gives."""
    q, k, v = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30, 16)
    mask = torch.rand(10, 30) > 0.3
    for visible in (None, mask):
        found, expected = comfy_attention(q, k, v, visible), sdpa(q, k, v, visible)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules hold the same numbers under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weights_arrive_whole() -> None:
    """The same numbers as without ComfyUI, also where it loads weights lazily."""
    plain = load_bundle(MODEL)
    for dynamic in (False, True):
        comfy.memory_management.aimdo_enabled = dynamic
        try:
            loaded = load_mutual_forcing(MODEL, "float32", "automatic")
        finally:
            comfy.memory_management.aimdo_enabled = False
        parts = {
            "transformer": loaded.model.model.diffusion_model,
            "text_encoder": loaded.clip.cond_stage_model.text_encoder,
            "video_codec": loaded.vae.first_stage_model.video_codec,
            "audio_codec": loaded.audio_vae.first_stage_model.audio_codec,
        }
        for name, part in parts.items():
            assert same_weights(part, getattr(plain, name)), (name, dynamic)
        assert stream_model(loaded.model).model_id == plain.model_id


def lora(model: object) -> dict[str, torch.Tensor]:
    """A LoRA of a few layers, under the keys that trainers write."""
    generator = torch.Generator().manual_seed(6)
    weights = model.model.diffusion_model.state_dict()
    found = {}
    for layer in ("attn1.to_q", "audio_attn1.to_k", "audio_to_video_attn.to_v", "ff.net.2"):
        name = f"transformer_blocks.0.{layer}"
        rows, columns = weights[f"{name}.weight"].shape
        down, up = (
            torch.randn(4, columns, generator=generator),
            torch.randn(rows, 4, generator=generator),
        )
        found[f"diffusion_model.{name}.lora_A.weight"] = down
        found[f"diffusion_model.{name}.lora_B.weight"] = up / 8
    return found


def with_lora(model: object, strength: float = 1.0) -> object:
    """The stock LoRA loader's own call."""
    return comfy.sd.load_lora_for_models(model, None, lora(model), strength, 0.0)[0]


def codecs_are_the_codecs(loaded: object) -> None:
    """ComfyUI's way through our VAEs gives our codecs' own numbers, there and back."""
    bundle, generator = load_bundle(MODEL), torch.Generator().manual_seed(1)
    pictures = torch.rand(17, 64, 64, 3, generator=generator)
    latents = loaded.vae.encode(pictures)
    shown = rearrange(pictures, "f h w rgb -> 1 rgb f h w") * 2 - 1
    assert torch.equal(latents, bundle.video_codec.encode(shown))
    decoded = loaded.vae.decode(latents)
    expected, _ = bundle.video_codec.decode(latents)
    expected = ((rearrange(expected, "b rgb f h w -> b f h w rgb") + 1) / 2).clamp(0, 1)
    assert decoded.shape == (1, 17, 64, 64, 3)
    assert said("vae_decode_vs_codec", difference(decoded, expected)) < 1e-5
    tiled = loaded.vae.decode_tiled(latents, tile_x=16, tile_y=16, overlap=4)
    assert torch.equal(tiled, decoded)
    sound = torch.rand(1, 160 * (4 * 40 + 1) + 77, 2, generator=generator) - 0.5
    latents = loaded.audio_vae.encode(sound)
    assert latents.shape == (1, bundle.audio_codec.config.latent_channels, 41, 1)
    decoded = loaded.audio_vae.decode(latents)
    expected, _ = bundle.audio_codec.decode(rearrange(latents, "b c s 1 -> b s c"))
    assert torch.equal(decoded[..., 0], expected.clamp(-1, 1))


def on_another_device(vae: object, device: torch.device) -> object:
    """What ComfyUI's Select VAE Device does where there are two cards: a copy, loaded anew."""
    vae = copy.copy(vae)
    offload = comfy.model_management.vae_offload_device()
    vae.patcher = _retarget_patcher(vae.patcher.clone(), device, offload)
    vae.first_stage_model, vae.device = vae.patcher.model, device
    return vae


def vaes_go_to_another_device(loaded: object) -> None:
    """The same pictures and sound come from there. The CPU by another name is the other device."""
    other = torch.device("cpu:0")
    usual = loaded.vae, loaded.audio_vae
    vaes = [on_another_device(vae, other) for vae in usual]
    bundle = load_bundle(MODEL)
    state = new_stream(bundle, SETTINGS)
    made = list(rollout(bundle, bundle.prompt(TEXT), state, 3, sampler_settings("few", 2)))
    channels = bundle.video_codec.config.channels, bundle.audio_codec.config.latent_channels
    shown = [], []
    for pair, blocks in zip((usual, vaes), shown, strict=True):
        decoder = clip_decoder(*pair, bundle.clock, channels=channels)
        comfy.model_management.load_models_gpu(decoder.beside, force_full_load=True)
        decoder.follow(made, state, lambda block, _state, blocks=blocks: blocks.append(block))
    for here, there in zip(usual, vaes, strict=True):
        assert there.patcher.load_device == other != here.patcher.load_device
        assert there.first_stage_model is there.patcher.model is not here.first_stage_model
        assert same_weights(here.first_stage_model, there.first_stage_model)
    for ours, theirs in zip(*shown, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def clips_go_to_another_device(clip: object) -> None:
    """What Select CLIP Device does: the same words are read there. Of a CLIP of ComfyUI's own it
    leaves the module behind, which our nodes do not call."""
    other, here = torch.device("cpu:0"), torch.device("cpu")
    clip.load_model()
    (expected, _), moved = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))[0], clip.clone()
    moved.patcher = _retarget_patcher(moved.patcher, other, here)
    theirs = comfy.sd.CLIP(no_init=True)
    theirs.__dict__ |= moved.__dict__ | {"cond_stage_model": clip.cond_stage_model}
    called = []
    for module in (moved.patcher.model, clip.patcher.model):
        encode = module.encode_token_weights
        module.encode_token_weights = lambda tokens, encode=encode, module=module: (
            called.append(module) or encode(tokens)
        )
    assert moved.patcher.load_device == other and moved.patcher.model is not clip.patcher.model
    for found in (
        moved.encode_from_tokens_scheduled(moved.tokenize(TEXT)),
        encoder_of(moved.clone())(TEXT),
        encoder_of(theirs)(TEXT),
    ):
        assert torch.equal(found[0][0], expected) and called.pop() is moved.patcher.model
    assert not called


def saved_and_loaded(model: object, folder: Path, name: str) -> Path:
    """What Save Model writes."""
    path = folder / name
    comfy.sd.save_checkpoint(str(path), model)
    return path


with torch.inference_mode():
    attention_is_the_same_attention()
    weights_arrive_whole()
    loaded = load_mutual_forcing(MODEL, "float32", "automatic")
    expected = engine(MODEL)
    found = from_wires(loaded.model, loaded.clip)
    assert torch.equal(found, expected), "MODEL and CLIP make another stream than the engine"
    assert torch.equal(from_wires(loaded.model.clone(), loaded.clip.clone()), expected)

    changed_model = with_lora(loaded.model)
    changed = from_wires(changed_model, loaded.clip)
    assert said("lora_changes_it_by", difference(changed, expected)) > 1e-3
    half = from_wires(with_lora(loaded.model, 0.5), loaded.clip)
    assert 0 < difference(half, expected) < difference(changed, expected)
    assert torch.equal(from_wires(loaded.model, loaded.clip), expected), "a LoRA left something"

    lean = with_lora(load_mutual_forcing(MODEL, "float32", "automatic").model)
    lean.load(lean.load_device, lowvram_model_memory=1)
    assert any(getattr(m, "weight_function", None) for m in lean.model.modules())
    conditioning = loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize(TEXT))
    offloaded = unloaded(stream_model(lean), conditioning)
    assert said("low_vram_with_lora_vs_loaded", difference(offloaded, changed)) < 1e-4

    codecs_are_the_codecs(loaded)
    vaes_go_to_another_device(loaded)
    clips_go_to_another_device(loaded.clip)

    with tempfile.TemporaryDirectory() as folder:
        copy = saved_and_loaded(loaded.model, Path(folder), "copy.safetensors")
        again = load_mutual_forcing(copy, "float32", "automatic")
        assert torch.equal(from_wires(again.model, again.clip), expected)
        assert stream_model(again.model).model_id == stream_model(loaded.model).model_id
        merged = saved_and_loaded(with_lora(loaded.model), Path(folder), "merged.safetensors")
        again = load_mutual_forcing(merged, "float32", "automatic")
        assert torch.equal(from_wires(again.model, again.clip), changed)
        assert stream_model(again.model).model_id != stream_model(loaded.model).model_id
sys.stdout.write("ok\n")
