"""Command-line options that measurements share: which model, sampled how, where to write."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from ...model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from ...samplers.atomic_file import write_whole
from ...samplers.rollout import Mode, SamplerSettings, sampler_settings

log = logging.getLogger("mutualforcing")


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Which model, and how it samples."""
    p.add_argument("--model", type=Path, default=shipped_model_path(), help="default: shipped")
    p.add_argument("--mode", choices=get_args(Mode), help="default: the model's own")
    p.add_argument("--steps", type=int, help="default: the mode's own")
    p.add_argument("--guidance", type=float, help="default: the mode's own")
    p.add_argument("--window", type=int, help="blocks of history; default: the model's own")
    p.add_argument("--device", default="cpu")


def add_result_options(p: argparse.ArgumentParser) -> None:
    """Where results go, and whether a missed target is an error."""
    p.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    p.add_argument("--out", type=Path, required=True, help="where to write, without an ending")


def open_model(args: argparse.Namespace) -> tuple[Bundle, SamplerSettings] | None:
    """The model and how it samples, by `add_model_options`; None when that cannot be, having said
    why.
    """
    try:
        bundle = load_bundle(args.model, device=args.device)
        mode = args.mode or bundle.stream.default_mode
        return bundle, sampler_settings(mode, args.steps, args.guidance)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return None


def log_to_the_screen() -> None:
    """Results are what these commands are for, so they go to standard output."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)


def at_least_one(args: argparse.Namespace, *names: str) -> bool:
    """Whether these counts are all positive; says so when one is not."""
    for name in names:
        if getattr(args, name) < 1:
            log.error("--%s is %d, expected at least 1", name, getattr(args, name))
            return False
    return True


def write_json(path: Path, results: Mapping[str, object]) -> None:
    """Write results whole or not at all, so that a killed run leaves nothing half-written behind.

    Raises:
        ValueError: a number that is not finite.
        OSError: it cannot be written.
    """
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_whole(path, text)


def write_report(
    folder: Path, name: str, results: Mapping[str, object], lines: Sequence[str]
) -> None:
    """Write FOLDER/NAME.json and, for the reader, FOLDER/NAME.md; say the latter on the screen.

    Raises:
        ValueError: a number that is not finite.
        OSError: they cannot be written.
    """
    path, text = folder / f"{name}.json", "\n".join(lines)
    write_json(path, results)
    write_whole(path.with_suffix(".md"), text + "\n")
    log.info("%s\nwrote %s", text, path)
