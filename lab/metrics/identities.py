"""What must be equal, as numbers for a real model: `python launch.py lab.metrics.identities`.

b batch, c channels, f h w video latent grid, s audio latents.
Prints, one per line, the largest difference relative to the largest value: the whole sequence under
masks against the rolling cache block by block; the influence of a changed last block on everything
before it; five seconds in one go against two and three; and decoding block by block against
decoding the whole.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...networks.full_sequence import Told, causal_forward, history_forward
from ...networks.kv_cache import OpenBlock, RollingCache
from ...samplers.rollout import SigmaConstants, rollout, sampler_settings
from .. import command

log = logging.getLogger("mutualforcing")

SIGMA, BLOCKS = 0.6, 6
PROMPT = "a red ball bounces fast on a blue background with a high sound"


def difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def _latents(bundle: Bundle, seed: int) -> tuple[Tensor, Tensor]:
    config, generator = bundle.transformer.config, torch.Generator().manual_seed(seed)
    video = (
        1,
        config.in_channels,
        config.layout.video_latents(BLOCKS),
        bundle.stream.height,
        bundle.stream.width,
    )
    audio = (1, config.layout.audio_latents(BLOCKS), config.audio_in_channels)
    return torch.randn(video, generator=generator), torch.randn(audio, generator=generator)


def masked_against_cached(bundle: Bundle) -> float:
    """Velocity of every noisy block: one pass under masks, and block by block over the cache."""
    model, config = bundle.transformer, bundle.transformer.config
    clean, noisy = _latents(bundle, 0), _latents(bundle, 1)
    text = bundle.prompt(PROMPT).text
    levels = torch.full((1, 1, BLOCKS), SIGMA)
    whole = history_forward(
        model, clean, (noisy[0][:, None], noisy[1][:, None]), levels, Told(text)
    )
    constants = SigmaConstants(model, bundle.like)
    cache, worst = RollingCache(window=BLOCKS), 0.0
    for block in range(BLOCKS):
        (v0, v1), (a0, a1) = config.layout.video_span(block), config.layout.audio_span(block)
        opened = OpenBlock(model, cache, bundle.stream.height, bundle.stream.width, clean[0])
        video, audio = opened.velocity(
            noisy[0][:, :, v0:v1], noisy[1][:, a0:a1], text, constants.at(SIGMA)
        )
        worst = max(worst, difference(video, whole[0][:, 0, :, v0:v1]))
        worst = max(worst, difference(audio, whole[1][:, 0, a0:a1]))
        cache = opened.commit(clean[0][:, :, v0:v1], clean[1][:, a0:a1], text, constants.at(0.0))
    return worst


def influence_of_the_last_block(bundle: Bundle) -> float:
    """Largest change before the last block when the last block is another one; exactly 0."""
    model, layout = bundle.transformer, bundle.transformer.config.layout
    video, audio = _latents(bundle, 0)
    text = bundle.prompt(PROMPT).text
    sigmas = torch.full((1, video.shape[2]), SIGMA), torch.full((1, audio.shape[1]), SIGMA)
    before = causal_forward(model, video, audio, *sigmas, text)
    video_end, audio_end = layout.video_latents(BLOCKS - 1), layout.audio_latents(BLOCKS - 1)
    video[:, :, video_end:] += 10
    audio[:, audio_end:] -= 10
    after = causal_forward(model, video, audio, *sigmas, text)
    return max(
        difference(after[0][:, :, :video_end], before[0][:, :, :video_end]),
        difference(after[1][:, :audio_end], before[1][:, :audio_end]),
    )


def chunks_against_whole(bundle: Bundle) -> tuple[float, float]:
    """Five blocks against two and three, and streamed against whole decoding."""
    prompt, sampler = bundle.prompt(PROMPT), sampler_settings("few", 4)

    def run(state: object, blocks: int) -> Iterator[tuple[object, object]]:
        return rollout(bundle, prompt, state, blocks, sampler)

    *_, (_, whole) = run(bundle.begin(), 5)
    *_, (_, part) = run(bundle.begin(), 2)
    *_, (_, parts) = run(part, 3)
    rolled = max(
        max(difference(a.video, b.video), difference(a.audio, b.audio))
        for a, b in zip(parts.latents, whole.latents, strict=True)
    )
    video, _ = bundle.video_codec.decode(torch.cat([block.video for block in whole.latents], dim=2))
    audio, _ = bundle.audio_codec.decode(torch.cat([block.audio for block in whole.latents], dim=1))
    decoder, memory, pictures, sounds = bundle.decoder(), None, [], []
    for block in whole.latents:
        decoded, memory = decoder.decode(block, memory)
        pictures.append(decoded.video)
        sounds.append(decoded.audio[:, 0])
    streamed = torch.cat(pictures, dim=1)
    expected = ((video + 1) / 2).clamp(0, 1).movedim(1, -1)
    sound = torch.cat(sounds, dim=1)
    return rolled, max((streamed - expected).abs().max().item(), (sound - audio).abs().max().item())


def work(args: argparse.Namespace) -> int:
    """Print the four numbers; 1 if one is out of bounds."""
    bundle = load_bundle(args.model)
    rolled, decoded = chunks_against_whole(bundle)
    rows = (
        ("masked_whole_against_cached_blocks", masked_against_cached(bundle), 1e-5),
        ("influence_of_a_later_block", influence_of_the_last_block(bundle), 0.0),
        ("two_and_three_blocks_against_five", rolled, 0.0),
        ("streamed_against_whole_decoding", decoded, 1e-4),
    )
    for name, value, limit in rows:
        log.info("%s %.3e (limit %g)", name, value, limit)
    return int(any(not value <= limit for _, value, limit in rows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.identities", __doc__)
    p.add_argument("--model", type=Path, default=shipped_model_path())
    return p


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
