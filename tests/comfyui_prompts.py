"""What the tests with a real ComfyUI share: prompts from our workflows, and what came of them."""

from __future__ import annotations

import io
import os
import subprocess
import time
from contextlib import suppress
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np
import pytest
import torch
from mutual_forcing.samplers.state import BlockLatents, StreamState
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_server import (
    ROOT,
    Server,
    browser,
    comfyui_path,
    comfyui_python,
)
from mutual_forcing.tests.ui_workflow import api_prompt, read_workflow

LIVE = "/mutual_forcing/live"


def prompt_of(name: str, schemas: dict) -> dict:
    """A workflow of ours, ready to queue."""
    return api_prompt(read_workflow(ROOT / "example_workflows" / name), schemas)


def inputs_of(prompt: dict, node: str) -> list[dict]:
    """The inputs of all nodes of a type, in the order of their ids."""
    return [entry["inputs"] for entry in prompt.values() if entry["class_type"] == node]


def frames_of(path: Path | IO[bytes]) -> np.ndarray:
    """All frames of a video."""
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def frames_in(content: bytes) -> int:
    """How many pictures a whole or growing mp4 plays."""
    count = 0
    # The last one may not be whole.
    with suppress(av.error.InvalidDataError), av.open(io.BytesIO(content)) as file:
        for _ in file.decode(video=0):
            count += 1
    return count


def lengths(path: Path | IO[bytes]) -> tuple[Fraction, Fraction]:
    """Seconds of picture and of sound in a file."""
    with av.open(path) as file:
        frames = sum(1 for _ in file.decode(video=0))
        video = frames / file.streams.video[0].average_rate
        sound = file.streams.audio[0]
        return video, sound.duration * sound.time_base


def endings(server: Server, prompt: dict, name: str) -> tuple[dict, list[StreamState]]:
    """Run a forked workflow and save the states after its last chunks: exact, as H.264 is not."""
    prompt = deepcopy(prompt)
    chunks = [node for node, entry in prompt.items() if entry["class_type"] == "MF_SampleChunk"]
    for node in chunks[2:]:
        saving = {"state": [node, 0], "name": f"{name}_{node}", "memory": False}
        prompt[f"save{node}"] = {"class_type": "MF_SaveState", "inputs": saving}
    entry = server.run(prompt)
    kept = server.output / "mutual_forcing"
    return entry, [load_state(kept / f"{name}_{node}_00001_.safetensors") for node in chunks[2:]]


def same(one: BlockLatents, other: BlockLatents) -> bool:
    """Whether two blocks are equal, bit for bit."""
    return torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)


def cached_nodes(entry: dict) -> list[str]:
    """Ids of the nodes whose outputs came from ComfyUI's cache."""
    return next(
        data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"
    )


def refusal(server: Server, prompt: dict) -> str:
    """All that an artist is told about a prompt that is refused before or while it runs."""
    answer = server.post("/prompt", {"prompt": prompt})
    if "prompt_id" not in answer or answer.get("node_errors"):
        return str(answer)
    entry = server.finished(answer["prompt_id"])
    assert entry["status"]["status_str"] == "error"
    return str(entry["status"]["messages"])


def run_from_page(server: Server, workflow: Path, picture: Path) -> str:
    """Open a workflow in ComfyUI's page, press Run, insist on success; what the script said.

    Skips where there is no browser.
    """
    chromium = browser()
    if chromium is None:
        pytest.skip("needs Chromium, and playwright in ComfyUI's environment")
    script = ROOT / "tests" / "web_page.py"
    python = comfyui_python(comfyui_path())
    done = subprocess.run(
        [str(python), str(script), server.url, str(workflow), str(picture)],
        env=os.environ | {"CHROMIUM": str(chromium)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing: none" in done.stdout and "status: success" in done.stdout
    assert picture.stat().st_size > 10_000
    return done.stdout


def run_named(server: Server, prompt_id: str) -> dict:
    """The status of the run of a prompt, once there is one."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for run in server.get(LIVE):
            if run["prompt_id"] == prompt_id:
                return run
        time.sleep(0.05)
    raise TimeoutError(prompt_id)


def titled(prompt: dict, schemas: dict) -> dict:
    """An API prompt as the page sends it: ComfyUI's replacement of nodes wants their titles."""
    return {
        key: node | {"_meta": {"title": schemas.get(node["class_type"], {}).get("display_name")}}
        for key, node in deepcopy(prompt).items()
    }
