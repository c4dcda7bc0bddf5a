"""Does a voice say the syllables that it is told? Read from its sound alone.

    python launch.py lab.metrics.syllables --seed 0 --prompts 24

A clip is decoded freely: of all beginnings and rates near its own, those at which every syllable's
length of sound is nearest to one of thirty templates, which are the world's own syllables at the
clip's pitch, through the codec. What was decoded is compared with what was told, turned to where
the loop fits best. Beside it: a ridge regression that reads latents at the told times, without a
template. `codec`: true clips through the codec; `wrong`: the model's clips against another prompt.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ...model_loaders.bundle import Bundle
from ...samplers.rollout import SamplerSettings
from .. import command
from ..world.scene import caption, parse, sample_scene, sample_transcript
from ..world.sound import synthesise
from ..world.timing import spoken
from ..world.vocabulary import SYLLABLES
from .clips import HELD_OUT, HeldOut, PromptedClip, decoded_turns, joined, through_codecs, true_clip
from .clips import _clips as as_clips
from .samples import pitch

log = logging.getLogger("mutualforcing")

RATE = 16_000
HOP = 0.01
BANDS = 26
RATES = np.linspace(0.96, 1.04, 9)
PROBE_CLIPS = 120
SECONDS = 4

Heard = list[tuple[float, str]]
"""Seconds of the middle of a syllable, and which it is."""


def log_bands(audio: NDArray[np.floating]) -> NDArray[np.float64]:
    """Loudness of bands as wide as the ear's at each hop: (t, BANDS), in nepers."""
    window, hop = round(0.032 * RATE), round(HOP * RATE)
    padded = np.pad(audio.astype(np.float64), (window // 2, window // 2 + hop))
    pieces = sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces, axis=1)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(window, 1 / RATE) / 700)
    middles = np.linspace(mel[2], mel[-1], BANDS + 2)[1:-1]
    width = middles[1] - middles[0]
    filters = np.clip(1 - np.abs(mel[:, None] - middles) / width, 0, None)
    return 0.5 * np.log(power @ filters + 1e-4)


@torch.no_grad()
def through_codec(bundle: Bundle, audio: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sound after the audio codec."""
    codec = bundle.audio_codec
    latents = codec.encode(torch.from_numpy(audio.astype(np.float32))[None].to(bundle.device))
    return codec.decode(latents)[0].flatten().double().cpu().numpy()


def templates(bundle: Bundle, f0: float, rate: float) -> NDArray[np.float64]:
    """(syllables, t, BANDS) of every syllable at a pitch and a rate, between two others."""
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(SYLLABLES)) for _ in range(2)])
    scene = replace(
        sample_scene(rng, "speech"),
        f0=f0,
        rate=rate,
        offset=0.0,
        transcript=tuple(SYLLABLES[i] for i in order),
    )
    samples = int(np.ceil(len(order) / rate * 25)) * 640 + 160
    bands = log_bands(through_codec(bundle, synthesise(scene, 0, samples)[0]))
    length = round(1 / rate / HOP)
    cut = np.zeros((len(SYLLABLES), length, BANDS))
    for place, index in enumerate(order):
        start = round(place / rate / HOP)
        piece = bands[start : start + length]
        cut[index, : len(piece)] += piece / 2
    return cut


def decode(audio: NDArray[np.floating], cut: NDArray[np.float64], rate: float) -> Heard:
    """The syllables of a clip, freely, by templates at about this rate."""
    bands = log_bands(audio)
    length = cut.shape[1]
    flat = rearranged(sliding_window_view(bands, length, axis=0))
    far = (
        (flat**2).sum(1)[:, None]
        - 2 * flat @ cut.reshape(len(cut), -1).T
        + (cut**2).sum((1, 2))[None]
    )
    nearest, least = far.argmin(1), far.min(1)
    best, found = np.inf, np.zeros(0, dtype=int)
    for factor in RATES:
        step = 1 / (rate * factor) / HOP
        for begin in np.arange(0, step):
            starts = np.arange(begin, len(least) - 1, step).round().astype(int)
            cost = least[starts].mean()
            if cost < best:
                best, found = cost, starts
    return [(HOP * (start + length / 2), SYLLABLES[nearest[start]]) for start in found]


def rearranged(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(t, BANDS, length) to (t, length * BANDS)."""
    return windows.transpose(0, 2, 1).reshape(len(windows), -1)


def right(heard: Heard, told: Sequence[tuple[float, str]], loop: int) -> NDArray[np.float64]:
    """Shares of syllables, consonants and vowels that are right, at the loop's best turn.

    Args:
        told: onsets and syllables, in order.
        loop: how many there are before they begin again.
    """
    onsets = np.array([onset for onset, _ in told])
    best = np.zeros(3)
    for turn in range(loop):
        answers = []
        for middle, syllable in heard:
            place = int(np.searchsorted(onsets, middle, side="right")) - 1 + turn
            if 0 <= place < len(told):
                wanted = told[place][1]
                answers.append(
                    (syllable == wanted, syllable[0] == wanted[0], syllable[1] == wanted[1])
                )
        best = max(best, np.mean(answers, axis=0), key=lambda shares: shares[0])
    return best


class Probe:
    """Ridge regression from the latents about a syllable's beginning to which it is."""

    def __init__(self, bundle: Bundle, seed: int) -> None:
        self.bundle = bundle
        rows, names = [], []
        for index in range(PROBE_CLIPS):
            scene = sample_transcript(np.random.default_rng([HELD_OUT, seed, index, 1]))
            audio = synthesise(scene, 0, 160 + SECONDS * RATE)[0]
            told = spoken(scene, 0, SECONDS - 0.3)[1:-1]
            rows.append(self._read(audio, told, scene.rate))
            names += [syllable for _, syllable in told]
        known = [i for i, name in enumerate(names) if name in SYLLABLES]
        x = np.concatenate(rows)[known]
        y = np.eye(len(SYLLABLES))[[SYLLABLES.index(names[i]) for i in known]]
        self.mean = x.mean(0)
        x = x - self.mean
        self.weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ y)

    @torch.no_grad()
    def _read(
        self, audio: NDArray[np.floating], told: Sequence[tuple[float, str]], rate: float
    ) -> NDArray[np.float64]:
        """(n, features): latents at eight places of each told syllable."""
        wave = torch.from_numpy(audio.astype(np.float32))[None].to(self.bundle.device)
        latents = self.bundle.audio_codec.encode(wave)[0].double().cpu().numpy()
        places = np.linspace(0, 0.9, 8) / rate
        rows = []
        for onset, _ in told:
            at = np.clip((onset + places - 0.01) / 0.04 + 0.5, 0, len(latents) - 1.001)
            low, part = at.astype(int), (at % 1)[:, None]
            rows.append((latents[low] * (1 - part) + latents[low + 1] * part).ravel())
        return np.array(rows)

    def right(
        self, audio: NDArray[np.floating], told: Sequence[tuple[float, str]], rate: float
    ) -> NDArray[np.float64]:
        """Shares of syllables, consonants and vowels read right at their times."""
        scores = (self._read(audio, told, rate) - self.mean) @ self.weights
        read = [SYLLABLES[i] for i in scores.argmax(1)]
        pairs = list(zip(read, (syllable for _, syllable in told), strict=True))
        return np.mean([(a == b, a[0] == b[0], a[1] == b[1]) for a, b in pairs], axis=0)


def speech_prompts(seed: int, count: int) -> list[HeldOut]:
    """Speech scenes that training never draws, begun with their first syllable."""
    made = []
    for index in range(count):
        rng = np.random.default_rng([HELD_OUT, seed, index])
        scene = replace(sample_scene(rng, "speech"), offset=0.0)
        text = caption(scene)
        made.append(HeldOut(scene, text, parse(text)))
    return made


def told_by(bundle: Bundle, prompt: HeldOut, seconds: float) -> list[tuple[float, str]]:
    """When the model is told to say what; at the world's middle rate where it is told nothing."""
    transcript = bundle.transcript_of(prompt.text)
    rate = prompt.scene.rate if transcript is None else transcript.rate
    return spoken(replace(prompt.scene, rate=rate), 0, seconds)


def measured(
    bundle: Bundle,
    clips: Sequence[PromptedClip],
    told: Sequence[list[tuple[float, str]]],
    probe: Probe,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Shares right of each clip (n, 3): freely, against the next clip's prompt, by the probe."""
    free, wrong, probed = [], [], []
    for index, clip in enumerate(clips):
        own, other = told[index], told[(index + 1) % len(told)]
        rate = 1 / (own[1][0] - own[0][0])
        f0 = pitch(clip.audio, RATE)
        f0 = clip.prompt.scene.f0 if not np.isfinite(f0) else f0
        heard = decode(clip.audio, templates(bundle, f0, rate), rate)
        free.append(right(heard, own, len(clip.prompt.scene.syllables)))
        loop = len(clips[(index + 1) % len(clips)].prompt.scene.syllables)
        wrong.append(right(heard, other, loop))
        inside = [event for event in own if 0 <= event[0] < len(clip.audio) / RATE - 1 / rate]
        probed.append(probe.right(clip.audio, inside, rate))
    return np.array(free), np.array(wrong), np.array(probed)


def generated(
    bundle: Bundle,
    turns: Sequence[Sequence[HeldOut]],
    seconds: int,
    sampler: SamplerSettings,
    window: int | None,
) -> list[PromptedClip]:
    """Clips of prompts that change every `seconds` seconds, named by the last of them."""
    first = bundle.clock.blocks_for(seconds)
    asked = [
        ([prompt.text for prompt in prompts], first if turn == 0 else first - 1)
        for turn, prompts in enumerate(turns)
    ]
    seeds = range(len(turns[-1]))
    return as_clips(joined(decoded_turns(bundle, asked, seeds, sampler, window)), turns[-1], seeds)


def after_change(clip: PromptedClip, seconds: int) -> PromptedClip:
    """What follows a change of the text at `seconds`, from a second later on."""
    return replace(clip, video=clip.video[:0], audio=clip.audio[RATE * (seconds + 1) :])


def line(name: str, shares: NDArray[np.float64]) -> str:
    """One row of numbers, with the standard error of the first."""
    syllable, consonant, vowel = shares.mean(0)
    error = shares[:, 0].std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return f"{name:22} {syllable:.3f} +- {error:.3f}  {consonant:.3f}  {vowel:.3f}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.syllables", __doc__)
    command.add_model_options(p)
    p.add_argument("--seed", type=int, default=0, help="of the prompts")
    p.add_argument("--prompts", type=int, default=24)
    p.add_argument("--seconds", type=int, default=SECONDS)
    p.add_argument(
        "--change",
        action="store_true",
        help="another text after SECONDS; measured is what follows a second later",
    )
    return p


def work(args: argparse.Namespace) -> None:
    """Generate, decode and print."""
    bundle, sampler = command.open_model(args)
    prompts = speech_prompts(args.seed, args.prompts)
    turns = [prompts]
    if args.change:
        turns = [changed(prompts, args.seed), prompts]
    clips = generated(bundle, turns, args.seconds, sampler, args.window)
    told = [told_by(bundle, prompt, args.seconds) for prompt in prompts]
    if args.change:
        clips = [after_change(clip, args.seconds) for clip in clips]
        told = [
            told_after(bundle, *pair, args.seconds) for pair in zip(turns[0], prompts, strict=True)
        ]
    probe = Probe(bundle, args.seed)
    true = [through_codecs(bundle, true_clip(prompt, args.seconds)) for prompt in prompts]
    events = [spoken(prompt.scene, 0, args.seconds) for prompt in prompts]
    free, wrong, probed = measured(bundle, clips, told, probe)
    codec, _, codec_probed = measured(bundle, true, events, probe)
    log.info("%-22s syllable          consonant vowel", f"{args.prompts} prompts, {sampler.mode}")
    for name, shares in (
        ("told, freely decoded", free),
        ("codec, freely decoded", codec),
        ("told, probe", probed),
        ("codec, probe", codec_probed),
        ("wrong, freely decoded", wrong),
    ):
        log.info("%s", line(name, shares))
    numbers = [" ".join(f"{share:.3f}" for share in shares.mean(0)) for shares in (codec, wrong)]
    syllable, consonant, vowel = free.mean(0)
    log.info(
        "syllable %.3f consonant %.3f vowel %.3f codec %s wrong %s",
        *(syllable, consonant, vowel, *numbers),
    )


def changed(prompts: Sequence[HeldOut], seed: int) -> list[HeldOut]:
    """The same people saying something else, as long before the text changes."""
    others = []
    for index, prompt in enumerate(prompts):
        rng = np.random.default_rng([HELD_OUT, seed, index, 2])
        named = {"syllables": sample_scene(rng, "speech").attributes["syllables"]}
        scene = replace(prompt.scene, attributes={**prompt.scene.attributes, **named})
        text = caption(scene)
        others.append(HeldOut(scene, text, parse(text)))
    return others


def told_after(
    bundle: Bundle, before: HeldOut, after: HeldOut, seconds: int
) -> list[tuple[float, str]]:
    """When the new text is due, in the time of the clip that `after_change` cuts."""
    transcript = bundle.transcript_of(after.text)
    rate = after.scene.rate if transcript is None else transcript.rate
    # The syllable that sounds at the change is spoken to its end.
    first = next(
        onset
        for onset, _ in spoken(replace(before.scene, rate=rate), 0, 2 * seconds)
        if onset >= seconds + 0.01
    )
    scene = replace(after.scene, rate=rate, offset=first)
    return [
        (onset - seconds - 1, syllable)
        for onset, syllable in spoken(scene, seconds + 1, 2 * seconds)
    ]


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
