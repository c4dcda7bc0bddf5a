"""Sound for given pictures: what `networks/picture_track.py` learns, and nothing else.

b batch, c channels, f h w video latent grid, s audio latents, t track channels.
The track learns to read (`sound_read`), then it and the adapters learn the sound's flow
(`sound_of_pictures`). In such a pass the sound before says when everything after it is heard, so
beside true histories there would be nothing to learn of the pictures. But a stream begins with a
sound that it made for one picture alone, and what it makes drifts; so most histories here have a
sound that does not go with the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...networks.full_sequence import Told
from ...samplers.steps import euler
from .data import Batch
from .draws import Draws
from .flow_matching import flow_target, sample_sigma
from .pair import Pair, block_count, block_error, noised, velocity
from .system import Parts, without_some

NEAR = 10
"""Latents by which a history's sound is early or late where it is so by little, 0.4 s."""
HISTORIES = ("near", "anywhere", "another", "begun")
"""Kinds of histories besides the true ones: the clip's own sound shifted by little or by any time,
that of another clip, and one that begins as a stream does."""
CHANGED = 0.5
"""Mean square of a sound latent's change from which something begins or ends."""


def seen_in(system: Parts, video: Tensor) -> Tensor:
    """The picture track (b, s, t) of the clean pictures (b, c, f, h, w) of a clip, by blocks."""
    model, layout, frames = system.transformer, system.transformer.config.layout, video.shape[2]
    found, begin, block = [], 0, 0
    while begin < frames:
        begin, end = layout.video_span(block)
        first, last = layout.audio_span(block)
        before, after = int(begin > 0), int(end < frames)
        shown = video[:, :, begin - before : end + after]
        found.append(model.picture_track(shown, last - first, before, after))
        begin, block = end, block + 1
    return torch.cat(found, dim=1)


def sound_read(system: Parts, batch: Batch) -> Tensor:
    """Cross-entropy of what the track's first channel says of where the sound changes: a start for
    the track that needs no pass of the network."""
    change = F.pad(batch.audio.diff(dim=1).square().mean(dim=2), (1, 0))
    found = seen_in(system, batch.video)[:, :, 0]
    return F.binary_cross_entropy_with_logits(4 * found - 2, (change > CHANGED).float())


def sound_of_pictures(
    system: Parts,
    batch: Batch,
    draws: Draws,
    *,
    sigma_mean: float,
    sigma_spread: float,
    caption_dropout: float,
    histories: Mapping[str, float],
) -> Tensor:
    """Loss of multi-step mode's sound beside given pictures.

    No transcript is told: it would say when things are heard.

    Args:
        histories: shares of the `HISTORIES`, 1 or less together; the rest are true.
    """
    layout = system.transformer.config.layout
    clean = Pair(batch.video, batch.audio)
    told = system.told(without_some(system, batch.asked, caption_dropout, draws, 1.0))
    told = told._replace(seen=seen_in(system, clean.video))
    past = _past_sound(system, clean, told, histories, draws)
    audio = sample_sigma(block_count(clean, layout), sigma_mean, sigma_spread, draws)
    sigma, noise = Pair(torch.zeros_like(audio), audio), clean.noise(draws)
    x = noised(clean, noise, sigma, layout)
    out = velocity(system.transformer, clean._replace(audio=past), x, sigma, told)
    return block_error(out, flow_target(clean, noise), layout).audio


def _past_sound(
    system: Parts, clean: Pair, told: Told, histories: Mapping[str, float], draws: Draws
) -> Tensor:
    """The sound (b, s, c) of the histories of a batch."""
    audio, first = clean.audio, system.transformer.config.layout.audio_first
    length = audio.shape[1]
    kind = draws.uniform()
    little, any_time = draws.integers(2 * NEAR + 1) - NEAR, draws.integers(length)
    ends = list(accumulate(histories.get(name, 0.0) for name in HISTORIES))
    late = torch.where(kind < ends[0], little, any_time)
    places = (torch.arange(length, device=audio.device) - late[:, None]) % length
    shifted = audio.take_along_dim(places[:, :, None], dim=1)
    begun = torch.cat((_first_sound(system, clean, told, draws), audio[:, first:]), dim=1)
    sounds = shifted, shifted, audio.roll(1, 0), begun
    past = audio
    for end, sound in zip(reversed(ends), reversed(sounds), strict=True):
        past = torch.where((kind < end)[:, None, None], sound, past)
    return past


@torch.no_grad()
def _first_sound(system: Parts, clean: Pair, told: Told, draws: Draws) -> Tensor:
    """The prefix's sound as a stream makes it for its given picture, (b, s, c), in four steps."""
    layout = system.transformer.config.layout
    x = Pair(clean.video[:, :, : layout.video_first], clean.audio[:, : layout.audio_first])
    sound = draws.normal(*x.audio.shape[1:])
    told = told._replace(
        track=None if told.track is None else told.track[:, : layout.audio_first],
        seen=told.seen[:, : layout.audio_first],
    )
    for level, lower in pairwise(torch.linspace(1, 0, 5).tolist()):
        sigma = sound.new_full((len(sound), 1), level)
        made = Pair(x.video, sound)
        v = velocity(system.transformer, made, made, Pair(0 * sigma, sigma), told)
        sound = euler(sound, v.audio, level, lower)
    return sound
