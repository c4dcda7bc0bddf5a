"""A stream against drift: TaoMate's numbers, and a stream that remembers goes on as any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.fixture import Golden, relative_error
from mutual_forcing.networks import execution as execution_module
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.execution import Execution
from mutual_forcing.networks.timestep import TimestepEmbedding
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.clock import Clock
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import (
    Prompt,
    SigmaConstants,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.schedule import Line, Schedule, Transition
from mutual_forcing.samplers.sigmas import TAOMATE
from mutual_forcing.samplers.start import Held, Start
from mutual_forcing.samplers.state import StreamSettings, StreamState, rewound, take_of
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.samplers.stream_memory import StreamMemory
from mutual_forcing.tests.networks.test_paths import Replayed
from mutual_forcing.tests.tiny import LATER, TRANSFORMER

GOLDEN = Golden(Path(__file__).parents[1] / "data" / "ltx23_golden.safetensors")
CONFIG = TransformerConfig.from_dict(TRANSFORMER.to_dict() | LATER | {"step_size_embedding": False})
SETTINGS = StreamSettings(4, 5, window=1, seeds=(3, 8))
SAMPLER = sampler_settings("few", 3, method="renoise", entries=TAOMATE)
BLOCKS, TURN = 7, 4


@pytest.fixture(scope="module")
def model() -> BareModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = CausalAVTransformer(CONFIG).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            if "table" in name or "to_gate_logits" in name:
                parameter.normal_(0, 0.5)
    return BareModel(network, "remembering")


def encode(model: BareModel, texts: tuple[str, ...]) -> Prompt:
    generator = torch.Generator().manual_seed(len(texts[0]))
    contexts = [torch.randn(1, 5, width, generator=generator) for width in (32, 16)]
    return Prompt(text_keys(model.transformer, *contexts), texts=texts)


def lines(*more: Line) -> tuple[Line, ...]:
    return (Line(0.0, ("one",)), *more)


CHANGES = lines(Line(Clock.of(CONFIG).time_of(TURN), ("another",)))


def rolled(
    model: BareModel,
    blocks: int,
    state: StreamState | None = None,
    *,
    told: tuple[Line, ...] = CHANGES,
    **kwargs: object,
) -> list[tuple]:
    schedule = Schedule(Clock.of(CONFIG), told, lambda texts: encode(model, texts))
    state = state or new_stream(model, SETTINGS)
    return list(rollout(model, schedule, state, blocks, SAMPLER, **kwargs))


@pytest.fixture(scope="module")
def whole(model: BareModel) -> list[tuple]:
    return rolled(model, BLOCKS)


def same(found: list[tuple], expected: list[tuple]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b)
        for (one, _), (two, _) in zip(found, expected, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_memory_and_colours_are_taomates_after_every_block() -> None:
    memory, layout = None, GOLDEN.config.layout
    for block in range(10):
        frames, sounds = slice(*layout.video_span(block)), slice(*layout.audio_span(block))
        video = GOLDEN["rollout.full.video_latent"][:, frames].transpose(1, 2)
        audio = GOLDEN["rollout.full.audio_latent"][:, sounds]
        if memory is not None:
            raw = GOLDEN[f"rollout.full.raw_video.{block}"].transpose(1, 2)
            assert relative_error(memory.settled(raw), video) < 1e-5
        memory = memory.after(video, audio) if memory else StreamMemory.begun(video, audio)
        for name, found in zip(
            ("video", "audio", "color_mean", "color_std", "color_proto"), memory.now, strict=True
        ):
            assert relative_error(found, GOLDEN[f"rollout.full.after.{name}.{block}"]) < 1e-5


@pytest.mark.parametrize("cut", [1, TURN, 5])
def test_it_goes_on_as_if_it_had_never_stopped(
    model: BareModel, whole: list[tuple], cut: int, tmp_path: Path
) -> None:
    """Saved with its keys, saved without, which are made anew, and without what is not needed."""
    for name, state in (
        ("whole", whole[cut - 1][1]),
        ("trimmed", whole[cut - 1][1].trimmed(decoding=False)),
    ):
        save_state(tmp_path / name, state)
        assert same(rolled(model, BLOCKS - cut, load_state(tmp_path / name)), whole[cut:])
    save_state(tmp_path / "bare", whole[cut - 1][1], keys=False)
    for state in (load_state(tmp_path / "bare"), rewound(whole[-1][1], cut)):
        assert same(rolled(model, BLOCKS - cut, state), whole[cut:])


def test_clips_of_a_batch_know_nothing_of_each_other(model: BareModel, whole: list[tuple]) -> None:
    alone = rolled(model, BLOCKS, new_stream(model, replace(SETTINGS, seeds=(8,))))
    taken = rolled(model, 2, take_of(whole[-3][1], 1))
    for found in (alone, taken):
        pairs = zip(found[-1][0], whole[-1][0], strict=True)
        assert all(relative_error(a[0], b[1]) < 1e-4 for a, b in pairs)


def test_the_opening_keeps_everything_and_then_the_window(whole: list[tuple]) -> None:
    kept = [state.cache.indices for _, state in whole]
    assert kept == [(), (0,), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]


def test_a_new_prompt_reads_the_past_again_but_for_the_pictures_own_keys(
    model: BareModel, whole: list[tuple]
) -> None:
    before = rolled(model, TURN + 1, told=lines())[-1][1].cache
    after = whole[TURN][1].cache
    assert before.indices == after.indices == (0, TURN - 1)
    for old, new in zip(before.blocks, after.blocks, strict=True):
        # Read in a pass of its own or beside the next block, which may round differently.
        pairs = zip(old.video, new.video, strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
        for name in ("audio", "audio_to_video", "video_to_audio"):
            # Keys of the first layer are made before any text is seen.
            pairs = zip(getattr(old, name), getattr(new, name), strict=True)
            assert not any(torch.allclose(a[1], b[1], atol=1e-3) for a, b in pairs)
    keep = Line(Clock.of(CONFIG).time_of(TURN), ("another",), Transition())
    kept = rolled(model, TURN + 1, told=lines(keep))[-1][1].cache
    for old, new in zip(before.blocks, kept.blocks, strict=True):
        assert torch.equal(old.audio[0], new.audio[0])


def test_recorded_passes_are_told_of_the_stream_and_stand_where_they_stand(
    model: BareModel, whole: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a recording reads lies still though memory and positions change with every block."""
    monkeypatch.setattr(execution_module, "_Recorded", Replayed)
    monkeypatch.setattr(Execution, "unavailable", lambda self, device: None)
    Replayed.made = 0
    recorded = rolled(model, BLOCKS + 1, execution=Execution(graph=True), told=lines())
    assert Replayed.made == 4  # both kinds of pass in two places
    assert same(recorded, rolled(model, BLOCKS + 1, told=lines()))


def test_a_given_picture_tells_the_text_the_mean_noise_level(model: BareModel) -> None:
    given = Start(torch.randn(1, CONFIG.in_channels, 1, 4, 5))
    (latents, _), *_ = rolled(model, 1, start=given)
    assert torch.equal(latents.video[:, :, :1], given.latents.expand(2, -1, -1, -1, -1))
    constants = SigmaConstants(model.transformer, torch.empty(0))
    levels = constants.embedding(0.0), constants.embedding(0.8)
    video, audio = torch.empty(1, 1, 4, 4, 5), torch.empty(1, 2, 1)

    def text_at(share: float) -> TimestepEmbedding:
        return constants.embedding(0.8 * share)

    made = Held(video=given.latents).modulation(model.transformer, *levels, video, audio, text_at)
    expected = constants.embedding(0.8 * 3 / 4).video.prompt
    assert torch.equal(made.embedding.video.prompt, expected)
    assert torch.equal(made.embedding.audio.prompt, levels[1].audio.prompt)


def test_a_stream_without_its_memory_is_refused(model: BareModel, whole: list[tuple]) -> None:
    with pytest.raises(ValueError, match="no memory of its 7 blocks, expected one"):
        rolled(model, 1, replace(whole[-1][1], past=None))
