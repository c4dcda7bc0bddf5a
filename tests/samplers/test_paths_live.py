"""Decoding one block while the next is denoised: the same blocks, in order, and nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.decode import DecodedBlock
from mutual_forcing.samplers.live import Use, behind, decoded_live
from mutual_forcing.samplers.rollout import Step, rollout, sampler_settings
from mutual_forcing.samplers.state import StreamState

CPU = torch.device("cpu")


def live(
    bundle: Bundle, before: StreamState, overlap: bool, use: Use | None = None, **options: object
) -> Iterator:
    made = rollout(
        bundle,
        bundle.prompt("red ball"),
        before,
        4,
        sampler_settings("few", 1),
        **options,
    )
    return decoded_live(made, bundle.decoder(), before, use, overlap=overlap)


def test_overlapped_decoding_gives_the_same_blocks(bundle: Bundle) -> None:
    begun = bundle.begin((3,))
    pairs = zip(live(bundle, begun, True), live(bundle, begun, False), strict=True)
    for (found, after), (expected, state) in pairs:
        assert torch.equal(found.video, expected.video)
        assert torch.equal(found.audio, expected.audio)
        assert after.next_block == state.next_block


def test_an_item_is_made_while_the_one_before_is_worked_on_and_no_further_ahead() -> None:
    begun = [threading.Event() for _ in range(5)]

    def make() -> Iterator[int]:
        for index, event in enumerate(begun):
            event.set()
            yield index

    def work(index: int) -> int:
        if index + 1 < len(begun):
            assert begun[index + 1].wait(timeout=5)
        assert not any(event.is_set() for event in begun[index + 2 :])
        return 2 * index

    assert list(behind(make(), work, CPU)) == [0, 2, 4, 6, 8]


def test_a_block_is_used_before_the_next_one_is_there(bundle: Bundle) -> None:
    """A preview that waited for the next block would come a block late."""
    used, begun = [], bundle.begin()
    shown = threading.Event()

    def on_step(step: Step) -> None:
        if step.block == 1:
            assert shown.wait(timeout=5)

    def use(decoded: DecodedBlock, state: StreamState) -> None:
        used.append(state.next_block)
        shown.set()

    blocks = list(live(bundle, begun, True, use, on_step=on_step))
    assert used == [state.next_block for _, state in blocks] == [1, 2, 3, 4]


def test_an_interrupt_while_sampling_comes_after_all_that_was_finished(bundle: Bundle) -> None:
    def on_step(step: Step) -> None:
        if step.block == 2:
            raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        for decoded, _ in live(bundle, bundle.begin(), True, on_step=on_step):
            kept.append(decoded)
    whole = [decoded for decoded, _ in live(bundle, bundle.begin(), False)]
    assert len(kept) == 2
    assert all(torch.equal(a.video, b.video) for a, b in zip(kept, whole, strict=False))


def test_an_error_in_the_work_stops_the_maker() -> None:
    made = []

    def make() -> Iterator[int]:
        for index in range(100):
            made.append(index)
            yield index

    def work(index: int) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        list(behind(make(), work, CPU))
    assert len(made) <= 2
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_the_workers_thread_keeps_its_callers_mode() -> None:
    """ComfyUI runs nodes in inference mode, and its tensors refuse to be changed outside of it."""

    def work(_: int) -> torch.Tensor:
        return torch.ones(1)

    with torch.inference_mode():
        (found,) = behind(iter([1]), work, CPU)
    assert found.is_inference()
    (found,) = behind(iter([1]), work, CPU)
    assert not found.is_inference()
