"""What is measured: a network's sizes (random weights), the block it makes, the codecs after it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...model_loaders.blank import BlankWeights
from ...model_loaders.bundle import StreamDefaults, shipped_model_path
from ...networks.audio_codec import AudioCodec, AudioCodecConfig
from ...networks.config import TransformerConfig
from ...networks.kept_keys import AS_COMPUTED, Kept
from ...networks.layer import Text
from ...networks.transformer import CausalAVTransformer, text_keys
from ...networks.video_codec import FOLD, VideoCodec, VideoCodecConfig
from ...samplers.clock import Clock
from ...samplers.decode import StreamDecoder
from ...samplers.model import StreamModel
from ...samplers.rollout import new_stream
from ...samplers.sigmas import OMNIFORCING, TAOMATE
from ...samplers.state import StreamSettings, StreamState

NAMES = ("quarter", "19b", "taomate", "taomate-quarter", "small")
_TEXT_TOKENS, _HEIGHT, _WIDTH = 1024, 16, 24  # LTX-2's prompt, and 512 x 768 pixels
_WINDOW, _TAOMATE_WINDOW = 5, 2
# LTX-2.3 as TaoMate made it causal (docs/ltx23.md, sections 1 and 3).
_TAOMATE: dict[str, object] = {
    "cross_attention_adaln": True,
    "apply_gated_attention": True,
    "caption_proj_before_connector": True,
    "memory_interval": 4,
    "anchored_colours": True,
    "absolute_positions": True,
    "opening_blocks": 5,
}


@dataclass(frozen=True)
class Setup:
    """One configuration.

    Attributes:
        height, width: latent grid.
        window: blocks kept besides the prefix.
        text_tokens: of a prompt.
        entries: noise levels of few-step mode, of LTX-2's list.
        video_codec, audio_codec: this pack's codecs at the network's latent sizes. LTX-2's own
            decoders belong to ComfyUI and are not measured here.
    """

    name: str
    config: TransformerConfig
    height: int
    width: int
    window: int
    text_tokens: int
    video_codec: VideoCodecConfig
    audio_codec: AudioCodecConfig
    entries: tuple[int, ...] = OMNIFORCING

    @property
    def clock(self) -> Clock:
        """Frames and samples of its streams."""
        return Clock.of(self.config)

    def weights(self) -> int:
        """Parameters of the network."""
        with BlankWeights():
            return sum(p.numel() for p in CausalAVTransformer(self.config).parameters())

    def model(self, dtype: torch.dtype, device: torch.device) -> CausalAVTransformer:
        """The network with random weights.

        Raises:
            ValueError: it does not fit into a CPU's memory.
        """
        needed = self.weights() * dtype.itemsize
        if device.type == "cpu" and needed > _memory():
            raise ValueError(
                f"{self.name} at {dtype} has {needed / 2**30:.0f} GiB of weights and this machine "
                f"{_memory() / 2**30:.0f} GiB of memory; measure fewer layers (--layers) or a GPU"
            )
        torch.manual_seed(0)
        return CausalAVTransformer(self.config, dtype=dtype, device=device).eval()

    def decoder(self, device: torch.device) -> StreamDecoder:
        """Both codecs with random weights."""
        torch.manual_seed(0)
        codecs = VideoCodec(self.video_codec), AudioCodec(self.audio_codec)
        return StreamDecoder(*(codec.to(device).eval() for codec in codecs))

    def contexts(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Random caption embeddings (1, m, c), for the video's text and for the audio's."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        widths = config.caption_channels, config.caption_channels
        if config.caption_proj_before_connector:
            widths = config.cross_attention_dim, config.audio_cross_attention_dim
        video, audio = (
            torch.randn(1, self.text_tokens, width, generator=generator).to(like)
            for width in widths
        )
        return video, audio

    def text(self, model: nn.Module, like: Tensor) -> Text:
        """What a pass attends to of them."""
        return text_keys(model, *self.contexts(like))

    def begin(self, model: StreamModel, kept: Kept = AS_COMPUTED) -> StreamState:
        """A new stream."""
        settings = StreamSettings(self.height, self.width, self.window, kept=kept)
        return new_stream(model, settings)


def setup(
    name: str,
    layers: int | None = None,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Setup:
    """A named configuration, with some of its sizes changed.

    Raises:
        ValueError: a name that does not exist.
    """
    if name == "small":
        found = _small()
    elif name in NAMES:
        # The released layout; random weights are the same in either order of rotation.
        released = {"video_first_block": 4, "audio_first_block": 26, "rope_type": "split"}
        later = name.startswith("taomate")
        config = TransformerConfig(**released, **(_TAOMATE if later else {}))
        if name.endswith("quarter"):
            config = replace(config, **_quartered(config))
        video = VideoCodecConfig(latent_channels=config.in_channels // FOLD**2)
        audio = AudioCodecConfig(latent_channels=config.audio_in_channels)
        size = _HEIGHT, _WIDTH, _TAOMATE_WINDOW if later else _WINDOW, _TEXT_TOKENS
        entries = TAOMATE if later else OMNIFORCING
        found = Setup(name, config, *size, video, audio, entries)
    else:
        raise ValueError(f"config is {name!r}, expected one of {', '.join(NAMES)}")
    if layers is not None:
        found = replace(found, config=replace(found.config, num_layers=layers))
    if window is not None:
        found = replace(found, window=window)
    return found if grid is None else replace(found, height=grid[0], width=grid[1])


def _quartered(config: TransformerConfig) -> dict[str, int]:
    """Eight layers, and every width of the stream divided by four."""
    widths = (
        "attention_head_dim",
        "audio_attention_head_dim",
        "cross_attention_dim",
        "audio_cross_attention_dim",
        "caption_channels",
        "memory_video_dim",
        "memory_audio_dim",
        "memory_film_hidden",
    )
    return {"num_layers": 8} | {name: getattr(config, name) // 4 for name in widths}


def _small() -> Setup:
    with safe_open(shipped_model_path(), "pt") as file:
        header = json.loads(file.metadata()["config"])
    stream = StreamDefaults(**header["stream"])
    return Setup(
        "small",
        TransformerConfig.from_dict(header["transformer"]),
        stream.height,
        stream.width,
        stream.window,
        header["text_encoder"]["length"],
        VideoCodecConfig.from_dict(header["video_codec"]),
        AudioCodecConfig.from_dict(header["audio_codec"]),
    )


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2**63
