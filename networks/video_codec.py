"""A small causal video autoencoder: 32x smaller in space, 8x in time, decoded as a stream.

Letters: b batch, c latent channels, F pixel frames, H W pixel size, f h w latent frames and size,
with F = 1 + 8 (f - 1), H = 32 h, W = 32 w. Latent 0 is pixel frame 0; latent j > 0 is the frames
8j-7 .. 8j. Neither way looks ahead. Pixels are in [-1, 1]; latents leave `encode` with mean 0 and
standard deviation 1 per channel.

Most layers run where a frame is 8x8 or 4x4 features, and time is mixed nowhere above that:
flat-coloured pictures need their detail in space, and this is what keeps decoding far below real
time on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil

import torch
from einops import rearrange
from torch import Tensor, nn

from .causal_conv import (
    Pipeline,
    ResidualBlock,
    SpatialConv,
    SpatialUp,
    Stream,
    StreamState,
    TemporalConv,
    TemporalDown,
    TemporalUp,
)
from .checked import Width, build, check

SPACE_STRIDE = 32
TIME_STRIDE = 8
PATCH = 4
# 2x2 neighbours of the 1/16 grid are folded into channels: a transformer gets fewer and richer
# tokens, and the latent is LTX-2's own shape, 128 channels at 1/32.
FOLD = 2

VideoDecoderState = StreamState
"""What the decoder remembers between chunks: the frames before each temporal conv. Immutable."""


@dataclass(frozen=True)
class VideoCodecConfig:
    """Sizes of the codec: channels before folding, and at 1/4, 1/8 and 1/16 of the pixel size."""

    latent_channels: Width = 32
    fine_width: Width = 64
    middle_width: Width = 80
    coarse_width: Width = 96

    def __post_init__(self) -> None:
        check(self, "video codec config")

    @property
    def channels(self) -> int:
        """Channels of the latents that `encode` gives."""
        return self.latent_channels * FOLD**2

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> VideoCodecConfig:
        """Build from a checkpoint's JSON; raises ValueError for what does not belong there."""
        return build(cls, values, "video codec config")

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form that `from_dict` reads."""
        return asdict(self)


class VideoCodec(nn.Module):
    """The codec. `encode` and `decode` speak normalised latents; its training, raw moments."""

    def __init__(self, config: VideoCodecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VideoCodecConfig()
        fine, middle, coarse = config.fine_width, config.middle_width, config.coarse_width
        pixels = 3 * PATCH * PATCH
        self.encoder = Pipeline(
            [
                SpatialConv(pixels, fine),
                nn.SiLU(),
                SpatialConv(fine, middle, stride=2),
                ResidualBlock(middle, temporal=False),
                TemporalDown(middle, middle),
                ResidualBlock(middle, temporal=False),
                TemporalDown(middle, middle),
                SpatialConv(middle, coarse, stride=2),
                ResidualBlock(coarse, temporal=False),
                TemporalDown(coarse, coarse),
                ResidualBlock(coarse, temporal=False),
                nn.Linear(coarse, 2 * config.latent_channels),
            ]
        )
        self.decoder = Pipeline(
            [
                nn.Linear(config.latent_channels, coarse),
                ResidualBlock(coarse, temporal=True),
                TemporalUp(coarse, coarse),
                ResidualBlock(coarse, temporal=False),
                SpatialUp(coarse, middle),
                ResidualBlock(middle, temporal=False),
                TemporalUp(middle, middle),
                ResidualBlock(middle, temporal=True),
                TemporalUp(middle, middle),
                ResidualBlock(middle, temporal=True),
                SpatialUp(middle, fine),
                ResidualBlock(fine, temporal=False),
                ResidualBlock(fine, temporal=False),
                SpatialConv(fine, pixels),
            ]
        )
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Keep the signal's size through both halves, and start with little noise on the latents.

        With torch's default the latents start far below the noise of the KL term, and learning
        waits for them.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                last = module.time if isinstance(module.time, nn.Linear) else module.time.linear
                last.weight.mul_(0.2)
        moments = self.encoder[-1]
        moments.weight[self.config.latent_channels :].mul_(0.1)
        moments.bias[self.config.latent_channels :] = -4.0

    @property
    def context_latents(self) -> int:
        """How many latents before a chunk still show in its frames; older ones change nothing."""
        frames, rate = Fraction(0), 1
        for layer in self.decoder:
            if isinstance(layer, TemporalUp):
                rate *= 2
            elif isinstance(layer, ResidualBlock) and isinstance(layer.time, TemporalConv):
                frames += Fraction(2, rate)
        return ceil(frames)

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the raw latents.

        Args:
            video: (b 3 F H W) in [-1, 1], F = 1 + 8k, H and W multiples of 32.
        Returns:
            Two tensors (b c f h w), not normalised.
        Raises:
            ValueError: for another shape.
        """
        _check_video(video)
        x = rearrange(video, "b r f (h y) (w x) -> b f h w (y x r)", y=PATCH, x=PATCH)
        moments = rearrange(self.encoder(x, Stream()), "b f h w c -> b c f h w")
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-12.0, 4.0)

    def encode(self, video: Tensor) -> Tensor:
        """Return the normalised latent mean (b c f h w) of a video (b 3 F H W) in [-1, 1]."""
        mean, _ = self.encode_moments(video)
        latent = (mean - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)
        return rearrange(latent, "b c f (h y) (w x) -> b (c y x) f h w", y=FOLD, x=FOLD)

    def decode(
        self, latent: Tensor, state: VideoDecoderState | None = None
    ) -> tuple[Tensor, VideoDecoderState]:
        """Decode the next chunk of a stream.

        Args:
            latent: (b c f h w) normalised latents, any f >= 1.
            state: what the previous chunk's call returned; None at a stream's start.
        Returns:
            The video (b 3 F H W), about [-1, 1] and not clipped, F = 8f, or 8f - 7 at a stream's
            start; and the state for the next chunk. The given state is left as it was.
        Raises:
            ValueError: for another shape, or for a state of another stream.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.channels or latent.shape[2] < 1:
            raise ValueError(
                f"video latents have shape {tuple(latent.shape)}, expected (batch, "
                f"{self.config.channels}, frames >= 1, height, width)"
            )
        latent = rearrange(latent, "b (c y x) f h w -> b c f (h y) (w x)", y=FOLD, x=FOLD)
        raw = latent * _per_channel(self.latent_std) + _per_channel(self.latent_mean)
        return self.decode_raw(raw, state)

    def decode_raw(
        self, raw: Tensor, state: VideoDecoderState | None = None
    ) -> tuple[Tensor, VideoDecoderState]:
        """`decode` for latents that are not normalised, as `encode_moments` gives them."""
        stream = Stream(state)
        x = self.decoder(rearrange(raw, "b c f h w -> b f h w c"), stream)
        video = rearrange(x, "b f h w (y x r) -> b r f (h y) (w x)", y=PATCH, x=PATCH)
        return video, stream.state()


def latent_frames(frames: int) -> int:
    """Return how many latents `frames` pixel frames make; ValueError unless frames = 1 + 8k."""
    if frames < 1 or frames % TIME_STRIDE != 1:
        lower = max(1, frames - (frames - 1) % TIME_STRIDE)
        raise ValueError(
            f"the video has {frames} frames, expected 1 + {TIME_STRIDE}k; cut it to {lower} or "
            f"extend it to {lower + TIME_STRIDE if frames > 1 else lower}"
        )
    return 1 + frames // TIME_STRIDE


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(
            f"the video has shape {tuple(video.shape)}, expected (batch, 3, frames, height, width)"
        )
    latent_frames(video.shape[2])
    height, width = video.shape[3:]
    if height < 1 or width < 1 or height % SPACE_STRIDE or width % SPACE_STRIDE:
        raise ValueError(
            f"the video is {width}x{height} pixels (width x height), expected multiples of "
            f"{SPACE_STRIDE}; resize or crop it"
        )


def _per_channel(values: Tensor) -> Tensor:
    return rearrange(values, "c -> 1 c 1 1 1")
