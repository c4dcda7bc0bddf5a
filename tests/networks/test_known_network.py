"""The network whose velocity is known has that velocity, in both ways of running it."""

from __future__ import annotations

import torch
from mutual_forcing.networks.full_sequence import Told, history_forward
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.samplers.rollout import SigmaConstants
from mutual_forcing.tests.known_network import AUDIO, VIDEO, known_system, prompts


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
