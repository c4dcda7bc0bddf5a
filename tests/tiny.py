"""A whole model with random weights that is built in a moment: every part, no training."""

from __future__ import annotations

from pathlib import Path

import torch
from mutual_forcing.model_loaders.bundle import Bundle, StreamDefaults, load_bundle, save_bundle
from mutual_forcing.networks.audio_codec import AudioCodec, AudioCodecConfig
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.text_encoder import TextEncoder, TextEncoderConfig
from mutual_forcing.networks.transformer import CausalAVTransformer
from mutual_forcing.networks.video_codec import FOLD, VideoCodec, VideoCodecConfig

WORDS = ("red", "ball", "bell", "drum", "face", "says", "low", "high")
CHANNELS = 4
VIDEO_CHANNELS = CHANNELS * FOLD**2
TRANSFORMER = TransformerConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    in_channels=VIDEO_CHANNELS,
    out_channels=VIDEO_CHANNELS,
    audio_in_channels=CHANNELS,
    audio_out_channels=CHANNELS,
    cross_attention_dim=32,
    audio_cross_attention_dim=16,
    caption_channels=12,
    rope_type="split",
    num_audio_sink_tokens=2,
    step_size_embedding=True,
)
LATER = {
    "num_audio_sink_tokens": 0,
    "cross_attention_adaln": True,
    "apply_gated_attention": True,
    "caption_proj_before_connector": True,
    "memory_interval": 2,
    "memory_video_dim": 8,
    "memory_audio_dim": 8,
    "memory_heads": 2,
    "memory_film_hidden": 4,
    "anchored_colours": True,
    "absolute_positions": True,
    "opening_blocks": 3,
}
"""What LTX-2.3 and TaoMate changed, for a config this small."""
TEXT = TextEncoderConfig(WORDS, dim=12, layers=1, heads=2, length=6)
VIDEO = VideoCodecConfig(latent_channels=CHANNELS, fine_width=8, middle_width=8, coarse_width=8)
AUDIO = AudioCodecConfig(
    latent_channels=CHANNELS, channels=8, encoder_dilations=(1,), pitch_features=12
)
STREAM = StreamDefaults(window=2, height=2, width=2)


def tiny_parts(
    seed: int = 0, transformer: TransformerConfig = TRANSFORMER
) -> tuple[CausalAVTransformer, TextEncoder, VideoCodec, AudioCodec]:
    """The four modules with random weights; the global random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = (
            CausalAVTransformer(transformer),
            TextEncoder(TEXT),
            VideoCodec(VIDEO),
            AudioCodec(AUDIO),
        )
        for name, parameter in parts[0].named_parameters():
            if "table" in name:
                parameter.normal_(0, 0.3)
            elif name.endswith((".few_step.up.weight", ".pictures.up.weight")):
                parameter.normal_(0, 0.1)
        # Untrained heads are nearly silent and pictures too bright: neither should be clipped.
        parts[3].heads.weight.mul_(3)
        parts[3].heads.bias[AUDIO.f0_bins :].fill_(-2.3)
        parts[2].decoder[-1].weight.mul_(0.3)
    for part in parts:
        part.eval().requires_grad_(False)
    return parts


def save_tiny(path: Path, seed: int = 0, transformer: TransformerConfig = TRANSFORMER) -> Path:
    """Write the tiny model as a bundle file."""
    save_bundle(
        path, *tiny_parts(seed, transformer), STREAM, title="tiny random model", dtype=torch.float32
    )
    return path


def tiny_bundle(folder: Path, seed: int = 0) -> Bundle:
    """The tiny model as `load_bundle` gives it."""
    return load_bundle(save_tiny(folder / f"tiny{seed}.safetensors", seed))
