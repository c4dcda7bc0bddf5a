"""The network whose velocity is known has that velocity, in both ways of running it."""

from __future__ import annotations

import math

import torch
from mutual_forcing.networks.full_sequence import Told, history_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.samplers.rollout import SigmaConstants
from mutual_forcing.tests.known_network import AUDIO, PROMPT, VIDEO, known_system, prompts


def test_its_velocity_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    system = known_system()
    model, layout = system.transformer, system.transformer.config.layout
    frames, sounds = layout.video_latents(3), layout.audio_latents(3)

    def latents() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.randn(1, 2, frames, 2, 2, generator=generator).double(),
            torch.randn(1, sounds, 2, generator=generator).double(),
        )

    clean, noisy = latents(), latents()
    sigma, d = torch.tensor([[0.9, 0.4, 0.6]]), torch.tensor([[0.1, 0.0, 0.25]])
    text = system.text(prompts((2.0, -1.0)))
    with torch.no_grad():
        video, audio = history_forward(
            model,
            clean,
            tuple(x[:, None] for x in noisy),
            sigma[:, None],
            Told(text),
            step_size=d[:, None],
        )
        for block in range(3):
            v0, v1 = layout.video_span(block)
            a0, a1 = layout.audio_span(block)
            level = sigma[0, block], d[0, block]
            seen = torch.cat((clean[0][0, 0, :v0], noisy[0][0, 0, v0:v1])).mean()
            expected = VIDEO.velocity(noisy[0][:, :, v0:v1], *level, 2.0, seen)
            assert torch.allclose(video[:, 0, :, v0:v1], expected, atol=1e-5)
            seen = torch.cat((clean[1][0, :a0, 0], noisy[1][0, a0:a1, 0])).mean()
            expected = AUDIO.velocity(noisy[1][:, a0:a1], *level, -1.0, seen)
            assert torch.allclose(audio[:, 0, a0:a1], expected, atol=1e-5)
        constants = SigmaConstants(model, clean[0])
        cache = RollingCache(window=2)
        for block in range(3):
            vs, as_ = slice(*layout.video_span(block)), slice(*layout.audio_span(block))
            opened = OpenBlock(model, cache, 2, 2, clean[0])
            level = sigma[0, block].item(), d[0, block].item()
            v, a = opened.velocity(noisy[0][:, :, vs], noisy[1][:, as_], text, constants.at(*level))
            assert torch.allclose(v, video[:, 0, :, vs], atol=1e-5)
            assert torch.allclose(a, audio[:, 0, as_], atol=1e-5)
            cache = opened.commit(clean[0][:, :, vs], clean[1][:, as_], text, constants.at(0.0))


def test_the_feed_forward_is_a_gated_tanh_gelu() -> None:
    """gelu(2) = 1 + tanh(sqrt(2/pi) (2 + 0.044715 * 8)), added to what stands for the prompt."""
    system = known_system()
    model = system.transformer
    latents = torch.ones(1, 2, 1, 2, 2).double(), torch.ones(1, 1, 2).double()

    def velocity() -> torch.Tensor:
        noisy = tuple(x[:, None] for x in latents)
        told = Told(system.text(prompts((0.0, 0.0))))
        return history_forward(model, latents, noisy, torch.full((1, 1, 1), 0.5), told)[0]

    with torch.no_grad():
        before = velocity()
        feed_forward = model.transformer_blocks[0].ff
        feed_forward.net[0].proj.bias[0] = 2.0
        feed_forward.net[2].weight[PROMPT, 0] = 10.0
        model.transformer_blocks[0].scale_shift_table[5, PROMPT] = 0.5
        added = velocity() - before
    gelu = 1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8))
    expected = VIDEO.prompt * 0.5 * 10.0 * gelu
    assert torch.allclose(added, torch.full_like(added, expected), atol=1e-5, rtol=0)
