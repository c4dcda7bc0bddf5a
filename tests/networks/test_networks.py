"""The network's identities: masked = cached, nothing later reaches back, golden numbers."""

from __future__ import annotations

import pytest
import torch
from mutual_forcing.model_loaders.bundle import Bundle
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.full_sequence import Told, causal_forward, history_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.modulation import TokenModulation
from mutual_forcing.networks.timestep import timestep_embedding
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.rollout import SigmaConstants

LAYOUTS = {"paper": (1, 1), "released": (4, 26)}


def tiny_config(layout: str = "paper", sinks: int = 3, **changes: object) -> TransformerConfig:
    video_first, audio_first = LAYOUTS[layout]
    values = dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, audio_num_attention_heads=2,
        audio_attention_head_dim=8, in_channels=6, out_channels=6, audio_in_channels=5,
        audio_out_channels=5, cross_attention_dim=32, audio_cross_attention_dim=16,
        caption_channels=12, rope_type="split",
        video_first_block=video_first, audio_first_block=audio_first, num_audio_sink_tokens=sinks,
        step_size_embedding=True,
    )  # fmt: skip
    return TransformerConfig(**(values | changes))


def random_model(config: TransformerConfig, seed: int = 0) -> CausalAVTransformer:
    torch.manual_seed(seed)
    model = CausalAVTransformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


def inputs(config: TransformerConfig, blocks: int, height: int = 2, width: int = 3, batch: int = 2):
    layout = config.layout
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        randn(batch, config.in_channels, layout.video_latents(blocks), height, width),
        randn(batch, layout.audio_latents(blocks), config.audio_in_channels),
        randn(batch, 4, config.caption_channels),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sinks", [0, 3])
@torch.no_grad()
def test_masked_whole_sequence_equals_cached_block_by_block(layout: str, sinks: int) -> None:
    config = tiny_config(layout, sinks)
    model, blocks, sigma = random_model(config), 4, 0.6
    clean_v, clean_a, context = inputs(config, blocks)
    noisy_v, noisy_a = clean_v + 0.5, clean_a - 0.5
    text = text_keys(model, context, context)
    levels = torch.full((2, 1, blocks), sigma)
    whole_v, whole_a = history_forward(
        model,
        (clean_v, clean_a),
        (noisy_v[:, None], noisy_a[:, None]),
        levels,
        Told(text),
        step_size=levels * 0.5,
    )
    constants = SigmaConstants(model, clean_v)
    noisy, refresh = constants.at(sigma, sigma * 0.5), constants.at(0.0)
    cache = RollingCache(window=blocks)
    for block in range(blocks):
        vs, as_ = slice(*config.layout.video_span(block)), slice(*config.layout.audio_span(block))
        opened = OpenBlock(model, cache, 2, 3, clean_v)
        v, a = opened.velocity(noisy_v[:, :, vs], noisy_a[:, as_], text, noisy)
        assert close(v, whole_v[:, 0, :, vs]) < 1e-5
        assert close(a, whole_a[:, 0, as_]) < 1e-5
        cache = opened.commit(clean_v[:, :, vs], clean_a[:, as_], text, refresh)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_stream_whose_prompt_changes_and_which_has_a_transcript_is_one_masked_pass(
    layout: str,
) -> None:
    """Keys are written when the stream goes on, under the prompt that it goes on with."""
    config = tiny_config(layout, transcript_channels=4)
    model, blocks, sigma = random_model(config), 4, (0.6, 0.3)
    clean_v, clean_a, context = inputs(config, blocks)
    noisy_v, noisy_a = clean_v + 0.5, clean_a - 0.5
    first, second = (text_keys(model, x, x) for x in (context, 1 - context))
    under = torch.tensor([[False, False, True, True], [False, True, True, True]])
    track = torch.rand(2, clean_a.shape[1], 4, generator=torch.Generator().manual_seed(3))
    told = Told(first, (second, under), track)
    levels = tuple(torch.full((2, 1, blocks), s) for s in sigma)
    whole_v, whole_a = history_forward(
        model, (clean_v, clean_a), (noisy_v[:, None], noisy_a[:, None]), levels, told
    )
    ones = [torch.full((1, 1), s) for s in sigma]
    noisy = TokenModulation(model, timestep_embedding(model, *ones, None, torch.float32))
    refresh = SigmaConstants(model, clean_v).at(0.0)
    cache, past = RollingCache(window=blocks), None
    for block in range(blocks):
        spans = config.layout.video_span(block), config.layout.audio_span(block)
        (vs, as_), keys = (slice(*span) for span in spans), told.block(block)
        if past is not None:
            opened = OpenBlock(model, cache, 2, 3, clean_v)
            cache = opened.commit(past[0], past[1], keys, refresh, past[2])
        opened, now = OpenBlock(model, cache, 2, 3, clean_v), told.block_track(block, config.layout)
        assert torch.equal(now, track[:, as_])
        v, a = opened.velocity(noisy_v[:, :, vs], noisy_a[:, as_], keys, noisy, track=now)
        assert close(v, whole_v[:, 0, :, vs]) < 1e-5
        assert close(a, whole_a[:, 0, as_]) < 1e-5
        past = clean_v[:, :, vs], clean_a[:, as_], now


@torch.no_grad()
def test_two_prompts_that_are_one_and_a_transcript_of_nothing_change_nothing() -> None:
    config = tiny_config(transcript_channels=4)
    model, blocks = random_model(config), 3
    video, audio, context = inputs(config, blocks)
    text = text_keys(model, context, context)
    levels = torch.full((2, 1, blocks), 0.5)
    given = model, (video, audio), (video[:, None], audio[:, None]), levels
    plain = history_forward(*given, Told(text))
    under = torch.tensor([[False, True, True], [False, False, True]])
    silent = torch.zeros(2, audio.shape[1], 4)
    same = history_forward(*given, Told(text, (text, under), silent))
    for a, b in zip(same, plain, strict=True):
        assert close(a, b) < 1e-6
    heard = history_forward(*given, Told(text, None, silent + 1))
    assert close(heard[1], plain[1]) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_later_block_changes_nothing_earlier(layout: str) -> None:
    config = tiny_config(layout)
    model = random_model(config)
    video, audio, context = inputs(config, 3)
    text = text_keys(model, context, context)
    sigmas = torch.full((2, video.shape[2]), 0.4), torch.full((2, audio.shape[1]), 0.4)
    before = causal_forward(model, video, audio, *sigmas, text)
    video_end, audio_end = config.layout.video_latents(2), config.layout.audio_latents(2)
    video, audio = video.clone(), audio.clone()
    video[:, :, video_end:] += 10
    audio[:, audio_end:] -= 10
    after = causal_forward(model, video, audio, *sigmas, text)
    assert torch.equal(before[0][:, :, :video_end], after[0][:, :, :video_end])
    assert torch.equal(before[1][:, :audio_end], after[1][:, :audio_end])
    assert not torch.equal(before[0][:, :, video_end:], after[0][:, :, video_end:])


@torch.no_grad()
def test_a_rolled_window_sees_what_a_young_stream_of_the_same_blocks_sees() -> None:
    """Re-based positions: prefix + last 2 blocks of an old stream act like blocks 0, 1, 2."""
    config = tiny_config()
    model = random_model(config)
    video, audio, context = inputs(config, 2)
    text = text_keys(model, context, context)
    constants = SigmaConstants(model, video)
    noisy, refresh = constants.at(0.5), constants.at(0.0)

    def fill(cache: RollingCache, blocks: list[int]) -> RollingCache:
        for block in blocks:
            vs, as_ = (
                slice(*config.layout.video_span(block)),
                slice(*config.layout.audio_span(block)),
            )
            opened = OpenBlock(model, cache, 2, 3, video)
            cache = opened.commit(video[:, :, vs], audio[:, as_], text, refresh)
        return cache

    young = fill(RollingCache(window=2), [0, 1, 1])
    old = RollingCache(window=2, indices=(0, 41, 42), blocks=young.blocks)
    vs, as_ = slice(*config.layout.video_span(1)), slice(*config.layout.audio_span(1))
    results = [
        OpenBlock(model, cache, 2, 3, video).velocity(video[:, :, vs], audio[:, as_], text, noisy)
        for cache in (young, old)
    ]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    rolled = old.append(young.blocks[2])
    assert rolled.indices == (0, 42, 43) and old.indices == (0, 41, 42)
    assert rolled.bytes() == old.bytes()


@torch.no_grad()
def test_one_stream_alone_runs_without_the_other() -> None:
    config = tiny_config()
    model = random_model(config)
    video, audio, context = inputs(config, 2)
    text = text_keys(model, context, context)
    levels = torch.full((2, 1, 2), 0.5)
    v, none = history_forward(model, (video, None), (video[:, None], None), levels, Told(text))
    assert none is None and v.shape == video[:, None].shape
    none, a = history_forward(model, (None, audio), (None, audio[:, None]), levels, Told(text))
    assert none is None and a.shape == audio[:, None].shape


def test_configs_that_cannot_be_built_say_why() -> None:
    with pytest.raises(ValueError, match="attention_head_dim is 7"):
        TransformerConfig.from_dict({"attention_head_dim": 7})
    with pytest.raises(ValueError, match="num_layers is 'many'"):
        TransformerConfig.from_dict({"num_layers": "many"})


def test_a_prompt_is_the_same_bits_in_any_number_of_threads(bundle: Bundle) -> None:
    """A node encodes in as many as there are, and a line that is typed is encoded in one."""
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(bundle.text_encoder.encode(["red ball"]))
        assert torch.equal(*made) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
