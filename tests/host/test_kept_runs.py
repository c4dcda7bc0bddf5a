"""What a longer run need not make again."""

from __future__ import annotations

from mutual_forcing.host import kept_runs
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.samplers.rollout import rollout, sampler_settings
from mutual_forcing.samplers.state import StreamState


class Wire:
    """Something on a wire."""


def test_the_longest_stream_of_the_same_wires_is_found_until_a_wire_is_gone(
    bundle: Bundle,
) -> None:
    states: list[StreamState] = []
    prompt, sampler = bundle.prompt("red ball"), sampler_settings("few", 1)
    for _, state in rollout(bundle, prompt, bundle.begin(), 3, sampler):
        states.append(state)
    model, positive = Wire(), [["a prompt", {}]]
    asked = model, positive, {"mode": "few", "steps": 4}, 0
    assert kept_runs.longest(asked, 9) is None
    for state in states[:2]:
        assert kept_runs.keep(asked, state) is state
    again = model, positive, {"mode": "few", "steps": 4}, 0
    assert kept_runs.longest(again, 9) is states[1]
    assert kept_runs.longest(again, 1) is states[0]
    assert kept_runs.keep(again, states[1].without_keys()) is states[1]
    for other in (
        (Wire(), *asked[1:]),
        (model, [["a prompt", {}]], *asked[2:]),
        (*asked[:2], {"mode": "few", "steps": 5}, 0),
        (*asked[:3], 1),
        asked[:3],
    ):
        assert kept_runs.longest(other, 9) is None
    del model, asked, again, other
    assert not kept_runs._RUNS
