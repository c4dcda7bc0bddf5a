"""Decoding one block while the next is denoised: the same blocks, in order, and nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.live import ahead, decoded_live
from mutual_forcing.samplers.rollout import Step, rollout, sampler_settings
from mutual_forcing.samplers.state import StreamState

CPU = torch.device("cpu")


def live(bundle: Bundle, before: StreamState, overlap: bool, **options: object) -> Iterator:
    made = rollout(
        bundle,
        bundle.prompt("red ball"),
        before,
        4,
        sampler_settings("few", 1),
        **options,
    )
    return decoded_live(made, bundle.decoder(), before, overlap=overlap)


def test_overlapped_decoding_gives_the_same_blocks(bundle: Bundle) -> None:
    begun = bundle.begin((3,))
    pairs = zip(live(bundle, begun, True), live(bundle, begun, False), strict=True)
    for (found, after), (expected, state) in pairs:
        assert torch.equal(found.video, expected.video)
        assert torch.equal(found.audio, expected.audio)
        assert after.next_block == state.next_block


def test_an_item_is_made_while_the_one_before_is_in_use_and_no_further_ahead() -> None:
    begun = [threading.Event() for _ in range(5)]

    def make() -> Iterator[int]:
        for index, event in enumerate(begun):
            event.set()
            yield index

    for index in ahead(make(), CPU):
        if index + 1 < len(begun):
            assert begun[index + 1].wait(timeout=5)
        assert not any(event.is_set() for event in begun[index + 2 :])


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


def test_an_error_of_the_consumer_stops_the_maker() -> None:
    made = []

    def make() -> Iterator[int]:
        for index in range(100):
            made.append(index)
            yield index

    def use() -> None:
        for _ in ahead(make(), CPU):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        use()
    assert len(made) <= 2
    assert not any(thread.name.startswith("rollout") for thread in threading.enumerate())


def test_the_makers_thread_keeps_its_callers_mode() -> None:
    """ComfyUI runs nodes in inference mode, and its tensors refuse to be changed outside of it."""

    def make() -> Iterator[torch.Tensor]:
        yield torch.ones(1)

    with torch.inference_mode():
        (found,) = ahead(make(), CPU)
    assert found.is_inference()
    (found,) = ahead(make(), CPU)
    assert not found.is_inference()
