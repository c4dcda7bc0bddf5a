"""Clips to latents on disk, once, so that training never waits for a renderer or a codec.

k clips, v caption variants, m tokens, c channels, f h w video latent grid, s audio latents.
A set is a folder of arrays (video.npy (k, c, f, h, w) and audio.npy (k, s, c), float16, normalised;
captions.npy (k, v, m) token ids; and what `lab.training.data.CLIP_FACTS` names) plus about.json,
written as it is made: a killed run goes on where it was.

    python launch.py lab.training.latents --clips 6000 --seconds 4 --out runs/latents \
        --codecs video.safetensors audio.safetensors
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.lib.format import open_memmap
from safetensors import safe_open
from torch import Tensor

from ...networks.audio_codec import AudioCodec, AudioCodecConfig
from ...networks.text_encoder import TextEncoder, TextEncoderConfig
from ...networks.transcript import REST, UNKNOWN
from ...networks.video_codec import VideoCodec, VideoCodecConfig
from ...samplers.atomic_file import write_whole
from .. import command
from ..world.sound import SAMPLE_RATE
from ..world.vocabulary import SYLLABLES, VOCABULARY
from .captioned_clip import CaptionedClip, Spoken
from .data import CLIP_FACTS
from .sources import clips_from

logger = logging.getLogger("mutualforcing")
EVENTS = 6
"""Syllables a second that there is room for."""


def load_codec(path: Path, kind: str) -> VideoCodec | AudioCodec:
    """ "video_codec" or "audio_codec", from the file its training wrote or from a model file.

    Raises:
        ValueError: another kind of file.
    """
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}")).get(kind)
        if config is None:
            raise ValueError(
                f"{path}: found no config of a {kind}, expected a model file or what "
                f"lab.training.{kind} writes"
            )
        weights = {key: file.get_tensor(key) for key in file.keys()}
    if kind == "video_codec":
        codec = VideoCodec(VideoCodecConfig.from_dict(config))
    else:
        codec = AudioCodec(AudioCodecConfig.from_dict(config))
    prefix = f"{kind}."
    if any(key.startswith(prefix) for key in weights):
        weights = {
            key.removeprefix(prefix): value.float()
            for key, value in weights.items()
            if key.startswith(prefix)
        }
    codec.load_state_dict(weights)
    return codec.eval()


def to_pixels(video: np.ndarray) -> Tensor:
    """uint8 (f, h, w, 3) to (1, 3, f, h, w) in [-1, 1]."""
    return rearrange(torch.from_numpy(video).float() / 127.5 - 1, "f h w c -> 1 c f h w")


@torch.inference_mode()
def encode_set(
    clips: Iterator[CaptionedClip],
    count: int,
    video_codec: VideoCodec,
    audio_codec: AudioCodec,
    tokenizer: TextEncoder,
    out: Path,
    about: dict[str, object],
) -> None:
    """Encode `count` clips into the folder `out`; goes on with a set that was begun alike.

    Raises:
        ValueError: the folder holds a set made with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    record, done = out / "about.json", 0
    if record.exists():
        found = json.loads(record.read_text())
        done = found.pop("done")
        if found != about:
            raise ValueError(
                f"{out} holds a set made with {found}, expected {about}; choose another folder"
            )
    arrays: list[np.ndarray] = []

    def tokens(texts: tuple[str, ...]) -> np.ndarray:
        return np.array([tokenizer.tokenize(text) for text in texts], dtype=np.int16)

    for index, clip in enumerate(islice(clips, done, count), start=done):
        seconds = len(clip.audio) // SAMPLE_RATE
        row = (
            video_codec.encode(to_pixels(clip.video))[0].half().numpy(),
            audio_codec.encode(torch.from_numpy(clip.audio)[None])[0].half().numpy(),
            tokens(clip.captions),
            # A clip of one prompt is one whose prompt changes to what it was.
            tokens(clip.later or clip.captions),
            np.stack([_events(said, seconds) for said in (clip.spoken, clip.later_spoken)]),
            np.array(clip.switch, dtype=np.int16),
        )
        if not arrays:
            mode = "r+" if done else "w+"
            arrays = [
                open_memmap(out / f"{name}.npy", mode, **({} if done else _like(part, count)))
                for name, part in zip(("video", "audio", *CLIP_FACTS), row, strict=True)
            ]
        for array, part in zip(arrays, row, strict=True):
            array[index] = part
        if (index + 1) % 200 == 0 or index + 1 == count:
            for array in arrays:
                array.flush()
            write_whole(record, json.dumps(about | {"done": index + 1}))
            logger.info("encoded %d of %d clips", index + 1, count)


def _events(said: Spoken, seconds: int) -> np.ndarray:
    """(n, 2) float32: onset and number of each syllable; the rest is never and unknown."""
    events = np.full((EVENTS * (1 + seconds), 2), (np.inf, UNKNOWN), dtype=np.float32)
    for row, (onset, syllable) in zip(events, said, strict=False):
        row[:] = onset, SYLLABLES.index(syllable) if syllable in SYLLABLES else REST
    return events


def _like(part: np.ndarray, count: int) -> dict[str, object]:
    return {"dtype": part.dtype, "shape": (count, *part.shape)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.latents", __doc__)
    p.add_argument("--clips", type=int, default=6000)
    p.add_argument("--seconds", type=int, default=4, help="whole seconds after the prefix")
    p.add_argument(
        "--source",
        default="world",
        help="world, transcripts, switches, a folder of videos, or webdataset shards",
    )
    p.add_argument("--captions", type=int, default=4, help="caption variants per clip")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--codecs", type=Path, nargs=2, metavar=("VIDEO", "AUDIO"), required=True)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Encode the clips."""
    about = {"source": args.source, "clips": args.clips, "seconds": args.seconds, "seed": args.seed}
    clips = clips_from(args.source, args.seconds, args.seed, args.captions)
    tokenizer = TextEncoder(TextEncoderConfig(VOCABULARY))
    video_codec, audio_codec = (
        load_codec(path, kind)
        for path, kind in zip(args.codecs, ("video_codec", "audio_codec"), strict=True)
    )
    encode_set(clips, args.clips, video_codec, audio_codec, tokenizer, args.out, about)


def main() -> int:
    """Command line."""
    return command.run(parser(), work, timed=True)


if __name__ == "__main__":
    sys.exit(main())
