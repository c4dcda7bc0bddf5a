"""What is measured: a network's sizes (random weights), the block it makes, the codecs after it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch import Tensor

from ...model_loaders.blank import BlankWeights
from ...model_loaders.bundle import StreamDefaults, shipped_model_path
from ...networks.audio_codec import AudioCodec, AudioCodecConfig
from ...networks.config import TransformerConfig
from ...networks.transformer import CausalAVTransformer
from ...networks.video_codec import FOLD, VideoCodec, VideoCodecConfig
from ...samplers.clock import Clock
from ...samplers.decode import StreamDecoder
from ...samplers.model import StreamModel
from ...samplers.rollout import new_stream
from ...samplers.state import StreamSettings, StreamState

NAMES = ("quarter", "19b", "small")
_TEXT_TOKENS, _HEIGHT, _WIDTH = 1024, 16, 24  # LTX-2's prompt, and 512 x 768 pixels
_WINDOW = 5


@dataclass(frozen=True)
class Setup:
    """One configuration.

    Attributes:
        height, width: latent grid.
        window: blocks kept besides the prefix.
        text_tokens: of a prompt.
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

    def context(self, like: Tensor) -> Tensor:
        """A random caption embedding (1, m, c)."""
        shape = 1, self.text_tokens, self.config.caption_channels
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)

    def begin(self, model: StreamModel) -> StreamState:
        """A new stream."""
        return new_stream(model, StreamSettings(self.height, self.width, self.window))


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
        config = TransformerConfig(**released)
        if name == "quarter":
            config = replace(
                config,
                num_layers=8,
                attention_head_dim=32,
                audio_attention_head_dim=16,
                cross_attention_dim=1024,
                audio_cross_attention_dim=512,
                caption_channels=960,
            )
        video = VideoCodecConfig(latent_channels=config.in_channels // FOLD**2)
        audio = AudioCodecConfig(latent_channels=config.audio_in_channels)
        found = Setup(name, config, _HEIGHT, _WIDTH, _WINDOW, _TEXT_TOKENS, video, audio)
    else:
        raise ValueError(f"config is {name!r}, expected one of {', '.join(NAMES)}")
    if layers is not None:
        found = replace(found, config=replace(found.config, num_layers=layers))
    if window is not None:
        found = replace(found, window=window)
    return found if grid is None else replace(found, height=grid[0], width=grid[1])


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
