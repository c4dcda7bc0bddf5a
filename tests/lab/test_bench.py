"""The benchmark measures what it says: FLOPs counted twice, equal rollouts, commands in turn."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutual_forcing.lab.bench import against, clip, parallel_plan, rollout
from mutual_forcing.lab.bench.breakdown import KINDS, kind_of
from mutual_forcing.lab.bench.floor import Rates, Work, block_work, measure_rates, pass_work
from mutual_forcing.lab.bench.measure import Workload, measure
from mutual_forcing.lab.bench.setups import Setup, setup
from mutual_forcing.lab.bench.stopwatch import Span, Stopwatch
from mutual_forcing.networks.execution import Execution
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.samplers.rollout import SigmaConstants
from mutual_forcing.samplers.stream_memory import StreamMemory
from mutual_forcing.tests import tiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def small(**changes: object) -> Setup:
    config = replace(
        tiny.TRANSFORMER, step_size_embedding=False, video_first_block=4, audio_first_block=26
    )
    made = Setup("tiny", config, 2, 3, 2, 5, tiny.VIDEO, tiny.AUDIO)
    return replace(made, **changes)


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention whose products the counter knows on every device."""
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


LATER = tiny.LATER | {"memory_audio_dim": 4, "memory_film_hidden": 6, "opening_blocks": 4}


@pytest.mark.parametrize(
    "changes",
    [{"num_audio_sink_tokens": 0}, {"num_audio_sink_tokens": 2}, LATER],
    ids=("no sinks", "sinks", "taomate"),
)
@torch.no_grad()
def test_what_is_computed_is_what_cannot_be_done_without(changes: dict[str, object]) -> None:
    """The FLOPs counted from the config are those that our passes execute: none is wasted."""
    made = small()
    made = replace(made, config=replace(made.config, **changes), height=8, width=4)
    model = made.model(torch.float32, CPU)
    model.kernel = by_products
    like = torch.empty(0)
    text, constants = made.text(model, like), SigmaConstants(model, like)
    noisy, clean = constants.at(0.5), constants.at(0.0)
    cache = RollingCache(made.window, opening=made.config.opening_blocks)
    memory = None
    for block in range(6):  # past the window of 2
        opened = OpenBlock(model, cache, made.height, made.width, like)
        video, audio = torch.zeros(1, *opened.video_shape), torch.zeros(1, *opened.audio_shape)
        with FlopCounterMode(display=False) as steps:
            opened.velocity(video, audio, text, noisy, memory=memory)
        with FlopCounterMode(display=False) as refresh:
            cache = opened.commit(video, audio, text, clean, memory=memory)
        if made.config.memory_interval:
            memory = StreamMemory.begun(video, audio).told()
        assert steps.get_total_flops() == pass_work(made, block, 4).flops
        assert refresh.get_total_flops() == pass_work(made, block, 4, refresh=True).flops


def test_all_weights_of_a_layer_are_read_in_a_pass() -> None:
    made = small()
    read = pass_work(made, 0, 1).bytes
    model = made.model(torch.float32, CPU)
    context = ("to_k", "to_v")
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and "table" not in name
        and not any(part in name for part in ("adaln", "caption", "sink"))
        and not ("attn2" in name and any(part in name for part in context))
    )
    text = 2 * made.text_tokens * made.config.num_layers
    known = text * (made.config.video_dim + made.config.audio_dim)
    assert read == weights + known


def test_a_floor_is_arithmetic_or_memory_whichever_is_longer() -> None:
    second = Span(1.0, 2.0)
    rates = Rates(100.0, second, 10.0, second, 1.0, second)
    computing, reading = Work(150.0, 50.0, 1.0), Work(1.0, 0.0, 40.0)
    assert rates.floor([(computing, 3), (reading, 1)], lambda span: span.wall) == 3 * 2.0 + 4.0
    assert rates.floor([(computing, 1)], lambda span: span.cpu) == 4.0
    # Its 50 FLOPs of attention at one a second.
    assert rates.floor([(computing, 1)], lambda span: span.wall, apart=True) == 1.5 + 50.0
    assert [count for _, count in block_work(small(), 2, 4, 4)] == [4, 1]
    assert len(block_work(small(), 0, 4, 4)) == 1


def test_rates_are_of_the_work_that_they_name() -> None:
    made = small()
    rates = measure_rates(made, torch.float32, CPU, seconds=0.01)
    tokens, width = 3 * 6, made.config.video_dim
    assert rates.flops == 2 * tokens * width * (6 * width + 8 * width)
    assert all(span.wall > 0 and span.cpu >= 0 for span in (rates.matmul, rates.copy))


def plan(**changes: object) -> Workload:
    return replace(Workload(small(), 3, 2, torch.float32, CPU, Execution()), **changes)


def test_the_plain_rollout_makes_the_same_blocks() -> None:
    found = measure(plan(plain=True, decode=True, separate=True))
    assert all(block.difference < 1e-4 and block.plain.wall > 0 for block in found.blocks)
    assert [block.frames for block in found.blocks] == [25, 24, 24]
    denoising = {"open", "denoise", "refresh", "refresh and denoise"}
    assert set(found.stages) == denoising | {"video decode", "audio decode"}
    assert all(block.separate.wall > 0 for block in found.blocks)
    assert "refresh" not in found.blocks[2].stages and found.blocks[2].stages["refresh and denoise"]
    for block in found.blocks:
        assert 0 < sum(block.stages.values()) <= block.span.wall
        assert block.floor.wall > 0 and block.attended.wall > 0
    assert "refresh" not in found.blocks[0].stages
    two = found.blocks[0].span.wall + found.blocks[1].span.wall
    assert found.first_chunk == pytest.approx(two + found.prompt)


def test_overlapped_and_eight_bit_runs_are_measured_too() -> None:
    found = measure(plan(decode=True, overlap=True, blocks=2))
    assert found.stages["denoise"] > 0 and found.stages["video decode"] > 0
    wide = replace(
        small().config, num_attention_heads=4, audio_num_attention_heads=4, cross_attention_dim=64
    )
    made = small(config=replace(wide, audio_cross_attention_dim=32))
    found = measure(plan(setup=made, fp8=True, blocks=1))
    assert set(found.fp8) == {"video", "audio"} and all(0 < x < 0.2 for x in found.fp8.values())
    assert found.first_chunk is None


def test_the_hosted_network_is_the_same_and_its_time_is_broken_down() -> None:
    """Through the view of interleaved weights; what is started is counted by kind."""
    config = replace(small().config, rope_type="split")
    own = plan(setup=small(config=config), profile=True, blocks=1)
    found = measure(replace(own, host="view"))
    kinds = found.breakdown.kinds
    assert set(kinds) == set(KINDS) and all(part.seconds > 0 for part in kinds.values())
    assert [kind for kind in KINDS if kinds[kind].alone] == ["attention", "products"]
    plain = measure(own).breakdown.kinds
    assert all(kinds[kind].calls == plain[kind].calls for kind in ("products", "attention"))
    assert list(found.rows) == [18, 36, 144] and found.path == "eager"
    names = {"flash_fwd_kernel": "attention", "nvjet_tst_128x256": "products", "aten::mul": "rest"}
    assert {name: kind_of(name) for name in names} == names


def test_named_setups_have_the_sizes_of_the_19b_model() -> None:
    whole, quarter = setup("19b"), setup("quarter")
    assert abs(whole.weights() - 18.876e9) < 1e6
    assert quarter.config.num_layers == 8 and quarter.config.video_dim * 4 == whole.config.video_dim
    assert setup("small").config.step_size_embedding
    # docs/ltx23.md, section 1: LTX-2.3 with TaoMate's memory.
    assert abs(setup("taomate").weights() - 19.087e9) < 1e6 and setup("taomate").window == 2
    changed = setup("quarter", layers=1, window=3, grid=(2, 4))
    assert (changed.config.num_layers, changed.window, changed.height, changed.width) == (
        1,
        3,
        2,
        4,
    )
    # docs/omniforcing.md, section 7: linears of a pass over block 0, and over a later one.
    assert abs(pass_work(whole, 0, 2).linear / 39.8e12 - 1) < 0.02
    assert abs(pass_work(whole, 1, 2).linear / 29.9e12 - 1) < 0.02


def test_the_command_writes_a_table_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mutualforcing")
    monkeypatch.setattr(rollout, "setup", lambda *_: small())
    out = tmp_path / "here" / "bench"
    assert rollout.main(["--blocks", "2", "--steps", "2", "--plain", "--out", str(out)]) == 0
    shown = caplog.messages[0]
    assert f"{shown}\n" == Path(f"{out}.md").read_text(encoding="utf-8")
    assert "| 1 |" in shown and "ratio to the floor" in shown
    found = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    assert len(found["blocks"]) == 2 and found["difference to plain"] < 1e-4
    assert found["frames a second"] == pytest.approx(49 / (2 * found["seconds per block"]))
    assert found["peak GiB"] is None  # it would be the plain one's


def test_what_cannot_be_measured_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = {
        ("--blocks", "0"): "--blocks is 0",
        ("--grid", "16"): "expected HEIGHTxWIDTH",
        ("--device", "cuda"): "no CUDA GPU",
        ("--path", "graph"): "graphs are CUDA's",
        ("--plain", "--blocks", "9"): "ask for --window 7 or more",
    }
    for arguments, message in cases.items():
        assert rollout.main(list(arguments)) == 2
        assert message in caplog.messages[-1]
    monkeypatch.setattr("mutual_forcing.lab.bench.setups._memory", lambda: 2**33)
    assert rollout.main(["--config", "19b", "--dtype", "bf16"]) == 2
    assert "35 GiB of weights and this machine 8 GiB" in caplog.messages[-1]


def test_commands_run_in_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = [[sys.executable, "-c", f"open({str(log)!r}, 'a').write({name!r})"] for name in "ab"]
    seconds = against.in_turn(commands, 3)
    assert log.read_text() == "ababab"
    assert [len(runs) for runs in seconds] == [3, 3] and all(
        s > 0 for runs in seconds for s in runs
    )
    assert against.compared([2.0, 1.0, 4.0], [8.0, 8.0, 1.0])["theirs over ours"] == 4.0
    with pytest.raises(ValueError, match="ended with status 3"):
        against.in_turn([[sys.executable, "-c", "raise SystemExit(3)"]], 1)
    with pytest.raises(ValueError, match="cannot be started"):
        against.in_turn([[str(tmp_path / "missing")]], 1)


def test_a_stopwatch_adds_up_by_stage() -> None:
    watch = Stopwatch(CPU)
    for stage in ("a", "b", "a"):
        with watch(stage):
            pass
    first = watch.read()
    assert set(first) == {"a", "b"} and min(first.values()) >= 0
    assert watch.read() == {}


def test_a_whole_clip_is_timed_alone_and_beside_busy_programs(tmp_path: Path) -> None:
    out = tmp_path / "clip"
    model = tiny.save_tiny(tmp_path / "model.safetensors")
    words = ["--model", str(model), "--seconds", "1", "--rounds", "1", "--threads", "1"]
    threads = torch.get_num_threads()
    assert clip.main([*words, "--neighbours", "0", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    rates = json.loads(out.with_suffix(".json").read_text())["times real time"]
    assert list(rates) == ["0 busy neighbours", "1 busy neighbours"]
    for ways in rates.values():
        assert list(ways) == ["1 thread, one after the other", "1 thread, side by side"]
        assert all(rate > 0 for rate in ways.values())
    assert clip.main(["--model", str(tmp_path / "none")]) == 2


def test_an_older_version_says_itself_how_long_its_clip_took(tmp_path: Path) -> None:
    older = tmp_path / "generate.py"
    says = "0.50 times real time ({:.1f} s, loading not counted)"
    older.write_text(f"import sys\nprint({says!r}.format(float(sys.argv[3]) * len(sys.argv)))")
    made = tmp_path / "clip.mp4"
    assert clip.seconds_by_generate(tmp_path, None, 2, made) == 12  # six words
    assert clip.seconds_by_generate(tmp_path, 1, 2, made) == 16
    older.write_text("print('done')")
    with pytest.raises(ValueError, match="does not say how long"):
        clip.seconds_by_generate(tmp_path, None, 2, made)


def test_cards_that_share_a_stream_are_computed_from_what_one_took() -> None:
    def planned(cards: int, *, size: tuple[int, int] = (768, 512), **link: float) -> object:
        link = parallel_plan.Link("", **{"latency": 0.0, "bandwidth": float("inf")} | link)
        return parallel_plan.planned("19b", size, cards, link, 0.0, sound_on_one=False)

    one, two = planned(1), planned(2)
    assert one.seconds == parallel_plan.ON_ONE["19b"].whole and not one.sent
    assert one.seconds / 2 < two.seconds < one.seconds
    assert 0.5 * one.held < two.held < 0.51 * one.held
    # A message's own time, and through each of two cards all of its bytes.
    assert planned(2, latency=1e-3).seconds == pytest.approx(two.seconds + 1e-3 * two.messages)
    assert planned(2, bandwidth=1e9).talking == pytest.approx(two.sent / 1e9)
    assert two.messages == 4 * 7 * 48 and planned(2, size=(1280, 704)).sent > 2 * two.sent
