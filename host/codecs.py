"""This pack's two codecs as VAEs of ComfyUI's, which its own nodes encode and decode with.

b batch, c channels, f h w video latent grid, F H W pixel frames and size, s audio latents, q
frequency bins of an audio latent (1), n samples. Both look back only and decode a stream piece by
piece, so a tiled decode is the same in pieces of time, and exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ..networks.audio_codec import AudioCodec
from ..networks.video_codec import SPACE_STRIDE, TIME_STRIDE, VideoCodec

_LATENTS_AT_ONCE = 16


class MutualForcingVideo(nn.Module):
    """What ComfyUI's VAE calls its `first_stage_model`. Its keys are those of a model file."""

    def __init__(self, codec: VideoCodec) -> None:
        super().__init__()
        self.video_codec = codec

    def encode(self, video: Tensor, **_options: object) -> Tensor:
        """Pictures (b, 3, F, H, W) in -1..1 to latents (b, c, f, h, w).

        Frames beyond 1 + 8k are left out.
        """
        frames = video.shape[2] - (video.shape[2] - 1) % TIME_STRIDE
        return self.video_codec.encode(video[:, :, :frames])

    def decode(self, latents: Tensor, **_options: object) -> Tensor:
        """Latents (b, c, f, h, w) to pictures (b, 3, F, H, W), F = 8f - 7."""
        state, pieces = None, []
        for piece in latents.split(_LATENTS_AT_ONCE, dim=2):
            video, state = self.video_codec.decode(piece, state)
            pieces.append(video)
        return torch.cat(pieces, dim=2)

    encode_tiled, decode_tiled = encode, decode


class MutualForcingAudio(nn.Module):
    """The same for sound."""

    latent_frequency_bins = 1

    def __init__(self, codec: AudioCodec) -> None:
        super().__init__()
        self.audio_codec = codec
        self.output_sample_rate = codec.config.sample_rate

    def encode(self, sound: Tensor, **_options: object) -> Tensor:
        """Sound (b, channels, n), mixed down to one channel, to latents (b, c, s, 1).

        Samples beyond 1 + 4k frames are left out.
        """
        mono, hop = reduce(sound, "b channels n -> b n", "mean"), self.audio_codec.config.hop
        frames = mono.shape[1] // hop
        latents = self.audio_codec.encode(mono[:, : hop * max(0, frames - (frames - 1) % 4)])
        return rearrange(latents, "b s c -> b c s 1")

    def decode(self, latents: Tensor, **_options: object) -> Tensor:
        """Latents (b, c, s, 1) to sound (b, 1, n)."""
        sound, _ = self.audio_codec.decode(rearrange(latents, "b c s q -> b s (c q)"))
        return rearrange(sound, "b n -> b 1 n")

    encode_tiled, decode_tiled = encode, decode


class CodecVAE(comfy.sd.VAE):
    """One of our codecs in ComfyUI's care. It looks back only."""

    def __init__(self, stage: MutualForcingVideo | MutualForcingAudio) -> None:
        with _no_warning_of_missing_weights():
            super().__init__(sd={})  # every attribute as ComfyUI's own VAEs begin with it
        self.first_stage_model = stage.eval()
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype, self.working_dtypes = torch.float32, [torch.float32]
        self.handles_tiling, self.crop_input = True, isinstance(stage, MutualForcingVideo)
        # Its layers are torch's own: they are whole on the device, or not there at all.
        self.disable_offload = True
        self.patcher = comfy.model_patcher.ModelPatcher(
            stage,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )

    def decode(self, samples_in: Tensor, *arguments: object, **options: object) -> Tensor:
        """See ComfyUI's.

        Raises:
            ValueError: latents of another model.
        """
        dimensions = 2 + self.latent_dim
        if samples_in.ndim != dimensions or samples_in.shape[1] != self.latent_channels:
            raise ValueError(
                f"the latents have shape {tuple(samples_in.shape)}, and this VAE decodes "
                f"{self.latent_channels} channels in {dimensions} dimensions: connect the VAE of "
                "the model that made them, pictures to 'vae' and sound to 'audio VAE'"
            )
        return super().decode(samples_in, *arguments, **options)


def video_vae(codec: VideoCodec) -> CodecVAE:
    """A VAE over the video codec."""
    vae = CodecVAE(MutualForcingVideo(codec))
    vae.latent_dim, vae.latent_channels = 3, codec.config.channels
    stride = TIME_STRIDE
    space = SPACE_STRIDE, SPACE_STRIDE
    vae.upscale_ratio = (lambda f: max(0, 1 + (f - 1) * stride), *space)
    vae.downscale_ratio = (lambda frames: max(0, 1 + (frames - 1) // stride), *space)
    vae.upscale_index_formula = vae.downscale_index_formula = (stride, *space)
    # Per pixel: the widest layers run at a quarter of the size.
    vae.memory_used_encode = lambda shape, _dtype: 64 * shape[2] * shape[3] * shape[4]
    vae.memory_used_decode = lambda shape, _dtype: (
        64 * shape[2] * stride * shape[3] * shape[4] * SPACE_STRIDE**2
    )
    return vae


def audio_vae(codec: AudioCodec) -> CodecVAE:
    """A VAE over the audio codec."""
    vae = CodecVAE(MutualForcingAudio(codec))
    vae.latent_dim, vae.latent_channels = 2, codec.config.latent_channels
    vae.output_channels = 2  # of what comes in: two are mixed down, more are cut off
    vae.audio_sample_rate = vae.audio_sample_rate_output = codec.config.sample_rate
    vae.upscale_ratio = vae.downscale_ratio = 4 * codec.config.hop
    vae.process_input = lambda sound: sound
    vae.process_output = lambda sound: sound.clamp_(-1.0, 1.0)
    vae.memory_used_encode = lambda shape, _dtype: 64 * shape[-1]
    vae.memory_used_decode = lambda shape, _dtype: 64 * shape[2] * 4 * codec.config.hop
    return vae


@contextmanager
def _no_warning_of_missing_weights() -> Iterator[None]:
    """ComfyUI warns of a VAE without weights; ours get theirs right afterwards."""

    def wanted(record: logging.LogRecord) -> bool:
        return "No VAE weights detected" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)
