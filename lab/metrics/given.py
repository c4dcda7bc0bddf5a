"""Does what is made go with what is given? Sound given to pictures, and pictures to sound.

    python launch.py lab.metrics.given --seed 0 --prompts 32 --out docs/measured/given

writes OUT.json and OUT.md. The true sound of held-out scenes is given and the pictures are made, in
few-step and in multi-step mode; then the other way round; beside what is made of nothing but the
prompt, and what the codecs leave of the true clips. What is given is never noisy: sigma 0 in every
step (`samplers/start.py`). Offsets of seen against heard hits and mouth against loudness are
measured as everywhere (`sync.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ... import shell
from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.decode import joined
from ...samplers.live import live_clip
from ...samplers.rollout import SamplerSettings, Step, sampler_settings
from ...samplers.start import Given
from .. import command
from ..report import publish, said, table
from .clips import HeldOut, PromptedClip, as_arrays, held_out, through_codecs, true_clip
from .score import Table, judge, summary

NOTHING, SOUND, PICTURES = "nothing", "sound", "pictures"
BATCH = 16
_SHOWN = {
    "median offset, ms": ("hits", "median |offset| ms"),
    "seen, not heard": ("hits", "seen but not heard"),
    "heard, not seen": ("hits", "heard but not seen"),
    "mouth": ("mouth", "correlation"),
    "attributes": ("attributes",),
    "kind": ("kind",),
}
_WORST = "worst kind of scene, ms"


def given_of(bundle: Bundle, clips: Sequence[PromptedClip], what: str) -> Given | None:
    """One modality of these clips, encoded."""
    layout, device = bundle.clock.layout, bundle.device
    if what == SOUND:
        waves = torch.stack([torch.from_numpy(clip.audio) for clip in clips]).to(device)
        return Given(layout, 0, audio=bundle.audio_codec.encode(waves))
    if what == PICTURES:
        pixels = torch.stack([torch.from_numpy(clip.video) for clip in clips]).to(device)
        video = bundle.video_codec.encode(pixels.movedim(-1, 1).float() / 127.5 - 1)
        return Given(layout, 0, video=video)
    return None


def made(
    bundle: Bundle,
    prompts: Sequence[HeldOut],
    seed: int,
    seconds: int,
    sampler: SamplerSettings,
    what: str,
) -> list[PromptedClip]:
    """A clip of every prompt, with one modality of its true clip given, or none."""
    clips: list[PromptedClip] = []
    blocks = bundle.clock.blocks_for(seconds)
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    with shell.progress(total=len(batches) * blocks * sampler.steps, unit="step") as bar:

        def on_step(_: Step) -> None:
            bar.update()

        for part in batches:
            given = given_of(bundle, [true_clip(one, seconds) for one in part], what)
            seeds = tuple(1000 * seed + len(clips) + i for i in range(len(part)))
            prompt = bundle.prompts([one.text for one in part], sampler.guidance != 1)
            made = live_clip(
                bundle,
                prompt,
                bundle.begin(seeds),
                blocks,
                sampler,
                bundle.decoder(),
                on_step=on_step,
                given=given,
            )
            whole = joined(decoded for decoded, _ in made)
            clips += [
                PromptedClip(one, number, *as_arrays(whole, i))
                for i, (one, number) in enumerate(zip(part, seeds, strict=True))
            ]
    return clips


def measured(bundle: Bundle, clips: Sequence[PromptedClip]) -> Table:
    """A row's numbers, those of every kind of scene by itself under "kinds"."""
    judged = [judge(clip, bundle.clock) for clip in clips]
    kinds = sorted({one.clip.prompt.scene.kind for one in judged})
    by_kind = {k: summary([j for j in judged if j.clip.prompt.scene.kind == k]) for k in kinds}
    kept = ("clips", "attributes", "kind", "hits", "mouth")
    return summary(judged) | {"kinds": {k: {x: v[x] for x in kept} for k, v in by_kind.items()}}


def shown(row: Table) -> list[str]:
    """A row's numbers, and the kind whose hits are furthest off."""
    cells = []
    for path in _SHOWN.values():
        value: object = row
        for key in path:
            value = value[key]
        cells.append(said(value, 3))
    key = _SHOWN["median offset, ms"][1]
    found = {kind: one["hits"][key] for kind, one in row["kinds"].items()}
    off = {kind: value for kind, value in found.items() if value is not None}
    worst = max(off, key=off.get, default=None)
    return [*cells, "-" if worst is None else f"{worst} {said(off[worst], 3)}"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.metrics.given", __doc__)
    p.add_argument("--model", type=shell.Input(), default=shipped_model_path())
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--prompts", type=int, default=32)
    p.add_argument("--seconds", type=int, default=5)
    p.add_argument("--steps", type=int, default=50, help="of multi-step mode; few-step mode has 4")
    p.add_argument("--device", default="cpu")
    command.add_result_options(p)
    return p


def work(args: argparse.Namespace) -> int:
    """Make, measure, print and write. Returns the exit status."""
    bundle = load_bundle(args.model, device=args.device)
    prompts = held_out(args.prompts)
    floor = [through_codecs(bundle, true_clip(one, args.seconds)) for one in prompts]
    rows = {"true clips through the codecs": measured(bundle, floor)}
    for sampler in (sampler_settings("few"), sampler_settings("multi", args.steps)):
        for what in (NOTHING, SOUND, PICTURES):
            clips = made(bundle, prompts, args.seed, args.seconds, sampler, what)
            name = f"{sampler.mode} {sampler.steps}, {what} given"
            rows[name] = measured(bundle, clips)
    results = {
        "model": {"file": args.model.name, "id": bundle.model_id},
        "settings": {
            "seed": args.seed,
            "prompts": args.prompts,
            "seconds": args.seconds,
            "steps": args.steps,
        },
        "rows": rows,
    }
    cells = [[name, *shown(row)] for name, row in rows.items()]
    publish(args.out, results, table(["", *_SHOWN, _WORST], cells))
    # What is given must not go worse together than what is made together.
    few = {what: rows[f"few 4, {what} given"]["mouth"]["correlation"] for what in (NOTHING, SOUND)}
    return int(args.check and not (few[SOUND] or 0) >= (few[NOTHING] or 0))


@torch.no_grad()
def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
