"""JavisBench's numbers from embeddings: whoever can run its networks gives them, and has these.

n frames, k windows, m stretches, c channels.
Source: JavisBench (arXiv 2503.23377) and the README of its evaluation, section 4, at
https://github.com/JavisVerse/JavisDiT/tree/b505b37/eval/javisbench; where text and code there
differ, as its code does. A film's embeddings are a safetensors file:

| key | shape | what |
|---|---|---|
| imagebind.text, .video, .audio | (c) | of the caption and of the whole film (arXiv 2305.05665) |
| imagebind.frames | (n, c) | of every frame |
| imagebind.windows | (k, c) | of the sound of every window (`windows`) |
| synchformer.logits | (m, 21) | offsets of stretches of the film (arXiv 2401.16423) |
| i3d, audioclip | (c) | of the whole film |

"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .frechet import frechet_distance, moments

WINDOW, LEAST = 0.5, 0.4  # seconds; share of a window's frames that count, the least alike
OFFSETS = torch.linspace(-2, 2, 21)  # seconds by which the sound may be late, Synchformer's classes
FAD_SCALE = 10_000  # as the benchmark prints it
SHAPES = {
    "imagebind.text": 1,
    "imagebind.video": 1,
    "imagebind.audio": 1,
    "imagebind.frames": 2,
    "imagebind.windows": 2,
    "synchformer.logits": 2,
    "i3d": 1,
    "audioclip": 1,
}


def cosine(a: Tensor, b: Tensor) -> float:
    """The mean cosine of embeddings (.., c), one of another."""
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def windows(frames: int, fps: float) -> list[range]:
    """Frames of each window of WINDOW seconds; the last one reaches back to be whole."""
    size = max(1, int(WINDOW * fps))
    if frames <= size:
        return [range(frames)]
    starts = (min(start, frames - size) for start in range(0, frames, size))
    return [range(start, start + size) for start in starts]


def javis_score(frames: Tensor, sounds: Tensor, fps: float) -> float:
    """JavisScore (arXiv 2503.23377): in each window the LEAST alike of the cosines of its frames
    (n, c) with its sound (k, c), their mean, and the mean over windows."""
    found = []
    # Frames and sound may end a window apart.
    for window, sound in zip(windows(len(frames), fps), sounds, strict=False):
        alike = F.cosine_similarity(frames[window.start : window.stop], sound, dim=-1)
        least = alike.topk(max(1, int(len(alike) * LEAST)), largest=False).values
        found.append(least.mean())
    return float(torch.stack(found).mean())


def desync(logits: Tensor) -> float:
    """DeSync: seconds that the likeliest offsets (m, 21) are away from none, on average."""
    return float(OFFSETS[logits.argmax(dim=-1)].abs().mean())


def scores(made: Mapping[str, Tensor], fps: float) -> dict[str, float]:
    """What can be said of one film; what lacks its embeddings is left out.

    TV-IB, TA-IB, AV-IB: cosines of ImageBind's. AVHScore (arXiv 2404.14381): the mean cosine of the
    frames with the whole sound.
    """
    text, video, audio, frames, sounds = (
        made.get(f"imagebind.{part}") for part in ("text", "video", "audio", "frames", "windows")
    )
    pairs = {
        "TV-IB": (text, video),
        "TA-IB": (text, audio),
        "AV-IB": (audio, video),
        "AVHScore": (frames, audio),
    }
    found = {
        name: cosine(a, b) for name, (a, b) in pairs.items() if a is not None and b is not None
    }
    if frames is not None and sounds is not None:
        found["JavisScore"] = javis_score(frames, sounds, fps)
    if "synchformer.logits" in made:
        found["DeSync"] = desync(made["synchformer.logits"])
    return found


def distances(
    films: Sequence[Mapping[str, Tensor]], real: Mapping[str, Tensor]
) -> dict[str, float]:
    """FVD (arXiv 1812.01717) of I3D's and FAD (arXiv 1812.08466) of AudioCLIP's embeddings: how far
    the films' are from those of real ones, (n, c) each.

    Raises:
        ValueError: fewer than two films, or embeddings that do not go together.
    """
    found = {}
    for name, key, scale in (("FVD", "i3d", 1), ("FAD", "audioclip", FAD_SCALE)):
        ours = [film[key] for film in films if key in film]
        if ours and key in real:
            sets = (moments(one.double().numpy()) for one in (torch.stack(ours), real[key]))
            found[name] = scale * frechet_distance(*sets)
    return found


def read_embeddings(path: Path, shapes: Mapping[str, int] = SHAPES) -> dict[str, Tensor]:
    """Embeddings of a file, float32.

    Raises:
        ValueError: it is no such file, or holds something else.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of embeddings ({error}); write safetensors") from error
    for name, tensor in found.items():
        good = tensor.ndim == shapes.get(name) and tensor.numel() and tensor.is_floating_point()
        if name == "synchformer.logits":
            good = good and tensor.shape[-1] == len(OFFSETS)
        if not good or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: found {name} {tuple(tensor.shape)}, expected finite numbers under "
                f"{', '.join(f'{key} ({axes} axes)' for key, axes in shapes.items())}"
            )
    return {name: tensor.float() for name, tensor in found.items()}


def averages(films: Sequence[Mapping[str, object]], names: Sequence[str]) -> dict[str, float]:
    """The mean of each score over the films that have it."""
    columns = {name: [film[name] for film in films if film.get(name) is not None] for name in names}
    return {name: float(np.mean(values)) for name, values in columns.items() if values}
