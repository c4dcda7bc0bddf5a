"""How well pictures and sound fit a caption, by CLIP and CLAP weights that somebody has.

b batch, n samples, c channels.
The two of JavisBench's numbers (arXiv 2503.23377) whose networks a kept library holds: transformers
(docs/folder.md tells of the others). Nothing is downloaded, and only safetensors are read.

CLIP (arXiv 2103.00020): the mean cosine of the caption's embedding with those of 48 frames, evenly
apart; the benchmark's weights are ViT-B/32. CLAP (arXiv 2211.06687): the mean cosine of the
caption's with those of the sound at 48 kHz, in pieces of 10 s, which are what it takes at once; the
benchmark's weights are laion/clap-htsat-unfused, of which it takes one random piece.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray
from torch import nn

from ...measures.film import opened
from .javisbench import cosine

FRAMES = 48
PIECE, SHORTEST = 10, 0.1  # seconds


class TextScores:
    """Two models that have been loaded; either may be missing.

    Args:
        clip, clap: folders as transformers' `save_pretrained` writes them.

    Raises:
        ImportError: no transformers.
        ValueError: a folder is not such a one, or lacks weights.
    """

    def __init__(self, clip: Path | None, clap: Path | None) -> None:
        try:
            from transformers import AutoProcessor, ClapModel, CLIPModel
        except ImportError as error:
            raise ImportError(
                "CLIP and CLAP need the library transformers; pip install transformers"
            ) from error
        self._models: dict[str, tuple[nn.Module, Callable[..., dict]]] = {}
        for name, kind, folder in (("CLIP", CLIPModel, clip), ("CLAP", ClapModel, clap)):
            if folder is not None:
                self._models[name] = _loaded(name, kind, AutoProcessor, folder)

    @torch.inference_mode()
    def of(self, film: Path, frames: int, text: str) -> dict[str, float | None]:
        """Scores of a film of that many frames; None for one that it has no sound for."""
        scores: dict[str, float | None] = {}
        if "CLIP" in self._models:
            scores["CLIP"] = self._clip(film, frames, text)
        if "CLAP" in self._models:
            scores["CLAP"] = self._clap(film, text)
        return scores

    def _clip(self, film: Path, frames: int, text: str) -> float:
        model, processor = self._models["CLIP"]
        pictures = _pictures(film, frames)
        settings = {"return_tensors": "pt", "truncation": True, "padding": True}
        made = model(**processor(text=[text], images=pictures, **settings))
        return cosine(made.image_embeds, made.text_embeds)

    def _clap(self, film: Path, text: str) -> float | None:
        model, processor = self._models["CLAP"]
        rate = processor.feature_extractor.sampling_rate
        wave = _wave(film, rate)
        pieces = [wave[i : i + PIECE * rate] for i in range(0, len(wave), PIECE * rate)]
        pieces = [piece for piece in pieces if len(piece) > SHORTEST * rate]
        if not pieces:
            return None
        settings = {"return_tensors": "pt", "padding": True, "sampling_rate": rate}
        made = model(**processor(text=[text], audio=pieces, **settings))
        return cosine(made.audio_embeds, made.text_embeds)


def _loaded(
    name: str, kind: type, processors: type, folder: Path
) -> tuple[nn.Module, Callable[..., dict]]:
    """A model and what prepares its inputs.

    Raises:
        ValueError: the folder does not hold it whole: transformers itself fills up with noise.
    """
    if not folder.is_dir():  # a name would be looked for elsewhere
        raise ValueError(f"no such folder: {folder}; name one with {name}'s files")
    local = {"local_files_only": True}
    try:
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
        processor = processors.from_pretrained(folder, **local)
    except Exception as error:  # it raises whatever its parts raise
        raise ValueError(
            f"{folder} holds no {name} as transformers reads it ({_first(error)}), expected "
            "config.json, model.safetensors and the processor's files"
        ) from error
    lacking = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if lacking:
        raise ValueError(
            f"{folder} lacks {len(lacking)} of {name}'s weights, {lacking[0]} first; copy its "
            "files again"
        )
    return model.eval(), processor


def _pictures(film: Path, frames: int) -> list[NDArray[np.uint8]]:
    """At most FRAMES of them (h, w, 3), evenly apart."""
    wanted = set(np.linspace(0, frames - 1, min(FRAMES, frames)).round().astype(int).tolist())
    with opened(film) as container:
        return [
            frame.to_ndarray(format="rgb24")
            for index, frame in enumerate(container.decode(video=0))
            if index in wanted
        ]


def _wave(film: Path, rate: int) -> NDArray[np.float32]:
    """The sound (n) of one channel; empty without any."""
    with opened(film) as container:
        stream = next((s for s in container.streams.audio if s.codec_context), None)
        if stream is None:
            return np.zeros(0, np.float32)
        resampler = AudioResampler("flt", "mono", rate)
        frames = [one for frame in container.decode(stream) for one in resampler.resample(frame)]
        frames += resampler.resample(None)
    parts = [frame.to_ndarray()[0] for frame in frames]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:150]
