"""Parked states share what their pasts share, and go on as if they had never been parked."""

from __future__ import annotations

from dataclasses import replace

import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.parking import parked
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import StreamState


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
