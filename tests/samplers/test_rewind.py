"""Back to an earlier second, one of several takes, and a clip that somebody else made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.decode import joined
from mutual_forcing.samplers.encode import cut_to_blocks, encoded, in_phase
from mutual_forcing.samplers.live import live_clip
from mutual_forcing.samplers.rollout import sampler_settings
from mutual_forcing.samplers.speech import Speech, Transcript
from mutual_forcing.samplers.state import BlockLatents, StreamState, clock_of, rewound, take_of
from torch import Tensor

FEW = sampler_settings("few", 2)


def going_on(
    bundle: Bundle, state: StreamState, blocks: int
) -> tuple[Tensor, Tensor, list[BlockLatents], StreamState]:
    """Pictures, sound and latents of some more blocks, and the state after them."""
    prompt = bundle.prompt("red ball")
    made = list(live_clip(bundle, prompt, state, blocks, FEW, bundle.decoder()))
    after = made[-1][1]
    return *joined(decoded for decoded, _ in made), list(after.latents[-blocks:]), after


def equal(one: list[BlockLatents], other: list[BlockLatents]) -> bool:
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_rewound_stream_makes_what_came_there(bundle: Bundle) -> None:
    """From any second, for it is made under one prompt, in pictures and sound as well."""
    video, audio, blocks, whole = going_on(bundle, bundle.begin((4,)), 4)
    for second, count in ((0, 0), (1, 2), (3, 4)):
        back = rewound(whole, clock_of(whole.layout).block_at(second))
        assert back.next_block == count
        if count == 4:
            assert back is whole
            continue
        seen, heard, again, _ = going_on(bundle, back, 4 - count)
        assert equal(again, blocks[count:])
        assert torch.allclose(seen, video[:, bundle.clock.frames(count) :], atol=1e-4)
        assert torch.allclose(heard, audio[..., bundle.clock.samples(count) :], atol=1e-4)
    with pytest.raises(ValueError, match="no longer holds"):
        rewound(replace(whole, latents=whole.latents[2:], dropped=2, prefix=whole.block(0)), 1)
    with pytest.raises(ValueError, match="has 4 blocks"):
        rewound(whole, 5)


def test_a_take_goes_on_as_it_would_have_gone_on_beside_the_others(bundle: Bundle) -> None:
    *_, both = going_on(bundle, bundle.begin((4, 5)), 3)
    video, audio, blocks, _ = going_on(bundle, both, 1)
    seen, heard, alone, after = going_on(bundle, take_of(both, 1), 1)
    assert after.settings.seeds == (5,)
    expected = [BlockLatents(x.video[1:], x.audio[1:]) for x in blocks]
    for one, other in zip(alone, expected, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    assert torch.allclose(seen, video[1:], atol=1e-4)
    assert torch.allclose(heard, audio[1:], atol=1e-3)
    with pytest.raises(ValueError, match="take 3 is not there"):
        take_of(both, 2)


def test_what_was_told_is_rewound_with_the_stream() -> None:
    first, second = Transcript((1, 2, 3), 4.0), Transcript((5, 6), 4.0)
    told = [Speech()]
    for block in range(6):
        told.append(told[-1].going_on(first if block < 4 else second, block, block + 1.0))
    for blocks in (1, 2, 3, 4):  # under the transcript that it was rewound to
        assert told[4].until(blocks) == told[blocks]
    before = told[6].until(3.0)
    assert before.said == told[3].said and before.transcript is None
    late = told[6].since(5.1)
    assert late.said[2:] == told[6].said[2 - len(late.said) :] and len(late.said) < 10
    assert late.going_on(second, 6.0, 7.0).said[-1] == told[6].going_on(second, 6.0, 7.0).said[-1]


@torch.no_grad()
def test_a_clip_becomes_a_stream_that_goes_on_where_it_ends(bundle: Bundle) -> None:
    """Cut at its beginning to whole blocks; a tone's wave goes on where the clip's stands."""
    clock = bundle.clock
    video, audio, _, whole = going_on(bundle, bundle.begin((4,)), 5)
    fewer, late = video[:, 11:], audio[..., round(11 / 24 * 16000) :]
    pictures, sound, blocks = cut_to_blocks(clock, fewer, late, 16000, 9)
    assert blocks == 4 and torch.equal(pictures, video[:, -clock.frames(4) :])
    assert sound.shape[2] == clock.samples(4)
    assert cut_to_blocks(clock, fewer, late, 16000, 2)[2] == 2
    seen = bundle.video_codec.encode(pictures.movedim(-1, 1) * 2 - 1)
    heard = bundle.audio_codec.encode(sound[:, 0])
    stream = encoded(bundle.begin((7, 8)), blocks, seen, heard)
    stream = in_phase(bundle.decoder(), stream, sound)
    assert stream.memory.blocks == stream.next_block == 4
    going_on(bundle, stream, 1)
    with pytest.raises(ValueError, match="give a longer one"):
        cut_to_blocks(clock, video[:, :0], audio, 16000, 9)

    found = in_phase(bundle.decoder(), replace(whole, memory=None), audio)
    true, guess = (s.memory.decoders.audio.vocoder.phase for s in (whole, found))
    assert ((guess - true + 0.5) % 1 - 0.5).abs() < 1 / 32
