"""Run a module of this pack from the shell: `python launch.py lab.training.train --help`.

The pack's folder is itself the Python package (ComfyUI loads it by path, under any folder name), so
a module in it cannot be started with `python -m`. This registers the folder as `mutual_forcing`,
without touching what else is importable, and runs the module named.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

PACKAGE = "mutual_forcing"
ROOT = Path(__file__).resolve().parent


def register(root: Path = ROOT) -> None:
    """Make `import mutual_forcing` mean the pack at `root`, unless it is registered already."""
    if PACKAGE in sys.modules:
        return
    # ComfyUI owns a top-level module `nodes`; with the root on sys.path ours would shadow it.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != root]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        sys.exit(
            "usage: python launch.py MODULE [ARGS], for example: python launch.py "
            "lab.training.train --help"
        )
    register()
    name = f"{PACKAGE}.{sys.argv[1]}"
    sys.argv = [sys.argv[1], *sys.argv[2:]]
    runpy.run_module(name, run_name="__main__", alter_sys=False)
