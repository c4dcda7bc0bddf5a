"""The rollout: block after block, each denoised in steps from a past that it only reads.

b batch, c channels, f h w video latent grid, s audio latents.
Few-step mode tells the network its step size d = sigma_i - sigma_(i+1); multi-step mode has d = 0
and may use classifier-free guidance (mutual_forcing.md, sections 3.2 and 4). After the last step
one refresh pass over the clean block writes its keys and values (omniforcing.md, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..networks.kv_cache import OpenBlock, RollingCache
from ..networks.modulation import Modulation, modulation
from ..networks.transformer import TextKeys
from .noise import NoiseSource, noise_of
from .sigmas import few_step_sigmas, ltx2_sigmas
from .state import BlockLatents, StreamSettings, StreamState, check_state

Mode = Literal["few", "multi"]
Method = Literal["euler", "renoise"]
FEW_STEPS, MULTI_STEPS, GUIDANCE = 4, 50, 3.0


@dataclass(frozen=True)
class SamplerSettings:
    """How a block is denoised.

    Attributes:
        mode: which of the network's two modes is asked for.
        sigmas: noise levels from 1 down to 0.
        guidance: classifier-free guidance; 1 = off. Multi-step mode only: few-step mode has it
            built in.
        method: `euler` follows the velocity; `renoise` predicts the clean block and adds fresh
            noise.
    """

    mode: Mode
    sigmas: tuple[float, ...]
    guidance: float = 1.0
    method: Method = "euler"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}, expected 'few' or 'multi'")
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}, expected 'euler' or 'renoise'")
        falling = all(a > b for a, b in pairwise(self.sigmas))
        if len(self.sigmas) < 2 or not falling or self.sigmas[-1] != 0 or self.sigmas[0] > 1:
            raise ValueError(
                f"sigmas are {self.sigmas}, expected at least two falling values from 1 down to 0"
            )
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}, expected 1 (off) or more")
        # Guidance is folded into few-step mode by its training, so asking for it again is a
        # mistake.
        if self.mode == "few" and self.guidance != 1:
            raise ValueError(
                f"guidance is {self.guidance} in few-step mode, expected 1: choose mode 'multi' "
                "to use guidance"
            )

    @property
    def steps(self) -> int:
        """Network evaluations per block, the refresh not counted."""
        return len(self.sigmas) - 1


def sampler_settings(
    mode: Mode,
    steps: int | None = None,
    guidance: float | None = None,
    method: Method | None = None,
) -> SamplerSettings:
    """Settings of a mode with its own defaults: few = 4 steps; multi = 50 steps, guidance 3.

    Raises:
        ValueError: an unknown mode or method, or a number of steps that cannot be made.
    """
    few = mode == "few"
    if steps is None:
        steps = FEW_STEPS if few else MULTI_STEPS
    sigmas = few_step_sigmas(steps) if few else ltx2_sigmas(steps)
    if guidance is None:
        guidance = 1.0 if few else GUIDANCE
    return SamplerSettings(mode, sigmas, guidance, method or "euler")


class Prompt(NamedTuple):
    """Text keys of the prompt and, where guidance needs it, of the empty prompt."""

    text: TextKeys
    unguided: TextKeys | None = None


class Step(NamedTuple):
    """Told to `on_step` after every network evaluation of the sampler."""

    block: int
    step: int
    steps: int


class NonFiniteBlockError(RuntimeError):
    """A block came out with NaN or infinity; the blocks before it are untouched."""

    def __init__(self, block: int, stream: str) -> None:
        super().__init__(
            f"block {block} has NaN or infinite values in its {stream}; the {block} blocks before "
            "it are kept. Try another seed or float32, or check the model file"
        )
        self.block = block


def new_stream(model: nn.Module, model_id: str, settings: StreamSettings) -> StreamState:
    """The state before the first block."""
    return StreamState(settings, model_id, model.config.layout, (), RollingCache(settings.window))


class SigmaConstants:
    """Modulations, computed once per sigma and step size."""

    def __init__(self, model: nn.Module, like: Tensor) -> None:
        self.model, self.like = model, like
        self.known: dict[tuple[float, float], Modulation] = {}

    def at(self, sigma: float, step_size: float = 0.0) -> Modulation:
        """The modulation of one noise level for all tokens; step size 0 is multi-step mode."""
        if (sigma, step_size) not in self.known:
            level = torch.full((1, 1), sigma, device=self.like.device, dtype=torch.float32)
            step = torch.full_like(level, step_size)
            self.known[sigma, step_size] = modulation(
                self.model, self.model.config, level, level, step, self.like.dtype
            )
        return self.known[sigma, step_size]


@torch.no_grad()
def rebuild_cache(
    model: nn.Module,
    text: TextKeys,
    latents: tuple[BlockLatents, ...],
    settings: StreamSettings,
    like: Tensor,
    on_rebuild: Callable[[int, int], None] | None = None,
) -> RollingCache:
    """Keys and values of finished blocks, made again from their latents: one refresh per block.

    Exactly what the stream itself wrote, if the prompt was the same throughout. Every block is
    needed, also those that have left the window: the kept ones saw them when they were made.
    """
    constants = SigmaConstants(model, like)
    cache = RollingCache(settings.window)
    for index, block in enumerate(latents):
        if on_rebuild is not None:
            on_rebuild(index, len(latents))
        opened = OpenBlock(model, cache, settings.height, settings.width, like)
        cache = opened.commit(block.video.to(like), block.audio.to(like), text, constants.at(0.0))
    return cache


def rollout(
    model: nn.Module,
    prompt: Prompt,
    state: StreamState,
    blocks: int,
    sampler: SamplerSettings,
    *,
    model_id: str,
    on_step: Callable[[Step], None] | None = None,
    on_rebuild: Callable[[int, int], None] | None = None,
    noise: NoiseSource | None = None,
    like: Tensor | None = None,
) -> Iterator[tuple[BlockLatents, StreamState]]:
    """Yield `blocks` further blocks, each with the state after it. `state` itself is not changed.

    Args:
        prompt: text keys of one entry, or of one for every clip of the batch.
        on_step: called after every denoising step; an exception raised there stops within that
            step, and what was yielded before stays good.
        on_rebuild: called with (blocks done, blocks in all) while a state without keys gets them
            back; an exception raised there stops as well.
        noise: where noise comes from; by default named by the state's seeds.
        like: tensor with the device and dtype to compute in; by default the model's first
            parameter.

    Raises:
        ValueError: at once, if the state belongs to another model, guidance has no empty prompt to
            compare with, or the prompt's batch is not the stream's.
        NonFiniteBlockError: while iterating, if a block has NaN; names the block.
    """
    check_state(state, model_id, model.config.layout)
    if blocks < 1:
        raise ValueError(f"blocks is {blocks}, expected at least 1")
    guided = sampler.guidance != 1.0
    if guided and prompt.unguided is None:
        raise ValueError("guidance needs the text keys of the empty prompt; encode '' as well")
    batch = len(state.settings.seeds)
    prompt = Prompt(
        _spread(prompt.text, batch), _spread(prompt.unguided, batch) if guided else None
    )
    if like is None:
        like = next(model.parameters()).new_empty(0)
    if not like.is_floating_point() or like.element_size() < 2:
        like = like.to(torch.bfloat16)
    source = noise or noise_of(state.settings.seeds)

    # The checks above must not wait for the first block to be asked for, so the loop is a generator
    # inside.
    def generate(state: StreamState) -> Iterator[tuple[BlockLatents, StreamState]]:
        constants = SigmaConstants(model, like)
        state = _with_keys(model, prompt, state, like, on_rebuild)
        for _ in range(blocks):
            latents, state = _next_block(
                model, prompt, state, sampler, constants, source, on_step, like
            )
            yield latents, state

    return generate(state)


def _spread(text: TextKeys, batch: int) -> TextKeys:
    """One entry's text keys for every clip of the batch."""
    found = text.video[0][0].shape[0]
    if found == batch:
        return text
    if found != 1:
        raise ValueError(
            f"the prompt has {found} entries and the stream {batch} clips; give one prompt for all "
            "or one each"
        )

    def spread(layers: tuple[tuple[Tensor, Tensor], ...]) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in layers)

    return TextKeys(spread(text.video), spread(text.audio))


def _with_keys(
    model: nn.Module,
    prompt: Prompt,
    state: StreamState,
    like: Tensor,
    on_rebuild: Callable[[int, int], None] | None,
) -> StreamState:
    """The state with keys and values for every branch of the prompt and for no other."""

    def keys(text: TextKeys, cache: RollingCache | None) -> RollingCache:
        if cache is not None:
            return cache.to(like)  # a loaded state lies on the CPU
        return rebuild_cache(model, text, state.latents, state.settings, like, on_rebuild)

    # Keys of a branch that is not extended would fall behind; they are rebuilt if guidance comes
    # back.
    unguided = None if prompt.unguided is None else keys(prompt.unguided, state.unguided)
    return replace(state, cache=keys(prompt.text, state.cache), unguided=unguided)


@torch.no_grad()
def _next_block(
    model: nn.Module,
    prompt: Prompt,
    state: StreamState,
    sampler: SamplerSettings,
    constants: SigmaConstants,
    noise: NoiseSource,
    on_step: Callable[[Step], None] | None,
    like: Tensor,
) -> tuple[BlockLatents, StreamState]:
    settings, index = state.settings, state.next_block
    batch = len(settings.seeds)
    opened = OpenBlock(model, state.cache, settings.height, settings.width, like)
    branches = [(opened, prompt.text)]
    if prompt.unguided is not None:
        unguided = OpenBlock(model, state.unguided, settings.height, settings.width, like)
        branches.append((unguided, prompt.unguided))

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return (
            noise(index, step, "video", (batch, *opened.video_shape)).to(like.device),
            noise(index, step, "audio", (batch, *opened.audio_shape)).to(like.device),
        )

    video, audio = draw(0)
    for step, (sigma, next_sigma) in enumerate(pairwise(sampler.sigmas)):
        mode = constants.at(sigma, sigma - next_sigma if sampler.mode == "few" else 0.0)
        velocities = [
            branch.velocity(video.to(like.dtype), audio.to(like.dtype), text, mode)
            for branch, text in branches
        ]
        (video_v, audio_v), *rest = [tuple(v.float() for v in pair) for pair in velocities]
        if rest:
            video_v = rest[0][0] + sampler.guidance * (video_v - rest[0][0])
            audio_v = rest[0][1] + sampler.guidance * (audio_v - rest[0][1])
        if sampler.method == "euler":
            video = video - (sigma - next_sigma) * video_v
            audio = audio - (sigma - next_sigma) * audio_v
        else:
            video, audio = video - sigma * video_v, audio - sigma * audio_v
            if next_sigma > 0:
                fresh_video, fresh_audio = draw(step + 1)
                video = (1 - next_sigma) * video + next_sigma * fresh_video
                audio = (1 - next_sigma) * audio + next_sigma * fresh_audio
        if on_step is not None:
            on_step(Step(index, step, sampler.steps))
    for stream, value in (("video", video), ("audio", audio)):
        if not torch.isfinite(value).all():
            raise NonFiniteBlockError(index, stream)
    caches = [
        branch.commit(video.to(like.dtype), audio.to(like.dtype), text, constants.at(0.0))
        for branch, text in branches
    ]
    latents = BlockLatents(video.float().cpu(), audio.float().cpu())
    return latents, replace(
        state,
        latents=(*state.latents, latents),
        cache=caches[0],
        unguided=caches[1] if len(caches) > 1 else None,
    )
