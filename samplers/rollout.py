"""The rollout: block after block, each denoised in steps from a past that it only reads.

b batch, c channels, f h w video latent grid, s audio latents.
Few-step mode tells the network its step size d = sigma_i - sigma_(i+1); multi-step mode has d = 0
and may use classifier-free guidance (docs/mutual_forcing.md, sections 3.2 and 4). A refresh of the
clean block writes its keys and values (docs/omniforcing.md, section 4). It is made when the stream
goes on and not before: a block is handed out as soon as it is denoised, and nobody would look at
the last block's keys. Then it is part of the next block's first pass: four steps are four passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice, pairwise, repeat
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..networks.allocated import allocated_bytes, lays_out
from ..networks.checked import quoted
from ..networks.config import TransformerConfig
from ..networks.execution import EAGER, Execution, Workspace, to_device
from ..networks.few_step import folded
from ..networks.kept_keys import AS_COMPUTED, BlockKeys
from ..networks.kv_cache import BlockInput, OpenBlock, RollingCache, kept_blocks
from ..networks.layer import Text
from ..networks.memory_branch import Remembered
from ..networks.modulation import (
    Modulation,
    SharedModulation,
    TokenModulation,
    beside,
    shared_modulation,
)
from ..networks.tape import is_plain
from ..networks.tensor_parallel import part_of
from ..networks.timestep import GUIDANCE as FEW_STEP_GUIDANCE
from ..networks.timestep import TimestepEmbedding, timestep_embedding
from ..networks.transformer import with_seen
from .clock import Clock
from .model import StreamModel
from .noise import NoiseSource, noise_of
from .ranks import WholeStates, part_of_cache
from .schedule import (
    MOST_BLOCKS,
    USUAL,
    Line,
    Prompt,
    Schedule,
    Transition,
    line_at,
)
from .sigmas import OMNIFORCING, few_step_sigmas, ltx2_sigmas
from .speech import Speech, Transcript, block_seconds, block_track
from .start import Given, Held, Start, held
from .state import BlockLatents, StreamSettings, StreamState, check_state
from .steps import euler, guided, renoise
from .stream_memory import StreamMemory, remembered

Speeches = tuple[Speech, ...]
Mode = Literal["few", "multi"]
Method = Literal["euler", "renoise"]
FEW_STEPS, MULTI_STEPS, GUIDANCE = 4, 50, 3.0
TAPED_NUMBERS = 2**15
"""Numbers in a block's pictures, as a layer has them, up to which a CPU takes longer to start a
pass than to do it; the small model's have 2688. To note one down takes room for all it makes."""


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
        few_step_guidance: of few-step mode, 1 to 4, for a network that has adapters for it; any
            other has the guidance that it was trained with. None = as the network was trained.
    """

    mode: Mode
    sigmas: tuple[float, ...]
    guidance: float = 1.0
    method: Method = "euler"
    few_step_guidance: float | None = None

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
        if self.few_step_guidance is not None and not 1 <= self.few_step_guidance <= 4:
            raise ValueError(
                f"guidance of few-step mode is {self.few_step_guidance}, expected 1 to 4"
            )
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
    entries: tuple[int, ...] = OMNIFORCING,
) -> SamplerSettings:
    """Settings of a mode with its own defaults: few = as many steps as were trained (4, where
    nothing else is known); multi = 50 steps, guidance 3.

    Args:
        entries: which noise levels few-step mode was trained with (`few_step_sigmas`).
        guidance: in few-step mode `few_step_guidance`: no second pass is made for it.

    Raises:
        ValueError: an unknown mode or method, or a number of steps that cannot be made.
    """
    few = mode == "few"
    if steps is None:
        steps = len(entries) - 1 if few else MULTI_STEPS
    sigmas = few_step_sigmas(steps, entries) if few else ltx2_sigmas(steps)
    method = method or "euler"
    if few:
        return SamplerSettings(mode, sigmas, method=method, few_step_guidance=guidance)
    return SamplerSettings(mode, sigmas, GUIDANCE if guidance is None else guidance, method)


def check_guidance(sampler: SamplerSettings, config: TransformerConfig) -> None:
    """Refuse guidance of few-step mode for a network that has not learned it as a knob.

    Raises:
        ValueError: it is asked for, and there are no adapters for it.
    """
    if sampler.few_step_guidance is not None and not config.few_step_rank:
        raise ValueError(
            f"found guidance {sampler.few_step_guidance:g} for few-step mode, and this model's "
            "few-step mode has the guidance that it was trained with: leave it out, or choose many "
            "steps"
        )


class Step(NamedTuple):
    """Told to `on_step` after every network evaluation of the sampler."""

    block: int
    step: int
    steps: int


class BeginAgain(Exception):  # noqa: N818 - nothing went wrong
    """Raised by `on_step`: the block that is being made is begun anew, with what its schedule says
    by then."""


class NonFiniteBlockError(RuntimeError):
    """A block came out with NaN or infinity; the blocks before it are untouched."""

    def __init__(self, block: int, modality: str) -> None:
        super().__init__(
            f"block {block} has NaN or infinite values in its {modality}; the {block} blocks "
            "before it are kept. Try another seed or float32, or check the model file"
        )
        self.block = block


def new_stream(model: StreamModel, settings: StreamSettings) -> StreamState:
    """The state before the first block."""
    layout = model.transformer.config.layout
    opening = model.transformer.config.opening_blocks
    cache = RollingCache(settings.window, opening=opening, kept=settings.kept)
    return StreamState(settings, model.model_id, layout, (), cache, model_title=model.title)


class SigmaConstants:
    """What the network makes of a noise level and step size, computed once for each."""

    def __init__(
        self,
        model: nn.Module,
        like: Tensor,
        guidance: float = FEW_STEP_GUIDANCE,
        folded: nn.Module | None = None,
    ) -> None:
        """`folded`: the network of few-step mode at this guidance, for passes in that alone."""
        self.model, self.like, self.guidance, self.folded = model, like, guidance, folded
        self._embeddings: dict[tuple[float, float], TimestepEmbedding] = {}
        self._modulations: dict[tuple[float, float], Modulation] = {}
        self._after_refresh: dict[tuple[float, float], SharedModulation] = {}

    def embedding(self, sigma: float, step_size: float = 0.0) -> TimestepEmbedding:
        """The embedding of one noise level, of one group; step size 0 is multi-step mode."""
        if (sigma, step_size) not in self._embeddings:
            level = torch.full((1, 1), sigma, device=self.like.device, dtype=torch.float32)
            step = torch.full_like(level, step_size)
            self._embeddings[sigma, step_size] = timestep_embedding(
                self.model, level, level, step, self.like.dtype, self.guidance
            )
        return self._embeddings[sigma, step_size]

    def at(self, sigma: float, step_size: float = 0.0) -> Modulation:
        """The modulation of all tokens at one noise level."""
        if (sigma, step_size) not in self._modulations:
            # Shared, every layer's gradient would be as large as all layers' modulation together.
            make = TokenModulation if torch.is_grad_enabled() else shared_modulation
            network = self.folded if step_size else None
            # What is part of the weights does not act beside them.
            acting = _acting(self.embedding(sigma, step_size), 0.0 if network else step_size)
            made = make(self.model, acting)
            if network is not None:
                made = made._replace(network=network)
            self._modulations[sigma, step_size] = made
        return self._modulations[sigma, step_size]

    @torch.no_grad()
    def after_refresh(self, sigma: float, step_size: float = 0.0) -> SharedModulation:
        """The modulation of a clean block and of the next one at a noise level, for a pass over
        both."""
        if (sigma, step_size) not in self._after_refresh:
            both = beside(self.embedding(0.0), self.embedding(sigma, step_size))
            made = shared_modulation(self.model, _acting(both, step_size))
            self._after_refresh[sigma, step_size] = made
        return self._after_refresh[sigma, step_size]


def _acting(embedding: TimestepEmbedding, step_size: float) -> TimestepEmbedding:
    """An embedding without what does not act: nothing of few-step mode's does in the other."""
    if step_size:
        return embedding
    return TimestepEmbedding(*(one._replace(factors=None) for one in embedding))


class _Branch:
    """One line of keys and values through a rollout: that of the prompt, or of the empty prompt."""

    def __init__(
        self, model: nn.Module, settings: StreamSettings, like: Tensor, execution: Execution
    ) -> None:
        self.model, self.settings, self.like = model, settings, like
        self.workspace = Workspace(execution, like.device)
        self.merged = execution.merged
        self._opened: OpenBlock | None = None

    def open(self, cache: RollingCache, index: int | None = None) -> OpenBlock:
        """The block after `cache`, by default the next one; the last one that was opened, if it is
        that."""
        if self._opened is None or self._opened.cache is not cache:
            self._opened = None  # its memory is used again
            grid = self.settings.height, self.settings.width
            rest = self.like, self.workspace, index
            self._opened = OpenBlock(self.model, cache, *grid, *rest)
        return self._opened

    def next(
        self,
        cache: RollingCache | None,
        state: StreamState,
        clean: Modulation,
        track: Callable[[int, int], Tensor | None],
        reading: Callable[[int], _Reading],
        on_rebuild: Callable[[int, int], None] | None,
        given: bool,
    ) -> OpenBlock:
        """The block that comes next, opened. `cache` is a past that may lack some of the finished
        blocks: the last one where a stream goes on, and all where they were dropped.

        The last one is read in the first pass of the new one wherever it can be (`_is_merged`), and
        each of the others in a pass of its own, also those that have left the window: the kept ones
        saw them when they were made. Exactly what the stream itself wrote, if its prompts can be
        had (`reading`).

        A network with a memory branch reads a block under the memory that it was made with. Where
        blocks are read again it is under that of now, and the pictures keep the keys and values of
        their own attention (docs/ltx23.md, section 5).
        """
        opening = self.model.config.opening_blocks
        fresh = RollingCache(self.settings.window, opening=opening, kept=self.settings.kept)
        cache = cache or fresh
        rebuilding = state.next_block - cache.next_block > 1

        def read_with(block: int, index: int, text: Text, memory: Remembered | None) -> BlockInput:
            latents = (to_device(x, self.like).to(self.like.dtype) for x in state.block(block))
            return BlockInput(*latents, text, track(block, index), memory)

        def refreshed(past: RollingCache, block: int, *rest: object) -> RollingCache:
            video, audio, text, *told = read_with(block, *rest)
            return self.open(past, block).commit(video, audio, text, clean, *told)

        told = _memories(state, cache.next_block, self.model.config)
        memories = (_placed(memory, self.like) for memory in told)
        unread = range(cache.next_block, state.next_block)
        # One longer than the blocks are: what the next one is told.
        for index, (made_under, now) in zip(unread, pairwise(memories), strict=False):
            if on_rebuild is not None and rebuilding:
                on_rebuild(index, state.next_block)
            text, again, own = reading(index)
            held: dict[int, BlockKeys] = {}
            if own is not None:
                cache = refreshed(cache, index, index, own, made_under)
                held = dict(zip(cache.indices, cache.blocks, strict=True))
            if again:
                old = dict(zip(cache.indices, cache.blocks, strict=True))
                kept = kept_blocks(index + 1, cache.window, opening)
                first = max(0, len(kept) - again)
                left = kept[:first]
                cache = replace(cache, indices=left, blocks=tuple(old[i] for i in left))
                for block in kept[first:-1]:
                    cache = refreshed(cache, block, index, text, now)
            opened = self.open(cache, index)
            last = read_with(index, index, text, now if again else made_under)
            alike = not held and self._is_merged(opened)
            if alike and not given and index + 1 == state.next_block:
                self._opened = opened.followed(last)
                return self._opened
            video, audio, text, *told = last
            cache = opened.commit(video, audio, text, clean, *told, alike=alike)
            if held:
                pairs = zip(cache.indices, cache.blocks, strict=True)
                cache = replace(
                    cache, blocks=tuple(new._replace(video=held[i].video) for i, new in pairs)
                )
        return self.open(cache)

    def _is_merged(self, opened: OpenBlock) -> bool:
        """Whether this block's keys are those of a pass over it and the next one: if both have the
        same shape.

        Nothing else is looked at, so that a block's keys are the same bits however one comes to
        them: where the next one's first step is a pass by itself, because some of that block is
        given, or where keys are made again, the refresh goes through products of the same sizes.
        """
        return self.merged and not opened.is_prefix


def _memories(
    state: StreamState, first: int, config: TransformerConfig
) -> Iterator[Remembered | None]:
    """What a network with a memory branch is told in each block from `first` to the next one.

    Raises:
        ValueError: the stream does not hold the blocks that it would have to be made from.
    """
    memory = state.past
    if memory is None or not config.memory_interval:
        yield from repeat(None)
    elif first + 1 >= state.next_block:
        yield from [memory.was_told(), memory.told()][first + 1 - state.next_block :]
    else:
        after = remembered(state.block(index) for index in range(state.next_block))
        yield from (one and one.told() for one in islice(chain([None], after), first, None))


def _placed(memory: Remembered | None, like: Tensor) -> Remembered | None:
    if memory is None:
        return None
    return Remembered(*(to_device(x, like).to(like.dtype) for x in memory))


def _settled(
    state: StreamState, latents: BlockLatents, config: TransformerConfig
) -> tuple[BlockLatents, StreamState]:
    """A block as it is handed out by a network that keeps a memory, and the state that has it in
    its memory."""
    past = state.past
    if past is None:
        return latents, replace(state, past=StreamMemory.begun(*latents))
    if config.anchored_colours:
        latents = latents._replace(video=past.settled(latents.video))
    return latents, replace(state, past=past.after(*latents))


class _Reading(NamedTuple):
    """How a finished block is read.

    Attributes:
        text: keys of the prompt.
        again: how many blocks, it being the last one, are read again under them: none, where no
            prompt takes over.
        own: the prompt that it was made with, where the pictures of what is read again keep the
            keys and values that they have under it.
    """

    text: Text
    again: int
    own: Text | None = None


class _Prompts:
    """What a stream's lines say, block by block, as keys for every clip of its batch."""

    def __init__(self, schedule: Schedule, batch: int, rereads: bool = False) -> None:
        """`rereads`: the network is one that reads all it keeps again where nobody chooses, but
        for the pictures' own keys (docs/ltx23.md, section 5)."""
        self.schedule, self.batch, self.rereads = schedule, batch, rereads
        self._held: dict[tuple[str, ...], Prompt | None] = {}

    def of(self, line: Line | None) -> Prompt | None:
        """The prompt of a line, for every clip; None where it cannot be had.

        Raises:
            ValueError: its batch is not the stream's.
        """
        if line is None:
            return None
        if line.texts not in self._held:
            prompt = self.schedule.encode(line.texts)
            self._held[line.texts] = prompt and _for_all(prompt, self.batch)
        return self._held[line.texts]

    def followed(self, state: StreamState) -> StreamState:
        """The state before a block, with what is to be followed in it written down.

        Raises:
            ValueError: nothing is, or a text that cannot be encoded here.
        """
        block, clock, lines = state.next_block, self.schedule.clock, state.schedule
        self.schedule.heard(block)
        line, last = self.schedule.due(block), lines[-1] if lines else None
        if line is None and last is None:
            raise ValueError(
                f"the schedule says nothing for second {clock.time_of(block):g}, where the stream "
                "begins: let its first line begin there, or at 0"
            )
        if last is not None and (line is None or line.texts == last.texts):
            blending = self._share(lines, len(lines) - 1, block) < 1
            for needed in lines[-2:] if blending else [last]:
                self._check(needed)
            if not blending:  # those of large models are large
                self._held = {last.texts: self._held[last.texts]}
            return state
        self._check(line)
        how = line.transition if block else USUAL
        if block and self.rereads and how == USUAL:
            how = Transition(reread=MOST_BLOCKS)
        if block and (how.blend or not how.reread) and self.of(last) is None:
            # The last block can't be read under the prompt that it was made with.
            how = Transition(max(1, how.reread))
        start = line.start if clock.block_at(line.start) == block else clock.time_of(block)
        return replace(state, schedule=(*lines, Line(start, line.texts, how)))

    def _check(self, line: Line) -> None:
        if self.of(line) is None:
            raise ValueError(
                f"the stream follows the prompt {quoted(line.texts[0])}, which cannot be encoded "
                "here: connect a clip, or give it another prompt"
            )

    def text(self, lines: Sequence[Line], block: int) -> Text:
        """Keys that a block is made with; the last line's where its own cannot be had."""
        place = line_at(lines, self.schedule.clock, block)
        if place is None or self.of(lines[place]) is None:
            place = len(lines) - 1
        new, share = self.of(lines[place]).text, self._share(lines, place, block)
        old = self.of(lines[place - 1]) if share < 1 else None
        return new if old is None else old.text.toward(new, share)

    def reading(self, lines: Sequence[Line], block: int) -> _Reading:
        """How a finished block is read when the one after it is to be made."""
        clock = self.schedule.clock
        place = line_at(lines, clock, block + 1)
        if place and clock.block_at(lines[place].start) == block + 1:
            again = lines[place].transition.reread
            if again:
                own = self.text(lines, block) if self.rereads else None
                return _Reading(self.text(lines, block + 1), again, own)
        return _Reading(self.text(lines, block), 0)

    def spoken(self, state: StreamState, config: TransformerConfig) -> dict[int, Speeches]:
        """What had been told by the end of each block, as nothing was known of later lines.

        Empty where that cannot be found out, or where blocks are gone.
        """
        found: dict[int, Speeches] = {}
        speeches: Speeches = ()
        for block in () if state.dropped else range(state.next_block):
            place = line_at(state.schedule, self.schedule.clock, block)
            prompt = None if place is None else self.of(state.schedule[place])
            if prompt is None:
                return {}
            found[block] = speeches = _told(speeches, prompt.transcripts, config, block)
        return found if speeches == state.speeches else {}

    def _share(self, lines: Sequence[Line], place: int, block: int) -> float:
        """How far a block has gone over to a line, the last one at or before it."""
        line = lines[place]
        steps = 1 + (line.transition.blend if place else 0)
        return min(1.0, (block + 1 - self.schedule.clock.block_at(line.start)) / steps)


def _for_all(prompt: Prompt, batch: int) -> Prompt:
    """A prompt for every clip of the batch.

    Raises:
        ValueError: it is of another number of clips.
    """
    transcripts = prompt.transcripts * (batch if len(prompt.transcripts) == 1 else 1)
    if len(transcripts) != batch:
        raise ValueError(
            f"the prompt has {len(transcripts)} transcripts and the stream {batch} clips; give one "
            "for all or one each"
        )
    unguided = prompt.unguided and _spread(prompt.unguided, batch)
    return Prompt(_spread(prompt.text, batch), unguided, transcripts, prompt.texts)


def rollout(
    model: StreamModel,
    prompt: Prompt | Schedule,
    state: StreamState,
    blocks: int | None,
    sampler: SamplerSettings,
    *,
    on_step: Callable[[Step], None] | None = None,
    on_rebuild: Callable[[int, int], None] | None = None,
    noise: NoiseSource | None = None,
    execution: Execution = EAGER,
    start: Start | None = None,
    given: Given | None = None,
    settle: Callable[[StreamState], StreamState] | None = None,
    whole: bool = True,
) -> Iterator[tuple[BlockLatents, StreamState]]:
    """Yield `blocks` further blocks, each with the state after it. `state` itself is not changed.

    The keys and values of a state lie one block behind its latents; its last block gets them when
    the stream goes on, under the prompt that it was made with, or, where the schedule says so or
    that prompt cannot be had any more, under the one that it goes on with.

    Args:
        prompt: one for all blocks, or a schedule on the stream's own clock. Before a schedule's
            first line a stream goes on with the prompt that it followed last.
        blocks: None = until the caller asks for no more.
        on_step: called after every denoising step; an exception raised there stops within that
            step, and what was yielded before stays good. `BeginAgain` does not stop it.
        on_rebuild: called with (blocks done, blocks in all) while a state without keys gets them
            back; an exception raised there stops as well.
        noise: where noise comes from; by default named by the state's seeds.
        execution: how passes are carried out; the numbers are the same.
        start: video latents that block 0 begins with.
        given: one modality of blocks to come; the other one is made to go with it. No
            transcript is told meanwhile.
        settle: what to do with the state after every block, so that a long stream does not fill
            the memory: `StreamState.trimmed`, or `parking.spooled` with a folder.
        whole: where several processes share the network, states have the keys of all of them on
            the first one, and of their own on the others (`WholeStates`); False: none anywhere.

    Raises:
        ValueError: at once, if the state belongs to another model, what is given does not fit it,
            guidance has no empty prompt to compare with, there is no prompt for the next block, its
            batch is not the stream's, or the device lacks this way of execution; while iterating,
            if a prompt that is due cannot be encoded.
        NonFiniteBlockError: while iterating, if a block has NaN; names the block.
        RankLostError: while iterating, if a process that shares the network is gone.
    """
    network, like = model.transformer, model.like
    part = part_of(network)
    # On the other ranks it may have their own heads' keys, which fit nobody else.
    check_state(state.without_keys() if part is not None and part.rank else state, model)
    if blocks is not None and blocks < 1:
        raise ValueError(f"blocks is {blocks}, expected at least 1")
    check_guidance(sampler, network.config)
    if given is not None:
        channels = network.config.in_channels, network.config.audio_in_channels
        given.check(
            len(state.settings.seeds), channels, (state.settings.height, state.settings.width)
        )
    if isinstance(prompt, Prompt):
        prompt = Schedule.of(Clock.of(network.config), prompt)
    prompts = _Prompts(prompt, len(state.settings.seeds), bool(network.config.memory_interval))
    first = prompts.of(prompts.followed(state).schedule[-1])
    is_guided = sampler.guidance != 1.0
    if is_guided and first.unguided is None:
        raise ValueError("guidance needs the text keys of the empty prompt; encode '' as well")
    # Weights of eight bits or fewer are kept in, not computed in.
    if not like.is_floating_point() or like.element_size() < 2:
        like = like.to(torch.bfloat16)
    source = noise or noise_of(state.settings.seeds)

    settings = state.settings
    shape = network.config, settings.window, settings.height, settings.width
    numbers = {
        "batch": len(settings.seeds),
        "element_size": like.element_size(),
        "branches": 1 + is_guided,
    }
    text_tokens = first.text.sample.shape[-2]
    needed = allocated_bytes(*shape, **numbers, text_tokens=text_tokens, laid_out=True)
    still = settings.kept == AS_COMPUTED
    execution = execution.chosen(network, like.device, needed if still else None)
    if like.device.type == "cpu":
        laid_out = lays_out(*shape, **numbers, kept=settings.kept)
        tokens = network.config.layout.video_next * settings.height * settings.width
        is_small = len(settings.seeds) * tokens * network.config.video_dim <= TAPED_NUMBERS
        taped = laid_out and is_small and not execution.compiled and part is None
        taped = taped and is_plain(network)
        execution = replace(execution, laid_out=laid_out, taped=taped)
    reason = execution.unfit(network, like.device)
    if execution.graph and not still:
        reason = (
            "graphs need keys and values that stay where they are as they were computed, and "
            f"those of this stream are kept otherwise ({settings.kept})"
        )
    if reason:
        raise ValueError(f"{reason}; choose another execution path")
    branches = [_Branch(network, state.settings, like, execution) for _ in range(1 + is_guided)]
    handed = _as_it_is
    if part is not None:
        handed = WholeStates(part) if whole else StreamState.without_keys

    # The checks above must not wait for the first block to be asked for, so the loop is a generator
    # inside.
    def generate(state: StreamState) -> Iterator[tuple[BlockLatents, StreamState]]:
        strength = sampler.few_step_guidance or FEW_STEP_GUIDANCE
        few = sampler.mode == "few" and part is None
        in_weights = folded(network, strength, like) if few else None
        constants = SigmaConstants(network, like, strength, in_weights)
        config = network.config

        def track(block: int, after: int) -> Tensor | None:
            speeches = then.get(after, state.speeches)
            if not speeches:
                return None
            return to_device(block_track(config, speeches, block), like).to(like.dtype)

        def untold(block: int, after: int) -> None:
            """The empty prompt says nothing either."""

        tracks = (track, untold)[: len(branches)]
        readings = (
            lambda block: prompts.reading(state.schedule, block),
            lambda block: _Reading(first.unguided, 0),
        )[: len(branches)]
        caches = [state.cache, state.unguided][: len(branches)]
        if part is not None:
            caches = [cache and part_of_cache(part, cache) for cache in caches]
        # A loaded state lies on the CPU.
        caches = [cache and cache.to(like) for cache in caches]
        written = min(0 if cache is None else cache.next_block for cache in caches)
        rebuilding = config.transcript_channels and written + 1 < state.next_block
        then = prompts.spoken(state, config) if rebuilding else {}

        @torch.no_grad()
        def made() -> BlockLatents:
            nonlocal state, caches
            clean = constants.at(0.0)
            state = prompts.followed(state)
            kept = held(start, given, state.next_block)
            opened = [
                branch.next(cache, state, clean, told, reading, on_rebuild, kept is not None)
                for branch, cache, told, reading in zip(
                    branches, caches, tracks, readings, strict=True
                )
            ]
            if config.transcript_channels:
                now = prompts.of(state.schedule[-1]).transcripts
                if given is not None and given.block(state.next_block) is not None:
                    # What is given has its own times, and the rest would follow the told ones.
                    now = (None,) * len(now)
                speeches = _told(state.speeches, now, config, state.next_block)
                state = replace(state, speeches=speeches)
            texts = (prompts.text(state.schedule, state.next_block), first.unguided)
            memory = state.past.told() if config.memory_interval and state.past else None
            seen = _seen(network, given, opened[0].audio_shape[0], state, like)
            told_now = [told(state.next_block, state.next_block) for told in tracks]
            if seen is not None:
                told_now = [with_seen(track, seen, config) for track in told_now]
            latents = _denoised(
                list(zip(opened, texts, told_now, strict=False)),
                state,
                _placed(memory, like),
                sampler,
                constants,
                source,
                on_step,
                kept,
                seen is not None,
            )
            caches = [block.cache for block in opened]
            if config.keeps_memory:
                latents, state = _settled(state, latents, config)
            return latents

        for _ in count() if blocks is None else range(blocks):
            before = state
            while True:
                try:
                    latents = made()
                    break
                except BeginAgain:
                    state = before
            # Keys of a branch that is not extended would fall behind; they are rebuilt if guidance
            # comes back.
            cache, unguided = (*caches, None)[:2]
            state = replace(
                state, latents=(*state.latents, latents), cache=cache, unguided=unguided
            )
            if settle is not None:
                state = settle(state)
            yield latents, handed(state)

    return generate(state)


def _as_it_is(state: StreamState) -> StreamState:
    return state


def _spread(text: Text, batch: int) -> Text:
    """One entry's text keys for every clip of the batch."""
    entries = text.sample.shape[0]
    if entries == batch:
        return text
    if entries != 1:
        raise ValueError(
            f"the prompt has {entries} entries and the stream {batch} clips; give one prompt for "
            "all or one each"
        )

    return text.spread(batch)


def _told(
    before: Speeches,
    transcripts: tuple[Transcript | None, ...],
    config: TransformerConfig,
    block: int,
) -> Speeches:
    """What is to be spoken up to the end of a block."""
    seconds = block_seconds(config, block)
    pairs = zip(before or (Speech(),) * len(transcripts), transcripts, strict=True)
    return tuple(a.going_on(t, *seconds) for a, t in pairs)


def _seen(
    model: nn.Module, given: Given | None, latents: int, state: StreamState, like: Tensor
) -> Tensor | None:
    """What the given pictures of the next block show, (b, s, t), told to its so many latents of
    sound; None where none are given, or the network is told none."""
    shown = None if given is None else given.shown(state.next_block)
    if shown is None or not model.config.picture_track_channels:
        return None
    clips, (video, after), before = len(state.settings.seeds), shown, min(state.next_block, 1)
    parts = [to_device(video, like).expand(clips, -1, -1, -1, -1)]
    if before:
        parts.insert(0, to_device(state.block(state.next_block - 1).video[:, :, -1:], like))
    video = torch.cat([part.to(like.dtype) for part in parts], dim=2)
    return model.picture_track(video, latents, before, after)


def _embedding_at(constants: SigmaConstants, sigma: float, share: float) -> TimestepEmbedding:
    return constants.embedding(share * sigma)


def _denoised(
    branches: list[tuple[OpenBlock, Text, Tensor | None]],
    state: StreamState,
    memory: Remembered | None,
    sampler: SamplerSettings,
    constants: SigmaConstants,
    noise: NoiseSource,
    on_step: Callable[[Step], None] | None,
    kept: Held | None,
    sees: bool,
) -> BlockLatents:
    """The next block from noise; the first branch is the prompt's, a second the empty prompt's."""
    index, batch = state.next_block, len(state.settings.seeds)
    opened, _, _ = branches[0]
    like = opened.like

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return (
            to_device(noise(index, step, "video", (batch, *opened.video_shape)), like),
            to_device(noise(index, step, "audio", (batch, *opened.audio_shape)), like),
        )

    if kept is not None:
        kept = Held(*(x if x is None else to_device(x, like) for x in kept))
    video, audio = draw(0)
    for step, (sigma, next_sigma) in enumerate(pairwise(sampler.sigmas)):
        level = sigma, sigma - next_sigma if sampler.mode == "few" else 0.0
        if kept is None:
            modulation = constants.at(*level)
        else:
            video, audio = kept.placed(video, audio)
            embeddings = constants.embedding(0.0), constants.embedding(*level)
            text_at = partial(_embedding_at, constants, sigma)
            latents = video, audio, text_at
            modulation = kept.modulation(constants.model, *embeddings, *latents, sees=sees)
        noisy = video.to(like.dtype), audio.to(like.dtype)
        velocities = [
            branch.velocity(
                *noisy,
                text,
                constants.after_refresh(*level) if branch.follows else modulation,
                track,
                memory,
            )
            for branch, text, track in branches
        ]
        (video_v, audio_v), *rest = [tuple(v.float() for v in pair) for pair in velocities]
        if rest:
            video_v = guided(rest[0][0], video_v, sampler.guidance)
            audio_v = guided(rest[0][1], audio_v, sampler.guidance)
        if sampler.method == "euler":
            video = euler(video, video_v, sigma, next_sigma)
            audio = euler(audio, audio_v, sigma, next_sigma)
        else:
            fresh_video, fresh_audio = draw(step + 1) if next_sigma > 0 else (None, None)
            video = renoise(video, video_v, sigma, next_sigma, fresh_video)
            audio = renoise(audio, audio_v, sigma, next_sigma, fresh_audio)
        if on_step is not None:
            on_step(Step(index, step, sampler.steps))
    if kept is not None:
        video, audio = kept.placed(video, audio)
    # The only place where the host waits for the device.
    latents = BlockLatents(video.float().cpu(), audio.float().cpu())
    for modality, value in zip(BlockLatents._fields, latents, strict=True):
        if not torch.isfinite(value).all():
            raise NonFiniteBlockError(index, modality)
    return latents
