"""One measured rollout: blocks in turn, each with its stages, its floor and its plain double."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter
from statistics import median
from typing import Literal

import torch

from ...networks.execution import Execution
from ...networks.fp8 import use_fp8
from ...networks.kept_keys import AS_COMPUTED, Kept
from ...samplers.decode import StreamDecoder
from ...samplers.live import behind
from ...samplers.model import BareModel, StreamModel
from ...samplers.rollout import Prompt, SamplerSettings, rollout
from ...samplers.sigmas import few_step_sigmas
from ...samplers.state import BlockLatents, StreamState
from .breakdown import Breakdown, breakdown
from .floor import Rates, block_work, measure_rates, rates_of_rows
from .hosted import hosted_model
from .plain import plain_block
from .setups import Setup
from .stopwatch import NO_TIME, Span, Stopwatch, now, since, spanned

try:
    import resource
except ImportError:  # not on Windows, where memory is not measured
    resource = None


HostMode = Literal["view", "whole", "low", "dynamic", "usual"]


@dataclass(frozen=True)
class Workload:
    """What to measure; see the command line of `lab.bench.rollout`."""

    setup: Setup
    blocks: int
    steps: int
    dtype: torch.dtype
    device: torch.device
    execution: Execution
    decode: bool = False
    overlap: bool = False
    plain: bool = False
    fp8: bool = False
    profile: bool = False
    host: HostMode | None = None
    separate: bool = False
    kept: Kept = AS_COMPUTED

    @property
    def sampler(self) -> SamplerSettings:
        """Few steps, told to the network as multi-step mode: the work is the same."""
        return SamplerSettings("multi", few_step_sigmas(self.steps, self.setup.entries))

    def network(self) -> StreamModel:
        """The network with random weights, and what computes with it.

        Raises:
            ValueError: it cannot be had.
        """
        if self.host is not None:
            weights = "fp8, fast" if self.fp8 else "as in the file"
            return hosted_model(self.setup, self.dtype, self.device, self.host, weights)
        model = self.setup.model(self.dtype, self.device)
        return BareModel(model, self.setup.name, next(model.parameters()).new_empty(0))

    @property
    def element_size(self) -> int:
        """Bytes of a number, weights in eight bits not considered."""
        return self.dtype.itemsize


@dataclass
class Block:
    """One block.

    Attributes:
        frames: pictures that it adds.
        span: from asking for it until it is out (decoded, where that is asked for).
        stages: seconds of each.
        floor: the least that the machine could need by either clock, from rates measured around it.
        attended: the same with attention at the rate of torch's own.
        plain, difference: of the plainest correct rollout, where it is measured: its time, and how
            far its block is from ours (largest difference over largest value).
        separate: of our rollout with a refresh by itself, where it is measured.
    """

    frames: int
    span: Span
    stages: dict[str, float]
    floor: Span = NO_TIME
    attended: Span = NO_TIME
    plain: Span | None = None
    difference: float | None = None
    separate: Span | None = None


@dataclass
class Measured:
    """A rollout.

    Attributes:
        prompt: seconds for the text keys, once.
        first_chunk: seconds from the text embedding until blocks 0 and 1 are out; None for one
            block.
        peak_bytes: the most memory there ever was, on the device; None where nobody tells.
        fp8: relative difference (L2) of block 0 in eight bits, per modality.
        stages: seconds of each stage in all blocks.
        rows: FLOPs a second of a layer's products over so many tokens.
        breakdown: where the time of one more block goes.
        path: how passes were carried out.
    """

    prompt: float
    blocks: list[Block]
    rates: Rates
    peak_bytes: int | None
    stages: dict[str, float]
    fp8: dict[str, float] | None = None
    rows: dict[int, float] = field(default_factory=dict)
    breakdown: Breakdown | None = None
    path: str = ""
    first_chunk: float | None = field(init=False)

    def __post_init__(self) -> None:
        two = self.blocks[:2]
        chunk = self.prompt + sum(block.span.wall for block in two)
        self.first_chunk = chunk if len(two) == 2 else None


@torch.no_grad()
def measure(load: Workload) -> Measured:
    """Run it once, after a block or two to warm up (libraries, compilers, memory)."""
    setup, device = load.setup, load.device
    model = load.network()
    decoder = setup.decoder(device) if load.decode else None
    own_fp8 = load.fp8 and load.host is None
    difference = _in_eight_bits(load, model) if own_fp8 else None
    still = 0 if load.kept == AS_COMPUTED else None
    execution = load.execution.chosen(model.transformer, device, still)
    load = replace(load, execution=execution)
    # What reads a past is compiled for the first block that has one, and what reads two blocks at
    # once for the next.
    first = replace(load, blocks=3 if execution.compiled else 1)
    for _ in _blocks(first, model, decoder, Stopwatch(device)):
        pass
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch, blocks, rates, past = Stopwatch(device), [], [], ()
    # The machine is measured between the blocks, where that does not get in the way of an overlap.
    between = not load.overlap
    rates.append(measure_rates(setup, load.dtype, device))
    prompt = spanned(lambda: setup.text(model.transformer, model.like), device).wall
    apart = replace(load, execution=replace(execution, merged=False))
    beside = _blocks(apart, model, decoder, Stopwatch(device)) if load.separate else None
    more = replace(load, blocks=load.blocks + load.profile)
    made = _blocks(more, model, decoder, watch)
    for latents, block in islice(made, load.blocks):
        if load.plain:
            _beside(load, model, past, latents, block)
        if beside is not None:
            block.separate = next(beside)[1].span
        past = (*past, latents)
        blocks.append(block)
        if between:
            rates.append(measure_rates(setup, load.dtype, device))
    rates = rates if between else [*rates, measure_rates(setup, load.dtype, device)]
    peak = _peak(load)
    like = torch.empty(0, dtype=load.dtype, device=device)
    spent = breakdown(lambda: next(made), like) if load.profile else None
    typical = _typical(rates)
    for index, block in enumerate(blocks):
        around = _typical(rates[index : index + 2]) if between else typical
        work = block_work(setup, index, load.steps, load.element_size)
        clocks = [attrgetter(name) for name in Span._fields]
        block.floor = Span(*(around.floor(work, clock) for clock in clocks))
        block.attended = Span(*(around.floor(work, clock, apart=True) for clock in clocks))
    stages = watch.read() if load.overlap else {}
    for block in blocks:
        for stage, seconds in block.stages.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    rows = rates_of_rows(setup, load.dtype, device)
    beside = difference, rows, spent, execution.name
    return Measured(prompt, blocks, typical, peak, stages, *beside)


def _blocks(
    load: Workload, model: StreamModel, decoder: StreamDecoder | None, watch: Stopwatch
) -> Iterator[tuple[BlockLatents, Block]]:
    setup = load.setup
    made = rollout(
        model,
        Prompt(setup.text(model.transformer, model.like)),
        setup.begin(model, load.kept),
        load.blocks,
        load.sampler,
        execution=replace(load.execution, watch=watch),
    )
    video_memory = audio_memory = None

    def decode(item: tuple[BlockLatents, StreamState]) -> BlockLatents:
        nonlocal video_memory, audio_memory
        latents, _ = item
        if decoder is not None:
            with watch("video decode"):
                _, video_memory = decoder.decode_video(latents.video, video_memory)
            with watch("audio decode"):
                _, audio_memory = decoder.decode_audio(latents.audio, audio_memory)
        return latents

    decoded = behind(made, decode, load.device) if load.overlap else map(decode, made)
    for index in range(load.blocks):
        start = now()
        latents = next(decoded)
        span = since(start)
        first, last = setup.clock.frame_span(index)
        # While the next block is on its way its stages cannot be told apart from this one's.
        yield latents, Block(last - first, span, {} if load.overlap else watch.read())


def _beside(
    load: Workload,
    model: StreamModel,
    past: tuple[BlockLatents, ...],
    ours: BlockLatents,
    block: Block,
) -> None:
    """Make the same block plainly, and note its time and how far it is from ours."""
    start = now()
    made = plain_block(load.setup, model.transformer, model.like, past, load.sampler)
    block.plain = since(start)
    pairs = zip(ours, made, strict=True)
    block.difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _in_eight_bits(load: Workload, model: StreamModel) -> dict[str, float]:
    """Turn the model to eight bits; how far block 0 is from what it was before."""
    first = replace(load, blocks=1, overlap=False)

    def block() -> BlockLatents:
        ((latents, _),) = _blocks(first, model, None, Stopwatch(load.device))
        return latents

    before = block()
    use_fp8(model.transformer, compiled=load.execution.compiled)
    return {
        name: ((a - b).norm() / b.norm()).item()
        for name, a, b in zip(BlockLatents._fields, block(), before, strict=True)
    }


def _typical(rates: list[Rates]) -> Rates:
    def middle(name: str) -> Span:
        spans = [getattr(rate, name) for rate in rates]
        return Span(median(s.wall for s in spans), median(s.cpu for s in spans))

    return rates[0]._replace(**{name: middle(name) for name in ("matmul", "copy", "attention")})


def _peak(load: Workload) -> int | None:
    if load.device.type == "cuda":
        return torch.cuda.max_memory_allocated(load.device)
    # The process's peak: beside a plain rollout it would be that one's.
    if resource is None or load.plain:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10
