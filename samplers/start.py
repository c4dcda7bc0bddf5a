"""A stream that begins with a given picture: the first video latents of block 0 are never noisy.

b batch, c channels, f h w video latent grid, g given latents.
As LTX-2 does for image to video, the given latents keep sigma 0 while everything else in the block,
the sound included, comes down from noise; so their tokens are a group of their own in the
modulation. In the paper's block layout the prefix is that one latent. OmniForcing's released layout
has three more behind it; it was not trained for a given one, so how well it takes a picture is the
checkpoint's business and not promised here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..networks.modulation import TokenModulation
from ..networks.timestep import ModalityEmbedding, TimestepEmbedding


@dataclass(frozen=True)
class Start:
    """Given video latents (1, c, g, h, w), normalised as the network has them."""

    latents: Tensor = field(repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Latent height and width."""
        return self.latents.shape[3], self.latents.shape[4]

    def placed(self, video: Tensor) -> Tensor:
        """Video latents (b, c, f, h, w) of block 0 with the given ones in their place.

        Raises:
            ValueError: more of them than the block has, or of another kind.
        """
        given = self.latents
        fits = given.shape[1] == video.shape[1] and self.grid == tuple(video.shape[3:])
        if not fits or given.shape[2] > video.shape[2]:
            raise ValueError(
                f"the start has {given.shape[2]} video latents of {given.shape[1]} channels on a "
                "grid of "
                f"{self.grid[0]} x {self.grid[1]}; the first block takes up to {video.shape[2]} of "
                f"{video.shape[1]} channels on {video.shape[3]} x {video.shape[4]}: encode one "
                "picture, with "
                "this model's VAE and at the stream's size"
            )
        rest = video[:, :, given.shape[2] :]
        return torch.cat((given.to(video).expand(video.shape[0], -1, -1, -1, -1), rest), dim=2)

    def modulation(
        self, model: nn.Module, clean: TimestepEmbedding, noisy: TimestepEmbedding, video: Tensor
    ) -> TokenModulation:
        """Of a block with video latents (b, c, f, h, w): all but the given ones noisy."""
        levels = zip(clean.video, noisy.video, strict=True)
        both = ModalityEmbedding(
            *(None if None in level else torch.cat(level, dim=1) for level in levels)
        )
        frames = torch.arange(video.shape[2], device=video.device) >= self.latents.shape[2]
        groups = frames.long().repeat_interleave(video.shape[3] * video.shape[4])
        return TokenModulation(model, TimestepEmbedding(both, noisy.audio), groups)


def start_of(samples: Tensor, noise_mask: Tensor | None) -> Start:
    """The given latents of a LATENT: all of them, or the leading ones that its mask keeps.

    Args:
        samples: (1, c, f, h, w).
        noise_mask: broadcasts to (1, 1, f, h, w); 0 = given, 1 = to be made, as core's
            image-to-video nodes write it.

    Raises:
        ValueError: nothing is given, something after what is not, or only in part.
    """
    if samples.ndim != 5 or samples.shape[0] != 1:
        raise ValueError(
            f"the start latent has shape {tuple(samples.shape)}, expected (1, channels, frames, "
            "height, "
            "width): encode one picture with LTX-2's VAE"
        )
    if noise_mask is None:
        return Start(samples)
    mask = noise_mask.expand(1, 1, samples.shape[2], *noise_mask.shape[3:])
    free = mask.amax(dim=(0, 1, 3, 4))
    given = int((free == 0).sum())
    if not given or (free[:given] != 0).any() or (mask[:, :, given:] != 1).any():
        raise ValueError(
            "the start latent's mask is not 'the first frames given, the rest free': set the "
            "strength of the "
            "image to 1, and give the beginning only"
        )
    return Start(samples[:, :, :given])
