"""What a run says of itself as it goes: lines of numbers, and sample sheets with sound.

`<out>/log.jsonl` has one JSON object per line: every so many steps the means of what the steps
logged, with seconds per step and peak memory; and at other intervals what the metrics say of a few
fixed held-out prompts, whose clips lie in `<out>/samples/` as a picture and as an mp4 (one clip
after the other).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...model_loaders.bundle import Bundle, StreamDefaults
from ...networks.config import TransformerConfig
from ...samplers.atomic_file import write_whole
from ...samplers.clip_writer import ClipWriter
from ...samplers.clock import Clock
from ...samplers.decode import DecodedBlock
from ...samplers.rollout import Method, Mode, NonFiniteBlockError, sampler_settings
from ..metrics.clips import generate, held_out
from ..metrics.evaluate import strips_of
from ..metrics.longrun import peak_mb
from ..metrics.overview import overview
from ..metrics.score import judge, summary
from .data import TRANSCRIPT
from .latents import load_codec
from .parallel import Processes
from .system import System

logger = logging.getLogger("mutualforcing")

PROMPTS, SECONDS, FEW, MULTI = 4, 4, 4, 16
Line = dict[str, float | int | str | None]


class RunLog:
    """The numbers of a run. What has not been written yet is part of the run's state.

    Args:
        path: log.jsonl; lines of steps after `step` are of a run that was killed, and go.
        every: steps from one line to the next.
    """

    def __init__(self, path: Path, every: int, step: int, processes: Processes) -> None:
        self.path, self.every, self.processes = path, every, processes
        self.sums: dict[str, Tensor] = {}
        self.seconds = 0.0
        if not processes.rank and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_whole(path, "".join(kept))

    def add(self, logged: Mapping[str, Tensor], seconds: float) -> None:
        """Take in what a step logged, and how long it took."""
        self.seconds += seconds
        for name, value in logged.items():
            for key, amount in ((name, value), (f"{name}#", torch.ones_like(value))):
                self.sums[key] = self.sums[key] + amount if key in self.sums else amount.clone()

    def line(self, step: int, total_seconds: float) -> None:
        """Write the means since the last line, where a line is due; all processes must call it."""
        if step % self.every or not self.sums:
            return
        names = sorted(self.sums)
        found = self.processes.sum(torch.stack([self.sums[name].float() for name in names]))
        sums = dict(zip(names, found.tolist(), strict=True))
        means = {name: sums[name] / sums[f"{name}#"] for name in names if not name.endswith("#")}
        self.write(
            {
                "step": step,
                "seconds": round(total_seconds, 2),
                "seconds per step": round(self.seconds / self.every, 4),
                "peak MB": round(self.peak()),
                **means,
            }
        )
        self.sums, self.seconds = {}, 0.0

    def peak(self) -> float:
        """The most memory that this process has had: the GPU's where it computes on one."""
        device = self.processes.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        return peak_mb()

    def write(self, line: Line) -> None:
        """Append a line, from the first process."""
        if self.processes.rank:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        text = " ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in line.items()
        )
        logger.info("%s", text)

    def state_dict(self) -> dict[str, object]:
        """What has not been written yet; all processes must ask for it."""
        names, world = sorted(self.sums), self.processes.world
        if names:
            sums = self.processes.sum(torch.stack([self.sums[name].float() for name in names]))
            self.sums = dict(zip(names, (sums / world).unbind(), strict=True))
        return {"sums": self.sums, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`."""
        device = self.processes.device
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.seconds = state["seconds"]


class SampleSheets:
    """Clips of a few fixed held-out prompts, one of each kind, from the averaged weights.

    Args:
        codecs: files of the video and of the audio codec.
        mode, method: how they are sampled: few-step mode in 4 steps, multi-step mode in 16.
    """

    def __init__(
        self,
        out: Path,
        config: TransformerConfig,
        codecs: tuple[Path, Path],
        stream: StreamDefaults,
        mode: Mode,
        method: Method,
        device: torch.device,
    ) -> None:
        self.out, self.config, self.stream, self.device = out, config, stream, device
        kinds = ("video_codec", "audio_codec")
        self.codecs = [
            load_codec(path, kind).to(device) for path, kind in zip(codecs, kinds, strict=True)
        ]
        self.clock = Clock.of(config)
        self.sampler = sampler_settings(mode, FEW if mode == "few" else MULTI, None, method)

    def write(self, weights: Mapping[str, Tensor], step: int) -> Line:
        """Make the clips and their sheet; returns what the metrics say of them."""
        with torch.random.fork_rng(devices=[]):
            system = System(self.config)
        system.load_state_dict(weights)
        system.to(self.device).eval().requires_grad_(False)
        parts = system.transformer, system.text_encoder, *self.codecs
        told = TRANSCRIPT if self.config.transcript_channels else None
        about = self.clock, self.stream, "in training", self.device, torch.float32
        model = Bundle(*parts, *about, transcript=told)
        prompts = held_out(PROMPTS)
        blocks = self.clock.blocks_for(SECONDS)
        try:
            clips = generate(model, prompts, range(PROMPTS), blocks, self.sampler)
        except NonFiniteBlockError as error:
            return {"step": step, "samples": str(error)}
        judged = [judge(clip, self.clock) for clip in clips]
        path = self.out / f"step_{step:07d}"
        overview(path.with_suffix(".png"), strips_of(judged, float(self.clock.fps)))
        with ClipWriter(path.with_suffix(".mp4"), self.clock, *clips[0].video.shape[1:3]) as writer:
            for clip in clips:
                video = torch.from_numpy(clip.video)[None].float() / 255
                writer.write(DecodedBlock(video, torch.from_numpy(clip.audio)[None, None]))
        found = summary(judged)
        return {
            "step": step,
            "samples": path.name,
            "attributes": found["attributes"],
            "kind": found["kind"],
            "hit offset ms": found["hits"]["median |offset| ms"],
            "mouth correlation": found["mouth"]["correlation"],
        }
