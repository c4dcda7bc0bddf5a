"""A trained transformer and its codecs in one file: `python launch.py lab.training.ship`.

    python launch.py lab.training.ship --run runs/joint \
        --out models/mutual_forcing_small.safetensors --codecs video.safetensors audio.safetensors

`--average-with` takes the mean of two runs, one trained from the other: of Mutual Forcing and of
the multi-step weights before it, which lie in one basin (docs/model_card.md has what it brought).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from torch import Tensor

from ...model_loaders.bundle import StreamDefaults, save_bundle, shipped_model_path
from ...networks.config import TransformerConfig
from .. import command
from .data import TRANSCRIPT
from .latents import load_codec
from .system import System
from .train import starting_weights


def averaged(run: Path, other: Path | None) -> dict[str, Tensor]:
    """Weights of a run, or their mean with those of another run or model file.

    Raises:
        ValueError: the two are not of one network.
    """
    weights = starting_weights(run)
    if other is None:
        return weights
    others = starting_weights(other)
    shapes = [{name: value.shape for name, value in part.items()} for part in (weights, others)]
    if shapes[0] != shapes[1]:
        unlike = sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ValueError(
            f"{run} and {other} hold different networks, first at {unlike[0]}; expected one made "
            "from the other"
        )
    return {name: (value + others[name]) / 2 for name, value in weights.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.ship", __doc__)
    p.add_argument("--run", type=Path, required=True, help="folder of lab.training.train")
    p.add_argument("--average-with", type=Path, help="run folder or model file")
    p.add_argument("--codecs", type=Path, nargs=2, metavar=("VIDEO", "AUDIO"), required=True)
    p.add_argument(
        "--window", type=int, default=3, help="blocks of history, as long as it was trained on"
    )
    p.add_argument("--default-mode", choices=("few", "multi"), default="multi")
    p.add_argument(
        "--title", default="Mutual Forcing small: cartoons that speak, bounce, ring and drum"
    )
    p.add_argument("--out", type=Path, default=shipped_model_path())
    return p


def work(args: argparse.Namespace) -> None:
    """Write the model file."""
    config = json.loads((args.run / "config.json").read_text())["transformer"]
    system = System(TransformerConfig.from_dict(config))
    system.load_state_dict(averaged(args.run, args.average_with))
    video_codec, audio_codec = (
        load_codec(path, kind)
        for path, kind in zip(args.codecs, ("video_codec", "audio_codec"), strict=True)
    )
    stream = StreamDefaults(window=args.window, height=2, width=2, default_mode=args.default_mode)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = (system.transformer, system.text_encoder, video_codec, audio_codec)
    told = TRANSCRIPT if system.transformer.config.transcript_channels else None
    save_bundle(args.out, *parts, stream, transcript=told, title=args.title)


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
