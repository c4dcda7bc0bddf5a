"""The pack in a real ComfyUI, queued over its API. Skipped unless COMFYUI_PATH names a checkout.

A tiny random model stands in for the shipped one: what is tested is the way, not the picture.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from mutual_forcing.model_loaders.bundle import StreamDefaults, save_bundle
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_prompts import (
    cached_nodes,
    endings,
    frames_of,
    inputs_of,
    lengths,
    prompt_of,
    refusal,
    run_from_page,
    same,
)
from mutual_forcing.tests.comfyui_server import PACK, ROOT, Server, comfyui_path, comfyui_python
from mutual_forcing.tests.tiny import save_tiny, tiny_parts
from mutual_forcing.tests.ui_workflow import api_prompt, read_workflow

pytestmark = pytest.mark.skipif(comfyui_path() is None, reason="COMFYUI_PATH names no ComfyUI")
# Those of LTX-2 have a file of their own.
WORKFLOWS = sorted(
    path for path in (ROOT / "workflows").glob("*.json") if "_ltx2_" not in path.name
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file."""
    folder = tmp_path_factory.mktemp("comfyui")
    model = folder / "tiny.safetensors"
    stream = StreamDefaults(window=2, height=2, width=2, default_mode="few")
    save_bundle(model, *tiny_parts(), stream, title="tiny random model", dtype=torch.float32)
    running = Server(comfyui_path(), folder / "base", model)
    try:
        running.wait_until_up()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def schemas(server: Server) -> dict:
    """The schemas of all nodes."""
    return server.get("/object_info")


@pytest.fixture(scope="module")
def ours(schemas: dict) -> dict:
    """The schemas of our nodes."""
    return {name: schema for name, schema in schemas.items() if name.startswith("MF_")}


def options_of(schema: dict) -> Iterator[tuple[str, dict]]:
    """Names and options of a node's inputs."""
    for section in ("required", "optional"):
        for name, (_, options) in schema["input"].get(section, {}).items():
            yield name, options


# What an artist sees of the nodes.


def test_all_nodes_are_there_and_not_too_many(ours: dict) -> None:
    assert set(ours) >= {"MF_LoadModel", "MF_StreamSettings", "MF_SampleChunk", "MF_DecodeChunk"}
    assert len(ours) <= 12


def test_every_node_explains_itself(ours: dict) -> None:
    for name, schema in ours.items():
        assert schema["category"].startswith("MutualForcing/"), name
        assert schema["description"] and schema["search_aliases"], name
        assert schema["display_name"] and "MF_" not in schema["display_name"], name
        assert all(schema["output_tooltips"]), name
        for entry, options in options_of(schema):
            assert options.get("tooltip"), f"{name}.{entry}"


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(
    server: Server, ours: dict
) -> None:
    for name, schema in ours.items():
        page = server.text(f"/extensions/{PACK}/docs/{name}.md")
        names = list(schema["output_name"])
        for entry, options in options_of(schema):
            names.append(options.get("display_name", entry))
            for option in options.get("options") or []:
                if isinstance(option, dict):
                    names += option["inputs"].get("required", {})
        missing = [entry for entry in names if f"| {entry} |" not in page]
        assert not missing, f"{name}: {missing}"


def test_templates_are_offered(server: Server) -> None:
    assert set(server.get("/workflow_templates")[PACK]) >= {path.stem for path in WORKFLOWS}


# The workflows.


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_and_its_clips_have_picture_and_sound_of_one_length(
    path: Path, server: Server, schemas: dict
) -> None:
    saved = server.saved(server.run(api_prompt(read_workflow(path), schemas)))
    assert saved
    for clip in saved:
        video, audio = lengths(clip)
        assert abs(video - audio) <= Fraction(1, 24), (
            f"{clip.name}: {float(video)} s, {float(audio)} s"
        )
        assert video >= 6


def test_both_endings_share_their_past_and_end_differently(server: Server, schemas: dict) -> None:
    _, (first, second) = endings(server, prompt_of("2_chunks_and_a_fork.json", schemas), "fork")
    alike = [same(*blocks) for blocks in zip(first.latents, second.latents, strict=True)]
    assert alike == [True] * 5 + [False] * 2


def test_changing_the_last_chunk_runs_only_that_one_and_gives_what_a_fresh_run_gives(
    server: Server, schemas: dict
) -> None:
    """States in ComfyUI's cache are handed out again and again; none may have been written into."""
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    _, before = endings(server, prompt, "before")
    inputs_of(prompt, "MF_SampleChunk")[-1]["variation"] = 5
    entry, again = endings(server, prompt, "again")
    chunks = [node for node, one in prompt.items() if one["class_type"] == "MF_SampleChunk"]
    assert [chunk in cached_nodes(entry) for chunk in chunks] == [True, True, True, False]
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    entry, fresh = endings(server, prompt, "fresh")
    assert cached_nodes(entry) == []
    for ours, theirs in zip(again, fresh, strict=True):
        assert all(same(*blocks) for blocks in zip(ours.latents, theirs.latents, strict=True))
    assert not same(before[1].latents[-1], fresh[1].latents[-1])


def test_how_the_work_is_carried_out_does_not_change_the_stream(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    _, expected = endings(server, prompt, "eager")
    for chunk in inputs_of(prompt, "MF_SampleChunk"):
        chunk["execution"] = "streams"
    _, found = endings(server, prompt, "streams")
    for ours, theirs in zip(found, expected, strict=True):
        assert all(same(*blocks) for blocks in zip(ours.latents, theirs.latents, strict=True))
    inputs_of(prompt, "MF_SampleChunk")[0]["execution"] = "graph"
    assert "graphs are CUDA" in refusal(server, prompt)


# Stopping, and going on.


def test_cancelling_keeps_what_was_finished(server: Server, schemas: dict) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    inputs_of(prompt, "MF_GenerateClip")[0] |= {
        "seconds": 300,
        "mode": "few steps",
        "mode.steps": 8,
    }
    kept = server.output / "mutual_forcing"
    before = set(kept.glob("unfinished_*"))
    queued = server.queue(prompt)
    temp = server.base / "temp"
    end = time.monotonic() + 300
    while not any(file.stat().st_size > 100_000 for file in temp.glob("mutual_forcing_*.mp4")):
        assert time.monotonic() < end, "no block was finished in five minutes"
        time.sleep(0.1)
    pressed = time.monotonic()
    server.post("/interrupt")
    entry = server.finished(queued)
    # The tiny model takes milliseconds a step; the rest is writing files, on a machine that may be
    # busy.
    assert time.monotonic() - pressed < 20
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    files = {file.suffix: file for file in set(kept.glob("unfinished_*")) - before}
    state = load_state(files[".safetensors"])
    assert 1 < state.next_block < 301
    assert len(frames_of(files[".mp4"])) == 1 + 24 * (state.next_block - 1)
    video, audio = lengths(files[".mp4"])
    assert abs(video - audio) <= Fraction(1, 24)
    assert str(files[".mp4"]) in server.log.read_text(errors="replace")
    assert not list(temp.glob("mutual_forcing_*.mp4"))


def test_a_saved_stream_goes_on_as_if_it_had_never_stopped(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    _, direct = endings(server, prompt, "direct")
    name = next(
        file.name for file in sorted((server.output / "mutual_forcing").glob("after_chunk_2*"))
    )
    prompt["90"] = {"class_type": "MF_LoadState", "inputs": {"file": name}}
    for chunk in inputs_of(prompt, "MF_SampleChunk")[2:]:
        chunk["state"] = ["90", 0]
    _, resumed = endings(server, prompt, "resumed")
    for ours, theirs in zip(direct, resumed, strict=True):
        assert all(same(*blocks) for blocks in zip(ours.latents, theirs.latents, strict=True))


# What an artist reads when something is wrong.


@pytest.mark.parametrize(
    ("node", "change", "said"),
    [
        ("MF_StreamSettings", {"width": 70}, "multiple of 32"),
        ("MF_LoadModel", {"file": "gone.safetensors"}, "is not there"),
        ("CLIPTextEncode", {"text": ""}, "the prompt is empty"),
        ("CLIPTextEncode", {"text": "zebra"}, "has no word that this model knows"),
    ],
)
def test_mistakes_are_named_with_a_next_step(
    node: str, change: dict, said: str, server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    inputs_of(prompt, node)[0].update(change)
    assert said in refusal(server, prompt)


def test_settings_and_state_together_are_refused(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    first, second = inputs_of(prompt, "MF_SampleChunk")[:2]
    second["settings"] = first["settings"]
    assert "disconnect 'settings'" in refusal(server, prompt)


def test_sound_and_picture_of_two_chunks_are_refused(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    one, other = inputs_of(prompt, "MF_DecodeChunk")
    one["audio"] = other["audio"]
    assert "two different chunks" in refusal(server, prompt)


# The seam.


def test_attention_and_weights_are_the_same_inside_comfyui(tmp_path: Path) -> None:
    comfyui = comfyui_path()
    script, model = ROOT / "tests" / "inside_comfyui.py", save_tiny(tmp_path / "tiny.safetensors")
    command = [str(comfyui_python(comfyui)), str(script), str(comfyui), str(model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr


# The page.


def test_workflow_1_runs_from_the_web_page(server: Server, tmp_path: Path) -> None:
    """In Chromium, by the Run button. PLAYWRIGHT_CORE: the folder of playwright-core."""
    run_from_page(server, WORKFLOWS[0], tmp_path / "page.png")
