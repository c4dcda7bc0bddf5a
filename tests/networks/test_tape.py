"""A tape makes what its function makes, bit for bit, in far less memory than its results take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mutual_forcing.networks import tape as module
from mutual_forcing.networks.audio_codec import AudioCodec
from mutual_forcing.networks.tape import Tape, is_plain
from mutual_forcing.tests.tiny import AUDIO, tiny_parts
from torch import Tensor

Mode = type[torch.no_grad] | type[torch.inference_mode]
WEIGHT, BIAS, KEYS = torch.randn(24, 8), torch.randn(24), torch.zeros(2, 3, 5, 4)
MASK = torch.randn(5, 5) > -1


def everything(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Views, places that are written to, several results, masks, numbers of other types."""
    q, k, v = (
        F.linear(x, WEIGHT, BIAS).view(2, 5, 3, 8).chunk(2, dim=-1)[0].permute(0, 2, 1, 3),
        *(part.transpose(1, 2) for part in F.linear(y, WEIGHT).view(2, 5, 6, 4).split(3, dim=2)),
    )
    KEYS[:, :, 1:].copy_(k[:, :, 1:]).mul_(2)
    room = q.new_empty(q.shape)
    room.copy_(F.scaled_dot_product_attention(q, KEYS, v, attn_mask=MASK))
    odd = torch.arange(5) % 2 == 1
    seen = torch.where(odd[:, None], room, F.rms_norm(room, (4,), eps=1e-6))
    top, place = seen.double().max(dim=-1)
    return torch.cat((seen.flatten(2), top.float()), dim=-1), place, F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_makes_the_same_of_other_inputs_bit_for_bit(mode: Mode) -> None:
    with mode():
        _compare()


def _compare() -> None:
    given = [(torch.randn(2, 5, 8), torch.randn(2, 5, 8)) for _ in range(3)]
    expected = [everything(*inputs) for inputs in given]
    KEYS.zero_()
    tape = Tape(everything, given[0])
    made = [tape(*inputs) for inputs in (*given, given[0])]
    for found, wanted in zip(made, (*expected, expected[0]), strict=True):
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True)
        )
    # Results are nobody else's.
    assert len({x.untyped_storage().data_ptr() for found in made for x in found}) == 12


@torch.no_grad()
def test_memory_is_used_again() -> None:
    def chain(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x = x.cos()
        for _ in range(50):
            x = (x + 1).sin()
        return first, x  # what is returned is nobody else's, however early it was made

    x = torch.randn(1000)
    tape = Tape(chain, (x,))
    assert all(map(torch.equal, tape(x), chain(x)))
    assert tape.outputs[0].untyped_storage().nbytes() <= 4 * 4032


@torch.no_grad()
def test_what_depends_on_a_number_is_refused() -> None:
    def branching(x: Tensor) -> tuple[Tensor]:
        return (x + 1 if x.sum() > 0 else x,)

    with pytest.raises(RuntimeError, match="cannot be played again"):
        Tape(branching, (torch.ones(3),))
    with pytest.raises(RuntimeError, match="cannot be played again"):
        Tape(lambda x: (torch.add(x, 1, out=torch.empty(3)),), (torch.ones(3),))


@torch.inference_mode()
def test_sound_is_decoded_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    codec: AudioCodec = tiny_parts()[3]
    latents = torch.randn(2, 9, AUDIO.latent_channels)
    notes: list[int] = []
    plays: list[int] = []
    note, play = Tape.__init__, Tape.__call__
    monkeypatch.setattr(Tape, "__init__", lambda tape, *x: notes.append(1) or note(tape, *x))
    monkeypatch.setattr(Tape, "__call__", lambda tape, *x: plays.append(1) or play(tape, *x))
    sound, state = codec.decode(latents)
    codec.heads.weight = torch.nn.Parameter(codec.heads.weight + 1)
    assert not torch.equal(codec.decode(latents)[0], sound) and len(notes) == 2
    codec.heads.weight = torch.nn.Parameter(codec.heads.weight - 1)
    sound, state = codec.decode(latents)
    plays.clear()
    later, after = codec.decode(latents, state)
    assert len(plays) == 9 and len(notes) == 3  # one for as long as it reads the same
    monkeypatch.setattr(module, "taped_on", lambda device: False)
    monkeypatch.setattr("mutual_forcing.networks.audio_codec.taped_on", lambda device: False)
    plain, plain_state = codec.decode(latents)
    later_plain, plain_after = codec.decode(latents, plain_state)
    assert torch.equal(sound, plain) and torch.equal(later, later_plain) and len(plays) == 9
    assert all(map(torch.equal, after.caches, plain_after.caches))


def test_weights_of_a_kind_of_their_own_are_not_taped() -> None:
    class Eighths(torch.Tensor):
        """As a host's tensors in 8 bits."""

    network = torch.nn.Linear(2, 2)
    assert is_plain(network)
    network.weight = torch.nn.Parameter(torch.zeros(2, 2).as_subclass(Eighths))
    assert not is_plain(network)
