"""A model on two devices in a real ComfyUI: ranks beside its process. Both devices are the CPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mutual_forcing.model_loaders.fixture import relative_error
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_prompts import (
    LIVE,
    endings,
    frames_of,
    inputs_of,
    prompt_of,
    refusal,
    run_named,
)
from mutual_forcing.tests.comfyui_server import Server, comfyui_path

pytestmark = pytest.mark.skipif(
    comfyui_path() is None or not Path("/proc/self/task").exists(),
    reason="no ComfyUI found, or no /proc to find its processes in",
)


def ranks_of(server: Server) -> list[int]:
    """Processes of the server's that hold a part of a model."""
    found = []
    for children in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            if b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def on_two(prompt: dict) -> dict:
    inputs_of(prompt, "MF_LoadModel")[0]["devices"] = "cpu, cpu"
    return prompt


def alike(one: StreamState, other: StreamState) -> bool:
    pairs = zip(one.latents, other.latents, strict=True)
    return all(relative_error(a, b) < 1e-5 for pair in pairs for a, b in zip(*pair, strict=True))


def cut_short(server: Server, prompt: dict, how: Callable[[], object]) -> tuple[str, StreamState]:
    """A long clip to which that is done meanwhile: what is said of it, and the stream so far."""
    folder = server.output / "mutual_forcing"
    before = set(folder.glob("unfinished_*"))
    queued = server.queue(prompt)
    until(lambda: run_named(server, queued)["made"] >= 3)
    how()
    entry = server.finished(queued)
    files = {file.suffix: file for file in set(folder.glob("unfinished_*")) - before}
    state = load_state(files[".safetensors"])
    assert len(frames_of(files[".mp4"])) == 1 + 24 * (state.next_block - 1) >= 73
    return str(entry["status"]["messages"]), state


def test_a_stream_on_two_devices_is_that_of_one_and_outlives_a_process_that_dies(
    server: Server, schemas: dict
) -> None:
    chunks = prompt_of("2_chunks_and_a_fork.json", schemas)
    for chunk in inputs_of(chunks, "MF_SampleChunk"):
        chunk |= {"seconds": 1, "mode": "few steps", "mode.steps": 2}
    _, expected = endings(server, chunks, "on_one")
    _, found = endings(server, on_two(chunks), "on_two")
    assert all(map(alike, found, expected))
    (first,) = ranks_of(server)
    clip = on_two(prompt_of("1_text_to_clip.json", schemas))
    asked = inputs_of(clip, "MF_GenerateClip")[0]
    asked |= {"seconds": 300, "variation": 12, "mode": "few steps", "mode.steps": 1}
    # Cancel leaves the processes there, and so does Stop.
    said, cancelled = cut_short(server, clip, lambda: server.post("/interrupt"))
    assert "interrupted" in said and ranks_of(server) == [first]
    # A process that dies ends the run with a sentence, and the next one starts another.
    asked["variation"] = 13
    said, died = cut_short(server, clip, lambda: os.kill(first, signal.SIGKILL))
    assert "a process that holds a part of the model is gone" in said and not ranks_of(server)
    asked["variation"] = 12
    queued = server.queue(clip)
    until(lambda: run_named(server, queued)["made"] >= 3)
    (second,) = ranks_of(server)
    place = f"{LIVE}/{queued}/{run_named(server, queued)['node_id']}"
    server.post(f"{place}/line", {"line": "ball red"})
    until(lambda: run_named(server, queued)["followed"])
    followed = run_named(server, queued)["made"]
    until(lambda: run_named(server, queued)["made"] >= followed + 2)
    server.post(f"{place}/stop")
    assert server.finished(queued)["status"]["status_str"] == "success"
    assert second != first and ranks_of(server) == [second]
    # Both streams that were cut short go on, on one device, as they would have.
    folder = server.output / "mutual_forcing"
    for state, variation in ((cancelled, 12), (died, 13)):
        assert state.settings.seeds and state.cache is not None
        one = prompt_of("1_text_to_clip.json", schemas)
        (key,) = [key for key, node in one.items() if node["class_type"] == "MF_GenerateClip"]
        seconds = state.next_block - 1
        one[key]["inputs"] |= asked | {"seconds": seconds, "variation": variation}
        saving = {"state": [key, 4], "name": f"alone_{variation}", "memory": False}
        one["99"] = {"class_type": "MF_SaveState", "inputs": saving}
        server.run(one)
        (file,) = folder.glob(f"alone_{variation}_*")
        assert alike(load_state(file), state)
    # Without the model nobody holds them.
    server.post("/free", {"unload_models": True, "free_memory": True})
    until(lambda: not ranks_of(server))


def test_what_cannot_be_shared_is_refused(server: Server, schemas: dict) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    (loader,) = inputs_of(prompt, "MF_LoadModel")
    loader["devices"] = "cuda:0, cuda:1"
    assert "cuda" in refusal(server, prompt)
    on_two(prompt)
    ((key, _),) = [(k, n) for k, n in prompt.items() if n["class_type"] == "MF_LoadModel"]
    lora = {"lora_name": "lora.safetensors", "strength_model": 1.0, "model": [key, 0]}
    prompt["90"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
    inputs_of(prompt, "MF_GenerateClip")[0]["model"] = ["90", 0]
    assert "shared out to several devices: choose 'one'" in refusal(server, prompt)
    saving = {"model": [key, 0], "filename_prefix": "part"}
    prompt["91"] = {"class_type": "ModelSave", "inputs": saving}
    prompt = {name: prompt[name] for name in (key, "91")}
    assert "only a whole one can be saved" in refusal(server, prompt)
