"""Encoded clips to draw batches from.

k clips, v caption variants, m tokens, c channels, b batch, f h w video latent grid, s audio
latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...networks.layout import BlockLayout
from ..world.scene import VOCABULARY
from .draws import Draws


class Batch(NamedTuple):
    """Latents of paired clips and their captions: video (b, c, f, h, w), audio (b, s, c).

    `ids` are token ids (b, m), or ready embeddings of both modalities (b, m, 2, c).
    """

    video: Tensor
    audio: Tensor
    ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(value.to(device) for value in self))


class LatentSet:
    """Encoded clips of one or several folders (lab.training.latents), read as they are needed.

    The folders may hold clips of different lengths: a batch is drawn from those that are long
    enough.

    Args:
        word_weights: how much more often a clip is drawn whose full caption has a word; 1 for all
            others.
    """

    def __init__(
        self, folders: list[Path], layout: BlockLayout, word_weights: dict[str, float]
    ) -> None:
        self.layout = layout
        self.sets = [_read_set(folder) for folder in folders]
        self.blocks = [layout.blocks(s.video.shape[2], s.audio.shape[1]) for s in self.sets]
        ids = {word: index + 1 for index, word in enumerate(VOCABULARY)}
        self.weights = []
        for found in self.sets:
            weights = torch.ones(len(found.video))
            for word, weight in word_weights.items():
                weights[(found.ids[:, 0] == ids[word]).any(dim=1)] = weight
            self.weights.append(weights)

    def batch(
        self, size: int, blocks: int, share: range, draws: Draws, *, skipped: int = 0
    ) -> Batch:
        """The first `blocks` blocks of random clips, each clip with one of its captions.

        Args:
            size: clips of the whole batch; `share` are the places in it that are wanted here.
            skipped: blocks left out after the prefix, as they are from the cache of a long stream.

        Raises:
            ValueError: no folder has clips of that length.
        """
        needed = blocks + skipped
        fit = [index for index, found in enumerate(self.blocks) if found >= needed]
        if not fit:
            raise ValueError(
                f"found clips of at most {max(self.blocks)} blocks, expected some of {needed}; "
                "encode longer ones (lab.training.latents --seconds)"
            )
        drawn = draws.weighted(torch.cat([self.weights[index] for index in fit]), size)
        starts = np.cumsum([0] + [len(self.weights[index]) for index in fit])
        variants = draws.integers(self.sets[0].ids.shape[1]).tolist()
        video = _kept(self.layout.video_span, blocks, skipped)
        audio = _kept(self.layout.audio_span, blocks, skipped)
        rows = []
        for place, variant in zip(share, variants, strict=True):
            number = int(drawn[place])
            at = int(np.searchsorted(starts, number, side="right")) - 1
            found, row = self.sets[fit[at]], number - int(starts[at])
            rows.append(
                (
                    found.video[row][:, video],
                    found.audio[row][audio],
                    found.ids[row, variant],
                )
            )
        videos, audios, ids = (torch.stack(part) for part in zip(*rows, strict=True))
        return Batch(videos.float(), audios.float(), ids if ids.is_floating_point() else ids.long())


def _kept(span: Callable[[int], tuple[int, int]], blocks: int, skipped: int) -> Tensor:
    """Indices of the latents of the prefix and of `blocks` - 1 blocks, `skipped` blocks later."""
    places = [0, *range(1 + skipped, blocks + skipped)]
    return torch.cat([torch.arange(*span(block)) for block in places])


def _read_set(folder: Path) -> Batch:
    """A folder of latents; `ids` has every variant of the captions, (k, v, ...)."""
    about = json.loads((folder / "about.json").read_text())
    if about["done"] < about["clips"]:
        raise ValueError(
            f"{folder} holds {about['done']} of {about['clips']} clips; finish it first"
        )
    # Mapped, not read: a set of a large model's latents and embeddings is larger than memory.
    return Batch(
        *(
            torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
            for name in ("video", "audio", "captions")
        )
    )
