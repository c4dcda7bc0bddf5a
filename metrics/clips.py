"""The clips that are measured: held-out prompts, what a model makes of them, and the true ones.

b batch, f frames, h rows, w columns, n samples.
Held-out scenes are drawn from generators seeded (20261121, i), which training never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model_loaders.bundle import Bundle
from ..samplers.decode import DecodedBlock
from ..samplers.rollout import SamplerSettings, Step, rollout
from ..samplers.state import BlockLatents
from ..training.world.render import render
from ..training.world.scene import KINDS, Scene, caption, parse, sample_scene

HELD_OUT = 20_261_121


@dataclass(frozen=True)
class HeldOut:
    """A held-out scene and how it is put in words.

    Attributes:
        scene: what a true clip of it would show.
        text: the caption.
        named: the attributes that the caption names.
    """

    scene: Scene
    text: str
    named: dict[str, str]


@dataclass(frozen=True)
class Clip:
    """Video (f, h, w, 3) uint8 and audio (n) float32 of a prompt."""

    prompt: HeldOut
    seed: int
    video: NDArray[np.uint8]
    audio: NDArray[np.float32]


def held_out(count: int, kinds: Sequence[str] = KINDS, free: bool = False) -> list[HeldOut]:
    """`count` prompts, the kinds in turn; captions name every attribute unless `free` (reworded,
    some attributes left out).
    """
    prompts = []
    for i in range(count):
        rng = np.random.default_rng([HELD_OUT, i])
        scene = sample_scene(rng, kinds[i % len(kinds)])
        text = caption(scene, rng if free else None)
        prompts.append(HeldOut(scene, text, parse(text)))
    return prompts


def true_clip(prompt: HeldOut, seconds: int) -> Clip:
    """The clip as the world renders it."""
    made = render(prompt.scene, seconds)
    return Clip(prompt, 0, made.video, made.audio)


@torch.no_grad()
def through_codecs(bundle: Bundle, clip: Clip) -> Clip:
    """A clip encoded and decoded again: what the codecs alone leave of it."""
    device = bundle.device
    pixels = torch.from_numpy(clip.video).to(device).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = BlockLatents(
        bundle.video_codec.encode(pixels),
        bundle.audio_codec.encode(torch.from_numpy(clip.audio).to(device)[None]),
    )
    decoded, _ = bundle.decoder().decode(latents)
    return Clip(clip.prompt, clip.seed, *as_arrays(decoded))


def as_arrays(decoded: DecodedBlock) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Video (f, h, w, 3) uint8 and audio (n) of the first entry of the batch."""
    video = (decoded.video[0] * 255).round().to(torch.uint8).numpy()
    return video, decoded.audio[0, 0].numpy()


def generate(
    bundle: Bundle,
    prompts: Sequence[HeldOut],
    seeds: Sequence[int],
    blocks: int,
    sampler: SamplerSettings,
    window: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Clip]:
    """Generate one batch: clip i of prompt i from seed i, the prefix being one of the blocks.

    Noise is named by each clip's own seed, so what comes out does not depend on the batch.
    """
    with torch.no_grad():
        words = bundle.text_encoder.encode([prompt.text for prompt in prompts])
        nothing = bundle.text_encoder.encode([""]) if sampler.guidance != 1 else None
        text = bundle.prompt_of(words, nothing)
    state = bundle.begin(tuple(seeds), window)
    model, model_id = bundle.transformer, bundle.model_id
    made = [
        latents
        for latents, _ in rollout(
            model, text, state, blocks, sampler, model_id=model_id, on_step=on_step
        )
    ]
    video = torch.cat([block.video for block in made], dim=2)
    audio = torch.cat([block.audio for block in made], dim=1)
    return [
        Clip(prompt, seed, *_decoded(bundle, video[i : i + 1], audio[i : i + 1]))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _decoded(
    bundle: Bundle, video: Tensor, audio: Tensor
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    decoded, _ = bundle.decoder().decode(BlockLatents(video, audio))
    return as_arrays(decoded)
