"""Ways to carry out a pass: other orders of work, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.networks import execution as execution_module
from mutual_forcing.networks.execution import Execution, Workspace
from mutual_forcing.networks.full_sequence import causal_forward
from mutual_forcing.networks.kernels import PLAIN
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.lanes import OneLane
from mutual_forcing.networks.modulation import TokenModulation, shared_modulation
from mutual_forcing.networks.rope import modality_tables
from mutual_forcing.networks.timestep import timestep_embedding
from mutual_forcing.samplers.rollout import (
    SamplerSettings,
    SigmaConstants,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import BlockLatents, StreamState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FEW, GUIDED = sampler_settings("few", 4), sampler_settings("multi", 3)
Blocks = list[tuple[BlockLatents, StreamState]]


def roll(
    bundle: Bundle,
    execution: Execution,
    blocks: int = 6,
    sampler: SamplerSettings = FEW,
    state: StreamState | None = None,
) -> Blocks:
    return list(
        rollout(
            bundle,
            bundle.prompt("red ball", guided=sampler.guidance != 1),
            state or bundle.begin(),
            blocks,
            sampler,
            execution=execution,
        )
    )


def same(a: Blocks, b: Blocks) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for (m, _), (n, _) in zip(a, b, strict=True)
        for x, y in zip(m, n, strict=True)
    )


class Replayed:
    """What a CUDA graph does, on a CPU: the pass as recorded, over the memory it was given."""

    made = 0

    def __init__(self, function: Callable[..., tuple], inputs: tuple, _pool: object) -> None:
        Replayed.made += 1
        self.function = function
        self.inputs = tuple(x.clone() for x in inputs)

    def __call__(self, *inputs: Tensor) -> tuple:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        return self.function(*self.inputs)


@pytest.mark.parametrize("sampler", [FEW, GUIDED], ids=("few", "guided"))
def test_recorded_passes_are_the_passes(
    bundle: Bundle, sampler: SamplerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording made in one block is right in the next: nothing it reads has moved."""
    monkeypatch.setattr(execution_module, "_Recorded", Replayed)
    monkeypatch.setattr(Execution, "unavailable", lambda self, device: None)
    Replayed.made = 0
    recorded = roll(bundle, Execution(graph=True), 8, sampler)
    branches = 1 if sampler is FEW else 2
    # Denoising, and the refresh with the first step, once the window is full; in either of the two
    # places in which the past is laid out in turn.
    assert Replayed.made == 2 * 2 * branches
    assert same(recorded, roll(bundle, Execution(), 8, sampler))


def test_what_cannot_be_recorded_is_carried_out(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(execution_module, "_Recorded", refuse)
    monkeypatch.setattr(Execution, "unavailable", lambda self, device: None)
    assert same(roll(bundle, Execution(graph=True), 7), roll(bundle, Execution(), 7))
    assert [record.getMessage() for record in caplog.records if "recorded" in record.msg] == [
        "passes are not recorded: operation not permitted when stream is capturing"
    ]


def test_weights_that_may_move_are_not_recorded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Execution, "unavailable", lambda self, device: None)
    offloaded = replace(bundle, transformer=copy.deepcopy(bundle.transformer))
    offloaded.transformer.proj_out.to("meta")
    with pytest.raises(ValueError, match=r"part of this model is not on cpu .* choose another"):
        roll(offloaded, Execution(graph=True))


def test_streams_are_eager_on_a_cpu(bundle: Bundle) -> None:
    assert same(roll(bundle, Execution(lanes=True), 3), roll(bundle, Execution(), 3))


class WatchedLanes(OneLane, TorchDispatchMode):
    """Two lanes that run one after the other, and a record of who may read what.

    As on a GPU, what a lane makes or writes is its own until the lanes join, except for what it
    hands over by name where they meet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lane = "video"
        self.readers: dict[int, set[str]] = {}
        self.kept: list[Tensor] = []  # so that no address is used again
        self.faults: list[str] = []
        self.crossings = 0

    @contextmanager
    def audio(self) -> Iterator[None]:
        self.lane = "audio"
        yield
        self.lane = "video"

    def fork(self, *inputs: Tensor | None) -> None:
        for readers in self.readers.values():
            readers.add("audio")

    def exchange(self, to_video: tuple[Tensor, ...], to_audio: tuple[Tensor, ...]) -> None:
        self.crossings += 1
        for reader, handed in (("video", to_video), ("audio", to_audio)):
            for tensor in handed:
                self.readers[address(tensor)].add(reader)

    def join(self, *outputs: Tensor | None) -> None:
        for readers in self.readers.values():
            readers.add("video")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        for tensor in given:
            if self.lane not in self.readers.get(address(tensor), {self.lane}):
                self.faults.append(f"{function} on the {self.lane} lane did not wait for its input")
        out = function(*arguments, **options)
        known = {address(tensor) for tensor in given}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                if address(tensor) not in known or function._schema.is_mutable:
                    self.readers[address(tensor)] = {self.lane}
                    self.kept.append(tensor)
        return out


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def watched_pass(bundle: Bundle, lanes: WatchedLanes, blocks: int) -> None:
    """Passes over the first blocks with their branches on the lanes given."""
    model = bundle.transformer
    like = torch.empty(0)
    text = bundle.prompt("red ball").text
    workspace = Workspace(Execution(), torch.device("cpu"))
    workspace.lanes = lanes
    with torch.no_grad():
        constants = SigmaConstants(model, like)
        noisy, clean = constants.at(0.7, 0.2), constants.at(0.0)
        cache = RollingCache(2)
        for _ in range(blocks):
            with lanes:
                opened = OpenBlock(model, cache, 2, 2, like, workspace)
                video, audio = (
                    torch.randn(1, *opened.video_shape),
                    torch.randn(1, *opened.audio_shape),
                )
                out = opened.velocity(video, audio, text, noisy)
                assert all(torch.isfinite(x).all() for x in out)
                cache = opened.commit(video, audio, text, clean)


def test_no_lane_reads_what_it_has_not_waited_for(bundle: Bundle) -> None:
    lanes = WatchedLanes()
    watched_pass(bundle, lanes, 4)
    assert not lanes.faults
    # One meeting a layer; the last layer of a refresh has none.
    assert lanes.crossings == 4 * (2 * bundle.transformer.config.num_layers - 1)


@pytest.mark.parametrize("forgotten", ["fork", "exchange", "join"])
def test_a_forgotten_wait_is_noticed(bundle: Bundle, forgotten: str) -> None:
    lanes = WatchedLanes()
    setattr(lanes, forgotten, lambda *_: None)
    watched_pass(bundle, lanes, 2)
    assert lanes.faults


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a number that Python wants to know."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        assert "nonzero" not in str(function)
        return function(*arguments, **(options or {}))


def test_the_host_never_waits_inside_a_block(bundle: Bundle) -> None:
    model, text = bundle.transformer, bundle.prompt("red ball").text
    like, cache = torch.empty(0), roll(bundle, Execution(), 5)[-1][1].cache
    with torch.no_grad(), NoWaiting():
        constants = SigmaConstants(model, like)
        opened = OpenBlock(model, cache, 2, 2, like)
        video, audio = torch.zeros(1, *opened.video_shape), torch.zeros(1, *opened.audio_shape)
        opened.velocity(video, audio, text, constants.at(0.5, 0.1))
        opened.commit(video, audio, text, constants.at(0.0))
    with NoWaiting(), pytest.raises(AssertionError):
        torch.ones(1).item()


def test_modulation_made_once_is_that_of_each_layer(bundle: Bundle) -> None:
    def same(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> bool:
        """Equal tensors, and None (no adapters) in the same places."""
        pairs = list(zip(ours, theirs, strict=True))
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    model, level = bundle.transformer, torch.full((1, 1), 0.4)
    embedding = timestep_embedding(model, level, level, level, torch.float32)
    expected, once = TokenModulation(model, embedding), shared_modulation(model, embedding)
    for shared in (once, once.at(once.flat.clone())):
        for index in range(len(model.transformer_blocks)):
            for ours, theirs in zip(shared.layer(index), expected.layer(index), strict=True):
                assert same(ours, theirs)
        for ours, theirs in zip(shared.head, expected.head, strict=True):
            assert same(ours, theirs)
        assert shared.head.video[0].untyped_storage().data_ptr() == shared.flat.data_ptr()


def test_a_refresh_writes_the_keys_of_a_whole_pass_and_does_not_go_on(bundle: Bundle) -> None:
    model, text = bundle.transformer, bundle.prompt("red ball").text
    like, last = torch.empty(0), model.transformer_blocks[-1]
    called: list[str] = []
    useless = {"head": model.proj_out, "ff": last.ff.net[2], "a2v": last.audio_to_video_attn.to_q}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in useless.items()
    ]
    with torch.no_grad():
        clean = SigmaConstants(model, like).at(0.0)
        opened = OpenBlock(model, RollingCache(2), 2, 2, like)
        video, audio = torch.randn(1, *opened.video_shape), torch.randn(1, *opened.audio_shape)
        (keys,) = opened.commit(video, audio, text, clean).blocks
        assert not called
        # The same pass to its end, through stores that keep what they are given.
        for store in opened.stores:
            store.record = {
                path: tuple(t.new_empty(t.shape[1:]) for t in getattr(keys, path))
                for path in keys._fields
            }
        opened.velocity(video, audio, text, clean)
    for hook in hooks:
        hook.remove()
    assert set(called) == set(useless)
    for layer, store in enumerate(opened.stores):
        for path in keys._fields:
            for kept, given in zip(getattr(keys, path), store.record[path], strict=True):
                assert torch.equal(kept[layer], given)


def test_tables_of_more_blocks_begin_with_those_of_fewer(bundle: Bundle) -> None:
    config = bundle.transformer.config
    for few, many in zip(
        modality_tables(config, 3, 2, 3), modality_tables(config, 8, 2, 3), strict=True
    ):
        for a, b in zip(few, many, strict=True):
            assert torch.equal(a, b[:, : a.shape[1]])


@torch.no_grad()
def test_a_whole_sequence_runs_with_the_kernels_that_it_is_given(bundle: Bundle) -> None:
    """Otherwise parity would compare the plain ones with themselves."""
    model, used = bundle.transformer, set()

    def watched(name: str) -> Callable:
        def run(*arguments: Tensor) -> object:
            used.add(name)
            return getattr(PLAIN, name)(*arguments)

        return run

    kernels = PLAIN._replace(**{name: watched(name) for name in PLAIN._fields})
    video = torch.randn(1, model.config.in_channels, 1, 2, 2)
    audio = torch.randn(1, 1, model.config.audio_in_channels)
    level, text = torch.full((1, 1), 0.5), bundle.prompt("red ball").text
    inputs = model, video, audio, level, level, text
    found, expected = causal_forward(*inputs, kernels=kernels), causal_forward(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Two are a cache's; LTX-2.3's heads have gates, the tiny model's none.
    assert used == set(PLAIN._fields) - {"rotate", "keep", "gate_heads"}


def test_a_workspace_serves_streams_of_any_age(bundle: Bundle) -> None:
    """What an older block left in the memory that is used again does not show."""
    model, text = bundle.transformer, bundle.prompt("red ball").text
    states = [state for _, state in roll(bundle, Execution(), 6)]
    like = torch.empty(0)
    shared = Workspace(Execution(), torch.device("cpu"))
    with torch.no_grad():
        level = SigmaConstants(model, like).at(0.5)
        for index in (5, 1, 3, 5):
            cache = states[index].cache
            shapes = OpenBlock(model, cache, 2, 2, like)
            video, audio = torch.ones(1, *shapes.video_shape), torch.ones(1, *shapes.audio_shape)
            again = OpenBlock(model, cache, 2, 2, like, shared).velocity(video, audio, text, level)
            alone = OpenBlock(model, cache, 2, 2, like).velocity(video, audio, text, level)
            assert all(torch.equal(a, b) for a, b in zip(again, alone, strict=True))


def test_automatic_is_what_can_be_had(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels where they compile; lanes and graphs where all weights stay on the card."""
    automatic, model = Execution.named("automatic"), bundle.transformer
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    assert Execution.named("compiled").chosen(model, card).name == "compiled"
    assert automatic.chosen(model, cpu).name == "eager"
    assert same(roll(bundle, automatic, 3), roll(bundle, Execution(), 3))
    for compiles, weights, expected in (
        (True, card, "compiled+lanes+graph"),
        (False, card, "lanes+graph"),
        (True, cpu, "compiled"),
        (False, cpu, "eager"),
    ):
        monkeypatch.setattr(execution_module, "_compiles", lambda _, found=compiles: found)
        held = SimpleNamespace(parameters=lambda device=weights: [SimpleNamespace(device=device)])
        for same_card in (card, torch.device("cuda")):
            assert automatic.chosen(held, same_card).name == expected
        assert Execution.named(expected).name == expected
    # A past that stays where it is takes room.
    monkeypatch.setattr(execution_module, "free_bytes", lambda device: 10)
    held = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=card)])
    names = [automatic.chosen(held, card, needed).name for needed in (10, 11)]
    assert names == ["lanes+graph", "lanes"]


def test_ways_that_cannot_be_had_say_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Execution.named("eager") == Execution()
    assert Execution.named("streams+graph") == Execution(lanes=True, graph=True)
    with pytest.raises(ValueError, match="'fast', expected 'automatic', 'eager' or some of"):
        Execution.named("fast")
    with pytest.raises(
        ValueError, match="graphs are CUDA's, and the device is cpu; choose another"
    ):
        roll(bundle, Execution(graph=True))
    with monkeypatch.context() as patched:
        patched.setattr("sysconfig.get_path", lambda _: "nowhere")
        patched.setattr("shutil.which", lambda name: name)
        with pytest.raises(ValueError, match="needs Python's headers on a CPU"):
            roll(bundle, Execution(compiled=True))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on a CPU, and none"):
        roll(bundle, Execution(compiled=True))


@pytest.mark.skipif(
    Execution(compiled=True).unavailable(torch.device("cpu")) is not None,
    reason="no C++ compiler for torch.compile",
)
def test_compiled_passes_are_eager_ones_up_to_rounding(bundle: Bundle) -> None:
    """Slow the first time (it compiles); also in any cut, bit for bit."""
    compiled, eager = roll(bundle, Execution(compiled=True), 5), roll(bundle, Execution(), 5)
    for (found, _), (expected, _) in zip(compiled, eager, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    first = roll(bundle, Execution(compiled=True), 2)
    then = roll(bundle, Execution(compiled=True), 3, state=first[-1][1])
    assert same(compiled, first + then)
