"""What a plan computes from a config is what a real step does and holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mutual_forcing.lab.bench.setups import setup
from mutual_forcing.lab.training import plan
from mutual_forcing.lab.training.adapters import AdapterSettings, adapt
from mutual_forcing.lab.training.data import Batch
from mutual_forcing.lab.training.draws import Draws
from mutual_forcing.lab.training.parallel import Processes
from mutual_forcing.lab.training.stages import Trained, build_stage
from mutual_forcing.lab.training.system import EmbeddedSystem, math_attention
from mutual_forcing.lab.training.train import CONFIGS, TransformerConfig, read_settings
from mutual_forcing.networks.transformer import CausalAVTransformer
from mutual_forcing.tests.tiny_training import SETTINGS
from torch.utils.flop_counter import FlopCounterMode

FULL = read_settings(CONFIGS / "ltx2_19b.json", "joint", "mutual")
TINY = SETTINGS | {
    "recipe": SETTINGS["recipe"]
    | {"dtype": "float32", "lengths": [{"blocks": 2, "batch": 2, "share": 1.0}], "recompute": True}
}


def adapted(stage: str, config: str = "ltx2_19b.json") -> dict[str, dict[str, object]]:
    """A small network under the adapters that a config has for a stage."""
    adapters = read_settings(CONFIGS / config, stage, "mutual")["adapters"]
    return TINY | {"adapters": adapters | {"rank": 2}}


def test_the_flops_of_a_step_without_values_are_those_of_one_with_them(monkeypatch) -> None:
    monkeypatch.setattr(plan, "gpu_attention", math_attention)
    settings = adapted("mutual")
    planned = plan.build(settings, "mutual", 1, 3)
    like = plan.empty_batch(settings, 2, 2, 3)
    with plan.Watch() as watch:
        planned.step(like, plan.Shapes(0, 0, 2), 0, 0.5, 1.0)
    model = CausalAVTransformer(TransformerConfig.from_dict(settings["transformer"]))
    adapt(model, AdapterSettings(**settings["adapters"]))
    model.kernel, model.recompute = math_attention, True
    system = EmbeddedSystem(model, torch.zeros(3, 2, 16))
    real = build_stage(
        "mutual", system, settings, Trained.from_recipe(settings["recipe"], Processes())
    )
    batch = Batch(*(None if t is None else torch.zeros(t.shape) for t in like))
    with FlopCounterMode(display=False) as counter:
        real.step(batch, Draws(0, 0, range(2)), 0, 0.5, 1.0)
    assert watch.flops == counter.get_total_flops() > 0


def test_layers_lie_on_a_straight_line() -> None:
    settings = adapted("joint")
    flops = [plan._flops(settings, "joint", depth, 3) for depth in (1, 2, 4)]
    assert plan.drawn_out(dict(zip((1, 2), flops, strict=False)).get, (1, 2), 4) == flops[2]
    size = {d: plan.working_bytes(settings, "joint", d, 3, 1) for d in (2, 4, 6)}
    assert plan.drawn_out(size.get, (2, 4), 6) == pytest.approx(size[6], rel=0.02)


def test_tensors_count_from_when_they_are_made_until_they_go() -> None:
    before = torch.empty(1000, device="meta")
    with plan.Watch() as watch:
        watch.known([before])
        view = before.view(10, 100)
        made = view + 1
        assert watch.now == watch.peak == 4000
        twice = torch.cat((made, made))
        del made
        assert (watch.now, watch.peak) == (8000, 12000)
        del twice
    assert watch.now == 0 and watch.flops == 0


def test_what_is_held_is_counted_once_and_split_by_rows(monkeypatch) -> None:
    # Where all is shared there is a teacher to hold as well.
    settings = adapted("mutual", "ltx2_19b_shared.json")
    with pytest.raises(ValueError, match="expected a multiple"):
        plan.working_bytes(settings, "joint", 1, 3, 3)
    # What a step adds takes long to find out and is another test's.
    monkeypatch.setattr(plan, "working_bytes", lambda *_: 1000)
    alone, four = ({p.name: p for p in plan.parts(settings | {"recipe": settings["recipe"] | {
        "lengths": [{"blocks": 1, "batch": 4, "share": 1.0}]}}, "mutual", 3, gpus)}
        for gpus in (1, 4))  # fmt: skip
    model = CausalAVTransformer(TransformerConfig.from_dict(settings["transformer"]))
    adapt(model, AdapterSettings(**settings["adapters"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert alone["frozen base, one for all"].whole == 4 * frozen
    assert alone["network: float32 weights"].whole == 4 * trained
    # AdamW: two moments and, for each tensor, a number that counts its steps.
    moments = alone["network: optimiser's moments"].whole - 8 * trained
    assert moments == 4 * sum(p.requires_grad for p in model.parameters())
    assert alone["network: moving average"].per_gpu == 4 * trained
    for name, part in alone.items():
        assert part.whole == part.per_gpu
        if name != "activations, gradients, temporaries":
            assert four[name].whole == part.whole
            assert part.whole / 4 <= four[name].per_gpu <= part.whole
    for kind in ("network: float32 weights", "network: moving average", "teacher: float32 weights"):
        assert four[kind].per_gpu < 0.4 * four[kind].whole
    assert four["frozen base, one for all"].per_gpu == 4 * frozen


def test_the_full_size_is_ltx2_19b() -> None:
    made = plan.build(FULL, "joint", 48, 1024)
    (base,) = (sum(p.numel() for p in made.system.parameters() if not p.requires_grad),)
    assert base == setup("19b").weights() and 18.8e9 < base < 19.0e9
    assert all(
        len(a) == len(b) for a, b in zip(made.weights.parameters, made.weights.average, strict=True)
    )


def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path: Path, caplog) -> None:
    config = tmp_path / "config.json"
    settings = adapted("joint")
    config.write_text(json.dumps(settings | {"adapters": {"joint": settings["adapters"]}}))
    out = tmp_path / "plan"
    caplog.set_level("INFO", "mutualforcing")
    plan.main(["--config", str(config), "--stages", "joint", "--gpus", "2", "--steps", "10",
               "--text-tokens", "3", "--out", str(out)])  # fmt: skip
    found, printed = json.loads(Path(f"{out}.json").read_text()), caplog.text
    joint = found["joint"]
    assert joint["sum GB per GPU"] == pytest.approx(sum(joint["parts GB per GPU"].values()))
    seconds = joint["PFLOP per step"] * 1e15 / 2 / (989e12 * 0.35)
    assert joint["seconds per step"] == pytest.approx(seconds)
    assert joint["GPU hours"] == pytest.approx(10 * 2 * seconds / 3600)
    for name in joint["parts GB per GPU"]:
        assert f"| {name} |" in printed
    # 16-bit captions of 3 tokens for two streams.
    assert found["MB on disk per clip"]["ids"] == pytest.approx(3 * 2 * 16 * 2 / 1e6)
