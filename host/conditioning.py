"""ComfyUI's CONDITIONING wire: a list of pairs, a tensor (b, m, c) and a dict of extras.

b batch, m text tokens, c channels. Imports nothing of ComfyUI.
"""

from __future__ import annotations

from torch import Tensor

Conditioning = list[list[object]]
REFUSAL = "mutual_forcing_refusal"
"""Extra with the sentence for a prompt that can't be followed: empty, or without a known word.

It travels along because the same prompt may well serve as the negative one.
"""
TRANSCRIPT = "mutual_forcing_transcript"
"""Extra with what a prompt says aloud, for a model that can be told (`Transcript`)."""

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
