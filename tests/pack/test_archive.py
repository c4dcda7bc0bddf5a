"""The registry's archive works by itself: its modules import and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutual_forcing.tests.comfyui_server import comfyui_path, comfyui_python
from mutual_forcing.tests.pack.archive import ROOT, archived, tracked, unpack
from mutual_forcing.tests.pack.commands import in_help, in_markdown

IMPORT_ALL = """
import importlib, pathlib, sys
import launch
launch.register()
for path in sorted(pathlib.Path().rglob("*.py")):
    module = path.with_suffix("").parts
    if module[0] in {rooms} and ".venv" not in module:
        importlib.import_module(".".join(("mutual_forcing", *module)))
        print(path)
"""

IN_TURN = """
import runpy, sys
for words in {commands}:
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        assert not error.code, words
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = unpack(tmp_path_factory.mktemp("registry") / "mutual-forcing")
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    return folder


def run(archive: Path, *words: str, limit: float = 1800) -> str:
    """Run a command in the archive, without this checkout's ways to be found; its output."""
    hidden = ("PYTHONPATH", "MUTUAL_FORCING_MODEL", "COMFYUI_PATH", "MAKEFLAGS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        words, cwd=archive, env=environment, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_modules_import_with_what_the_shell_needs_alone(archive: Path) -> None:
    rooms = ("model_loaders", "samplers", "networks", "measures", "jobs", "lab")
    listed = (ROOT / "requirements-dev.txt").read_text()
    more = re.findall(r"^([a-z]+)\W", listed, re.M)
    blocked = "import sys\nsys.modules.update(dict.fromkeys({more}, None))"
    script = blocked.format(more=[*more, "torchaudio", "comfy"]) + IMPORT_ALL.format(rooms=rooms)
    imported = run(archive, ".venv/bin/python", "-c", script).split()
    assert len(imported) == sum(
        path.endswith(".py") and path.split("/")[0] in rooms for path in archived()
    )


def test_modules_import_in_comfyui(archive: Path) -> None:
    comfyui = comfyui_path()
    if comfyui is None:
        pytest.skip("no ComfyUI here")
    start = f"import sys\nsys.path[0] = {str(comfyui)!r}\nimport comfy.cli_args\n"
    start += "comfy.cli_args.args.cpu = True\nsys.path.insert(0, '.')"
    script = start + IMPORT_ALL.format(rooms=("nodes", "host"))
    assert "nodes/__init__.py" in run(archive, str(comfyui_python(comfyui)), "-c", script)


def small(words: list[str]) -> list[str]:
    """The same command, over in a few seconds."""
    if words[0] == "make":
        test = "TESTS=tests/samplers/test_sigmas_noise_clock.py"
        # Every path is tested elsewhere; to compile one takes a minute.
        eager = [f"{word} --path eager" if word.startswith("GOLDEN=") else word for word in words]
        return ["make", "-o", ".venv/.run", "-o", ".venv/.dev", *eager[1:], "LENGTH=2", test]
    words = [".venv/bin/python", *words[1:]]
    if "--seconds" in words:
        words[words.index("--seconds") + 1] = "2"
        return words
    return [*words, "--seconds", "2"]


def examples() -> list[list[str]]:
    """Commands of README and of `generate.py --help`, in this order, each one once."""
    shown = [*in_markdown((ROOT / "README.md").read_text()), *in_help("generate.py")]
    return [list(words) for words in dict.fromkeys(map(tuple, map(small, shown)))]


def test_examples_of_readme_and_help_run(archive: Path) -> None:
    make = [words for words in examples() if words[0] == "make"]
    python = [words[1:] for words in examples() if words[0] != "make"]
    assert {words[5] for words in make} == {"demo", "test", "parity"} and len(python) > 3
    for words in make:
        run(archive, *words)
    # One after the other in one process, which imports PyTorch once.
    said = run(archive, ".venv/bin/python", "-c", IN_TURN.format(commands=python))
    for words in python:
        for option in {"-o", "--contact-sheet", "--state-out"} & set(words):
            made = words[words.index(option) + 1]
            assert made in said and (archive / made).stat().st_size > 1000


def test_nothing_in_it_names_what_is_left_out(archive: Path) -> None:
    left_out = {path.split("/")[0] for path in set(tracked()) - set(archived())}
    pattern = re.compile("|".join(rf"(?<![\w./]){re.escape(name)}/" for name in left_out))
    for path in archived():
        if path.endswith((".py", ".md", ".toml", ".txt", "Makefile")):
            assert not pattern.search((archive / path).read_text()), path


def test_it_is_small() -> None:
    sizes = {path: (ROOT / path).stat().st_size for path in archived()}
    models = sum(size for path, size in sizes.items() if path.startswith("models/"))
    assert models < 25e6 and sum(sizes.values()) - models < 10e6
