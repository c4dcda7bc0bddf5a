"""The stream as a value: any cut is the same clip, forks differ, what was made is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.networks.execution import Execution
from mutual_forcing.networks.kv_cache import RollingCache
from mutual_forcing.samplers.noise import named_noise, varied_seed
from mutual_forcing.samplers.rollout import (
    NonFiniteBlockError,
    Prompt,
    SamplerSettings,
    Step,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import BlockLatents, StreamState
from mutual_forcing.tests.tiny import CHANNELS, VIDEO_CHANNELS
from torch import Tensor

FEW = sampler_settings("few", 2)
GUIDED = sampler_settings("multi", 2)
SAMPLERS = pytest.mark.parametrize(
    "sampler",
    [FEW, GUIDED, sampler_settings("few", 2, method="renoise")],
    ids=("few", "guided", "renoise"),
)


def run(
    bundle: Bundle,
    state: StreamState,
    blocks: int,
    sampler: SamplerSettings = FEW,
    text: str = "red ball",
    **options: object,
) -> tuple[list[BlockLatents], StreamState]:
    prompt = bundle.prompt(text, guided=sampler.guidance != 1)
    made = []
    for latents, after in rollout(bundle, prompt, state, blocks, sampler, **options):
        made.append(latents)
        state = after
    return made, state


def equal(a: list[BlockLatents], b: list[BlockLatents]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.video, y.video) and torch.equal(x.audio, y.audio)
        for x, y in zip(a, b, strict=True)
    )


def tensors(state: StreamState) -> list[Tensor]:
    found = [tensor for block in state.latents for tensor in block]
    for cache in (state.cache, state.unguided):
        for block in cache.blocks if cache else ():
            found += [tensor for pair in block for tensor in pair]
    return found


@SAMPLERS
def test_two_blocks_and_then_three_are_five(bundle: Bundle, sampler: SamplerSettings) -> None:
    whole, whole_state = run(bundle, bundle.begin(), 5, sampler)
    first, state = run(bundle, bundle.begin(), 2, sampler)
    then, state = run(bundle, state, 3, sampler)
    assert equal(whole, first + then) and equal(whole, list(state.latents))
    pairs = zip(tensors(whole_state), tensors(state), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_blocks_have_the_layouts_shapes(bundle: Bundle) -> None:
    made, state = run(bundle, bundle.begin((1, 2)), 3)
    assert [tuple(b.video.shape) for b in made] == [(2, VIDEO_CHANNELS, f, 2, 2) for f in (1, 3, 3)]
    assert [tuple(b.audio.shape) for b in made] == [(2, s, CHANNELS) for s in (1, 25, 25)]
    assert state.next_block == 3 and made[0].video.dtype == torch.float32


def test_two_wires_from_one_state_are_two_futures(bundle: Bundle) -> None:
    _, past = run(bundle, bundle.begin(), 2)
    other_past = past.reseeded((varied_seed(0, 1),))
    one, _ = run(bundle, past, 2)
    other, other_state = run(bundle, other_past, 2)
    again, _ = run(bundle, past, 2)
    assert equal(one, again) and not torch.equal(one[0].video, other[0].video)
    assert equal(list(other_state.latents[:2]), list(past.latents))


@SAMPLERS
def test_the_state_given_in_is_unchanged(bundle: Bundle, sampler: SamplerSettings) -> None:
    _, past = run(bundle, bundle.begin(), 4, sampler)
    before, objects = [t.clone() for t in tensors(past)], tensors(past)
    run(bundle, past, 2, sampler)
    after = tensors(past)
    assert all(a is b for a, b in zip(objects, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@SAMPLERS
def test_keys_that_were_dropped_are_rebuilt_as_they_were(
    bundle: Bundle, sampler: SamplerSettings
) -> None:
    """Also where the stream is longer than its window (2 blocks)."""
    _, past = run(bundle, bundle.begin(), 5, sampler)
    seen: list[tuple[int, int]] = []
    kept, _ = run(bundle, past, 2, sampler)
    rebuilt, _ = run(
        bundle, past.without_keys(), 2, sampler, on_rebuild=lambda done, of: seen.append((done, of))
    )
    assert equal(kept, rebuilt)
    assert seen == [(i, 5) for i in range(5)] * (2 if sampler is GUIDED else 1)


def test_guidance_that_comes_back_finds_its_keys_rebuilt(bundle: Bundle) -> None:
    _, past = run(bundle, bundle.begin(), 4, GUIDED)
    kept, _ = run(bundle, past, 2, GUIDED)
    rebuilt, _ = run(bundle, replace(past, unguided=None), 2, GUIDED)
    assert equal(kept, rebuilt)
    _, without = run(bundle, past, 1, FEW)
    assert without.unguided is None  # it would have fallen behind
    assert run(bundle, without, 1, GUIDED)[1].unguided.indices == (0, 3, 4)


def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch(bundle: Bundle) -> None:
    both, _ = run(bundle, bundle.begin((3, 8)), 2)
    alone, _ = run(bundle, bundle.begin((8,)), 2)
    assert torch.allclose(both[1].video[1:], alone[1].video, atol=1e-5)
    assert torch.allclose(both[1].audio[1:], alone[1].audio, atol=1e-5)


def test_sampling_leaves_the_global_random_numbers_as_found(bundle: Bundle) -> None:
    before = torch.get_rng_state()
    run(bundle, bundle.begin(), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_an_interrupt_acts_within_one_step_and_keeps_finished_blocks(bundle: Bundle) -> None:
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if step == Step(block=2, step=0, steps=2):
            raise KeyboardInterrupt

    kept = []
    prompt = bundle.prompt("red ball")
    with pytest.raises(KeyboardInterrupt):
        for latents, after in rollout(
            bundle,
            prompt,
            bundle.begin(),
            5,
            FEW,
            on_step=on_step,
        ):
            kept.append(latents)
            state = after
    assert [(s.block, s.step) for s in steps] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    whole, _ = run(bundle, bundle.begin(), 5)
    assert equal(kept, whole[:2])
    assert equal(kept + run(bundle, state, 3)[0], whole)


def test_a_rebuild_can_be_interrupted(bundle: Bundle) -> None:
    _, past = run(bundle, bundle.begin(), 3)

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bundle, past.without_keys(), 1, on_rebuild=stop)


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_nan_names_its_block_and_keeps_those_before(bundle: Bundle, stream: str) -> None:
    def noise(block: int, step: int, name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = named_noise(0, block, step, name, shape)
        return drawn * torch.nan if (block, name) == (2, stream) else drawn

    kept = []
    made = rollout(
        bundle,
        bundle.prompt("red ball"),
        bundle.begin(),
        4,
        FEW,
        noise=noise,
    )
    with pytest.raises(
        NonFiniteBlockError, match=r"block 2 .*2 blocks before it are kept"
    ) as caught:
        for latents, _ in made:
            kept.append(latents)
    assert caught.value.block == 2 and len(kept) == 2
    assert all(torch.isfinite(b.video).all() and torch.isfinite(b.audio).all() for b in kept)


def test_memory_and_work_are_flat_once_the_window_is_full(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, work = bundle.transformer.kernel, []

    def counting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        work[-1] += q.shape[2] * k.shape[2]
        return plain(q, k, v, mask)

    monkeypatch.setattr(bundle.transformer, "kernel", counting)
    # A tape does the same work without calling the kernel.
    monkeypatch.setattr("mutual_forcing.samplers.rollout.TAPED_NUMBERS", 0)
    held: list[int] = []
    work.append(0)
    for _, state in rollout(
        bundle,
        bundle.prompt("red ball"),
        bundle.begin(),
        9,
        GUIDED.__class__("few", (1.0, 0.0)),
    ):
        held.append(state.cache.bytes())
        work.append(0)
    window = state.settings.window
    # The keys of a state lie one block behind its latents.
    assert len(set(held[window + 1 :])) == 1 and held[window + 1] > held[window]
    assert len(set(work[window + 2 : 9])) == 1 and work[window + 2] > work[window + 1]
    assert state.cache.indices == (0, 6, 7)


def test_a_block_is_handed_out_before_its_refresh(bundle: Bundle) -> None:
    """The first chunk does not wait for keys, and keys that nobody would look at are not made."""
    stages: list[str] = []

    @contextmanager
    def watch(stage: str) -> Iterator[None]:
        stages.append(stage)
        yield

    made = rollout(
        bundle,
        bundle.prompt("red ball"),
        bundle.begin(),
        3,
        FEW,
        execution=Execution(watch=watch),
    )
    per_block = []
    for _ in made:
        per_block.append([stage for stage in stages if stage != "open"])
        stages.clear()
    denoised = ["denoise"] * FEW.steps
    # From the second block on the refresh is part of the next block's first pass.
    later = ["refresh and denoise", *denoised[1:]]
    assert per_block == [denoised, ["refresh", *denoised], later] and not stages


def test_keys_in_another_type_are_brought_to_the_models(bundle: Bundle) -> None:
    """A state that was made in bfloat16, or on another device, goes on in a float32 model."""
    _, past = run(bundle, bundle.begin(), 2)
    half = replace(past, cache=past.cache.to(torch.zeros(0, dtype=torch.bfloat16)))
    made, after = run(bundle, half, 1)
    assert all(t.dtype == torch.float32 for t in tensors(after))
    assert torch.allclose(made[0].video, run(bundle, past, 1)[0][0].video, atol=0.1)


def attempt(
    bundle: Bundle, state: StreamState | None = None, **changes: object
) -> Callable[[], object]:
    arguments = {
        "model": bundle,
        "prompt": bundle.prompt("red ball"),
        "state": state or bundle.begin(),
        "blocks": 1,
        "sampler": FEW,
    }
    return lambda: rollout(**(arguments | changes))


def test_what_cannot_work_is_refused_before_any_block_is_asked_for(bundle: Bundle) -> None:
    _, made = run(bundle, bundle.begin(), 1)
    _, later = run(bundle, bundle.begin(), 3)
    two = Prompt(bundle.prompt_of(torch.cat([bundle.embed("bell")] * 2)).text)
    cases = {
        "made by model": attempt(bundle, model=replace(bundle, model_id="another")),
        "version 99": attempt(bundle, replace(made, version=99)),
        "another model": attempt(bundle, replace(made, layout=replace(made.layout, video_first=4))),
        "guidance needs": attempt(bundle, sampler=GUIDED),
        "found guidance 2 for few-step mode": attempt(
            bundle, sampler=sampler_settings("few", 1, 2.0)
        ),
        "blocks is 0": attempt(bundle, blocks=0),
        "2 entries and the stream 3 clips": attempt(bundle, bundle.begin((1, 2, 3)), prompt=two),
        "without_keys": attempt(bundle, replace(made, cache=RollingCache(3))),
        "at most 1 and 2": attempt(bundle, replace(later, latents=later.latents[:1])),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_sampler_settings_that_make_no_sense_say_so() -> None:
    cases = {
        "mode is 'fast'": lambda: sampler_settings("fast"),
        "method is 'heun'": lambda: sampler_settings("few", method="heun"),
        "choose mode 'multi'": lambda: SamplerSettings("few", (1.0, 0.0), guidance=3.0),
        "few-step mode is 5.0": lambda: sampler_settings("few", guidance=5.0),
        "guidance is 0.5": lambda: sampler_settings("multi", guidance=0.5),
        "guidance is nan": lambda: sampler_settings("multi", guidance=float("nan")),
        "falling values": lambda: SamplerSettings("few", (1.0, 0.5, 0.6, 0.0)),
        "1 down to 0": lambda: SamplerSettings("few", (1.5, 0.0)),
        "expected 1 to 1000": lambda: sampler_settings("multi", 0),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_settings_of_a_stream_are_checked(bundle: Bundle) -> None:
    for message, call in {
        "window is 0": lambda: bundle.begin(window=0),
        "no seed": lambda: bundle.begin(()),
        "2 clips, found 1": lambda: bundle.begin((1, 2)).reseeded((1,)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
