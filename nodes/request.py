"""What both sampling nodes ask for, and how it is read: prompt, stream, mode and variation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import NamedTuple

from comfy_api.latest import io

from ..host import kept_runs
from ..host.conditioning import Conditioning, Encode, encoder_of, frame_rate_of, remarks_on
from ..host.decoding import ClipDecoder, Glimpse, clip_decoder, live_decoder
from ..host.live import LiveRun
from ..host.model_wire import stream_model
from ..host.page import free_memory, is_open
from ..host.stream_model import StreamModel
from ..host.unread import unread
from ..model_loaders.memory import frame_bytes, stream_bytes
from ..networks.checked import quoted
from ..networks.execution import AUTOMATIC, CHOICES, Execution
from ..networks.kept_keys import AS_COMPUTED
from ..samplers.clock import Clock
from ..samplers.noise import varied_seed
from ..samplers.rollout import (
    FEW_STEPS,
    GUIDANCE,
    MULTI_STEPS,
    Mode,
    SamplerSettings,
)
from ..samplers.schedule import Schedule
from ..samplers.start import Given, Start, given_of
from ..samplers.state import StreamState, check_state
from . import limits
from .types import SettingsWire, StateWire, StreamPlan

logger = logging.getLogger("mutualforcing")

FEW, MANY = "few steps", "many steps"
A_MINUTE = 60
"""Blocks that there is room for at first where nobody says how many come."""
_NOT_SEEN = (
    "the clip is seen and heard when it is whole: there is no room for its decoders beside the "
    "network. A tiny one for pictures, taeltx_2 in models/vae_approx, needs little"
)
_MODES = {FEW: "few", MANY: "multi"}


class Request(NamedTuple):
    """Everything that a rollout needs, and what an artist should know of it.

    Attributes:
        decoder: of its clip; None where that is nobody's wish.
        glimpse: what shows it meanwhile, where the decoder can't and a page is there.
    """

    model: StreamModel
    prompt: Schedule
    state: StreamState
    sampler: SamplerSettings
    blocks: int | None
    start: Start | None
    given: Given | None
    execution: Execution
    asked: tuple[object, ...]
    decoder: ClipDecoder | None = None
    glimpse: Glimpse | None = None
    remarks: tuple[str, ...] = ()
    encode: Encode | None = None

    @property
    def steps(self) -> int:
        """Of the whole run; of a block where it has no end."""
        return (self.blocks or 1) * self.sampler.steps

    def tell(self, line: str, run: LiveRun, second: float) -> None:
        """Follow a typed line from the next block on, which begins at `second`, or say why not."""
        try:
            if self.encode is None:
                raise ValueError("connect a clip, which reads typed lines")
            read = self.encode(line)
            self.model.check_prompt(read)
            self.prompt.tell(line)
            run.follow(second, line)
            for remark in remarks_on(read):
                run.say(remark)
        except ValueError as error:
            logger.warning("the line %r is not followed: %s", line, error)
            run.say(f"{quoted(line)} is not followed: {error}")

    def seconds_to(self, state: StreamState) -> float:
        """Seconds of clip that were made from the request's own state to a later one."""
        seconds = self.model.clock.seconds
        return float(seconds(state.next_block) - seconds(self.state.next_block))


def wires() -> list[io.Input]:
    """Inputs with a wire: model and prompts, then what stream to begin or to go on from."""
    return [
        io.Model.Input(
            "model",
            tooltip="From Load Mutual Forcing Model, Load OmniForcing Model, or a LoRA loader "
            "after it.",
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="What to see and hear, from CLIP Text Encode, or several prompts with their "
            "times from Prompt Schedule. It may change from chunk to chunk.",
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
        io.Latent.Input(
            "given",
            optional=True,
            tooltip="A sound that pictures are made for (VAE Encode Audio, or LTXV Audio VAE "
            "Encode), or pictures that a sound is made for (VAE Encode), in whole seconds.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="Reads lines that are typed while the clip is made. Without it the model's own "
            "does; LTX-2 needs the one of its text encoder.",
        ),
    ]


def vaes() -> list[io.Input]:
    """Inputs of the VAEs that decode or encode, where the model's own will not do."""
    return [
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="For pictures, from the model's loader. Without it the model's own.",
        ),
        io.Vae.Input(
            "audio_vae",
            optional=True,
            tooltip="For sound, from the model's loader. Without it the model's own.",
        ),
    ]


def widgets() -> list[io.Input]:
    """Inputs that are set on the node, after its length."""
    steps = "Denoising steps for each second of the clip. More is slower."
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
                            tooltip="Guidance (CFG): how closely to follow the prompt. 1 is off "
                            "and takes half the time; above about 6 colours and sound get harsh.",
                        ),
                    ],
                ),
            ],
            tooltip="automatic: what suits the model best. few steps: fast. many steps: slow and "
            "careful.",
        ),
        io.Int.Input(
            "variation",
            default=0,
            min=0,
            max=0xFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="0 follows the stream's seed. Any other number gives another take from the "
            "same past.",
        ),
        io.Combo.Input(
            "execution",
            options=list(CHOICES),
            default=AUTOMATIC,
            optional=True,
            advanced=True,
            tooltip="How the work is carried out. The clip is the same up to rounding. automatic: "
            "as is fastest on this machine; the node says how. compiled: small operations are "
            "fused; the first seconds take longer. lanes: sound beside the picture, on a graphics "
            "card. graph: work is recorded and replayed, on a card that holds the whole model.",
        ),
        io.Float.Input(
            "few_step_guidance",
            default=GUIDANCE,
            min=1.0,
            max=4.0,
            step=0.1,
            optional=True,
            advanced=True,
            display_name="few-step guidance",
            tooltip="With few steps: how closely to follow the prompt, at no cost. Only for a "
            "model that has learned it as a knob; others do not change.",
        ),
    ]


def schedule_output() -> io.Output:
    """What was played, typed lines included."""
    return io.String.Output(
        "schedule",
        tooltip="What the stream followed from its beginning, typed lines included: for Prompt "
        "Schedule, which makes it again.",
    )


def check_path(execution: str | None) -> bool | str:
    """True, or why there is no such execution path."""
    if execution is not None:  # over a wire it is not known yet
        try:
            Execution.named(execution)
        except ValueError as error:
            return str(error)
    return True


def read(
    node: type[io.ComfyNode],
    wire: object,
    positive: Conditioning,
    negative: Conditioning | None,
    plan: StreamPlan | None,
    state: StreamState | None,
    seconds: int,
    mode: dict[str, object],
    variation: int,
    execution: str,
    few_step_guidance: float,
    vaes: tuple[object, object] | None = None,
    *,
    frames: bool = False,
    given: dict[str, object] | None = None,
    clip: object = None,
) -> Request:
    """Check what can be known before sampling, load the model, encode the prompt.

    Args:
        node: whose widgets these are.
        vaes: for pictures and for sound, where the stream is decoded too; None of them means the
            model's own. Without the pair it is decoded where a page is there to play it.
        frames: whether all pictures are to lie in memory.
        given: a LATENT with one modality of what comes.
        seconds: 0 = until it is stopped.
        clip: reads what is typed meanwhile; None = the model's own, if it has one.

    Raises:
        ValueError: in an artist's words, with the next step.
    """
    if not isinstance(mode, dict):  # over a wire its widgets do not come along
        mode = {"mode": mode}
    numbers = {"seconds": seconds, "variation": variation}
    limits.check(node, mode=mode, few_step_guidance=few_step_guidance, **numbers)
    asked = wire, positive, negative, plan, state, mode, variation, execution, few_step_guidance
    asked += (given and given["samples"], *(vaes or (None, None)))
    if plan is not None and state is not None:
        raise ValueError(
            "both 'settings' and 'state' are connected, but a stream keeps the size, memory and "
            "seed that it began with: disconnect 'settings', and use 'variation' for another take"
        )
    model, rate = stream_model(wire), frame_rate_of(positive)
    if state is None:
        model = model.at_rate(rate)
        plan = plan or StreamPlan()
        state = plan.begin(model)
    else:
        model = model.for_layout(state.layout)
        if rate is not None and rate != model.clock.fps:
            raise ValueError(
                f"the prompt asks for {rate:g} frames a second, and the stream that it goes on "
                f"from has {float(model.clock.fps):g}: give both the same in LTXVConditioning"
            )
    check_state(state, model)
    config = model.transformer.config
    channels = config.in_channels, config.audio_in_channels
    decoder, clock = None, model.clock
    if vaes is not None:
        decoder = clip_decoder(*vaes, clock, channels=channels, model=wire)
    if variation:
        state = state.reseeded(tuple(varied_seed(seed, variation) for seed in state.settings.seeds))
    sampler, settings = _sampler(model, mode, few_step_guidance), state.settings
    blocks = model.clock.blocks_for(seconds, state.next_block) if seconds else None
    if frames:
        check_frames(model.clock, state, state.next_block, blocks or A_MINUTE)
    guided = sampler.guidance != 1.0
    needed = partial(
        stream_bytes,
        model.transformer.config,
        settings.window,
        settings.height,
        settings.width,
        batch=len(settings.seeds),
        element_size=model.like.element_size(),
        guided=guided,
        text_tokens=model.about.text_tokens,
        kept=settings.kept,
        on_cpu=model.like.device.type == "cpu",
    )
    remarks, shown = [], None  # what is for the player only
    if is_open() and len(settings.seeds) == 1 and not (decoder and decoder.live):
        shown = live_decoder(wire, clock, channels, needed(), vaes or (None, None))
        if shown is None and decoder is not None:
            remarks.append(_NOT_SEEN)
    beside = [patcher for one in (decoder, shown) if one is not None for patcher in one.beside]
    load = partial(model.load, needed(), beside)
    load()
    encode = _encoder(clip or model.about.clip, load)
    prompt = model.schedule_of(positive, negative, encode, guided=guided)
    start = plan.start if plan else None
    coming = given and given_of(given["samples"], state.layout, state.next_block, model.audio_bins)
    if coming is not None:
        remarks += _followed(coming, model, blocks)
    path = Execution.named(str(execution))
    remarks += remarks_on(positive)
    latents = {"start": start and start.latents, "given": given and given["samples"]}
    remarks += [
        f"'{name}' is an empty latent, and the clip follows nothing there: encode a picture or a "
        "sound (VAE Encode, VAE Encode Audio)"
        for name, samples in latents.items()
        if samples is not None and not samples.any()
    ]
    remarks += (*model.remarks_on(positive), *_remarks(model, mode, few_step_guidance))
    prompts = {"positive": positive, "negative": negative}
    remarks += unread(wire, prompts, guided=guided)
    if path.automatic:
        still = needed(laid_out=True) if settings.kept == AS_COMPUTED else None
        path = path.chosen(model.transformer, model.like.device, still)
        remarks.append(f"execution: {path.name}")
    settled = model, prompt, state, sampler, blocks, start, coming, path, asked
    decoder, glimpse = (shown, None) if vaes is None else (decoder, shown)
    return Request(*settled, decoder, glimpse, tuple(remarks), encode)


def _followed(coming: Given, model: StreamModel, blocks: int | None) -> Iterator[str]:
    """What is to be said of a given modality that ends before the clip does."""
    clock, first = model.clock, coming.first
    end = next(block for block in count(first) if coming.block(block) is None)
    if blocks is not None and end < first + blocks:
        rule = ""
        if coming.video is not None:
            rule = f" (pictures need {float(clock.fps):g} for each second, and one more)"
        yield (
            f"what is given is followed up to second {clock.time_of(end):g} of "
            f"{clock.time_of(first + blocks):g}{rule}; after that both are made"
        )


def check_frames(clock: Clock, state: StreamState, first: int, blocks: int) -> None:
    """Refuse pictures of so many blocks of a stream, from block `first` on, that do not fit.

    Raises:
        ValueError: they take more memory than is free.
    """
    settings, frames = state.settings, clock.frames(first + blocks) - clock.frames(first)
    size = settings.pixels
    needed, free = frame_bytes(len(settings.seeds), frames, *size), free_memory()
    if needed > free:
        raise ValueError(
            f"{frames} pictures of {size[1]} x {size[0]} take {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free: disconnect 'images' and use 'video', which is a file "
            "and may have any length, or make less"
        )


def keep(asked: Request, run: LiveRun, state: StreamState) -> StreamState:
    """The stream after a request, remembered: a longer one of the same kind goes on from it."""
    if run.stop_asked or run.steered:
        run.say(
            "Run hands on what was played until something here changes, such as variation or length"
        )
    return state if run.steered else kept_runs.keep(asked.asked, state)


def _encoder(clip: object | None, load: Callable[[], None]) -> Encode | None:
    if clip is None:
        return None
    read_text = encoder_of(clip)

    def encode(text: str) -> Conditioning:
        read = read_text(text)
        load()  # a large encoder pushes the model off the card
        return read

    return encode


def _sampler(
    model: StreamModel, mode: dict[str, object], few_step_guidance: float
) -> SamplerSettings:
    guidance = mode.get("guidance")
    if _mode_of(model, mode) == "few":
        guidance = few_step_guidance if model.about.config.few_step_rank else None
    return model.sampler(_mode_of(model, mode), mode.get("steps"), guidance)


def _mode_of(model: StreamModel, mode: dict[str, object]) -> Mode:
    return _MODES.get(mode["mode"], model.about.defaults.default_mode)


def _remarks(
    model: StreamModel, mode: dict[str, object], few_step_guidance: float
) -> Iterator[str]:
    yield from model.about.remarks
    best, asked = model.about.defaults.default_mode, _mode_of(model, mode)
    if asked != best:
        yield f"this model is at its best in mode '{FEW if best == 'few' else MANY}'"
    usual, steps = model.few_steps, mode.get("steps")
    if asked == "few" and steps is not None and steps not in usual:
        learned = " or ".join(map(str, usual))
        yield f"few steps: {steps} are asked for, and this model learned {learned}"
    knob = model.about.config.few_step_rank
    if asked == "few" and not knob and few_step_guidance != GUIDANCE:
        yield "few-step guidance does nothing here: this model has its own built in"
