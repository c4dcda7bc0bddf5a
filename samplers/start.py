"""What of a block is given: latents that are never noisy, and that the rest is made to go with.

b batch, c channels, f h w video latent grid, s audio latents, g given latents.
As LTX-2 does for image to video, given latents keep sigma 0 while everything else in the block
comes down from noise; so their tokens are a group of their own in the modulation. A picture that a
stream begins with is given that way, and so is all of one modality in the blocks to come: a sound
that pictures are made for, or pictures that a sound is made for. In the paper's block layout the
prefix is a single picture. OmniForcing's released layout has three latents more behind it; it was
not trained for a given one, so how well it takes a picture is the checkpoint's business and not
promised here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.layout import BlockLayout
from ..networks.modulation import TokenModulation
from ..networks.timestep import ModalityEmbedding, TimestepEmbedding, seeing
from ..networks.video_codec import SPACE_STRIDE, TIME_STRIDE
from .state import BlockLatents


@dataclass(frozen=True)
class Start:
    """Given video latents (1, c, g, h, w), normalised as the network has them."""

    latents: Tensor = field(repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Latent height and width."""
        return self.latents.shape[3], self.latents.shape[4]

    def block(self, index: int) -> Held | None:
        """What of a block is given."""
        return Held(self.latents) if index == 0 else None


@dataclass(frozen=True)
class Given:
    """One modality of the blocks from `first` on; the other one is made to go with it.

    Attributes:
        video: (1 or b, c, f, h, w) of whole blocks; None where the sound is given.
        audio: (1 or b, s, c) likewise.
    """

    layout: BlockLayout
    first: int
    video: Tensor | None = field(default=None, repr=False)
    audio: Tensor | None = field(default=None, repr=False)

    def block(self, index: int) -> Held | None:
        """What of a block is given; after its last whole block, nothing."""
        if index < self.first:
            return None
        video, audio = self.video, self.audio
        if video is not None:
            offset = self.layout.video_latents(self.first)
            begin, end = (at - offset for at in self.layout.video_span(index))
            return Held(video[:, :, begin:end]) if end <= video.shape[2] else None
        offset = self.layout.audio_latents(self.first)
        begin, end = (at - offset for at in self.layout.audio_span(index))
        return Held(audio=audio[:, begin:end]) if end <= audio.shape[1] else None

    def check(self, clips: int, channels: tuple[int, int], grid: tuple[int, int]) -> None:
        """Refuse what a stream of so many clips, channels (video, audio) and this grid can't take.

        Raises:
            ValueError: saying what was found.
        """
        held = self.block(self.first)
        if held is None:
            return
        spans = self.layout.video_span(self.first), self.layout.audio_span(self.first)
        frames, sounds = (end - begin for begin, end in spans)
        video = torch.empty(clips, channels[0], frames, *grid, device="meta")
        audio = torch.empty(clips, sounds, channels[1], device="meta")
        held.placed(video, audio)

    def shown(self, index: int) -> tuple[Tensor, int] | None:
        """Pictures of a block with the latent after it, and how many that is: 1, or 0 where nothing
        more is given; None where the block's pictures are not given."""
        if self.video is None or self.block(index) is None:
            return None
        offset = self.layout.video_latents(self.first)
        begin, end = (at - offset for at in self.layout.video_span(index))
        after = int(end < self.video.shape[2])
        return self.video[:, :, begin : end + after], after


class Held(NamedTuple):
    """The latents of a block that are given: its first ones, up to all of them.

    Attributes:
        video: (1, c, g, h, w); None for none.
        audio: (1, g, c) likewise.
    """

    video: Tensor | None = None
    audio: Tensor | None = None

    def placed(self, video: Tensor, audio: Tensor) -> BlockLatents:
        """Latents (b, c, f, h, w) and (b, s, c) of the block with the given ones in their place.

        Raises:
            ValueError: more of them than the block has, or of another kind.
        """
        if self.video is not None:
            _check("pictures", self.video, video, 2)
            rest = video[:, :, self.video.shape[2] :]
            video = torch.cat((self.video.to(video).expand(len(video), -1, -1, -1, -1), rest), 2)
        if self.audio is not None:
            _check("sound", self.audio, audio, 1)
            rest = audio[:, self.audio.shape[1] :]
            audio = torch.cat((self.audio.to(audio).expand(len(audio), -1, -1), rest), 1)
        return BlockLatents(video, audio)

    def modulation(
        self,
        model: nn.Module,
        clean: TimestepEmbedding,
        noisy: TimestepEmbedding,
        video: Tensor,
        audio: Tensor,
        text_at: Callable[[float], TimestepEmbedding] | None = None,
        *,
        sees: bool = False,
    ) -> TokenModulation:
        """Of a block with such latents: all but the given ones noisy. `sees`: its sound is told
        what its pictures show.

        A network that modulates the text with the noise level has one for all latents, their mean
        (docs/ltx23.md, section 1): `text_at` gives the embedding of a share of the noisy ones'.
        """
        frames = 0 if self.video is None else self.video.shape[2]
        sounds = 0 if self.audio is None else self.audio.shape[1]
        grid = video.shape[3] * video.shape[4]
        seen, seen_groups = _level(clean.video, noisy.video, frames, video.shape[2], grid)
        heard, heard_groups = _level(clean.audio, noisy.audio, sounds, audio.shape[1], 1)
        groups = (x if x is None else x.to(video.device) for x in (seen_groups, heard_groups))
        if text_at is not None and noisy.video.prompt is not None:
            shares = 1 - frames / video.shape[2], 1 - sounds / audio.shape[1]
            seen = seen._replace(prompt=text_at(shares[0]).video.prompt)
            heard = heard._replace(prompt=text_at(shares[1]).audio.prompt)
        if sees:
            heard = seeing(heard)
        return TokenModulation(model, TimestepEmbedding(seen, heard), *groups)


def _level(
    clean: ModalityEmbedding, noisy: ModalityEmbedding, given: int, count: int, tokens: int
) -> tuple[ModalityEmbedding, Tensor | None]:
    """One modality's noise levels, and the group of each of its tokens where there are two."""
    if given in (0, count):
        return (clean if given else noisy), None
    pairs = zip(clean, noisy, strict=True)
    both = (None if None in pair else torch.cat(pair, dim=1) for pair in pairs)
    return ModalityEmbedding(*both), (torch.arange(count) >= given).long().repeat_interleave(tokens)


def _check(what: str, given: Tensor, block: Tensor, time: int) -> None:
    """Refuse given latents that don't fit a block's, `time` being the dimension of time."""
    found, expected = (tuple(x.shape[:time][1:] + x.shape[time + 1 :]) for x in (given, block))
    if len(given) not in (1, len(block)):
        raise ValueError(
            f"the given {what} are those of {len(given)} clips, and the stream has {len(block)}: "
            "give one for all, or one each"
        )
    if found == expected and given.shape[time] <= block.shape[time]:
        return
    if what == "pictures" and found[0] == expected[0] and found[1:] != expected[1:]:
        sizes = [f"{w * SPACE_STRIDE} x {h * SPACE_STRIDE}" for h, w in (found[1:], expected[1:])]
        raise ValueError(
            f"the given pictures are {sizes[0]} pixels, and the stream's {sizes[1]}: scale them, "
            "or set width and height in the stream's settings"
        )
    raise ValueError(
        f"the given {what} have latents of shape {tuple(given.shape)}, and the block takes up to "
        f"{block.shape[time]} of {tuple(block.shape)}: encode one picture, or a clip or its sound, "
        "with this model's VAE"
    )


def held(start: Start | None, given: Given | None, block: int) -> Held | None:
    """All that is given of a block."""
    parts = [part for one in (start, given) if one and (part := one.block(block)) is not None]
    whole = Held()
    for part in parts:  # a given picture, and then all pictures that are given
        whole = Held(*(a if b is None else b for a, b in zip(whole, part, strict=True)))
    return whole if parts else None


def given_of(
    samples: Tensor, layout: BlockLayout, first: int, audio_bins: int | None = None
) -> Given:
    """What a LATENT gives for the blocks from `first` on; its mask is not looked at.

    Args:
        samples: pictures (b, c, f, h, w) or sound (b, c, s, q), encoded as a clip by itself, one
            for all clips of the stream or one each. Its first latent stands for a single frame;
            where a stream goes on it is left out.
        audio_bins: q; None for any. Still pictures' latents have four dimensions too.

    Raises:
        ValueError: no such latent, or less than a second.
    """
    if getattr(samples, "is_nested", False):  # ComfyUI's latent of both
        raise ValueError(
            "the given latent holds pictures and sound, expected one of them: put "
            "LTXVSeparateAVLatent before it"
        )
    is_video = samples.ndim == 5
    if not is_video and (samples.ndim != 4 or audio_bins not in (None, samples.shape[3])):
        raise ValueError(
            f"the given latent has shape {tuple(samples.shape)}, expected pictures from VAE Encode "
            "or sound from VAE Encode Audio"
        )
    if first:
        samples = samples[:, :, 1:]
    spans, have = (layout.video_latents, layout.audio_latents)[not is_video], samples.shape[2]
    # A prefix of one latent is no second yet.
    needed = spans(first + 1 if first or spans(1) > 1 else 2) - spans(first)
    if have < needed:
        alone = int(first > 0)  # the one that was left out
        lengths = [n + alone for n in (have, needed)]
        kind, unit = "sound", "latents"
        if is_video:
            kind, unit = "pictures", "frames"
            lengths = [1 + TIME_STRIDE * (n - 1) for n in lengths]
        raise ValueError(
            f"of the given {kind} {lengths[0]} {unit} can be used, expected at least {lengths[1]}, "
            "a second and one more: give a longer clip (a picture to begin with is 'start' in "
            "Stream Settings)"
        )
    samples = samples.float().cpu()
    if is_video:
        return Given(layout, first, video=samples)
    return Given(layout, first, audio=rearrange(samples, "b c s q -> b s (c q)"))


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
