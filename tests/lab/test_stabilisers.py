"""Table 3 of OmniForcing: other forms of attention, and a table that is made once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.lab.training import stabilisers, train
from mutual_forcing.lab.training.attention_forms import FrozenNorm, HeadNorm, alter
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.networks.rope import block_tables
from mutual_forcing.tests.tiny import CHANNELS, TRANSFORMER, VIDEO_CHANNELS, save_tiny
from mutual_forcing.tests.tiny_training import CONFIG, LAYOUT, SETTINGS, run, system, write_latents
from torch import nn


def test_rotated_sinks_take_the_first_places_and_the_sound_those_after_them() -> None:
    """As if the first block had as many more latents of sound, and there were no sinks."""
    config = replace(CONFIG, num_audio_sink_tokens=3, rotated_sinks=True)
    longer = replace(CONFIG, num_audio_sink_tokens=0, audio_first_block=1 + 3)
    for blocks in (range(3), range(1, 3)):
        found, expected = (block_tables(c, blocks, 1, 1) for c in (config, longer))
        for table in ("audio", "cross_audio", "video"):
            for one, other in zip(getattr(found, table), getattr(expected, table), strict=True):
                assert torch.equal(one, other)
    plain = block_tables(replace(config, rotated_sinks=False), range(3), 1, 1)
    assert not torch.equal(found.audio.cos, plain.audio.cos[..., -found.audio.cos.shape[-2] :, :])


def test_forms_of_attention_by_hand() -> None:
    norm = nn.RMSNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[[3.0, 4.0, 0.0, 1.0]]])
    assert FrozenNorm(norm, torch.tensor(2.0))(x).tolist() == [[[1.5, 4.0, 0.0, 2.0]]]
    # Each head of two by its own root mean square, sqrt(12.5) and sqrt(0.5).
    expected = [3 / 12.5**0.5, 8 / 12.5**0.5, 0.0, 4 / 0.5**0.5]
    assert HeadNorm(norm, 2)(x)[0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    made = system()
    alter(made, "tanh gate")
    block = made.transformer.transformer_blocks[0]
    gated = block.audio_attn1.to_out[0]
    x = torch.randn(1, 2, gated.linear.in_features, generator=torch.Generator().manual_seed(0))
    assert gated(x).abs().max() == 0
    with torch.no_grad():
        gated.gate.fill_(0.5)
    assert torch.allclose(gated(x), torch.tensor(0.5).tanh() * gated.linear(x))
    assert isinstance(block.attn1.to_out[0], nn.Linear)
    assert isinstance(block.attn1.q_norm, FrozenNorm)
    with pytest.raises(ValueError, match="found attention 'soft'"):
        alter(made, "soft")


def test_convergence_is_read_off_the_losses() -> None:
    falling = [1 / (1 + step) for step in range(20)]
    assert stabilisers.verdict(falling) == "stable"
    assert stabilisers.verdict([1.0] * 20) == "plateau"
    assert stabilisers.verdict([*falling, float("nan")]) == "not finite"


def test_the_table_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    data = Batch(
        torch.randn(4, VIDEO_CHANNELS, LAYOUT.video_latents(2), 2, 2, generator=generator),
        torch.randn(4, LAYOUT.audio_latents(2), CHANNELS, generator=generator),
        torch.randint(1, 9, (4, 32), generator=generator),
    )
    latents = tmp_path / "latents"
    write_latents(latents, data)
    recipe = SETTINGS["recipe"] | {"lengths": [{"blocks": 2, "batch": 2, "share": 1.0}]}
    bare = {"transformer": {"num_audio_sink_tokens": 0}}
    settings = {"transformer": TRANSFORMER.to_dict(), "recipe": recipe}
    settings |= {"stages": {"bidirectional": bare}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SETTINGS | settings))
    run(latents, "teacher", "--steps", "3", stage="bidirectional").train()
    codecs = save_tiny(tmp_path / "tiny.safetensors")
    words = ["--config", config, "--teacher", tmp_path / "teacher", "--latents", latents]
    words += ["--held-out", latents, "--held-out-clips", 2, "--codecs", codecs]
    words += ["--variants", "16 sinks", "QK norm", "--precisions", "bfloat16", "--steps", 2]
    words += ["--seeds", 1, "--prompts", 2, "--seconds", 1, "--out", tmp_path / "out"]
    args = stabilisers.parser().parse_args([str(word) for word in words])
    stabilisers.work(args)
    found = json.loads((tmp_path / "out" / "stabilisers.json").read_text())["rows"]
    assert list(found) == ["16 sinks, bfloat16", "QK norm, bfloat16"]
    for (one,) in found.values():
        assert one["largest gradient"] > 0 and 0 < one["loss at 0.5"] < 100
        assert 0 <= one["attributes"] <= 1
    monkeypatch.setattr(train.Run, "train", lambda _: pytest.fail("it is there"))
    stabilisers.work(args)
