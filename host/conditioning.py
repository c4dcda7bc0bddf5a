"""ComfyUI's CONDITIONING wire: a list of pairs, a tensor (b, m, c) and a dict of extras.

b batch, m text tokens, c channels. Imports nothing of ComfyUI.
A schedule of prompts is one wire with several entries, each with its time in its extras.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache

from torch import Tensor

from ..samplers.schedule import LONGEST, USUAL, WIRED, Line, Transition

Conditioning = list[list[object]]
REFUSAL = "mutual_forcing_refusal"
"""Extra with the sentence for a prompt that can't be followed: empty, or without a known word.

It travels along because the same prompt may well serve as the negative one.
"""
TRANSCRIPT = "mutual_forcing_transcript"
"""Extra with what a prompt says aloud, for a model that can be told (`Transcript`)."""
TEXT = "mutual_forcing_text"
"""Extra with a prompt as written, and which embedding that is (another node may change it)."""
START, TRANSITION = "mutual_forcing_start", "mutual_forcing_transition"
"""Extras of a prompt in a schedule: its second of the stream, and what happens to the past."""
UNPROCESSED = "unprocessed_ltxav_embeds"
"""Core's mark of a prompt that has not been through LTX-2's connectors."""
Encode = Callable[[str], Conditioning]

REMARKS = "mutual_forcing_remarks"
"""Extra with what of a prompt is not used, sentences for whoever wrote it."""


def remarks_on(conditioning: Conditioning) -> list[str]:
    """What is said about the prompts of a wire."""
    return [text for _, extras in conditioning for text in extras.get(REMARKS, ())]


def only_entry(conditioning: Conditioning, name: str) -> tuple[Tensor, dict[str, object]]:
    """Embedding and extras of a wire that carries one prompt.

    Raises:
        ValueError: it carries none or several.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"the {name} wire carries {len(conditioning)} prompts, expected one: connect one CLIP "
            "Text Encode and write everything there"
        )
    embedding, extras = conditioning[0]
    return embedding, extras


def frame_rate_of(conditioning: Conditioning) -> float | None:
    """The frame rate that ComfyUI's LTXVConditioning wrote onto a wire, if it was used."""
    return next(
        (extras["frame_rate"] for _, extras in conditioning if "frame_rate" in extras), None
    )


def written_on(text: str, embedding: Tensor) -> dict[str, object]:
    """Extras that keep a prompt's text with its embedding."""
    return {TEXT: (text, _digest(embedding))} if len(text) <= LONGEST else {}


def encoder_of(clip: object) -> Encode:
    """What a CLIP makes of a text, as CLIP Text Encode does it; the last ones are kept.

    It encodes with what its patcher holds: behind Select CLIP Device (ComfyUI 0.33) that lies on
    the chosen card, and what CLIP Text Encode calls does not.
    """
    held = clip.patcher.model
    if held is not clip.cond_stage_model:
        clip = clip.clone()
        clip.cond_stage_model = held

    @lru_cache(maxsize=16)
    def encode(text: str) -> Conditioning:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    return encode


def at_time(conditioning: Conditioning, start: float, how: Transition = USUAL) -> Conditioning:
    """The same prompts as entries of a schedule; those that have a time keep it."""
    return [[x, {START: start, TRANSITION: how} | extras] for x, extras in conditioning]


def encoded(lines: Iterable[tuple[str, Line]], encode: Encode) -> Conditioning:
    """The entries of a schedule.

    Args:
        lines: each with its name in messages.

    Raises:
        ValueError: naming the first line that the encoder's model can't follow.
    """
    entries = []
    for name, line in lines:
        try:
            embedding, extras = only_entry(encode(line.texts[0]), "prompt")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if extras.get(REFUSAL):
            raise ValueError(f"{name}: {extras[REFUSAL]}")
        extras = extras | written_on(line.texts[0], embedding)
        entries += at_time([[embedding, extras]], line.start, line.transition)
    return entries


def lines_of(conditioning: Conditioning) -> list[Line]:
    """The lines of a wire's entries, in their order; of one without a time, from 0 on.

    Raises:
        ValueError: it carries no prompt, or several without times.
    """
    timeless = [entry for entry in conditioning if START not in entry[1]]
    if not conditioning or (timeless and len(conditioning) > 1):
        raise ValueError(
            f"the prompt wire carries {len(conditioning)} prompts, {len(timeless)} of them without "
            "a time: write one into one CLIP Text Encode, or several into Prompt Schedule"
        )
    return [
        Line(extras.get(START, 0.0), (_text_of(x, extras),), extras.get(TRANSITION, USUAL))
        for x, extras in conditioning
    ]


def _text_of(embedding: Tensor, extras: dict[str, object]) -> str:
    text, of = extras.get(TEXT, ("", ""))
    digest = _digest(embedding)
    return text if of == digest else f"{WIRED}{digest}"


def _digest(embedding: Tensor) -> str:
    numbers = embedding.detach().float().cpu().contiguous().numpy()
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
