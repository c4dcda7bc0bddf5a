"""A block is read in the first pass of the next one: the same stream in fewer passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, save_bundle
from mutual_forcing.networks import allocated
from mutual_forcing.networks.execution import EAGER, Execution
from mutual_forcing.networks.few_step import FEW_STEP
from mutual_forcing.networks.kept_keys import ATTENTIONS
from mutual_forcing.networks.kv_cache import BlockInput, OpenBlock, RollingCache
from mutual_forcing.networks.tape import Tape
from mutual_forcing.networks.transcript import TranscriptConfig
from mutual_forcing.samplers import rollout as rollout_module
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.rollout import (
    BeginAgain,
    SamplerSettings,
    Step,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.schedule import KEEP, Line, Transition
from mutual_forcing.samplers.start import Given
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.tests.tiny import STREAM, TRANSFORMER, VIDEO_CHANNELS, tiny_parts
from torch import Tensor, nn

SEPARATE = Execution(merged=False)
FEW, GUIDED = sampler_settings("few", 4), sampler_settings("multi", 3)
TOLD = TranscriptConfig(("low", "high"), {}, rate=3.0)
A, B = "red ball", "face says low high"
# By block. Block 2 and the mixture of blocks 4 and 5 are read with another prompt than the next one
# has; at block 6 the whole window is read again, at block 7 the last one.
TURNS = {3: (B, KEEP), 4: (A, Transition(blend=1)), 6: (B, Transition(99)), 7: (A, Transition(1))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All that a small model may have: adapters that act, sinks, a step size, a transcript."""
    path = tmp_path_factory.mktemp("merged") / "model.safetensors"
    config = replace(TRANSFORMER, transcript_channels=TOLD.channels, few_step_rank=2)
    parts = tiny_parts(0, config)
    for name, parameter in parts[0].named_parameters():
        if FEW_STEP in name:
            nn.init.normal_(parameter, std=0.1)
    save_bundle(path, *parts, STREAM, transcript=TOLD, title="tiny")
    return load_bundle(path)


def states(
    bundle: Bundle,
    blocks: int,
    state: StreamState | None = None,
    sampler: SamplerSettings = FEW,
    execution: Execution = EAGER,
    **options: object,
) -> list[StreamState]:
    time = Clock.of(bundle.transformer.config).time_of
    lines = [Line(0, (A,)), *(Line(time(at), (text,), how) for at, (text, how) in TURNS.items())]
    schedule = bundle.schedule(lines, guided=sampler is GUIDED)
    state = state or bundle.begin((1, 2))
    made = rollout(bundle, schedule, state, blocks, sampler, execution=execution, **options)
    return [after for _, after in made]


@pytest.mark.parametrize("sampler", [FEW, GUIDED], ids=("few", "guided"))
def test_passes_of_a_small_network_on_a_cpu_are_tapes_of_the_same_bits(
    bundle: Bundle, sampler: SamplerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[Tape] = []
    play = Tape.__call__
    monkeypatch.setattr(Tape, "__call__", lambda tape, *x: played.append(tape) or play(tape, *x))
    taped = states(bundle, 20, None, sampler)[-1]
    assert len(set(played)) >= 2 and len(played) > 6
    monkeypatch.setattr(rollout_module, "TAPED_NUMBERS", 0)
    count = len(played)
    plain = states(bundle, 20, None, sampler)[-1]
    assert len(played) == count
    for ours, theirs in zip(taped.latents, plain.latents, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("absolute", [False, True], ids=("re-based", "absolute"))
def test_a_line_in_mid_block_goes_on_with_the_same_tapes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    """Nothing is noted again while somebody waits, and its schedule makes the same bits."""
    config = replace(bundle.transformer.config, absolute_positions=absolute)
    monkeypatch.setattr(bundle.transformer, "config", config)
    noted, played, before = [], [], []
    note, play = Tape.__init__, Tape.__call__
    monkeypatch.setattr(Tape, "__init__", lambda tape, *x: noted.append(0) or note(tape, *x))
    monkeypatch.setattr(Tape, "__call__", lambda tape, *x: played.append(0) or play(tape, *x))
    schedule, began = bundle.schedule([Line(0, (A,))]), bundle.begin((1, 2), window=3)

    def on_step(step: Step) -> None:
        if step[:2] == (10, 1) and not before:
            before.extend((len(noted), len(played)))
            schedule.tell(B, Transition(reread=1))
            raise BeginAgain

    *_, (_, typed) = rollout(bundle, schedule, began, 13, FEW, on_step=on_step)
    # But for the pass that reads the last block again, which sees less of the past.
    assert [len(noted), len(played)] == [before[0], before[1] + 3 * FEW.steps - 1]
    monkeypatch.setattr(rollout_module, "TAPED_NUMBERS", 0)
    lines = typed.schedule
    assert [line.texts for line in lines] == [(A,), (B,)] and len(noted) == before[0] > 0
    *_, (_, plain) = rollout(bundle, bundle.schedule(lines), began, 13, FEW)
    for ours, theirs in zip(typed.latents, plain.latents, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@contextmanager
def rows(bundle: Bundle) -> Iterator[list[int]]:
    """How many tokens of a clip each pass takes through the first product of pictures."""
    found: list[int] = []

    def note(_module: nn.Module, inputs: tuple[Tensor, ...], _out: Tensor) -> None:
        found.append(inputs[0].shape[:-1].numel() // 2)

    hook = bundle.transformer.patchify_proj.register_forward_hook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_module, "TAPED_NUMBERS", 0)  # a tape calls no module
        yield found
    hook.remove()


@pytest.mark.parametrize("sampler", [FEW, GUIDED], ids=("few", "guided"))
def test_it_is_the_same_stream(bundle: Bundle, sampler: SamplerSettings) -> None:
    """Past the window of 2 blocks, and through every kind of turn to another prompt."""
    merged, separate = (states(bundle, 8, None, sampler, how) for how in (EAGER, SEPARATE))
    for ours, theirs in zip(merged[-1].latents, separate[-1].latents, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("execution", [EAGER, SEPARATE], ids=("merged", "separate"))
def test_a_past_that_is_laid_out_once_a_block_is_the_same_bits(
    bundle: Bundle, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As small ones are on a CPU, and larger ones are not."""
    laid: list[int] = []
    lay_out = OpenBlock._lay_out
    monkeypatch.setattr(
        OpenBlock, "_lay_out", lambda block, name: laid.append(block.index) or lay_out(block, name)
    )
    once = states(bundle, 6, execution=execution)[-1]
    assert laid == [block for block in range(1, 6) for _ in ATTENTIONS]
    monkeypatch.setattr(allocated, "LAID_OUT_BYTES", 0)
    each_time = states(bundle, 6, execution=execution)[-1]
    assert len(laid) == 5 * len(ATTENTIONS)
    for ours, theirs in zip(once.latents, each_time.latents, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_four_steps_are_four_passes_and_a_block_is_read_in_the_first(bundle: Bundle) -> None:
    """But for the prefix, which has another shape."""
    prefix, block = 4, 12
    steps = [block] * 4
    with rows(bundle) as merged:
        states(bundle, 8)
    later = [2 * block, *steps[1:]]
    # At block 6 the prefix and both blocks of the window are read again, the last one as always.
    again = [prefix, block, *later]
    assert merged == [*[prefix] * 4, prefix, *steps, *later * 4, *again, *later]
    with rows(bundle) as separate:
        states(bundle, 4, None, FEW, SEPARATE)
    assert separate == [*[prefix] * 4, prefix, *steps, *[block, *steps] * 2]


def test_a_blocks_keys_come_from_products_of_one_size(bundle: Bundle) -> None:
    """In the stream, made again, and where the next block is given: so they are the same bits."""
    *_, before, after = states(bundle, 5)
    expected = after.cache.blocks[-1]
    given = Given(
        bundle.transformer.config.layout, 4, video=torch.zeros(1, VIDEO_CHANNELS, 3, 2, 2)
    )
    ways = {
        "made again": {"state": before.without_keys()},
        "given": {"state": before, "given": given},
        "both": {"state": before.without_keys(), "given": given},
    }
    # The prefix alone, each later block as half of a batch; then steps.
    passes = {"made again": [4, 24, 24, 24], "given": [24, 12], "both": [4, 24, 24, 24, 12]}
    for name, options in ways.items():
        with rows(bundle) as found:
            (other,) = states(bundle, 1, **options)
        assert found == [*passes[name], 12, 12, 12], name
        found = other.cache.blocks[-1]
        for ours, theirs in zip(expected, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


def test_the_first_block_cannot_be_half_of_a_batch(bundle: Bundle) -> None:
    like = torch.empty(0)
    opened = OpenBlock(bundle.transformer, RollingCache(2), 2, 2, like)
    with pytest.raises(ValueError, match="another shape than the next; commit it first"):
        opened.followed(BlockInput(like, like, bundle.prompt(A).text))
