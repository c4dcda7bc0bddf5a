"""In ComfyUI's Python: LTX-2's files at a thousandth of their size, all keys, random weights.

python shrunken_ltx2.py COMFYUI MODELS

Writes into a ComfyUI models folder, under the names that our workflows have: the base file
(transformer, connectors, both VAEs, vocoder, projection of the text), a causal generator in shards
with an index, in one file that core's loaders take and in 8 bits, the connectors alone, a Gemma
file with a tokenizer, a latent upsampler, a tiny decoder for previews, and a LoRA; of LTX-2.3 the
base file and TaoMate's model.pt. Each module is core's own, built from the header that is written
with it.
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

COMFYUI, MODELS = sys.argv[1], Path(sys.argv[2])
sys.argv = sys.argv[:1]
sys.path[0] = COMFYUI
sys.path.append(str(Path(__file__).resolve().parent))

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.ldm.lightricks.av_model as av_model  # noqa: E402
import comfy.ldm.lightricks.latent_upsampler as latent_upsampler  # noqa: E402
import comfy.ldm.lightricks.vae.audio_vae as audio_vae  # noqa: E402
import comfy.ldm.lightricks.vae.causal_video_autoencoder as video_vae  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.taesd.taehv as taehv  # noqa: E402
import comfy.text_encoders.llama as llama  # noqa: E402
import sentencepiece  # noqa: E402
import shrunken_gemma  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

Tensors = dict[str, torch.Tensor]
OPS = comfy.ops.disable_weight_init
BASE, CAUSAL = "ltx-2-19b-dev-fp8.safetensors", "diffusion_models/omniforcing-ltx2-5s-causal"
GEMMA = "gemma_3_12B_it_fp4_mixed.safetensors"
CONNECTORS = "ltx-2-19b-embeddings_connector_dev_bf16.safetensors"
CAPTION = 32
TRANSFORMER = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 12,
    "in_channels": 128,
    "out_channels": 128,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "cross_attention_dim": 96,
    "audio_cross_attention_dim": 48,
    "caption_channels": CAPTION,
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "causal_temporal_positioning": True,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "connector_num_attention_heads": 4,
    "connector_attention_head_dim": CAPTION // 4,
    "connector_num_layers": 2,
}
# LTX-2.3: gates, modulated text, and an embedding as wide as both text attentions together.
LATER = TRANSFORMER | {
    "cross_attention_adaln": True,
    "apply_gated_attention": True,
    "connector_apply_gated_attention": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "connector_attention_head_dim": 24,
    "audio_connector_attention_head_dim": 12,
}
LATER_BASE, TAOMATE = "ltx-2.3-22b-dev.safetensors", "mutual_forcing/taomate/model.pt"
BLOCK = ["res_x", {"num_layers": 1}]
VIDEO_VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "encoder_base_channels": 4,
    "decoder_base_channels": 4,
    "encoder_blocks": [
        BLOCK,
        ["compress_space_res", {"multiplier": 2}],
        ["compress_time_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 2}],
        BLOCK,
    ],
    "decoder_blocks": [
        BLOCK,
        ["compress_all", {"residual": True, "multiplier": 2}],
        BLOCK,
        ["compress_all", {"residual": True, "multiplier": 2}],
        BLOCK,
        ["compress_all", {"residual": True, "multiplier": 2}],
        BLOCK,
    ],
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "causal_decoder": False,
    "timestep_conditioning": False,
}
AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 8,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 4,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
}
VOCODER = {
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "upsample_initial_channel": 64,
    "stereo": True,
    "resblock": "1",
}
AMP = {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_initial_channel": 32,
    "stereo": True,
}
# 160 samples at 16 kHz for each of the mel's frames, then 240 at 48 kHz for each of its own.
LATER_VOCODER = {
    "vocoder": AMP | {"upsample_rates": [5, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 4]},
    "bwe": AMP
    | {
        "upsample_rates": [6, 5, 4, 2],
        "upsample_kernel_sizes": [12, 11, 8, 4],
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 512,
        "num_mels": 64,
    },
}
UPSAMPLER = {
    "in_channels": 128,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
}
HEADER = {"transformer": TRANSFORMER, "vae": VIDEO_VAE, "audio_vae": AUDIO_VAE, "vocoder": VOCODER}
SENTENCES = ["waves roll onto a quiet rocky shore at dawn", "a smith strikes a glowing blade"]


def filled(module: torch.nn.Module, seed: int) -> Tensors:
    """Random numbers in every parameter and buffer, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name and value.ndim == 1:
            value = 1 + 0.1 * noise
        elif "std-of-means" in name:
            value = 1 + 0.1 * noise.abs()
        elif "table" in name or "registers" in name:
            value = 0.3 * noise
        elif value.ndim < 2:
            value = 0.05 * noise
        else:
            value = noise / math.sqrt(value[0].numel())
        tensors[name] = value.contiguous()
    return tensors


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def save(tensors: Tensors, folder: str, name: str, header: dict | None = None) -> None:
    path = MODELS / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, None if header is None else {"config": json.dumps(header)})


def save_scaled_fp8(transformer: Tensors) -> None:
    """The generator as ComfyUI quantises: 8-bit matrices, a scale each, named in the header."""
    tensors, layers = {}, {}
    for name, value in prefixed("model.diffusion_model.", transformer).items():
        if ".transformer_blocks." in name and value.ndim == 2 and name.endswith(".weight"):
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            layers[name.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
        else:
            tensors[name] = value
    path = MODELS / "diffusion_models" / "scaled-fp8.safetensors"
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": layers})})


def save_large() -> None:
    """A whole network in 16 bit whose size is that of its weights; all zeros."""
    wide = {"attention_head_dim": 192, "audio_attention_head_dim": 96}
    wide |= {"cross_attention_dim": 768, "audio_cross_attention_dim": 384}
    with torch.device("meta"):
        network = av_model.LTXAVModel(**TRANSFORMER | wide, dtype=torch.bfloat16, operations=OPS)
    tensors = {
        name: torch.zeros(value.shape, dtype=torch.bfloat16)
        for name, value in network.state_dict().items()
    }
    header = {"transformer": TRANSFORMER | wide}
    save(
        prefixed("model.diffusion_model.", tensors), "diffusion_models", "large.safetensors", header
    )


def tokenizer() -> torch.Tensor:
    """A SentencePiece model of a few words, with Gemma's special ids, as a tensor of bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=shrunken_gemma.VOCABULARY,
        hard_vocab_limit=False,
        model_type="char",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return torch.tensor(list(model.getvalue()), dtype=torch.uint8)


def memory_branch() -> Tensors:
    """TaoMate's, in the second of two layers."""
    shapes = {"learned_memory_video_encoder": (32, 128), "learned_memory_audio_encoder": (16, 128)}
    layer = "transformer_blocks.1"
    for modality, width, dim in (("video", 96, 32), ("audio", 48, 16)):
        attention = f"{layer}.{modality}_memory_attn"
        shapes |= {f"{attention}.to_q": (dim, width), f"{attention}.to_out": (width, dim)}
        shapes |= {f"{attention}.to_k": (dim, dim), f"{attention}.to_v": (dim, dim)}
    film = f"{layer}.video_color_film.net"
    shapes |= {f"{film}.0": (8, 512), f"{film}.2": (192, 8)}
    network = torch.nn.Module()
    for name, (rows, columns) in shapes.items():
        bias = not name.endswith(("to_q", "to_k", "to_v"))
        network.register_module(name.replace(".", "/"), torch.nn.Linear(columns, rows, bias=bias))
    return {name.replace("/", "."): value for name, value in filled(network, 10).items()}


def save_later() -> None:
    """LTX-2.3's base file and a causal generator as TaoMate is published."""
    network = av_model.LTXAVModel(**LATER, dtype=torch.float32, device="cpu", operations=OPS)
    header = HEADER | {"transformer": LATER, "vocoder": LATER_VOCODER}
    sound = filled(audio_vae.AudioVAE({"config": json.dumps(header)}), 4)
    base = {
        **prefixed("model.diffusion_model.", filled(network, 8)),
        **prefixed("vae.", filled(video_vae.VideoVAE(config=VIDEO_VAE), 2)),
    }
    for stream, width in (("video", 96), ("audio", 48)):
        projection = filled(torch.nn.Linear(shrunken_gemma.HIDDEN * 49, width), 3)
        base |= prefixed(f"text_embedding_projection.{stream}_aggregate_embed.", projection)
    for name, value in sound.items():
        base[name.replace("autoencoder.", "audio_vae.", 1)] = value
    save(base, "checkpoints", LATER_BASE, header)
    causal = {k: v for k, v in filled(network, 9).items() if "_connector." not in k}
    path = MODELS / TAOMATE
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"generator_ema": prefixed("model.", causal | memory_branch())}, path)


def main() -> None:
    """Write all files."""
    save_later()
    network = av_model.LTXAVModel(**TRANSFORMER, dtype=torch.float32, device="cpu", operations=OPS)
    base, causal = filled(network, 0), filled(network, 1)
    projection = torch.nn.Linear(shrunken_gemma.HIDDEN * 49, CAPTION, bias=False)
    everything = {
        **prefixed("model.diffusion_model.", base),
        **prefixed("vae.", filled(video_vae.VideoVAE(config=VIDEO_VAE), 2)),
        **prefixed("text_embedding_projection.aggregate_embed.", filled(projection, 3)),
    }
    sound = filled(audio_vae.AudioVAE({"config": json.dumps(HEADER)}), 4)
    for name, value in sound.items():
        everything[name.replace("autoencoder.", "audio_vae.", 1)] = value
    save(everything, "checkpoints", BASE, HEADER)

    transformer = {name: value for name, value in causal.items() if "_connector." not in name}
    shards = {}
    names = sorted(transformer)
    for i in range(3):
        file = f"causal-{i + 1:05d}-of-00003.safetensors"
        save({f"model.{n}": transformer[n] for n in names[i::3]}, CAUSAL, file)
        shards |= {f"model.{n}": file for n in names[i::3]}
    index = MODELS / CAUSAL / "causal.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    connectors = {name: value for name, value in base.items() if "_connector." in name}
    alone = prefixed("model.diffusion_model.", connectors)
    save(alone, "text_encoders", CONNECTORS, {"transformer": TRANSFORMER})
    stock = TRANSFORMER | {
        "rope_type": "interleaved",
        "frequencies_precision": "float32",
        "av_ca_timestep_scale_multiplier": 1.0,
    }
    save(
        prefixed("model.diffusion_model.", transformer | connectors),
        "diffusion_models",
        "stock.safetensors",
        {"transformer": stock},
    )

    save_scaled_fp8(transformer)
    save_large()

    gemma = filled(llama.Gemma3_12B({}, torch.float32, "cpu", OPS), 5)
    save(gemma | {"spiece_model": tokenizer()}, "text_encoders", GEMMA)

    upsampler = latent_upsampler.LatentUpsampler.from_config(UPSAMPLER, operations=OPS)
    save(filled(upsampler, 7), "latent_upscale_models", "upsampler.safetensors", UPSAMPLER)

    tiny = filled(taehv.TAEHV(latent_channels=128), 8)  # at its own size, which is small
    halves = {name: value.half() for name, value in tiny.items()}
    save(halves, "vae_approx", "taeltx_2.safetensors")

    generator = torch.Generator().manual_seed(6)
    lora = {}
    for layer in ("attn1.to_q", "audio_attn1.to_k", "audio_to_video_attn.to_v", "ff.net.2"):
        name = f"transformer_blocks.0.{layer}"
        rows, columns = transformer[f"{name}.weight"].shape
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        lora[f"diffusion_model.{name}.lora_B.weight"] = (
            torch.randn(rows, 4, generator=generator) / 8
        )
    save(lora, "loras", "lora.safetensors")
    sys.stdout.write("ok\n")


main()
