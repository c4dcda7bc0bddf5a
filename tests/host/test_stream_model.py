"""A MODEL as a maker of streams, without ComfyUI: a stand-in has its modules and its connectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutual_forcing.host.conditioning import (
    REFUSAL,
    TRANSCRIPT,
    Conditioning,
    at_time,
    lines_of,
    written_on,
)
from mutual_forcing.host.kinds import OWN, ltx2_model, stock_config
from mutual_forcing.host.stream_model import CausalModel, StreamModel
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.model_loaders.ltx2 import PRESETS
from mutual_forcing.networks.attention import sdpa
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.layout import RELEASED_LAYOUT, BlockLayout
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.chunk import chunk_origin, chunk_state, chunk_tensors
from mutual_forcing.samplers.rollout import Prompt, new_stream, rollout
from mutual_forcing.samplers.schedule import Line, Transition
from mutual_forcing.samplers.state import StreamSettings
from mutual_forcing.tests.ltx2_files import GOLDEN, WEIGHTS
from torch import Tensor, nn

WIDTH = GOLDEN.config.caption_channels


class Hosted(CausalAVTransformer):
    """What ComfyUI's network is to us; its connectors double a prompt and turn it round."""

    def preprocess_text_embeds(self, context: Tensor, unprocessed: bool = False) -> Tensor:
        if not unprocessed and context.shape[-1] == 2 * WIDTH:
            return context
        return torch.cat((context, context.flip(1)), dim=-1)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    """The fixture's weights as a host has them."""
    module = Hosted(GOLDEN.config)
    module.load_state_dict(WEIGHTS)
    about = ltx2_model(GOLDEN.config, "id")
    return StreamModel(module, about, torch.empty(0), sdpa, lambda *_: None)


def wire(*, unprocessed: bool = True, width: int = WIDTH) -> list[list[object]]:
    """CONDITIONING of one prompt."""
    context = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(0))
    return [[context, {"unprocessed_ltxav_embeds": unprocessed}]]


def test_prompts_go_through_the_connectors_once_and_a_finished_one_not_at_all(
    model: StreamModel,
) -> None:
    raw = wire()
    found = model.prompt_of(raw, None, guided=False).text
    context = raw[0][0]
    expected = text_keys(model.transformer, context, context.flip(1))
    finished = [[torch.cat((context, context.flip(1)), dim=-1), {}]]
    again = model.prompt_of(finished, None, guided=False).text
    for keys in zip(*(text.video + text.audio for text in (found, expected, again)), strict=True):
        for one, two, three in zip(*keys, strict=True):
            assert torch.equal(one, two) and torch.equal(one, three)


def test_the_connectors_run_once_per_prompt_however_long_the_stream(
    model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = Hosted.preprocess_text_embeds
    monkeypatch.setattr(
        Hosted,
        "preprocess_text_embeds",
        lambda *args, **kwargs: calls.append(args) or run(*args, **kwargs),
    )
    prompt = model.prompt_of(wire(), wire(), guided=True)
    state = new_stream(model, StreamSettings(2, 3, 2, (1,)))
    sampler = model.sampler("multi", 2, 3.0)
    rolled = rollout(model, prompt, state, 3, sampler)
    assert len(list(rolled)) == 3 and len(calls) == 2


def test_a_schedule_makes_keys_when_they_are_due_and_encodes_what_is_not_on_the_wire(
    model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    run = Hosted.preprocess_text_embeds
    monkeypatch.setattr(
        Hosted, "preprocess_text_embeds", lambda *a, **k: asked.append(a) or run(*a, **k)
    )

    def encode(text: str) -> Conditioning:
        asked.append(text)
        return wire()

    ball = wire()
    ball[0][1] |= written_on("ball", ball[0][0])
    changed = [[ball[0][0] * 2, dict(ball[0][1])]]
    entries = [*at_time(ball, 0.0), *at_time(changed, 2.0, Transition(reread=2))]
    lines = lines_of(entries)
    assert lines[0] == Line(0.0, ("ball",))
    # Another node has changed it, so it is no longer what its text says.
    assert lines[1].texts[0].startswith("?") and lines[1].transition == Transition(reread=2)
    schedule = model.schedule_of(entries, None, encode, guided=False)
    assert not asked
    assert schedule.encode(lines[1].texts).texts == lines[1].texts and len(asked) == 1
    assert schedule.encode(("bell",)).texts == ("bell",) and asked[1] == "bell"
    assert schedule.encode(("?0123",)) is None
    with pytest.raises(ValueError, match="2 prompts, 1 of them without a time"):
        lines_of([*wire(), *at_time(wire(), 1.0)])


def test_prompts_that_cannot_be_used_are_refused(model: StreamModel) -> None:
    with pytest.raises(ValueError, match="encoded for another model"):
        model.prompt_of(wire(width=WIDTH + 1), None, guided=False)
    with pytest.raises(ValueError, match="carries 2 prompts"):
        model.prompt_of(wire() * 2, None, guided=False)
    with pytest.raises(ValueError, match="guidance needs a second prompt"):
        model.prompt_of(wire(), None, guided=True)
    assert model.prompt_of(wire(), wire(), guided=True).unguided is not None


def test_a_prompt_longer_than_was_learned_is_named(model: StreamModel) -> None:
    most = model.about.text_tokens
    long, usual = ([[torch.zeros(1, n, 8), {}]] for n in (most + 1, most))
    (said,) = model.remarks_on(long)
    assert f"{most + 1} tokens, and this model learned with {most}: shorten it" in said
    assert not list(model.remarks_on(usual))


def test_omniforcing_noises_again_and_a_model_told_its_step_size_follows_the_velocity(
    model: StreamModel,
) -> None:
    assert model.sampler("few", None, None).method == "renoise"
    config = replace(GOLDEN.config, step_size_embedding=True)
    told = replace(model, about=replace(model.about, config=config))
    assert told.sampler("few", None, None).method == "euler"
    assert model.sampler("multi", 10, 3.0).method == "euler"


def test_a_stream_goes_on_at_the_rate_that_it_began_with(model: StreamModel) -> None:
    fast = model.at_rate(25)
    assert fast.clock.fps == 25 and fast.clock.layout == BlockLayout(4, 25, 3, 24)
    assert model.for_layout(fast.clock.layout).about == fast.about
    assert model.at_rate(None) is model
    # A layout that is not ours is left for the check that names it.
    assert model.for_layout(BlockLayout(4, 26, 3, 7)) is model


def test_chunks_are_latents_as_ltx2_nodes_have_them(model: StreamModel) -> None:
    settings = StreamSettings(2, 3, 2, (1,))
    rolled = rollout(
        model,
        model.prompt_of(wire(), None, guided=False),
        new_stream(model, settings),
        2,
        model.sampler("few", 1, None),
    )
    state = list(rolled)[-1][1]
    bins = GOLDEN.config.audio_in_channels // 2
    origin = chunk_origin(state, 1, model.clock, bins)
    video, audio = chunk_tensors(origin)
    assert video.shape == (1, GOLDEN.config.in_channels, 3, 2, 3)
    assert audio.shape == (1, 2, 25, bins)
    # Channel-major, as LTX-2's audio VAE has them.
    assert torch.equal(audio[0, 1, 4], state.latents[1].audio[0, 4, bins:])
    again = chunk_state(origin, video, audio)
    assert torch.equal(again.latents[1].audio, state.latents[1].audio)


# This pack's own model.


@pytest.fixture(scope="module")
def own(bundle: Bundle) -> StreamModel:
    """A whole model of ours, as its loader hands it over."""
    about = CausalModel(
        OWN,
        bundle.transformer.config,
        bundle.model_id,
        bundle.stream,
        bundle.text_encoder.config.length,
        fixed_length=True,
        empty=bundle.embed(""),
    )
    return StreamModel(bundle.transformer, about, torch.empty(0), sdpa, lambda *_: None)


def encoded(bundle: Bundle, text: str) -> Conditioning:
    """CONDITIONING as our CLIP makes it."""
    extras = {REFUSAL: bundle.prompt_refusal(text), TRANSCRIPT: bundle.transcript_of(text)}
    return [[bundle.embed(text), extras]]


def flat(prompt: Prompt) -> list[Tensor]:
    """All tensors of a prompt."""
    texts = [text for text in prompt[:2] if text is not None]
    return [tensor for text in texts for layers in text for pair in layers for tensor in pair]


def same(one: Prompt, other: Prompt) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def test_a_prompt_over_the_wires_is_the_bundles_own(own: StreamModel, bundle: Bundle) -> None:
    found = own.prompt_of(encoded(bundle, "red ball"), None, guided=True)
    assert same(found, bundle.prompt("red ball", guided=True))


def test_no_negative_prompt_means_the_empty_one(own: StreamModel, bundle: Bundle) -> None:
    positive, empty = encoded(bundle, "red ball"), encoded(bundle, "")
    found = own.prompt_of(positive, None, guided=True)
    assert same(found, own.prompt_of(positive, empty, guided=True))
    assert own.prompt_of(positive, None, guided=False).unguided is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("   ", "is empty"), ("zebra", "no word that this model knows")],
)
def test_a_prompt_that_says_nothing_is_refused(
    own: StreamModel, bundle: Bundle, text: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        own.prompt_of(encoded(bundle, text), None, guided=False)


def test_prompts_of_another_model_or_another_length_are_refused(
    own: StreamModel, bundle: Bundle
) -> None:
    with pytest.raises(ValueError, match="encoded for another model"):
        own.prompt_of([[torch.zeros(1, 4, 4096), {}]], None, guided=False)
    twice = bundle.embed("red ball").repeat(1, 2, 1)
    with pytest.raises(ValueError, match=r"without Conditioning \(Concat\)"):
        own.prompt_of([[twice, {}]], None, guided=False)


def test_it_makes_one_frame_rate(own: StreamModel) -> None:
    assert own.at_rate(24) is own and own.for_layout(own.clock.layout) is own
    with pytest.raises(ValueError, match="take LTXVConditioning out of the way"):
        own.at_rate(25)


# A MODEL of ComfyUI's own loaders.


def test_a_file_that_says_nothing_is_run_as_omniforcing_and_one_that_does_as_it_says() -> None:
    module = Hosted(GOLDEN.config)
    heads = {"num_attention_heads": 4, "attention_head_dim": 24}
    silent = stock_config(module, {"image_model": "ltxav", **heads})
    assert (
        silent.rope_type,
        silent.frequencies_precision,
        silent.av_ca_timestep_scale_multiplier,
    ) == (tuple(PRESETS["omniforcing"].values()))
    assert silent.layout == RELEASED_LAYOUT
    assert silent.num_layers == len(module.transformer_blocks)
    told = stock_config(module, {**heads, **PRESETS["ltx2_base"]})
    assert told.rope_type == "split" and told.av_ca_timestep_scale_multiplier == 1000


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="is a Linear, expected one that makes streams"):
        stock_config(nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match=r"later version of LTX-2 than 2\.3"):
        stock_config(Hosted(TransformerConfig(), device="meta"), {"ff_bias": False})
