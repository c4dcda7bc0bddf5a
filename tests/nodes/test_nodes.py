"""What holds for the nodes without ComfyUI: pages, borders, and who may import what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted((ROOT / "nodes").glob("*.py"))
COMPAT = [ROOT / "model_loaders" / name for name in ("compat.py", "compat_ltx2.py")]
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
        for name in re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))
    }


def test_every_node_has_a_help_page_and_every_page_a_node() -> None:
    assert node_ids() == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}


def test_ids_are_prefixed_and_not_more_than_twelve() -> None:
    assert all(name.startswith("MF_") for name in node_ids())
    assert 1 <= len(node_ids()) <= 12


def test_only_compat_imports_comfyui_internals() -> None:
    rooms = ("nodes", "model_loaders", "samplers", "networks", "metrics", "training")
    for room in rooms:
        for path in (ROOT / room).rglob("*.py"):
            if path not in COMPAT:
                assert not INTERNALS & set(imported(path)), path


def test_nodes_do_no_tensor_maths() -> None:
    for path in NODES:
        assert not {"torch", "numpy", "einops"} & set(imported(path)), path


def test_the_engine_never_imports_nodes_or_training() -> None:
    for room in ("model_loaders", "samplers", "networks", "nodes"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "..training" not in text, path
            assert room == "nodes" or "..nodes" not in text, path
