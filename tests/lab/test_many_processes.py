"""Two processes (FSDP2 over gloo) take the same steps as one: losses, norms and weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mutual_forcing.lab.training import train
from mutual_forcing.lab.training.stages import TAUGHT
from mutual_forcing.tests import many_processes
from mutual_forcing.tests.lab.test_adapters import CAPTION, HEADER, clips
from mutual_forcing.tests.ltx2_files import with_header
from mutual_forcing.tests.tiny_training import SETTINGS, batch, write_latents
from safetensors.torch import load_file

TIMED = {"seconds", "seconds per step", "peak MB"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage was trained by one process and by two."""
    if not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo, over which CPU processes talk")
    folder = tmp_path_factory.mktemp("many")
    write_latents(folder / "latents", batch(8))
    # In bfloat16 the split of a batch decides how its products are rounded.
    lengths = [{"blocks": blocks, "batch": 4, "share": 0.5} for blocks in (1, 3)]
    settings = SETTINGS | {
        "recipe": SETTINGS["recipe"] | {"dtype": "float32", "lengths": lengths},
        "mutual": SETTINGS["mutual"] | {"taught_every": 2},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    write_adapted(folder / "over")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, many_processes.__file__, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    many_processes.train_all(folder)
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return folder


def write_adapted(folder: Path) -> None:
    """A base, latents and the config for LTX-2 19B with what is large in it made small."""
    folder.mkdir()
    with_header(folder, **HEADER).rename(folder / "base.safetensors")
    write_latents(folder / "latents", clips(4))
    np.save(folder / "latents" / "empty.npy", np.zeros((5, 2, CAPTION), np.float16))
    full = json.loads((train.CONFIGS / "ltx2_19b_omniforcing.json").read_text())
    like = json.loads((train.CONFIGS / full.pop("like")).read_text())
    full["adapters"] = {stage: one | {"rank": 2} for stage, one in full["adapters"].items()}
    full["stages"] = {stage: one | {"steps": 3} for stage, one in full["stages"].items()}
    recipe = {"lengths": [{"blocks": 2, "batch": 2, "share": 1.0}], "dtype": "float32"}
    small = {
        "transformer": {"num_layers": 2},
        "stream": like["stream"] | {"height": 2, "width": 2},
        "recipe": like["recipe"] | recipe | {"warmup_steps": 1, "learning_rate": 0.01},
    }
    (folder / "config.json").write_text(json.dumps(like | full | small))


@pytest.mark.parametrize(("stage", "method"), many_processes.STAGES)
def test_two_processes_have_the_losses_and_weights_of_one(
    runs: Path, stage: str, method: str
) -> None:
    one, two = (runs / processes / f"{stage} {method}" for processes in "12")
    lines = [
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert len(lines[0]) == len(lines[1]) == 3
    for first, second in zip(*lines, strict=True):
        assert first.keys() == second.keys() > TIMED
        for key in first.keys() - TIMED:
            assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-6), key
    compare_weights(one, two)


@pytest.mark.parametrize("stage", TAUGHT)
def test_two_processes_train_the_adapters_of_one(runs: Path, stage: str) -> None:
    compare_weights(*(runs / processes / "over" / stage for processes in "12"))


def compare_weights(one: Path, two: Path) -> None:
    weights = [load_file(out / "weights.safetensors") for out in (one, two)]
    # Both optimisers divide by the gradient's size, so the rounding of a small gradient is not
    # small.
    step = 0.05 * SETTINGS["recipe"]["learning_rate"]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert value.isfinite().all() and torch.allclose(weights[1][name], value, atol=step), name


def test_what_two_processes_saved_one_goes_on_with(runs: Path) -> None:
    one, two = (
        torch.load(runs / processes / "mutual mutual" / "resume.pt", weights_only=True)
        for processes in "12"
    )

    def compare(a: object, b: object) -> None:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list):
            for x, y in zip(a, b, strict=True):
                compare(x, y)

    compare(one, two)
