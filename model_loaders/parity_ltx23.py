"""The second kind of parity fixture: LTX-2.3 made causal, with TaoMate's memory.

One line per quantity, for video and audio: the network without masks (LTX-2.3 itself, whose
positions it has then), under causal masks, block after block over a cache without and with a given
memory, and two rollouts of ten blocks: without memory under one prompt, and with everything, where
the prompt changes after five (docs/ltx23.md, section 8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..networks.config import TransformerConfig
from ..networks.execution import EAGER, Execution, Workspace
from ..networks.full_sequence import causal_forward
from ..networks.kept_keys import AS_COMPUTED, Kept
from ..networks.kv_cache import OpenBlock, RollingCache
from ..networks.memory_branch import Remembered
from ..networks.transformer import text_keys
from ..samplers.clock import Clock
from ..samplers.model import BareModel
from ..samplers.rollout import SamplerSettings, SigmaConstants, new_stream, rollout
from ..samplers.schedule import Line, Prompt, Schedule
from ..samplers.state import StreamSettings
from .fixture import Golden

LIMITS = {"bidirectional.video": 5e-4, "bidirectional.audio": 5e-4}


def causal_config(golden: Golden) -> TransformerConfig:
    """How the fixture's rollouts go, from what it says of memory and windows."""
    memory, run = golden.metadata["memory"], golden.metadata["run"]
    return replace(
        golden.config,
        memory_interval=memory["layer_interval"],
        memory_video_dim=memory["video_dim"],
        memory_audio_dim=memory["audio_dim"],
        memory_heads=memory["heads"],
        memory_film_hidden=memory["film_hidden"],
        anchored_colours=True,
        absolute_positions=True,
        opening_blocks=run["blocks_per_window"] if run["first_window_keeps_all"] else 0,
    )


@torch.no_grad()
def errors(
    golden: Golden,
    execution: Execution = EAGER,
    device: torch.device | str = "cpu",
    kept: Kept = AS_COMPUTED,
) -> Iterator[tuple[str, float]]:
    """Relative error of every quantity, by name."""
    golden = golden.on(torch.device(device))
    run, config = golden.metadata["run"], causal_config(golden)
    video, audio = golden.latents()
    contexts = golden["input.video_context.0"], golden["input.audio_context.0"]
    kernels = Workspace(execution, golden.device).kernels

    level = torch.full((1, 1), run["sigma"], device=golden.device)
    base = golden.model(replace(golden.config, **run["bidirectional"]))
    text = text_keys(base, *contexts)
    out = causal_forward(base, video, audio, level, level, text, causal=False, kernels=kernels)
    yield from golden.compare("bidirectional", *out, "velocity")
    model = golden.model(config)
    text = text_keys(model, *contexts)
    out = causal_forward(model, video, audio, level, level, text, kernels=kernels)
    yield from golden.compare("masked", *out, "velocity")
    memory = Remembered(*(golden[f"input.learned_memory_{k}"] for k in ("video", "audio", "color")))
    constants = SigmaConstants(model, video)
    for name, remembered in (("cached", None), ("cached_memory", memory)):
        workspace = Workspace(execution, golden.device)
        cache = RollingCache(run["recent_blocks"], opening=config.opening_blocks, kept=kept)
        size = golden.height, golden.width
        for block in range(3):
            frames, sounds = config.layout.video_span(block), config.layout.audio_span(block)
            now = video[:, :, slice(*frames)], audio[:, slice(*sounds)]
            opened = OpenBlock(model, cache, *size, video, workspace)
            if block < 2:
                cache = opened.commit(*now, text, constants.at(0.0), memory=remembered)
            else:
                at = constants.at(run["sigma"])
                out = opened.velocity(*now, text, at, memory=remembered)
        yield from golden.compare(name, *out, "velocity")
    for name in ("plain", "full"):
        yield from golden.compare(
            f"rollout.{name}", *rolled(golden, name, execution, kept), "latent"
        )


def rolled(
    golden: Golden,
    name: str,
    execution: Execution = EAGER,
    kept: Kept = AS_COMPUTED,
) -> tuple[Tensor, Tensor]:
    """The latents of one of the fixture's two rollouts: video (b, c, f, h, w), audio (b, s, c)."""
    run, config = golden.metadata["run"], causal_config(golden)
    plain = replace(config, memory_interval=0, anchored_colours=False)
    network = golden.model(config if name == "full" else plain)
    sampler = SamplerSettings("multi", tuple(golden["rollout.sigmas"].tolist()), method="renoise")
    settings = StreamSettings(golden.height, golden.width, run["recent_blocks"], kept=kept)
    bare = BareModel(network, name, torch.empty(0, device=golden.device))
    made = rollout(
        bare,
        _schedule(golden, network, run["prompts"][name]),
        new_stream(bare, settings),
        golden.blocks,
        sampler,
        noise=golden.noise,
        execution=execution,
    )
    blocks = [latents for latents, _ in made]
    video = torch.cat([block.video for block in blocks], dim=2)
    return video, torch.cat([block.audio for block in blocks], dim=1)


def _schedule(golden: Golden, network: nn.Module, prompts: list[int]) -> Schedule:
    """A prompt for each window, by its number."""
    clock, window = Clock.of(network.config), golden.metadata["run"]["blocks_per_window"]
    lines = [
        Line(clock.time_of(place * window), (str(prompt),)) for place, prompt in enumerate(prompts)
    ]

    def encode(texts: tuple[str, ...]) -> Prompt:
        contexts = (golden[f"input.{name}_context.{texts[0]}"] for name in ("video", "audio"))
        return Prompt(text_keys(network, *contexts), texts=texts)

    return Schedule(clock, lines, encode)
