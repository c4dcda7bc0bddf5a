"""What the tests of training share: a small network, random clips, and a run over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from mutual_forcing.lab.training import train
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.draws import Draws
from mutual_forcing.lab.training.system import System, initialise

SETTINGS = {
    "transformer": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "in_channels": 6,
        "out_channels": 6, "audio_in_channels": 5, "audio_out_channels": 5,
        "cross_attention_dim": 24, "audio_cross_attention_dim": 16,
        "caption_channels": 16, "rope_type": "split", "num_audio_sink_tokens": 2,
        "step_size_embedding": True,
    },
    "recipe": {
        "lengths": [
            {"blocks": 1, "batch": 4, "share": 0.5}, {"blocks": 3, "batch": 2, "share": 0.5},
        ],
        "learning_rate": 0.01, "warmup_steps": 2, "caption_dropout": 0.1, "history_noise": 0.1,
        "sigma_mean": 0.3, "sigma_spread": 1.2, "ema": 0.9,
    },
    "mutual": {"matching_every": 2, "fake_updates": 1, "fake_warmup": 0,
               "fake_learning_rate": 0.01, "window": 2, "steps": [2], "teacher_steps": 2,
               "history": {"highest": 0.9}},
    "stream": {"window": 2, "height": 1, "width": 2},
}  # fmt: skip
CONFIG = train.TransformerConfig.from_dict(SETTINGS["transformer"])
LAYOUT = CONFIG.layout


def system() -> System:
    with torch.random.fork_rng(devices=[]):
        made = System(train.TransformerConfig.from_dict(SETTINGS["transformer"]))
        initialise(made, 0)
    return made


def awake(made: System) -> System:
    """Fresh weights give zero velocity and closed gates; move all of them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made


def batch(clips: int = 3, blocks: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(clips, 6, LAYOUT.video_latents(blocks), 1, 2, generator=generator),
        torch.randn(clips, LAYOUT.audio_latents(blocks), 5, generator=generator),
        torch.randint(1, 9, (clips, 32), generator=generator),
    )


def draws(step: int = 0, clips: int = 3) -> Draws:
    return Draws(0, step, range(clips))


def write_latents(folder: Path, data: Batch) -> None:
    """A finished set of encoded clips with one caption each."""
    folder.mkdir()
    for name, values in (("video", data.video), ("audio", data.audio)):
        np.save(folder / f"{name}.npy", values.half().numpy())
    ids = data.ids.half() if data.ids.is_floating_point() else data.ids.short()
    np.save(folder / "captions.npy", ids[:, None].numpy())
    (folder / "about.json").write_text(json.dumps({"clips": len(data.ids), "done": len(data.ids)}))


def run(folder: Path, out: str, *options: str, stage: str = "joint") -> train.Run:
    fixed = ["--stage", stage, "--config", f"{folder.parent}/config.json", "--latents", str(folder)]
    budget = [] if "--steps" in options else ["--minutes", "1e9"]
    out = ["--out", f"{folder.parent}/{out}", "--log-every", "3"]
    return train.Run(train.parser().parse_args([*fixed, *out, *budget, *options]))


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
