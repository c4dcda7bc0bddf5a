"""Sound for given pictures: a track of what they show, and adapters that have it listened to.

b batch, c channels, f h w video latent grid, s audio latents, t track channels.
Attention from sound to pictures reads a token's values linearly, but when something hits is no
linear function of a causal codec's latents. So a small network reads the latents of a block whose
pictures are all given, frame by frame, and tells each audio latent, beside the transcript, what is
seen at its time. It looks a latent ahead: given pictures are all there. That alone does not
outweigh the sound's own past, so layers of the sound have thin matrices as few-step mode has, which
act in such blocks alone. Ours: neither paper makes sound for given pictures. A stream that is given
none is bit for bit what it is without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TransformerConfig
from .few_step import Adapter

SIGHT_DTYPE = torch.float8_e4m3fn
"""Of the matrices that act for given pictures alone, in a model file."""


class PictureTrack(nn.Module):
    """Reads a block's clean video latents; adds nothing to the sound at first."""

    def __init__(
        self, config: TransformerConfig, operations: object, dtype: object, device: object
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        hidden = config.picture_track_hidden
        self.frames, self.channels = config.video_time_stride, config.picture_track_channels
        # A latent's channels and its place in the picture, -1 to 1 down and across.
        self.place_in = operations.Linear(config.in_channels + 2, hidden, **kwargs)
        # A latent, the one before it and the one after it.
        self.time_in = operations.Linear(3 * hidden, hidden, **kwargs)
        self.frames_out = operations.Linear(hidden, self.frames * self.channels, **kwargs)
        self.proj_out = operations.Linear(self.channels, config.audio_dim, bias=False, **kwargs)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, video: Tensor, latents: int, before: int = 0, after: int = 0) -> Tensor:
        """Track (b, s, t) of a block's audio latents, from its video latents (b, c, f, h, w).

        Every latent counts as `video_time_stride` frames. The first of a clip is a single one, so a
        layout whose first block has more would be told too late what is seen there.

        Args:
            before, after: how many of the video latents, none or one, are of its neighbours: what
                moves says more than what stands still, of a block of a single picture above all.
        """
        frames, height, width = video.shape[2:]
        down, across = (
            (torch.arange(n, dtype=video.dtype, device=video.device) + 0.5) * (2 / n) - 1
            for n in (height, width)
        )
        place = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1)
        tokens = torch.cat((video.movedim(1, -1), place.expand(len(video), frames, -1, -1, 2)), -1)
        seen = F.gelu(self.place_in(tokens)).mean(dim=(2, 3))
        around = F.pad(seen, (0, 0, 1 - before, 1 - after)).unfold(1, 3, 1).flatten(2)
        seen = self.frames_out(F.gelu(self.time_in(around)))
        # The frames of all latents in a row, and of these what is seen when each sound is heard.
        seen = seen.unflatten(2, (self.frames, self.channels)).flatten(1, 2).movedim(1, 2)
        at = F.interpolate(seen.float(), size=latents, mode="linear", align_corners=False)
        return F.gelu(at.movedim(1, 2).to(seen.dtype))


def attach_sight(
    model: nn.Module, rank: int, operations: object, dtype: object, device: object
) -> None:
    """Give a transformer its adapters for given pictures: beside queries, keys and sums of the
    sound's own attention, queries and sums of that over the pictures, and the feed-forward's first
    half."""
    for block in model.transformer_blocks:
        own, seen = block.audio_attn1, block.video_to_audio_attn
        sums = own.to_out[0], seen.to_out[0]
        for linear in (own.to_q, own.to_k, seen.to_q, *sums, block.audio_ff.net[0].proj):
            channels = linear.in_features, linear.out_features
            linear.pictures = Adapter(channels, rank, operations, dtype, device)


def is_sight(name: str) -> bool:
    """Whether a parameter is of what acts for given pictures alone."""
    return "picture_track." in name or ".pictures." in name
