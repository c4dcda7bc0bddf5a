"""The player in ComfyUI's page, in Chromium, with the shipped model: `make page`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mutual_forcing.model_loaders.bundle import shipped_model_path
from mutual_forcing.samplers.schedule import written
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_prompts import inputs_of, lengths, run_from_page, same
from mutual_forcing.tests.comfyui_server import (
    ROOT,
    Server,
    browser,
    comfyui_path,
    comfyui_python,
)
from mutual_forcing.tests.ui_workflow import read_workflow

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(browser() is None, reason="needs Chromium, and playwright in ComfyUI's"),
]
PICTURES = Path(os.environ.get("MF_PAGE_PICTURES", ROOT / "output" / "page"))
BLUEPRINT = ROOT / "subgraphs" / "Text to Clip with Sound.json"
SECONDS = int(os.environ.get("MF_PAGE_SECONDS", "10"))
LINES = (
    "a bell rings on a white background",
    "a red drum beats fast on a white background",
    "a blue ball bounces slowly on a green background",
    "a yellow bell swings slowly on a black background",
    "a green drum beats slowly on a blue background",
)
# A folder with another comfyui-frontend-package, such as the newest one.
FRONTENDS = ["", *filter(None, [os.environ.get("MF_FRONTEND")])]


@pytest.fixture(scope="module", params=FRONTENDS, ids=lambda root: Path(root).name or "installed")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """As artists start it, with nothing switched off."""
    arguments = ["--front-end-root", request.param] if request.param else []
    base = tmp_path_factory.mktemp("page") / "base"
    with Server(comfyui_path(), base, shipped_model_path(), arguments=arguments) as running:
        yield running


def played(
    server: Server,
    workflow: str,
    renderer: str,
    seconds: int = SECONDS,
    lines: Sequence[str] = (),
    stream: str = "played",
) -> dict:
    """What the page's player says of itself."""
    pictures = PICTURES / f"{workflow}_{renderer}{f'_{len(lines)}_lines' if lines else ''}"
    command = [comfyui_python(comfyui_path()), ROOT / "tests" / "player_page.py", server.url]
    command += [ROOT / "example_workflows" / f"{workflow}.json", pictures, seconds]
    command += [stream, *lines] if lines else []
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"CHROMIUM": str(browser()), "MF_RENDERER": renderer},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (PICTURES / f"{pictures.name}.json").write_text(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_a_clip_is_seen_and_heard_while_it_is_made(server: Server, renderer: str) -> None:
    found = played(server, "1_text_to_clip", renderer)
    assert found["error"] is None and not found["hidden"] and not found["muted"]
    assert found["time"] == pytest.approx(found["status"]["made"], abs=0.1)
    # Seen first, heard when a second of it lies ready, and both before it was all made.
    after = found["after"]
    assert 0 < after["firstPicture"] <= after["firstSound"]
    saved = sorted((server.output / "video").glob("clip_*.mp4"))[-1]
    video, _ = lengths(saved)
    assert float(video) == pytest.approx(found["status"]["made"], abs=0.05)


def test_chunks_are_heard_one_after_the_other(server: Server) -> None:
    found = played(server, "2_chunks_and_a_fork", "canvas", seconds=3)
    assert found["players"] == 4 and found["error"] is None


def test_a_live_session_of_five_lines_is_made_again_from_its_schedule(server: Server) -> None:
    """Without an end, by the keyboard alone; Stop gives a clip."""
    found = played(server, "1_text_to_clip", "vue", 0, LINES, "played")
    status = found["status"]
    assert status["stop_asked"] and len(found["lines"]) == len(LINES) == len(status["followed"])
    saved = sorted((server.output / "video").glob("clip_*.mp4"))[-1]
    video, _ = lengths(saved)
    assert float(video) == pytest.approx(status["made"], abs=0.05)
    # What was queued, with the schedule that was played instead of the prompt that it began with.
    streams = server.output / "mutual_forcing"
    live = load_state(streams / "played_00002_.safetensors")
    again = server.get(f"/history/{status['prompt_id']}")[status["prompt_id"]]["prompt"][2]
    (sampler,) = inputs_of(again, "MF_GenerateClip")
    schedule = {"clip": sampler["clip"], "lines": written(live.schedule), "past": "keep"}
    schedule["start"] = 0.0
    again |= {"schedule": {"class_type": "MF_PromptSchedule", "inputs": schedule}}
    sampler |= {"positive": ["schedule", 0], "seconds": live.next_block - 1}
    inputs_of(again, "MF_SaveState")[0]["name"] = "again"
    server.run(again)
    made = load_state(streams / "again_00001_.safetensors")
    assert made.next_block == live.next_block
    assert all(same(made.block(n), live.block(n)) for n in range(live.next_block))


def test_the_blueprint_is_a_node_that_makes_a_clip(server: Server, tmp_path: Path) -> None:
    graph = read_workflow(BLUEPRINT)
    assert BLUEPRINT.stem in [entry["name"] for entry in server.get("/global_subgraphs").values()]
    template = read_workflow(ROOT / "example_workflows" / "1_text_to_clip.json")
    (saving,) = [node for node in template["nodes"] if node["type"] == "SaveVideo"]
    saving |= {"id": 99, "pos": [600, 0]}
    graph["nodes"][0]["outputs"][0]["links"] = [saving["inputs"][0]["link"]]
    graph["links"] = [[saving["inputs"][0]["link"], 1, 0, 99, 0, "VIDEO"]]
    graph |= {"nodes": [graph["nodes"][0], saving], "last_node_id": 99}
    (tmp_path / "blueprint.json").write_text(json.dumps(graph))
    run_from_page(server, tmp_path / "blueprint.json", PICTURES / "blueprint.png")
