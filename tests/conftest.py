"""Make `import mutual_forcing` mean this checkout, whatever its folder is called."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mutual_forcing.model_loaders.bundle import Bundle

_path = Path(__file__).resolve().parents[1] / "launch.py"
_spec = importlib.util.spec_from_file_location("mutual_forcing_launch", _path)
_launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_launch)
_launch.register()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A whole model with random weights."""
    from mutual_forcing.tests.tiny import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def generate() -> ModuleType:
    """The script of that name."""
    sys.modules.setdefault("launch", _launch)  # beside the script, when it is started as one
    spec = importlib.util.spec_from_file_location("generate_script", _path.with_name("generate.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which ComfyUI the tests met: without one, those of the nodes are skipped."""
    from mutual_forcing.tests.comfyui_server import comfyui_path

    found = comfyui_path()
    none = "none at COMFYUI_PATH or in ~/ComfyUI, so the tests that need one were skipped"
    terminalreporter.write_line(f"ComfyUI: {found or none}")
