"""Make `import mutual_forcing` mean this checkout, whatever its folder is called."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_path = Path(__file__).resolve().parents[1] / "launch.py"
_spec = importlib.util.spec_from_file_location("mutual_forcing_launch", _path)
_launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_launch)
_launch.register()
