"""Adapters over a frozen LTX-2 base, shrunken: they learn, the base stays, a file is exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mutual_forcing.lab.training import adapters, omniforcing
from mutual_forcing.lab.training.adapters import (
    AdapterSettings,
    adapt,
    load_trained,
    merged_weights,
)
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.flow_matching import flow_matching
from mutual_forcing.lab.training.train import CONFIGS
from mutual_forcing.model_loaders.fixture import relative_error
from mutual_forcing.model_loaders.ltx2 import load_transformer
from mutual_forcing.networks.full_sequence import causal_forward
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.tests.ltx2_files import WEIGHTS, with_header
from mutual_forcing.tests.tiny_training import draws, run, write_latents
from safetensors.torch import load_file

CONFIG = json.loads((CONFIGS / "ltx2_19b.json").read_text())
SHARED = CONFIG["adapters"]["joint"] | {"rank": 4, "alpha": 8}
APART = CONFIG["adapters"]["mutual"] | {"rank": 4}
BLOCKS, CAPTION = 2, 20
HEADER = {"rope_type": "interleaved", "av_ca_timestep_scale_multiplier": 1.0}
HEADER |= {"frequencies_precision": "float32"}
FLOW = {"sigma_mean": 0.3, "sigma_spread": 1.2, "caption_dropout": 0.1, "history_noise": 0.0}


def clips(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(count, 16, 7, 2, 2, generator=generator),
        torch.randn(count, 51, 16, generator=generator),
        torch.randn(count, 5, 2, CAPTION, generator=generator),
    )


@pytest.fixture(params=[SHARED, APART], ids=["shared", "apart"])
def adapters_of_mutual(request: pytest.FixtureRequest) -> dict[str, object]:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, adapters_of_mutual: dict[str, object]) -> Path:
    with_header(tmp_path, **HEADER)
    write_latents(tmp_path / "latents", clips())
    np.save(tmp_path / "latents" / "empty.npy", np.zeros((5, 2, CAPTION), np.float16))
    # The config of full size, its sizes those of the copy: network, clips, batch, ranks, first
    # steps.
    recipe = {"lengths": [{"blocks": BLOCKS, "batch": 2, "share": 1.0}], "dtype": "float32"}
    settings = {
        "transformer": {
            "num_layers": 2,
            "video_first_block": CONFIG["transformer"]["video_first_block"],
        },
        "stream": CONFIG["stream"] | {"height": 2, "width": 2},
        "recipe": CONFIG["recipe"] | recipe | {"warmup_steps": 1},
        "adapters": {"joint": SHARED, "mutual": adapters_of_mutual},
        "mutual": CONFIG["mutual"] | {"fake_warmup": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | settings))
    return tmp_path / "latents"


def trained(folder: Path) -> Path:
    base = str(folder.parent / "headed.safetensors")
    options = ("--base", base, "--steps", "2", "--learning-rate", "0.01")
    run(folder, "out", *options, stage="mutual").train()
    return folder.parent / "out"


def test_the_systems_share_one_base_that_never_changes(
    folder: Path, adapters_of_mutual: dict[str, object]
) -> None:
    base = str(folder.parent / "headed.safetensors")
    made = run(folder, "out", "--base", base, "--steps", "3", stage="mutual")
    stage, apart = made.stage, adapters_of_mutual is APART
    systems = [stage.system, stage.fake] if apart else [stage.system, stage.teacher, stage.fake]
    # With few-step adapters the network at rest is its own teacher.
    assert (stage.teacher is stage.system) == apart
    layers = [s.transformer.transformer_blocks[0].attn1.to_q for s in systems]
    shared = [layer.weight if apart else layer.base.weight for layer in layers]
    assert len({weight.data_ptr() for weight in shared}) == 1
    ups = [layer.few_step.up.weight if apart else layer.up for layer in layers]
    assert len({up.data_ptr() for up in ups}) == len(systems)
    before = load_transformer(base).transformer.state_dict()
    made.train()
    after = stage.system.transformer.state_dict()
    for name, value in before.items():
        owner, _, last = name.rpartition(".")
        key = name if name in after else f"{owner}.base.{last}"
        assert torch.equal(after[key], value), name
    assert ups[0].abs().sum() > 0 and ups[-1].abs().sum() > 0
    # The run keeps what it trained and nothing else.
    saved = load_file(folder.parent / "out" / "weights.safetensors")
    own = (".few_step.", ".step_size_embedder.") if apart else (".step_size_embedder.",)
    assert all(any(p in k for p in own) or k.endswith((".down", ".up")) for k in saved)


@pytest.mark.parametrize("adapters_of_mutual", [SHARED], indirect=True)
def test_fresh_adapters_change_nothing_and_learn(folder: Path) -> None:
    base = str(folder.parent / "headed.safetensors")
    made = run(folder, "out", "--base", base, "--steps", "12", "--learning-rate", "0.02")
    plain = load_transformer(base).transformer
    data = clips(2)
    text = text_keys(plain, *data.ids.unbind(dim=2))
    level = torch.full((2, 1), 0.5)
    expected = causal_forward(plain, data.video, data.audio, level, level, text)
    found = causal_forward(
        made.stage.system.transformer, data.video, data.audio, level, level, text
    )
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))

    def loss() -> float:
        with torch.no_grad():
            return float(
                sum(flow_matching(made.stage.system, clips(), draws(5, 4), coupled=True, **FLOW))
            )

    first = loss()
    made.train()
    assert loss() < 0.98 * first


def test_the_checkpoint_is_the_adapted_network(
    folder: Path, adapters_of_mutual: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, apart = trained(folder), adapters_of_mutual is APART
    base = folder.parent / "headed.safetensors"
    adapted = load_transformer(base).transformer
    adapt(adapted, AdapterSettings(**adapters_of_mutual))
    weights = load_file(out / "weights.safetensors")
    load_trained(adapted, {k.removeprefix("transformer."): v for k, v in weights.items()})
    path = folder.parent / "made.safetensors"
    command = ["lab.training.adapters", "--run", str(out), "--base", str(base), "--out", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    adapters.main()
    made, start = load_transformer(path).transformer, load_transformer(base).transformer
    assert made.config.step_size_embedding and set(merged_weights(adapted)) > set(WEIGHTS)
    assert made.config.few_step_rank == (4 if apart else 0)
    data, level = clips(2), torch.full((2, 1), 0.6)

    def velocities(model: CausalAVTransformer, d: float | None) -> tuple[torch.Tensor, ...]:
        text = text_keys(model, *data.ids.unbind(dim=2))
        step = None if d is None else torch.full((2, 1), d)
        return causal_forward(model, data.video, data.audio, level, level, text, step_size=step)

    few = velocities(made, 0.2)
    assert all(
        relative_error(*pair) < 1e-5 for pair in zip(velocities(adapted, 0.2), few, strict=True)
    )
    assert relative_error(velocities(start, None)[0], few[0]) > 1e-3
    # Few-step adapters leave multi-step mode what it was, those that are merged do not.
    same = map(torch.equal, velocities(made, None), velocities(start, None))
    assert all(same) == apart


def test_a_run_of_adapters_goes_on_and_is_started_from(folder: Path) -> None:
    out = trained(folder)
    base = str(folder.parent / "headed.safetensors")
    again = run(folder, "out", "--base", base, "--steps", "3", stage="mutual")
    assert again.step == 2
    options = ("--base", base, "--init", str(out), "--steps", "3")
    second = run(folder, "second", *options, stage="mutual")
    saved = load_file(out / "weights.safetensors")
    parameters = dict(second.stage.system.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in saved.items())


@pytest.mark.parametrize("adapters_of_mutual", [SHARED], indirect=True)
def test_wrong_bases_and_layers_are_refused(folder: Path) -> None:
    base = str(folder.parent / "headed.safetensors")
    with pytest.raises(ValueError, match="name the network under them with --base"):
        run(folder, "out", stage="mutual")
    config = folder.parent / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"transformer": {"num_layers": 3}}))
    with pytest.raises(ValueError, match=r"num_layers': 2.*expected what the section"):
        run(folder, "out", "--base", base, stage="mutual")
    model = load_transformer(base).transformer
    with pytest.raises(ValueError, match="found no linear layer that 'conv' names"):
        adapt(model, AdapterSettings(4, 4, "conv"))
    with pytest.raises(ValueError, match="expected both for adapters that change"):
        AdapterSettings(4, alpha=4)
    adapt(model, AdapterSettings(**SHARED))
    with pytest.raises(ValueError, match="not of these adapters"):
        load_trained(model, {"x": torch.zeros(1)})


@pytest.mark.parametrize("adapters_of_mutual", [SHARED], indirect=True)
def test_omniforcings_stages_train_one_set_of_adapters_over_one_base(folder: Path) -> None:
    base = folder.parent / "headed.safetensors"
    config = folder.parent / "config.json"
    full = json.loads((CONFIGS / "ltx2_19b_omniforcing.json").read_text())
    settings = json.loads(config.read_text())
    adapters_of = {stage: a | {"rank": 2} for stage, a in full["adapters"].items()}
    stages = {stage: own | {"steps": 2} for stage, own in full["stages"].items()}
    recipe = settings["recipe"] | {"learning_rate": 0.01}
    settings |= {"adapters": adapters_of, "stages": stages, "recipe": recipe}
    config.write_text(json.dumps(settings))
    out = folder.parent / "omniforcing"
    words = ["--config", config, "--base", base, "--latents", folder, "--out", out]
    args = omniforcing.parser().parse_args([str(word) for word in words])
    omniforcing.work(args)
    records = [json.loads((out / stage / "config.json").read_text()) for stage in stages]
    counts = [record["transformer"].get("num_audio_sink_tokens", 0) for record in records]
    assert counts == [0, 16, 16] and not (out / "bidirectional").exists()
    runs = {stage: load_file(out / stage / "weights.safetensors") for stage in stages}
    first, second, third = runs.values()
    assert set(first) | {"transformer.audio_sink_tokens"} == set(second) == set(third)
    # The third stage's teacher and fake score are the base, without sinks; all share its weights.
    options = ["--base", str(base), "--init", str(out / "causal_ode"), "--steps", "2"]
    made = run(folder, "third", *options, stage="self_forcing").stage
    systems = made.system, made.teacher, made.fake
    owners = [system.transformer.transformer_blocks[0].attn1.to_q for system in systems]
    assert len({owner.base.weight.data_ptr() for owner in owners}) == 1
    assert [system.transformer.config.num_audio_sink_tokens for system in systems] == [16, 0, 0]
    data, level = clips(2), torch.full((2, 1), 0.6)
    plain = load_transformer(base).transformer

    def velocities(model: CausalAVTransformer, **told: object) -> tuple[torch.Tensor, ...]:
        text = text_keys(model, *data.ids.unbind(dim=2))
        return causal_forward(model, data.video, data.audio, level, level, text, **told)

    pairs = zip(
        velocities(made.teacher.transformer, causal=False),
        velocities(plain, causal=False),
        strict=True,
    )
    assert all(relative_error(*pair) < 1e-5 for pair in pairs)
    saved = {key.removeprefix("transformer."): value for key, value in second.items()}
    parameters = dict(made.system.transformer.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in saved.items())
    # What comes out is a file with sinks, which makes what the adapted network makes.
    path = folder.parent / "made.safetensors"
    words = ["--run", out / "self_forcing", "--base", base, "--out", path]
    adapters.work(adapters.parser().parse_args([str(word) for word in words]))
    load_trained(
        made.system.transformer, {k.removeprefix("transformer."): v for k, v in third.items()}
    )
    loaded = load_transformer(path).transformer
    assert loaded.config.layout == plain.config.layout
    step = torch.full((2, 1), 0.2)
    few = [velocities(one, step_size=step) for one in (loaded, made.system.transformer)]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*few, strict=True))
    assert relative_error(few[0][0], velocities(plain)[0]) > 1e-3
