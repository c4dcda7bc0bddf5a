"""Encoded clips to draw batches from.

k clips, v caption variants, m tokens, c channels, b batch, f h w video latent grid, s audio
latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...networks.config import TransformerConfig
from ...networks.memory_branch import Remembered
from ...networks.transcript import TranscriptConfig, latent_times, transcript_track
from ..world.scene import SYLLABLES_PER_SECOND
from ..world.vocabulary import SYLLABLES, TEMPO_ADJECTIVES, TEMPO_ADVERBS, VOCABULARY
from .draws import Draws

TRANSCRIPT = TranscriptConfig(
    SYLLABLES,
    {
        word: SYLLABLES_PER_SECOND[tempo]
        for table in (TEMPO_ADJECTIVES, TEMPO_ADVERBS)
        for tempo, words in table.items()
        for word in words
    },
    SYLLABLES_PER_SECOND["steady"],
)
"""What a network of this world can be told to say."""
CLIP_FACTS = ("captions", "later", "spoken", "switch")
"""Arrays of a set beside its latents.

captions (k, v, m) of the prompt and, as later, of the one that it changes to; onset and unit of
what is spoken under each (k, 2, n, 2); the block of the change, 0 for none (k). A set may lack all
but the captions: then no prompt changes and nobody knows what is spoken.
"""


class Asked(NamedTuple):
    """What is asked for in a batch of clips: fields of `Batch`, and what is told of the stream.

    Attributes:
        memory: see `Told`.
    """

    ids: Tensor
    later: Tensor | None = None
    prompts: Tensor | None = None
    track: Tensor | None = None
    memory: tuple[Remembered, ...] | None = None

    def rows(self, rows: list[int]) -> Asked:
        """Of some clips."""
        *values, memory = self
        if memory is not None:
            memory = tuple(Remembered(*(x[rows] for x in one)) for one in memory)
        return Asked(*(None if value is None else value[rows] for value in values), memory)


class Batch(NamedTuple):
    """Latents of paired clips and their captions: video (b, c, f, h, w), audio (b, s, c).

    Attributes:
        ids: token ids (b, m), or ready embeddings of both modalities (b, m, 2, c).
        later: the same of the prompt that it changes to; None where no clip's does.
        prompts: (b, k) which of the two each block has, 0 or 1; None like `later`.
        track: timed transcript (b, s, c); None for a network that has none.
    """

    video: Tensor
    audio: Tensor
    ids: Tensor
    later: Tensor | None = None
    prompts: Tensor | None = None
    track: Tensor | None = None

    @property
    def asked(self) -> Asked:
        """All but the latents."""
        return Asked(self.ids, self.later, self.prompts, self.track)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(None if value is None else value.to(device) for value in self))


class _Set(NamedTuple):
    """The arrays of a folder, mapped."""

    video: Tensor
    audio: Tensor
    captions: Tensor
    later: Tensor | None
    spoken: Tensor | None
    switch: Tensor | None


class LatentSet:
    """Encoded clips of one or several folders (lab.training.latents), read as they are needed.

    The folders may hold clips of different lengths: a batch is drawn from those that are long
    enough.

    Args:
        config: of the network that is trained: the blocks' layout, and whether it is told a
            transcript.
        word_weights: how much more often a clip is drawn whose full caption has a word; 1 for all
            others.
        held_out: combinations of words; a clip whose full caption has all of one is never drawn.
    """

    def __init__(
        self,
        folders: list[Path],
        config: TransformerConfig,
        word_weights: Mapping[str, float],
        held_out: Sequence[Sequence[str]] = (),
    ) -> None:
        self.config, self.layout = config, config.layout
        self.names = [folder.name for folder in folders]
        self.sets = [_read_set(folder) for folder in folders]
        self.blocks = [self.layout.blocks(s.video.shape[2], s.audio.shape[1]) for s in self.sets]
        ids = {word: index + 1 for index, word in enumerate(VOCABULARY)}
        self.weights = []
        for found in self.sets:
            weights = torch.ones(len(found.video))
            for word, weight in word_weights.items():
                weights[(found.captions[:, 0] == ids[word]).any(dim=1)] = weight
            for combination in held_out:
                for captions in filter(lambda one: one is not None, (found.captions, found.later)):
                    has = [(captions[:, 0] == ids[word]).any(dim=1) for word in combination]
                    weights[torch.stack(has).all(dim=0)] = 0.0
            self.weights.append(weights)

    def batch(
        self,
        size: int,
        blocks: int,
        share: range,
        draws: Draws,
        *,
        skipped: int = 0,
        sets: Mapping[str, float] | None = None,
    ) -> Batch:
        """The first `blocks` blocks of random clips, each clip with one of its captions.

        Args:
            size: clips of the whole batch; `share` are the places in it that are wanted here.
            skipped: blocks left out after the prefix, as they are from the cache of a long stream.
            sets: names of the folders to draw from, and how much of the batch each is to have; None
                draws every clip of every folder alike.

        Raises:
            ValueError: no folder of these names has clips of that length.
        """
        needed = blocks + skipped
        named = [i for i, name in enumerate(self.names) if sets is None or name in sets]
        fit = [index for index in named if self.blocks[index] >= needed]
        if not fit:
            longest = max((self.blocks[index] for index in named), default=0)
            raise ValueError(
                f"found clips of at most {longest} blocks in {', '.join(sets or self.names)}, "
                f"expected some of {needed}; encode longer ones (lab.training.latents --seconds)"
            )
        weights = [self.weights[index] for index in fit]
        if sets is not None:
            shares = [sets[self.names[index]] for index in fit]
            weights = [w * share / w.sum() for w, share in zip(weights, shares, strict=True)]
        drawn = draws.weighted(torch.cat(weights), size)
        starts = np.cumsum([0] + [len(self.weights[index]) for index in fit])
        variants = draws.integers(self.sets[0].captions.shape[1]).tolist()
        kept = [0, *range(1 + skipped, blocks + skipped)]
        video, audio = (
            _kept(span, kept) for span in (self.layout.video_span, self.layout.audio_span)
        )
        rows = []
        for place, variant in zip(share, variants, strict=True):
            number = int(drawn[place])
            at = int(np.searchsorted(starts, number, side="right")) - 1
            found, row = self.sets[fit[at]], number - int(starts[at])
            ids, switch = found.captions[row, variant], 0
            if found.switch is not None:
                switch = int(found.switch[row])
            prompts = torch.tensor([int(0 < switch <= block) for block in kept])
            later = found.later[row, variant] if switch else ids
            parts = [found.video[row][:, video], found.audio[row][audio], ids, later, prompts]
            if self.config.transcript_channels:
                parts.append(self._track(found, row, kept, prompts))
            rows.append(parts)
        videos, audios, ids, later, prompts, *track = (
            torch.stack(part) for part in zip(*rows, strict=True)
        )
        whole = ids.float if ids.is_floating_point() else ids.long
        batch = Batch(videos.float(), audios.float(), whole(), track=track[0] if track else None)
        return batch._replace(later=later.long(), prompts=prompts) if prompts.any() else batch

    def _track(self, found: _Set, row: int, kept: list[int], prompts: Tensor) -> Tensor:
        """Timed transcript (s, c) of the kept blocks of a clip, each under its own prompt."""
        config = self.config
        frame = config.audio_hop_length / config.audio_sampling_rate
        spans: list[tuple[int, int, int]] = []
        for block, prompt in zip(kept, prompts.tolist(), strict=True):
            start, stop = self.layout.audio_span(block)
            # Blocks in a row under one prompt are one: a track costs the same whatever its length.
            if spans and spans[-1][1:] == (start, prompt):
                start = spans.pop()[0]
            spans.append((start, stop, prompt))
        parts = []
        for start, stop, prompt in spans:
            if found.spoken is None:
                parts.append(torch.zeros(stop - start, config.transcript_channels))
                continue
            onsets, units = found.spoken[row, prompt].double().T.contiguous()
            times = latent_times(start, stop, frame, config.audio_time_stride * frame)
            parts.append(transcript_track(onsets, units.long(), times, len(SYLLABLES)))
        return torch.cat(parts)


def _kept(span: Callable[[int], tuple[int, int]], blocks: list[int]) -> Tensor:
    """Indices of the latents of these blocks."""
    return torch.cat([torch.arange(*span(block)) for block in blocks])


def _read_set(folder: Path) -> _Set:
    about = json.loads((folder / "about.json").read_text())
    if about["done"] < about["clips"]:
        raise ValueError(
            f"{folder} holds {about['done']} of {about['clips']} clips; finish it first"
        )

    # Mapped, not read: a set of a large model's latents and embeddings is larger than memory.
    def mapped(name: str) -> Tensor | None:
        path = folder / f"{name}.npy"
        return torch.from_numpy(np.load(path, mmap_mode="c")) if path.exists() else None

    return _Set(*(mapped(name) for name in _Set._fields))
