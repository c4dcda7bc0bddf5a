"""One row of a comparison: a model asked in one way, its clips, and what is measured on them.

A row is scored once per sampling seed and piece of the streams (`Protocol`), always on the same
prompts and from the same named noise, so rows can be compared seed by seed. Three rows come without
a model: `truth` is other true clips of the same captions, what a perfect model would score with as
many clips; `codec` is these after both codecs, what any model over those codecs can reach;
`unsynced` is their pictures with the sound of yet another clip of the caption, what is in time by
chance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

import numpy as np

from ...model_loaders.bundle import Bundle
from ...samplers.rollout import Method, Mode, SamplerSettings, Step, sampler_settings
from .clips import (
    HeldOut,
    PromptedClip,
    generate_pieces,
    held_out,
    redrawn,
    through_codecs,
    true_clip,
)
from .features import Features, Reference, apart, distances, features, reference_of, stacked
from .score import Judged, Table, judge, summary
from .sync import NEAR, HitSync

TRUTH, CODEC, UNSYNCED = "truth", "codec", "unsynced"
WITHOUT_MODEL = (TRUTH, CODEC, UNSYNCED)
FARTHEST_MS = 1000 * NEAR  # partners of hits are looked for no farther
REFERENCE_DRAWS = 8  # true clips per prompt that distances are measured from
BATCH = 16  # clips generated together
_OTHER_SOUND = 1000  # draws of scenes whose sound alone is used
_ROW = re.compile(r"(?P<name>[\w.+-]+):(?P<mode>\w+):(?P<steps>\d+)(:(?P<more>[\w.]+))?", re.ASCII)


@dataclass(frozen=True)
class Candidate:
    """A model and how it is asked.

    Attributes:
        label: as given on the command line.
        name: of the model, or one of WITHOUT_MODEL.
        sampler: None for the rows without a model.
    """

    label: str
    name: str
    sampler: SamplerSettings | None = None

    @property
    def evaluations(self) -> int:
        """Passes through the network per block: one for each step, two where guidance is on. The
        refresh is part of the next block's first."""
        if self.sampler is None:
            return 0
        return self.sampler.steps * (1 if self.sampler.guidance == 1 else 2)


def candidate_of(label: str) -> Candidate:
    """Read NAME:MODE:STEPS, or with a fourth part a guidance or a sampling method.

    Raises:
        ValueError: anything else, or settings that do not go together.
    """
    found = _ROW.fullmatch(label)
    if found is None or found["mode"] not in get_args(Mode) or found["name"] in WITHOUT_MODEL:
        raise ValueError(
            f"found row {label!r}, expected NAME:MODE:STEPS, NAME:MODE:STEPS:GUIDANCE or "
            f"NAME:few:STEPS:METHOD, with a mode few or multi and a NAME other "
            f"than {', '.join(WITHOUT_MODEL)}"
        )
    more = found["more"]
    method = more if more in get_args(Method) else None
    try:
        guidance = None if more is None or method else float(more)
        sampler = sampler_settings(found["mode"], int(found["steps"]), guidance, method)
    except ValueError as error:
        raise ValueError(f"row {label!r}: {error}") from error
    return Candidate(label, found["name"], sampler)


@dataclass(frozen=True)
class Protocol:
    """What every row of a comparison is measured on.

    Attributes:
        prompts: held-out prompts, the kinds in turn.
        seeds: sampling seeds; each gives one score.
        seconds: length of a piece.
        pieces: pieces of each stream, one after the other.
        combinations: words of which a prompt is to have all of one; none: any prompts.
    """

    prompts: int
    seeds: int
    seconds: int
    pieces: int = 1
    combinations: tuple[tuple[str, ...], ...] = ()

    def asked(self) -> list[HeldOut]:
        """The prompts."""
        return held_out(self.prompts, combinations=self.combinations)

    def described(self) -> Table:
        """What is kept beside what was measured."""
        facts = asdict(self)
        combinations = [" ".join(one) for one in facts.pop("combinations")]
        return facts | ({"combinations": combinations} if combinations else {})


def true_reference(codecs: Bundle, protocol: Protocol) -> Reference:
    """Moments of REFERENCE_DRAWS true clips of every prompt, one piece long."""
    prompts = protocol.asked()
    drawn = (redrawn(prompts, draw) for draw in range(REFERENCE_DRAWS))
    clips = ([true_clip(prompt, protocol.seconds) for prompt in draw] for draw in drawn)
    return reference_of(stacked([features(codecs, draw) for draw in clips]))


def measure(
    candidate: Candidate,
    protocol: Protocol,
    model: Bundle,
    codecs: Bundle,
    reference: Reference,
    on_step: Callable[[Step], None] | None = None,
) -> list[list[Table]]:
    """Make the clips of a row and score them: one table of numbers per seed and piece.

    Args:
        model: whose clips; for the rows without a model, the same as `codecs`.
        codecs: whose feature spaces distances are measured in.

    Raises:
        NonFiniteBlockError: the model breaks down.
    """
    prompts = protocol.asked()
    scored, kept = [], []
    for seed in range(protocol.seeds):
        judged: list[list[Judged]] = [[] for _ in range(protocol.pieces)]
        seen: list[list[Features]] = [[] for _ in range(protocol.pieces)]
        made = (
            _true(candidate.name, protocol, model, prompts, seed)
            if candidate.sampler is None
            else _generated(candidate.sampler, protocol, model, prompts, seed, on_step)
        )
        for piece, clips in made:
            judged[piece] += [judge(clip, model.clock).without_media() for clip in clips]
            seen[piece].append(features(codecs, clips))
        pieces = [stacked(parts) for parts in seen]
        scored.append([scores(*one, reference) for one in zip(judged, pieces, strict=True)])
        kept.append(pieces)
    # Each seed's clips against those of the next one: with three seeds, all pairs.
    for seed in range(protocol.seeds if protocol.seeds > 1 else 0):
        for table, pair in zip(
            scored[seed], zip(kept[seed - 1], kept[seed], strict=True), strict=True
        ):
            table["video variety"], table["audio variety"] = apart(*pair, protocol.prompts)
    return scored


def _generated(
    sampler: SamplerSettings,
    protocol: Protocol,
    model: Bundle,
    prompts: list[HeldOut],
    seed: int,
    on_step: Callable[[Step], None] | None,
) -> Iterator[tuple[int, list[PromptedClip]]]:
    """(piece, clips) of one seed, batch by batch."""
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        named = [1000 * seed + first + i for i in range(len(part))]  # as in lab.metrics.evaluate
        size = protocol.seconds, protocol.pieces
        yield from enumerate(generate_pieces(model, part, named, *size, sampler, on_step))


def _true(
    name: str, protocol: Protocol, codecs: Bundle, prompts: list[HeldOut], seed: int
) -> Iterator[tuple[int, list[PromptedClip]]]:
    """Likewise of a row without a model."""
    seen = redrawn(prompts, REFERENCE_DRAWS + seed)
    heard = redrawn(prompts, _OTHER_SOUND + seed)
    for first in range(0, len(prompts), BATCH):
        for piece in range(protocol.pieces):
            window = protocol.seconds, piece * protocol.seconds
            clips = [true_clip(prompt, *window) for prompt in seen[first : first + BATCH]]
            if name == CODEC:
                clips = [through_codecs(codecs, clip) for clip in clips]
            elif name == UNSYNCED:
                others = [true_clip(prompt, *window) for prompt in heard[first : first + BATCH]]
                clips = [
                    replace(clip, audio=other.audio)
                    for clip, other in zip(clips, others, strict=True)
                ]
            yield piece, clips


def scores(judged: Sequence[Judged], found: Features, reference: Reference) -> Table:
    """The numbers of a set of clips; None where there is nothing to measure.

    A hit without a partner is at least as far off as partners are looked for, and counts as that
    far; so the offset is always a number, and the same as that of `summary` wherever that one is.
    """
    numbers = summary(judged)
    hits = [one.hits for one in judged if one.hits is not None]
    offset = numbers["hits"]["median |offset| ms"]
    video, audio = distances(found, reference)
    return {
        "attributes": numbers["attributes"],
        "offset ms": (FARTHEST_MS if offset is None else min(offset, FARTHEST_MS))
        if hits
        else None,
        "paired": float(np.mean([_paired(one) for one in hits])) if hits else None,
        "mouth": numbers["mouth"]["correlation"],
        "video distance": video,
        "audio distance": audio,
        "by attribute": numbers["by attribute"],
    }


def _paired(hits: HitSync) -> bool:
    """Whether more than half of a clip's hits are both seen and heard; if not, none is in time."""
    return bool(np.isfinite(hits.median_offset))
