"""The clips that are measured: held-out prompts, what a model makes of them, and the true ones.

b batch, f frames, h rows, w columns, n samples.
Held-out scenes are drawn from generators seeded (20261121, i) or (20261121, i, draw), which
training never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ...model_loaders.bundle import Bundle
from ...samplers.clock import Clock
from ...samplers.decode import DecodedBlock, joined
from ...samplers.live import live_clip
from ...samplers.rollout import SamplerSettings, Step
from ...samplers.schedule import USUAL, Line, Transition
from ...samplers.state import BlockLatents
from ..world.render import render
from ..world.scene import KINDS, Scene, caption, parse, sample_scene, words

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
class PromptedClip:
    """Video (f, h, w, 3) uint8 and audio (n) float32 of a prompt."""

    prompt: HeldOut
    seed: int
    video: NDArray[np.uint8]
    audio: NDArray[np.float32]


def held_out(
    count: int,
    kinds: Sequence[str] = KINDS,
    free: bool = False,
    combinations: Sequence[Sequence[str]] = (),
) -> list[HeldOut]:
    """`count` prompts, the kinds in turn; captions name every attribute unless `free` (reworded,
    some attributes left out).

    Args:
        combinations: only captions with all words of one of these, if there are any.

    Raises:
        ValueError: no caption has them.
    """
    prompts: list[HeldOut] = []
    for i in range(count if not combinations else 1000 * count):
        if len(prompts) == count:
            break
        rng = np.random.default_rng([HELD_OUT, i])
        scene = sample_scene(rng, kinds[i % len(kinds)])
        text = caption(scene, rng if free else None)
        said = set(words(text))
        if not combinations or any(said.issuperset(one) for one in combinations):
            prompts.append(HeldOut(scene, text, parse(text)))
    if len(prompts) < count:
        raise ValueError(
            f"found {len(prompts)} captions with one of {list(map(' '.join, combinations))}, "
            f"expected {count}; name words that go together"
        )
    return prompts


def redrawn(prompts: Sequence[HeldOut], draw: int) -> list[HeldOut]:
    """The same captions, and of everything that they leave open another draw.

    True clips of these are to the prompts what a perfect model's clips are.
    """
    others = []
    for i, prompt in enumerate(prompts):
        known = {key: value for key, value in prompt.named.items() if key != "kind"}
        rng = np.random.default_rng([HELD_OUT, i, draw])
        scene = sample_scene(rng, prompt.scene.kind, known)
        # "girl" or "boy" is said as well, though it is no attribute.
        others.append(replace(prompt, scene=replace(scene, long_hair=prompt.scene.long_hair)))
    return others


def true_clip(prompt: HeldOut, seconds: int, start: int = 0) -> PromptedClip:
    """The clip as the world renders it, from second `start` of the scene on."""
    made = render(prompt.scene, seconds, start)
    return PromptedClip(prompt, 0, made.video, made.audio)


@torch.no_grad()
def through_codecs(bundle: Bundle, clip: PromptedClip) -> PromptedClip:
    """A clip encoded and decoded again: what the codecs alone leave of it."""
    device = bundle.device
    pixels = torch.from_numpy(clip.video).to(device).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = BlockLatents(
        bundle.video_codec.encode(pixels),
        bundle.audio_codec.encode(torch.from_numpy(clip.audio).to(device)[None]),
    )
    decoded, _ = bundle.decoder().decode(latents)
    return PromptedClip(clip.prompt, clip.seed, *as_arrays(decoded))


def as_arrays(
    decoded: DecodedBlock, index: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Video (f, h, w, 3) uint8 and audio (n) of one entry of the batch."""
    video = (decoded.video[index] * 255).round().to(torch.uint8).numpy()
    return video, decoded.audio[index, 0].numpy()


def decoded_blocks(
    bundle: Bundle,
    prompts: Sequence[HeldOut],
    seeds: Sequence[int],
    blocks: int,
    sampler: SamplerSettings,
    window: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[DecodedBlock]:
    """A batch of streams, clip i of prompt i from seed i, block by block as they are made.

    Noise is named by each clip's own seed, so what comes out does not depend on the batch.

    Args:
        blocks: how many, the prefix being one of them.
    """
    turns = [([prompt.text for prompt in prompts], blocks)]
    return decoded_turns(bundle, turns, seeds, sampler, window, on_step)


@torch.no_grad()
def decoded_turns(
    bundle: Bundle,
    turns: Sequence[tuple[Sequence[str], int]],
    seeds: Sequence[int],
    sampler: SamplerSettings,
    window: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    past: Transition = USUAL,
) -> Iterator[DecodedBlock]:
    """A batch of streams whose prompts change: (texts, one per clip; blocks under them) in turn."""
    lines, begun = [], 0
    for texts, blocks in turns:
        lines.append(Line(bundle.clock.time_of(begun), tuple(texts), past))
        begun += blocks
    schedule = bundle.schedule(lines, sampler.guidance != 1)
    state, decoder = bundle.begin(tuple(seeds), window), bundle.decoder()
    made = live_clip(bundle, schedule, state, begun, sampler, decoder, on_step=on_step)
    for decoded, _ in made:
        yield decoded


def generate(
    bundle: Bundle,
    prompts: Sequence[HeldOut],
    seeds: Sequence[int],
    blocks: int,
    sampler: SamplerSettings,
    window: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[PromptedClip]:
    """One batch of whole clips; arguments as for `decoded_blocks`."""
    made = joined(decoded_blocks(bundle, prompts, seeds, blocks, sampler, window, on_step))
    return _clips(made, prompts, seeds)


def generate_pieces(
    bundle: Bundle,
    prompts: Sequence[HeldOut],
    seeds: Sequence[int],
    seconds: int,
    pieces: int,
    sampler: SamplerSettings,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[list[PromptedClip]]:
    """One batch of streams in pieces of `seconds`, each given as soon as it is made.

    Only one piece is held, however long the stream.
    """
    blocks = bundle.clock.blocks_for(seconds * pieces)
    made = decoded_blocks(bundle, prompts, seeds, blocks, sampler, None, on_step)
    for piece in in_pieces(made, bundle.clock, seconds):
        yield _clips(piece, prompts, seeds)


def in_pieces(made: Iterable[DecodedBlock], clock: Clock, seconds: int) -> Iterator[DecodedBlock]:
    """Cut a stream into the clips of `seconds` that begin at 0, `seconds`, twice `seconds`, ...

    As a clip from the start of a stream has a first frame before its first second, so has each
    piece: the last frame, and the last audio frame, of one are the first of the next. What does not
    fill a piece is left out.
    """
    frames, samples = int(seconds * clock.fps), seconds * clock.sample_rate
    held: list[DecodedBlock] = []
    for block in made:
        held.append(block)
        if sum(part.video.shape[1] for part in held) <= frames:
            continue
        whole = joined(held)
        last = samples + clock.samples_per_audio_frame
        yield DecodedBlock(whole.video[:, : frames + 1], whole.audio[..., :last])
        # A copy: a slice would keep the whole piece in memory.
        rest = whole.video[:, frames:].clone(), whole.audio[..., samples:].clone()
        held = [DecodedBlock(*rest)]


def _clips(
    made: DecodedBlock, prompts: Sequence[HeldOut], seeds: Sequence[int]
) -> list[PromptedClip]:
    return [
        PromptedClip(prompt, seed, *as_arrays(made, i))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
