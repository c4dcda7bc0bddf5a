"""Decoding in any cut is decoding the whole, also from the middle of a stream."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle
from mutual_forcing.networks.video_codec import VideoCodec
from mutual_forcing.samplers.chunk import chunk_origin, chunk_state, chunk_tensors
from mutual_forcing.samplers.decode import DecodedBlock, joined
from mutual_forcing.samplers.live import live_clip
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import BlockLatents, DecodeState, Memory, StreamState
from mutual_forcing.tests.tiny import CHANNELS, VIDEO_CHANNELS, save_tiny

BLOCKS = 5
FEW = sampler_settings("few", 1)


@pytest.fixture(scope="module")
def stream(bundle: Bundle) -> StreamState:
    generator = torch.Generator().manual_seed(0)
    layout = bundle.transformer.config.layout

    def block(index: int) -> BlockLatents:
        video, audio = layout.video_span(index), layout.audio_span(index)
        return BlockLatents(
            torch.randn(2, VIDEO_CHANNELS, video[1] - video[0], 2, 2, generator=generator),
            torch.randn(2, audio[1] - audio[0], CHANNELS, generator=generator),
        )

    start = bundle.begin((0, 1))
    return StreamState(
        start.settings, bundle.model_id, start.layout, tuple(block(i) for i in range(BLOCKS))
    )


@pytest.fixture(scope="module")
def whole(bundle: Bundle, stream: StreamState) -> DecodedBlock:
    return bundle.decoder().decode(together(stream, 0, BLOCKS))[0]


def together(stream: StreamState, start: int, stop: int) -> BlockLatents:
    blocks = stream.latents[start:stop]
    return BlockLatents(
        torch.cat([b.video for b in blocks], dim=2), torch.cat([b.audio for b in blocks], dim=1)
    )


def difference(a: DecodedBlock, b: DecodedBlock) -> float:
    assert a.video.shape == b.video.shape and a.audio.shape == b.audio.shape
    return max((a.video - b.video).abs().max().item(), (a.audio - b.audio).abs().max().item())


def test_shapes_ranges_and_lengths(bundle: Bundle, whole: DecodedBlock) -> None:
    clock = bundle.clock
    assert whole.video.shape == (2, clock.frames(BLOCKS), *bundle.pixel_size, 3)
    assert whole.audio.shape == (2, 1, clock.samples(BLOCKS))
    assert whole.video.min() >= 0 and whole.video.max() <= 1 and whole.video.std() > 0.05
    assert whole.audio.abs().max() <= 1 and whole.audio.std() > 0.01


@settings(max_examples=4, deadline=None)
@given(st.sets(st.integers(1, BLOCKS - 1)))
def test_chunks_are_the_whole(
    bundle: Bundle, stream: StreamState, whole: DecodedBlock, cuts: set[int]
) -> None:
    decoder, memory, parts = bundle.decoder(), None, []
    edges = [0, *sorted(cuts), BLOCKS]
    for start, stop in pairwise(edges):
        decoded, memory = decoder.decode(together(stream, start, stop), memory)
        parts.append(decoded)
    assert difference(joined(parts), whole) < 1e-4


@pytest.mark.parametrize("first", range(BLOCKS))
def test_decoding_from_any_block_is_the_end_of_the_whole(
    bundle: Bundle, stream: StreamState, whole: DecodedBlock, first: int
) -> None:
    part = joined(bundle.decoder().decode_from(stream, first))
    frame, sample = bundle.clock.frames(first), bundle.clock.samples(first)
    end = DecodedBlock(whole.video[:, frame:], whole.audio[:, :, sample:])
    assert difference(part, end) < 1e-4


def test_what_is_remembered_is_not_written_into(bundle: Bundle, stream: StreamState) -> None:
    decoder = bundle.decoder()
    _, memory = decoder.decode(stream.latents[0])
    before = [t.clone() for t in (*memory.video, *memory.audio.caches, memory.audio.vocoder.phase)]
    one, _ = decoder.decode(stream.latents[1], memory)
    decoder.decode(stream.latents[2], memory)
    again, _ = decoder.decode(stream.latents[1], memory)
    after = (*memory.video, *memory.audio.caches, memory.audio.vocoder.phase)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert difference(one, again) == 0


def test_the_video_context_is_three_latents_and_no_more(
    bundle: Bundle, stream: StreamState
) -> None:
    assert VideoCodec().context_latents == bundle.video_codec.context_latents == 3
    video = together(stream, 0, BLOCKS).video
    other = video.clone()
    other[:, :, 6] += 1
    a, b = bundle.video_codec.decode(video)[0], bundle.video_codec.decode(other)[0]
    changed = (a != b).amax(dim=(0, 1, 3, 4)).nonzero()
    assert changed.min() >= 8 * 6 - 7 and changed.max() <= 8 * (6 + 3)


def test_a_block_that_is_not_there_is_named(bundle: Bundle, stream: StreamState) -> None:
    for block in (-1, BLOCKS + 1):
        with pytest.raises(ValueError, match=f"has {BLOCKS} blocks.*found {block}"):
            list(bundle.decoder().decode_from(stream, block))
    assert list(bundle.decoder().decode_from(stream, BLOCKS)) == []


@pytest.fixture(scope="module")
def live(bundle: Bundle) -> list[StreamState]:
    """The states of a stream that was decoded as it was made."""
    begun = bundle.begin((3,))
    words = bundle.prompt("red ball")
    made = live_clip(bundle, words, begun, BLOCKS + 1, FEW, bundle.decoder())
    return [state for _, state in made]


def heard(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of audio latents of every call that decodes some."""
    plain, lengths = type(bundle.audio_codec).decode, []

    def decode(self: object, latent: torch.Tensor, *state: object) -> object:
        lengths.append(latent.shape[1])
        return plain(self, latent, *state)

    monkeypatch.setattr(type(bundle.audio_codec), "decode", decode)
    return lengths


def test_going_on_costs_the_same_at_any_age(
    bundle: Bundle, live: list[StreamState], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, decoder = heard(bundle, monkeypatch), bundle.decoder()
    for state in live[1:]:
        lengths.clear()
        memory = decoder.remember(state, state.next_block)
        assert sum(lengths) <= 1  # to see that the memory is of these decoders
    lengths.clear()
    whole = decoder.remember(replace(state, memory=None), state.next_block)
    assert sum(lengths) == state.layout.audio_latents(state.next_block)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(memory.tensors()[name], tensor, atol=1e-4, rtol=0)
    # Blocks that were not decoded are made up for, and no others.
    older = replace(state, memory=live[2].memory)
    lengths.clear()
    assert decoder.caught_up(older).memory.blocks == state.next_block
    assert sum(lengths) <= 1 + 25 * (state.next_block - 3)


def test_a_trimmed_stream_goes_on_bit_for_bit(bundle: Bundle, live: list[StreamState]) -> None:
    words, state = bundle.prompt("red ball"), live[-2]
    trimmed = state.trimmed()
    assert trimmed.next_block == state.next_block and len(trimmed.latents) < len(state.latents)
    blocks = [
        list(live_clip(bundle, words, past, 2, FEW, bundle.decoder(), settle=StreamState.trimmed))
        for past in (state, trimmed)
    ]
    for (one, after), (other, then) in zip(*blocks, strict=True):
        assert torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)
        assert after.next_block == then.next_block
    assert len(then.trimmed().latents) == len(trimmed.latents)  # as large at any age
    with pytest.raises(ValueError, match=r"no longer holds its first \d+ blocks.*saved whole"):
        list(bundle.decoder().decode_from(trimmed, 0))
    with pytest.raises(ValueError, match="no longer holds"):
        list(live_clip(bundle, words, trimmed.without_keys(), 1, FEW, bundle.decoder()))
    for past in (state.without_keys(), replace(state, memory=None)):
        assert past.trimmed() is past  # all of it is still needed


@pytest.mark.parametrize("pitch", [0.0, -1e30, torch.nan])
def test_memory_that_no_decoder_can_play_ends_in_a_sentence(
    bundle: Bundle, live: list[StreamState], pitch: float
) -> None:
    tensors = live[-1].memory.decoders.tensors()
    tensors["f0"] = torch.full_like(tensors["f0"], pitch)
    with pytest.raises(ValueError, match="damaged; go on from an older state"):
        bundle.decoder().decode(live[-1].latents[-1], DecodeState.of(tensors, 0))


@pytest.mark.parametrize("broken", ["video", "audio"])
def test_latents_that_decode_to_no_number_end_in_a_sentence(
    bundle: Bundle, stream: StreamState, broken: str
) -> None:
    block = stream.latents[0]
    block = block._replace(**{broken: torch.full_like(getattr(block, broken), torch.nan)})
    with pytest.raises(ValueError, match="damaged; go on from an older state"):
        bundle.decoder().decode(block)


def test_memory_of_other_decoders_is_refused(bundle: Bundle, live: list[StreamState]) -> None:
    state = live[-1]
    video, audio = state.memory.decoders
    other = Memory(state.next_block, DecodeState((video[0][..., :1], *video[1:]), audio))
    with pytest.raises(ValueError, match=r"decoder memory has video\.0 of .*load the model"):
        bundle.decoder().remember(replace(state, memory=other), state.next_block)


def test_chunks_of_a_stream_that_are_decoded_one_by_one_cost_their_own_length(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on wires: the sampler does not know the decoder, and the states have no memory."""
    words, state, lengths = bundle.prompt("red ball"), bundle.begin(), heard(bundle, monkeypatch)
    parts = []
    for _ in range(3):
        first = state.next_block
        *_, (_, state) = rollout(bundle, words, state, 2, FEW)
        chunk = chunk_origin(state, first, bundle.clock)
        lengths.clear()
        decoder, whole = bundle.decoder(), chunk_state(chunk, *chunk_tensors(chunk))
        parts.append(joined(decoder.decode_from(whole, first)))
        assert sum(lengths) <= 1 + 2 * 25
    expected = joined(bundle.decoder().decode_from(replace(state), 0))
    assert difference(joined(parts), expected) < 1e-4


def test_pictures_and_sound_may_be_decoded_on_another_device(tmp_path: Path) -> None:
    """Weights lie where they were asked for; of a block each modality's latents go there once."""
    path = save_tiny(tmp_path / "tiny.safetensors")
    apart = load_bundle(path, decode_device="meta")
    parts = apart.transformer, apart.text_encoder, apart.video_codec, apart.audio_codec
    places = [{x.device.type for x in part.state_dict().values()} for part in parts]
    assert places == [{"cpu"}, {"cpu"}, {"meta"}, {"meta"}] and apart.like.device.type == "cpu"
    bundle = load_bundle(path)
    decoder, memory = bundle.decoder(), None
    for latents, _ in rollout(bundle, bundle.prompt("red ball"), bundle.begin(), 3, FEW):
        _Travelling.went.clear()
        watched = BlockLatents(*(x.as_subclass(_Travelling) for x in latents))
        decoded, after = decoder.decode(watched, memory)
        expected, memory = decoder.decode(latents, memory)
        assert _Travelling.went == [x.shape for x in latents]
        assert all(torch.equal(a, b) for a, b in zip(decoded, expected, strict=True))
        assert not any(isinstance(x, _Travelling) for x in (*decoded, *after.tensors().values()))


class _Travelling(torch.Tensor):
    """Latents that note when they are sent to a device; what comes there is an ordinary tensor."""

    went: ClassVar[list[torch.Size]] = []

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.to:
                cls.went.append(args[0].shape)
                return args[0].as_subclass(torch.Tensor).to(*args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))
