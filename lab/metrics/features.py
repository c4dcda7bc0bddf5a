"""What the codecs' encoders see in clips: the feature spaces of the Fréchet distances.

b clips, c channels, f h w video latent grid, s audio latents, F H W pixel frames and size, n
samples.
Clips are encoded from pixels and samples, true and generated ones alike, so a distance tells what
can be seen and heard, whatever latents it was decoded from. A video feature is one latent token (c
channels, 32 x 32 pixels over 8 frames: motion included). An audio feature is SPAN latents in a row
(0.2 s): with single latents, sounds in any order would be as good as true ones. The first latent of
either modality holds a single frame and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from ...model_loaders.bundle import Bundle
from ...samplers.tensor_file import read_tensors, write_tensors
from .clips import PromptedClip
from .frechet import Moments, frechet_distance, moments

SPAN = 5  # audio latents of 40 ms; the fastest hits are 0.4 s apart
BATCH = 4  # clips encoded together: more only costs memory


class Features(NamedTuple):
    """Video features (v, c) and audio features (a, SPAN c) of some clips."""

    video: NDArray[np.float32]
    audio: NDArray[np.float32]


class Reference(NamedTuple):
    """What true clips look and sound like: moments of their features."""

    video: Moments
    audio: Moments


@torch.no_grad()
def features(bundle: Bundle, clips: Sequence[PromptedClip]) -> Features:
    """Features of clips of one length, from the codecs of `bundle`.

    Raises:
        ValueError: a length that the codecs do not take: 1 + 8 k frames with 160 (4 s - 3) samples.
    """
    pictures, sounds = [], []
    for first in range(0, len(clips), BATCH):
        part = clips[first : first + BATCH]
        pixels = torch.from_numpy(np.stack([clip.video for clip in part])).to(bundle.device)
        video = rearrange(pixels, "b F H W c -> b c F H W").float() / 127.5 - 1
        wave = torch.from_numpy(np.stack([clip.audio for clip in part])).to(bundle.device)
        tokens = bundle.video_codec.encode(video)[:, :, 1:]
        latents = bundle.audio_codec.encode(wave)[:, 1:]
        latents = latents[:, : latents.shape[1] // SPAN * SPAN]
        pictures.append(rearrange(tokens, "b c f h w -> (b f h w) c").cpu().numpy())
        spans = rearrange(latents, "b (k span) c -> (b k) (span c)", span=SPAN)
        sounds.append(spans.cpu().numpy())
    return Features(np.concatenate(pictures), np.concatenate(sounds))


def stacked(parts: Sequence[Features]) -> Features:
    """Features of several sets of clips as those of one set."""
    return Features(
        np.concatenate([part.video for part in parts]),
        np.concatenate([part.audio for part in parts]),
    )


def reference_of(found: Features) -> Reference:
    """The moments of a set of true clips."""
    return Reference(moments(found.video), moments(found.audio))


def distances(found: Features, reference: Reference) -> tuple[float, float]:
    """Fréchet distance of the pictures and of the sound from the true ones.

    Raises:
        ValueError: features that are not finite.
    """
    video = frechet_distance(moments(found.video), reference.video)
    return video, frechet_distance(moments(found.audio), reference.audio)


def apart(one: Features, other: Features, clips: int) -> tuple[float, float]:
    """How far the pictures and the sound of `clips` clips are from those in the same places of
    another set: root mean square over a clip's features, mean over clips.

    Between two seeds of the same prompts it is a model's variety, to be held against that of true
    clips: a model that makes one clip of a prompt again and again has none.
    """
    found = []
    for a, b in zip(one, other, strict=True):
        difference = rearrange(a - b, "(n k) c -> n (k c)", n=clips)
        found.append(float(np.sqrt(np.square(difference).mean(1)).mean()))
    return found[0], found[1]


def save_reference(path: Path, reference: Reference) -> None:
    """Keep the moments, so that every row of a table is held against the same ones."""
    tensors = {
        f"{modality}.{name}": torch.from_numpy(value)
        for modality, pair in reference._asdict().items()
        for name, value in pair._asdict().items()
    }
    write_tensors(path, tensors, {}, "the moments of true clips")


def load_reference(path: Path) -> Reference:
    """The moments that `save_reference` wrote.

    Raises:
        TensorFileError: no such file, or not whole.
    """
    tensors, _ = read_tensors(path, "the moments of true clips", "delete it to have it made again")
    return Reference(
        *(
            Moments(tensors[f"{modality}.mean"].numpy(), tensors[f"{modality}.covariance"].numpy())
            for modality in Reference._fields
        )
    )
