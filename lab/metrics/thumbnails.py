"""Moving pictures for the example workflows: `python launch.py lab.metrics.thumbnails`.

F H W pixel frames and size, n samples.
Reads each workflow's prompt, seed and chunks, runs the same streams with the engine alone, and
writes them as ComfyUI's template browser shows them: the clips side by side, each over the outline
of its sound. It asks for a .jpg whatever that is, so these are animated WebP under that name:
browsers go by what is in a picture.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.contact_sheet import Look, outline, strip
from ...samplers.decode import DecodedBlock, joined
from ...samplers.noise import varied_seed
from ...samplers.rollout import rollout, sampler_settings
from ...samplers.schedule import Line, parse_schedule
from .. import command

logger = logging.getLogger("mutualforcing")

SIDE, WAVE = 192, 40
MOMENTS, MILLISECONDS = 24, 250
PAPER, INK = (24, 26, 30), (120, 190, 230)
_SAMPLING = {"MF_GenerateClip", "MF_SampleChunk"}


class Chunk(NamedTuple):
    """What one sampling node of a workflow makes."""

    lines: Sequence[Line]
    seconds: int
    variation: int


class Take(NamedTuple):
    """One stream of a workflow, from its beginning to a sampling node that none follows."""

    seed: int
    chunks: tuple[Chunk, ...]


def takes(workflow: dict[str, list]) -> list[Take]:
    """The streams that a workflow (as the page saves it) ends in."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    wires = {(link[3], link[4]): link[1] for link in workflow["links"]}

    def source(node: dict, name: str) -> dict | None:
        slot = next(i for i, entry in enumerate(node["inputs"]) if entry["name"] == name)
        found = wires.get((node["id"], slot))
        return None if found is None else nodes[found]

    def take(node: dict) -> Take:
        values = node["widgets_values_named"]
        said = source(node, "positive")["widgets_values_named"]
        lines = parse_schedule(said["lines"]) if "lines" in said else [Line(0, (said["text"],))]
        chunk = Chunk(lines, values["seconds"], values["variation"])
        before = source(node, "state")
        if before is not None:
            begun = take(before)
            return Take(begun.seed, (*begun.chunks, chunk))
        settings = source(node, "settings")
        return Take(settings["widgets_values_named"]["seed"] if settings else 0, (chunk,))

    sampling = [node for node in nodes.values() if node["type"] in _SAMPLING]
    followed = {before["id"] for node in sampling if (before := source(node, "state"))}
    return [take(node) for node in sampling if node["id"] not in followed]


def clip_of(bundle: Bundle, take: Take) -> DecodedBlock:
    """Make a stream as the nodes do, in the model's best mode, and decode the whole."""
    sampler = sampler_settings(bundle.stream.default_mode)
    state = bundle.begin((take.seed,))
    for chunk in take.chunks:
        if chunk.variation:
            state = state.reseeded((varied_seed(state.settings.seeds[0], chunk.variation),))
        *_, (_, state) = rollout(
            bundle,
            bundle.schedule(chunk.lines, guided=sampler.guidance != 1),
            state,
            bundle.clock.blocks_for(chunk.seconds, state.next_block),
            sampler,
        )
    return joined(bundle.decoder().decode_from(state))


def thumbnail(clips: list[DecodedBlock]) -> list[Image.Image]:
    """What moves: clips side by side, with their sounds' outlines and where in them it is."""
    look = Look(1, SIDE, WAVE, loudest=None, paper=PAPER, ink=INK)
    outlines = [outline(clip.audio[0, 0].numpy(), SIDE) for clip in clips]

    def at(share: float) -> Image.Image:
        drawn = []
        for clip, sound in zip(clips, outlines, strict=True):
            picture = clip.video[0][round(share * (clip.video.shape[1] - 1))]
            frame = (picture * 255).round().byte().numpy()
            drawn.append(np.asarray(strip([frame], *sound, look, marks=[share])))
        return Image.fromarray(np.concatenate(drawn, axis=1))

    return [at(share) for share in np.linspace(0, 1, MOMENTS)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    folder = Path(__file__).resolve().parents[2] / "example_workflows"
    p = command.parser("lab.metrics.thumbnails", __doc__)
    p.add_argument("workflows", nargs="*", type=Path, default=sorted(folder.glob("*.json")))
    p.add_argument("--model", type=Path, default=shipped_model_path())
    return p


def work(arguments: argparse.Namespace) -> None:
    """Make the pictures of all workflows, or of those named."""
    bundle = load_bundle(arguments.model)
    for path in arguments.workflows:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if not any(node["type"] == "MF_LoadModel" for node in workflow["nodes"]):
            logger.info("%s is made with another model", path)
            continue
        picture = path.with_suffix(".jpg")
        first, *rest = thumbnail([clip_of(bundle, take) for take in takes(workflow)])
        moving = {"save_all": True, "append_images": rest, "duration": MILLISECONDS, "loop": 0}
        first.save(picture, "WEBP", quality=60, method=6, **moving)
        logger.info("%s", picture)


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
