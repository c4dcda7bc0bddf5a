"""What the page's player asks of a real ComfyUI: the growing clip, Stop, typed lines, words."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request

import av
import pytest
from mutual_forcing.host.live import CHARACTERS
from mutual_forcing.tests.comfyui_prompts import inputs_of, prompt_of
from mutual_forcing.tests.comfyui_server import Server, comfyui_path

pytestmark = pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI found")
LIVE = "/mutual_forcing/live"


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


def frames_in(content: bytes) -> int:
    """How many pictures a whole or growing mp4 plays."""
    with av.open(io.BytesIO(content)) as file:
        return sum(1 for _ in file.decode(video=0))


def run_named(server: Server, prompt_id: str) -> dict:
    """The status of the run of a prompt, once there is one."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for run in server.get(LIVE):
            if run["prompt_id"] == prompt_id:
                return run
        time.sleep(0.05)
    raise TimeoutError(prompt_id)


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


def test_only_runs_are_found_and_only_the_page_may_ask(server: Server, schemas: dict) -> None:
    prompt = prompt_of("2_chunks_and_a_fork.json", schemas)
    for chunk in inputs_of(prompt, "MF_SampleChunk"):
        chunk |= {"seconds": 1, "mode": "few steps", "mode.steps": 1}
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
