"""Parked states share what their pasts share, and go on as if they had never been parked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.parking import SPOOLED_AT_ONCE, parked, spooled
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state, save_state


def after(bundle: Bundle, state: StreamState, blocks: int) -> StreamState:
    rolled = rollout(
        bundle,
        bundle.prompt("red ball"),
        state,
        blocks,
        sampler_settings("few", 1),
    )
    return list(rolled)[-1][1]


def elsewhere(state: StreamState) -> StreamState:
    """A copy of a state's keys, as a card's memory would be one."""
    blocks = tuple(
        type(block)(*((k.clone(), v.clone()) for k, v in block)) for block in state.cache.blocks
    )
    return replace(state, cache=replace(state.cache, blocks=blocks))


def test_blocks_of_the_past_are_not_copied_again(bundle: Bundle) -> None:
    first = parked(after(bundle, bundle.begin(), 3), bundle.begin())
    second = elsewhere(after(bundle, first, 1))
    kept = parked(second, first)
    old = dict(zip(first.cache.indices, first.cache.blocks, strict=True))
    shared = set(kept.cache.indices) & set(old)
    assert shared
    for index, block in zip(kept.cache.indices, kept.cache.blocks, strict=True):
        if index in shared:
            assert all(
                a.data_ptr() == b.data_ptr()
                for pair, others in zip(block, old[index], strict=True)
                for a, b in zip(pair, others, strict=True)
            )


def test_a_parked_stream_goes_on_as_before(bundle: Bundle) -> None:
    begun = bundle.begin()
    state = after(bundle, begun, 2)
    found, expected = after(bundle, parked(elsewhere(state), begun), 2), after(bundle, state, 2)
    for one, other in zip(found.latents, expected.latents, strict=True):
        assert torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)
    assert parked(begun.without_keys(), begun).cache is None


def test_what_is_not_needed_goes_to_disk_and_stays_the_same(bundle: Bundle, tmp_path: Path) -> None:
    state = after(bundle, bundle.begin(), SPOOLED_AT_ONCE + 8)
    rolled = rollout(
        bundle,
        bundle.prompt("red ball"),
        bundle.begin(),
        SPOOLED_AT_ONCE + 8,
        sampler_settings("few", 1),
        settle=lambda state: spooled(state, tmp_path),
    )
    *_, (_, found) = rolled
    on_disk = [block.video.untyped_storage().filename is not None for block in found.latents]
    assert sum(on_disk) >= SPOOLED_AT_ONCE and on_disk == sorted(on_disk, reverse=True)
    assert list(tmp_path.iterdir()) == []  # mapped, and nameless: nothing can be left behind
    save_state(tmp_path / "s.state", found)
    for other in (state, load_state(tmp_path / "s.state")):
        for one, two in zip(found.latents, other.latents, strict=True):
            assert torch.equal(one.video, two.video) and torch.equal(one.audio, two.audio)
    assert spooled(found, tmp_path) is found
    assert spooled(state, tmp_path / "missing") is state  # a full disk is no reason to stop


def test_a_file_that_cannot_be_mapped_is_no_reason_to_stop(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_maps(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("unable to mmap")

    state = after(bundle, bundle.begin(), SPOOLED_AT_ONCE + 8)
    monkeypatch.setattr(torch, "from_file", out_of_maps)
    assert spooled(state, tmp_path) is state
    assert list(tmp_path.iterdir()) == []
