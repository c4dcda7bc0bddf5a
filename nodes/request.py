"""What both sampling nodes ask for, and how it is read: prompt, stream, mode and variation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

from comfy_api.latest import io

from ..model_loaders.compat import HostModel, Progress
from ..model_loaders.conditioning import Conditioning, prompt_of
from ..model_loaders.memory import stream_bytes
from ..samplers.noise import varied_seed
from ..samplers.rollout import (
    FEW_STEPS,
    GUIDANCE,
    MULTI_STEPS,
    Prompt,
    SamplerSettings,
    rollout,
    sampler_settings,
)
from ..samplers.state import BlockLatents, StreamState, check_state
from .types import ModelWire, SettingsWire, StateWire, StreamPlan

logger = logging.getLogger("mutualforcing")

AUTOMATIC, FEW, MANY = "automatic", "few steps", "many steps"
_MODES = {FEW: "few", MANY: "multi"}


class Request(NamedTuple):
    """Everything that a rollout needs."""

    prompt: Prompt
    state: StreamState
    sampler: SamplerSettings
    blocks: int


def wires() -> list[io.Input]:
    """Inputs with a wire: model and prompts, then what stream to begin or to go on from."""
    return [
        ModelWire.Input("model", tooltip="From Load Mutual Forcing Model."),
        io.Conditioning.Input(
            "positive",
            tooltip="What to see and hear, from CLIP Text Encode. It may change from chunk to chunk.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What to keep away from. Only used with guidance, and rarely needed.",
        ),
        SettingsWire.Input(
            "settings",
            optional=True,
            tooltip="Size, memory and seed of a new stream, from Stream Settings. Without it the "
            "model's own size is used, and seed 0.",
        ),
        StateWire.Input(
            "state",
            optional=True,
            tooltip="Goes on where an earlier chunk ended. Leave empty to begin a new stream.",
        ),
    ]


def widgets() -> list[io.Input]:
    """Inputs that are set on the node, after its length."""
    steps = "How often each second of the clip is refined. More is slower."
    return [
        io.DynamicCombo.Input(
            "mode",
            options=[
                io.DynamicCombo.Option(AUTOMATIC, []),
                io.DynamicCombo.Option(
                    FEW, [io.Int.Input("steps", default=FEW_STEPS, min=1, max=40, tooltip=steps)]
                ),
                io.DynamicCombo.Option(
                    MANY,
                    [
                        io.Int.Input("steps", default=MULTI_STEPS, min=1, max=200, tooltip=steps),
                        io.Float.Input(
                            "guidance",
                            default=GUIDANCE,
                            min=1.0,
                            max=20.0,
                            step=0.1,
                            tooltip="How closely to follow the prompt. 1 is off and takes half the "
                            "time; above about 6 colours and sound get harsh.",
                        ),
                    ],
                ),
            ],
            tooltip="automatic: what suits the model best. few steps: fast. many steps: slow and careful.",
        ),
        io.Int.Input(
            "variation",
            default=0,
            min=0,
            max=0xFFFFFFFF,
            tooltip="0 follows the stream's seed. Any other number gives another take from the same past.",
        ),
    ]


def read(
    model: HostModel,
    positive: Conditioning,
    negative: Conditioning | None,
    plan: StreamPlan | None,
    state: StreamState | None,
    seconds: int,
    mode: dict[str, object],
    variation: int,
) -> Request:
    """Check everything that can be known before sampling, bring the model to its device, encode the prompt.

    Raises:
        ValueError: in an artist's words, with the next step.
    """
    if plan is not None and state is not None:
        raise ValueError(
            "both 'settings' and 'state' are connected, but a stream keeps the size, memory and seed "
            "that it began with: disconnect 'settings', and use 'variation' for another take"
        )
    bundle = model.bundle
    if state is None:
        state = bundle.begin() if plan is None else plan.begin(bundle)
    check_state(state, bundle.model_id, bundle.transformer.config.layout)
    if variation:
        state = state.reseeded(tuple(varied_seed(seed, variation) for seed in state.settings.seeds))
    sampler = _sampler(model, mode)
    settings = state.settings
    model.make_ready(
        stream_bytes(
            bundle.transformer.config,
            settings.window,
            settings.height,
            settings.width,
            batch=len(settings.seeds),
            element_size=model.like.element_size(),
        )
    )
    prompt = prompt_of(
        bundle,
        positive,
        negative,
        guided=sampler.guidance != 1.0,
        like=model.like,
    )
    return Request(prompt, state, sampler, bundle.clock.blocks_for(seconds, state.next_block))


def _sampler(model: HostModel, mode: dict[str, object]) -> SamplerSettings:
    best = model.bundle.stream.default_mode
    asked = _MODES.get(mode["mode"], best)
    if asked != best:
        logger.warning("this model is at its best in mode '%s'", FEW if best == "few" else MANY)
    return sampler_settings(asked, mode.get("steps"), mode.get("guidance"))


def sample(
    model: HostModel, asked: Request, progress: Progress
) -> Iterator[tuple[BlockLatents, StreamState]]:
    """The blocks that were asked for, each with the state after it; progress and interruption included."""
    return rollout(
        model.bundle.transformer,
        asked.prompt,
        asked.state,
        asked.blocks,
        asked.sampler,
        model_id=model.bundle.model_id,
        on_step=progress.step,
        on_rebuild=progress.rebuild,
        like=model.like,
    )
