"""What the page's player asks of a real ComfyUI: the growing clip, Stop, typed lines, words."""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
import urllib.request

import pytest
import torch
from mutual_forcing.host.live import CHARACTERS
from mutual_forcing.samplers import version
from mutual_forcing.samplers.schedule import written
from mutual_forcing.samplers.state_file import load_state
from mutual_forcing.tests.comfyui_prompts import (
    LIVE,
    frames_in,
    inputs_of,
    prompt_of,
    refusal,
    run_named,
    same,
)
from mutual_forcing.tests.comfyui_server import Server, comfyui_path
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI found")
PICTURE = "mutual_forcing_picture"


def asked(url: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of a request."""
    request = urllib.request.Request(
        url, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_clip_is_heard_while_it_grows_and_stop_hands_on_what_there_is(
    server: Server, schemas: dict
) -> None:
    prompt = prompt_of("1_text_to_clip.json", schemas)
    inputs_of(prompt, "MF_GenerateClip")[0] |= {"seconds": 300, "variation": 7}
    queued = server.queue(prompt)
    run = run_named(server, queued)
    assert run["plays"] and run["asked"] == 300
    place = f"{server.url}{LIVE}/{queued}/{run['node_id']}"
    got, playing = io.BytesIO(), threading.Event()

    def follow() -> None:
        with urllib.request.urlopen(f"{place}/clip.mp4", timeout=60) as answer:
            assert answer.headers["Content-Type"] == "video/mp4"
            while piece := answer.read1(1 << 16):
                got.write(piece)
                playing.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert playing.wait(120) and not run_named(server, queued)["over"]
    assert frames_in(got.getvalue()) > 0  # as it stands, while more is made
    code, body = asked(f"{place}/stop", b"{}", Content_Type="application/json")
    assert code == 200 and json.loads(body)["stop_asked"]
    entry = server.finished(queued)
    assert entry["status"]["status_str"] == "success"
    thread.join(30)
    over = run_named(server, queued)
    assert over["over"] and 1 <= over["made"] < 300
    (saved,) = server.saved(entry)
    frames = frames_in(saved.read_bytes())
    assert frames == round(over["made"] * 24) == frames_in(got.getvalue())
    # The finished clip is a file with byte ranges, and the same bytes.
    code, part = asked(f"{place}/clip.mp4", Range="bytes=10-19")
    assert code == 206 and part == got.getvalue()[10:20]
    assert asked(f"{place}/clip.mp4") == (200, got.getvalue())
    code, said = asked(f"{place}/line", b'{"line": "a bell"}', Content_Type="application/json")
    assert code == 400 and b"over" in said


def saved_chunk(schemas: dict, name: str) -> dict:
    """A chunk of a second that is saved under a name."""
    whole = prompt_of("2_chunks_and_a_fork.json", schemas)
    chunk = next(key for key, node in whole.items() if node["class_type"] == "MF_SampleChunk")
    kept = {"MF_LoadModel", "MF_StreamSettings"}
    used = {chunk, whole[chunk]["inputs"]["positive"][0]}
    prompt = {k: node for k, node in whole.items() if k in used or node["class_type"] in kept}
    prompt[chunk]["inputs"] |= {"seconds": 1, "mode": "many steps", "mode.steps": 1}
    prompt[chunk]["inputs"] |= {"mode.guidance": 1.0}
    saving = {"state": [chunk, 0], "name": name, "memory": False}
    return prompt | {"99": {"class_type": "MF_SaveState", "inputs": saving}}


def test_words_say_what_is_not_used_and_files_hold_their_graph(
    server: Server, schemas: dict
) -> None:
    prompt = saved_chunk(schemas, "below/words")
    (chunk,) = [key for key, node in prompt.items() if node["class_type"] == "MF_SampleChunk"]
    (text,) = [node for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]
    text["inputs"]["text"] = "zebra ball red " + "ball " * 40
    loader = prompt[chunk]["inputs"]["model"][0]
    image = {"image": "example.png"}
    zeros = {"samples": ["71", 0], "multiplier": 0.0}
    prompt |= {
        "70": {"class_type": "LoadImage", "inputs": image},
        "71": {"class_type": "VAEEncode", "inputs": {"pixels": ["70", 0], "vae": [loader, 2]}},
        "72": {"class_type": "LatentMultiply", "inputs": zeros},
    }
    inputs_of(prompt, "MF_StreamSettings")[0]["start"] = ["72", 0]
    drawn = {"id": int(chunk), "inputs": [{"name": "state", "link": 7}]}
    workflow = {"id": "a-workflow", "nodes": [drawn]}
    extra = {"extra_pnginfo": {"workflow": workflow}}
    answer = server.post("/prompt", {"prompt": prompt, "extra_data": extra})
    server.finished(answer["prompt_id"])
    run = run_named(server, answer["prompt_id"])
    said = "\n".join(run["words"])
    assert "zebra" in said and "words, only the first" in said
    assert "at its best in mode 'few steps'" in said and "is bypassed" in said
    assert "'start' is an empty latent" in said
    assert run["workflow"] == "a-workflow"
    (file,) = (server.output / "mutual_forcing" / "below").glob("words_*.safetensors")
    with safe_open(file, "pt") as saved:
        notes = saved.metadata()
    assert json.loads(notes["workflow"]) == workflow and json.loads(notes["prompt"]) == prompt
    assert notes[version.NOTE] == version.VERSION
    # In Load Stream's list each can be recognised; a file whose metadata lie is not in it.
    broken = {**notes, "header": "{}", PICTURE: "<svg>"}
    save_file({"video": torch.zeros(1)}, file.with_name("broken.safetensors"), broken)
    listed = server.get("/mutual_forcing/streams")
    shown = listed[f"below/{file.name}"]
    assert "1.0 s" in shown["label"] and "zebra ball red" in shown["label"]
    assert "tiny random model" in shown["facts"] and "64 x 64" in shown["facts"]
    picture = base64.b64decode(shown["picture"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(picture)).size == (64, 64)
    assert "below/broken.safetensors" not in listed
    assert "bytes long" in refusal(server, saved_chunk(schemas, "x" * 240))
    for name in ("../words", "a/../../../words"):
        assert "leads out of output/mutual_forcing" in refusal(server, saved_chunk(schemas, name))


def test_only_runs_are_found_and_only_the_page_may_ask(server: Server, schemas: dict) -> None:
    prompt = saved_chunk(schemas, "chunk")
    queued = server.queue(prompt)
    server.finished(queued)
    run = run_named(server, queued)
    place = f"{server.url}{LIVE}/{queued}/{run['node_id']}"
    assert not run["plays"], "no page is there, so nothing is decoded for it"
    assert asked(f"{place}/clip.mp4")[0] == 404
    for path in ("x/1", "..%2f..%2fextra/1", f"{queued}/..%2f1"):
        assert asked(f"{server.url}{LIVE}/{path}/clip.mp4")[0] == 404
    json_type = {"Content_Type": "application/json"}
    line = f"{place}/line"
    assert asked(line, b"line=a+bell", Content_Type="text/plain")[0] == 415
    assert asked(line, b"{}", **json_type, Origin="http://elsewhere.example")[0] == 403
    for body in (b"{", b"[" * 9000, b'{"line": 3}', b"[]"):
        assert asked(line, body, **json_type)[0] == 400
    long = json.dumps({"line": "x" * (CHARACTERS + 1)}).encode()
    assert asked(line, long, **json_type)[0] == 400
    assert asked(line, long * 7, **json_type)[0] == 413


def test_a_typed_line_is_followed_from_the_block_on_that_is_being_made(
    server: Server, schemas: dict
) -> None:
    """It is begun anew, and the schedule of what was played makes the same stream again."""
    prompt = prompt_of("1_text_to_clip.json", schemas)
    (button,) = [key for key, node in prompt.items() if node["class_type"] == "MF_GenerateClip"]
    (loader,) = [key for key, node in prompt.items() if node["class_type"] == "MF_LoadModel"]
    inputs = prompt[button]["inputs"]
    inputs |= {"seconds": 3, "mode": "many steps", "mode.steps": 24, "mode.guidance": 1.0}
    inputs |= {"variation": 8, "clip": [loader, 1]}
    saving = {"state": [button, 4], "name": "typed", "memory": False}
    prompt["99"] = {"class_type": "MF_SaveState", "inputs": saving}
    queued = server.queue(prompt)
    run = run_named(server, queued)
    while not run["made"]:
        run = run_named(server, queued)
    line = f"{server.url}{LIVE}/{queued}/{run['node_id']}/line"
    asked(line, b'{"line": "a blue ball"}', Content_Type="application/json")
    began = run_named(server, queued)["made"]
    server.finished(queued)
    ((second, text),) = run_named(server, queued)["followed"]
    assert text == "a blue ball" and second <= began
    streams = server.output / "mutual_forcing"
    live = load_state(streams / "typed_00001_.safetensors")
    schedule = {"clip": [loader, 1], "lines": written(live.schedule), "past": "keep", "start": 0.0}
    prompt["98"] = {"class_type": "MF_PromptSchedule", "inputs": schedule}
    inputs |= {"positive": ["98", 0]}
    saving["name"] = "typed_again"
    server.run(prompt)
    again = load_state(streams / "typed_again_00001_.safetensors")
    assert len(live.schedule) == 2 and again.next_block == live.next_block
    assert all(same(again.block(n), live.block(n)) for n in range(live.next_block))
