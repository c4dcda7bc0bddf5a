"""Run after run in one ComfyUI: `python launch.py tests.many_runs --times 100`.

Queues template 1 again and again, each time with another seed, in a server of its own, and prints
what the server's process holds after the first run and after every tenth. The last must be within
5 % of the first. ComfyUI's own cache keeps what it can by default ("RAM pressure"); `--cache
cache-classic` is its other one, which keeps what the last graph gave.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from mutual_forcing.model_loaders.bundle import shipped_model_path
from mutual_forcing.tests.comfyui_prompts import inputs_of, prompt_of
from mutual_forcing.tests.comfyui_server import Server, comfyui_path


def held_mb(server: Server) -> float:
    """Memory of the server's process, in MB."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Command line; the exit status says whether memory stayed."""
    parser = argparse.ArgumentParser(prog="launch.py tests.many_runs", description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=2, help="of each clip")
    parser.add_argument("--cache", default="cache-ram", help="ComfyUI's option for its cache")
    parser.add_argument("--model", type=Path, default=shipped_model_path())
    args = parser.parse_args()
    arguments = ["--disable-api-nodes", f"--{args.cache}"]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        with Server(comfyui_path(), base, args.model, arguments=arguments) as server:
            schemas = server.get("/object_info")
            for number in range(1, args.times + 1):
                prompt = prompt_of("1_text_to_clip.json", schemas)
                inputs_of(prompt, "MF_StreamSettings")[0]["seed"] = number
                inputs_of(prompt, "MF_GenerateClip")[0]["seconds"] = args.seconds
                server.run(prompt)
                if number == 1:
                    first = held_mb(server)
                if number == 1 or number % 10 == 0:
                    files = len(list((base / "temp").iterdir()))
                    sys.stdout.write(
                        f"run {number}: {held_mb(server):.0f} MB, {held_mb(server) / first:.3f} of "
                        f"the first; {files} working files\n"
                    )
                    sys.stdout.flush()
            grown = held_mb(server) / first
    return int(grown > 1.05)


if __name__ == "__main__":
    sys.exit(main())
