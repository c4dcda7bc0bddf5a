"""What holds for the nodes without ComfyUI: pages, borders, and who may import what."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted((ROOT / "nodes").glob("*.py"))
# Top-level modules of ComfyUI; `comfy_api` is its public interface and free to use in nodes.
INTERNALS = {
    "comfy",
    "folder_paths",
    "execution",
    "server",
    "nodes",
    "node_helpers",
    "latent_preview",
}


def imported(path: Path) -> Iterator[str]:
    """Top-level names of the absolute imports of a file."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            yield from (alias.name.split(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            yield statement.module.split(".")[0]


def node_ids() -> set[str]:
    """Ids of all nodes, as the sources say."""
    return {
        name
        for path in NODES
        for name in re.findall(r'(?<!_)node_id="(\w+)"', path.read_text(encoding="utf-8"))
    }


def test_every_node_has_a_help_page_and_every_page_a_node() -> None:
    assert node_ids() == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}


def test_chinese_pages_have_the_rows_of_the_english_ones_by_the_names_on_the_node() -> None:
    """Keys of ComfyUI's locale file: `mode_steps` is the input `mode.steps`."""
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(chinese) == node_ids()
    for name, node in chinese.items():
        english = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        page = (ROOT / "web" / "docs" / name / "zh.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n")
        assert [len(table) for table in tables(page)] == [len(table) for table in tables(english)]
        inputs, outputs = tables(page)
        assert sorted(inputs) == sorted(entry["name"] for entry in node["inputs"].values()), name
        assert outputs == [entry["name"] for entry in node["outputs"].values()], name
        assert fences(page) == fences(english)


def tables(page: str) -> list[list[str]]:
    """The first column of each table of a help page."""
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    return [re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:] for table in found]


def fences(page: str) -> list[str]:
    """What an artist may copy out of a help page."""
    return re.findall(r"```.*?```", page, re.DOTALL)


def test_ids_are_prefixed_and_not_more_than_fourteen() -> None:
    assert all(name.startswith("MF_") for name in node_ids())
    assert 1 <= len(node_ids()) <= 14


def test_only_the_seam_imports_comfyui_internals() -> None:
    for room in ("nodes", "model_loaders", "samplers", "networks", "measures", "lab"):
        for path in (ROOT / room).rglob("*.py"):
            assert not INTERNALS & set(imported(path)), path
    seam = {name for path in (ROOT / "host").glob("*.py") for name in imported(path)}
    assert INTERNALS & seam, "the test would not see an import"


def test_nodes_do_no_tensor_maths() -> None:
    for path in NODES:
        assert not {"torch", "numpy", "einops"} & set(imported(path)), path


def test_rooms_import_one_way() -> None:
    """nodes -> host -> model_loaders, samplers -> networks, and host -> measures; nothing above
    imports lab, and lab nothing of ComfyUI's but where it runs in ComfyUI's process.
    """
    hosted = {ROOT / "lab/bench/hosted.py", ROOT / "lab/training/ltx2_latents.py"}
    above = {
        "host": ("nodes", "lab"),
        "nodes": ("lab",),
        "model_loaders": ("nodes", "host", "lab"),
        "samplers": ("nodes", "host", "lab"),
        "networks": ("nodes", "host", "lab", "model_loaders", "samplers"),
        "measures": ("nodes", "host", "lab", "model_loaders", "samplers", "networks"),
        "lab": ("nodes", "host"),
    }
    for room, others in above.items():
        for path in {*(ROOT / room).rglob("*.py")} - hosted:
            text = path.read_text(encoding="utf-8")
            for other in others:
                assert not re.search(rf"^\s*from \.+{other}\b", text, re.MULTILINE), (path, other)
