"""What travels on ComfyUI's LATENT wires, out and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.chunk import ChunkOrigin, chunk_origin, chunk_state, chunk_tensors
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.decode import joined
from mutual_forcing.samplers.live import decoded_live
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import StreamState


def made(bundle: Bundle, state: StreamState, blocks: int) -> StreamState:
    """The stream after some more blocks."""
    sampler = sampler_settings("few", 1)
    rolled = rollout(
        bundle,
        bundle.prompt("red ball"),
        state,
        blocks,
        sampler,
    )
    return list(rolled)[-1][1]


def origin_of(stream: StreamState, first: int) -> ChunkOrigin:
    """The stream's last blocks as a chunk."""
    return chunk_origin(stream, first, Clock(stream.layout))


@pytest.fixture(scope="module")
def stream(bundle: Bundle) -> StreamState:
    """A stream of five blocks."""
    return made(bundle, bundle.begin((3,)), 5)


def test_a_chunk_as_tensors_and_back_is_the_same_stream(stream: StreamState) -> None:
    for first in (0, 1, 3):
        origin = origin_of(stream, first)
        again = chunk_state(origin, *chunk_tensors(origin))
        assert again.next_block == stream.next_block
        for one, other in zip(again.latents, stream.latents, strict=True):
            assert torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)


def test_the_wire_carries_no_keys(stream: StreamState) -> None:
    origin = origin_of(stream, 2)
    assert origin.state.cache is None and origin.state.unguided is None
    assert stream.cache is not None


def test_what_another_node_did_to_a_chunk_is_kept_and_the_stream_is_not_touched(
    stream: StreamState,
) -> None:
    origin = origin_of(stream, 2)
    video, audio = chunk_tensors(origin)
    before = stream.latents[2].video.clone()
    video.mul_(2)
    again = chunk_state(origin, video, audio)
    assert torch.equal(again.latents[2].video, before * 2)
    assert torch.equal(stream.latents[2].video, before)
    assert again.latents[1] is stream.latents[1]


def test_a_chunk_of_another_size_is_refused(stream: StreamState) -> None:
    origin = origin_of(stream, 2)
    video, audio = chunk_tensors(origin)
    with pytest.raises(ValueError, match="video latent has shape"):
        chunk_state(origin, video[:, :, 1:], audio)
    with pytest.raises(ValueError, match="audio latent has shape"):
        chunk_state(origin, video, audio[:, :, 1:])


def test_chunks_decoded_one_by_one_are_the_whole(bundle: Bundle, stream: StreamState) -> None:
    decoder = bundle.decoder()
    whole = joined(decoder.decode_from(stream))
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 5)):
        chunk = origin_of(replace(stream, latents=stream.latents[:last]), first)
        parts.append(joined(decoder.decode_from(chunk_state(chunk, *chunk_tensors(chunk)), first)))
    cut = joined(parts)
    assert torch.allclose(cut.video, whole.video, atol=1e-4)
    assert torch.allclose(cut.audio, whole.audio, atol=1e-4)


def test_live_decoding_goes_on_without_a_seam(bundle: Bundle) -> None:
    begun = made(bundle, bundle.begin((3,)), 2)
    rolled = rollout(
        bundle,
        bundle.prompt("red ball"),
        begun,
        2,
        sampler_settings("few", 1),
    )
    decoder = bundle.decoder()
    blocks, states = zip(*decoded_live(rolled, decoder, begun), strict=True)
    expected = joined(decoder.decode_from(states[-1], 2))
    found = joined(blocks)
    assert torch.allclose(found.video, expected.video, atol=1e-4)
    assert torch.allclose(found.audio, expected.audio, atol=1e-4)


def test_a_state_in_an_error_report_is_short(stream: StreamState) -> None:
    """ComfyUI prints the inputs of a node that fails; that must not be megabytes of numbers."""
    assert len(repr(stream)) < 1000
    assert len(repr(origin_of(stream, 2))) < 1000
