"""A real ComfyUI for the tests: its server with this pack alone, in folders of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "ComfyUI-MutualForcing"


def comfyui_path() -> Path | None:
    """The ComfyUI of COMFYUI_PATH, or around this pack, or in ~/ComfyUI."""
    if os.environ.get("COMFYUI_PATH"):
        return Path(os.environ["COMFYUI_PATH"])
    around = ROOT.parents[1] if ROOT.parent.name == "custom_nodes" else None
    places = [place for place in (around, Path.home() / "ComfyUI") if place is not None]
    return next((place for place in places if (place / "main.py").is_file()), None)


def comfyui_python(comfyui: Path) -> Path:
    """ComfyUI's own Python: COMFYUI_PYTHON, or the environment beside its checkout, or this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"])
    folders = (
        comfyui / "venv",
        comfyui / ".venv",
        comfyui.parent / "venv",
        comfyui.parent / ".venv",
    )
    found = [folder / "bin" / "python" for folder in folders]
    found += [comfyui.parent / "python_embeded" / "python.exe"]
    return next((path for path in found if path.exists()), Path(sys.executable))


def browser() -> Path | None:
    """A Chromium that ComfyUI's own Python can drive, if there is one."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    comfyui = comfyui_path()
    if found is None or comfyui is None:
        return None
    probe = [str(comfyui_python(comfyui)), "-c", "import playwright.sync_api"]
    works = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return Path(found) if works else None


class Server:
    """A running server.

    Args:
        comfyui: the checkout.
        base: an empty folder; models, outputs and the pack (a link) go there.
        model: a model file that stands in for the shipped one.
        prepare: puts further things into the base folder before the server starts.
        arguments: further ones of ComfyUI's. Without API nodes its page may load nothing from
            elsewhere, media that a script makes included.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        model: Path,
        prepare: Callable[[Path], None] = lambda _base: None,
        arguments: Sequence[str] = ("--disable-api-nodes",),
    ) -> None:
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        for folder in (
            "input",
            "output",
            "temp",
            "user",
            "models/mutual_forcing",
            "models/checkpoints",
        ):
            (base / folder).mkdir(parents=True)
        prepare(base)
        self.base, self.output = base, base / "output"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(comfyui_python(comfyui)), "main.py", "--cpu", *arguments]
        command += [
            "--base-directory",
            str(base),
            "--port",
            str(self.port),
            "--listen",
            "127.0.0.1",
        ]
        command += ["--database-url", f"sqlite:///{base / 'comfyui.db'}"]
        environment = os.environ | {"MUTUAL_FORCING_MODEL": str(model), "HF_HUB_OFFLINE": "1"}
        self.log = base / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_up(self, seconds: float = 600) -> None:
        """Until it answers; a server that ends instead is an error."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(
            f"ComfyUI did not start:\n{self.log.read_text(errors='replace')[-3000:]}"
        )

    def stop(self) -> None:
        """End this server."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def __enter__(self) -> Server:
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def text(self, path: str) -> str:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def get(self, path: str) -> dict:
        """The JSON of a GET."""
        return json.loads(self.text(path))

    def post(self, path: str, body: dict | None = None) -> dict:
        """POST JSON; a refusal is an answer too, with its body."""
        data = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            content = error.read()
        return json.loads(content) if content else {}

    @contextmanager
    def page(self, name: str) -> Iterator[str]:
        """While inside, a page of this name is open, as far as the server can tell."""
        head = (
            f"GET /ws?clientId={name} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port)) as page:
            page.sendall(head.encode())
            page.recv(1)  # what follows may wait: nobody reads it
            yield name

    def queue(self, prompt: dict, page: str | None = None) -> str:
        """Queue a prompt, from an open page if it has a name; its id."""
        asked = {"prompt": prompt} | ({} if page is None else {"client_id": page})
        answer = self.post("/prompt", asked)
        if "prompt_id" not in answer or answer.get("node_errors"):
            raise AssertionError(answer)
        return answer["prompt_id"]

    def finished(self, prompt_id: str, seconds: float = 600) -> dict:
        """The history entry of a prompt, once there is one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text(errors="replace")[-3000:])

    def run(self, prompt: dict) -> dict:
        """Queue, wait, and insist on success."""
        entry = self.finished(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        return entry

    def saved(self, entry: dict) -> list[Path]:
        """Files that a prompt wrote to the output folder."""
        files = [file for node in entry["outputs"].values() for file in node.get("images", [])]
        return [
            self.output / file["subfolder"] / file["filename"]
            for file in files
            if file["type"] == "output"
        ]
