"""Are the formulas guarded? Each mutant is one wrong formula; the tests named for it must turn red.

    python launch.py tests.mutants [--only TEXT] [--list]

The list lies in `mutant_list.py`. A mutant's file is read, the fragment that stands in it exactly
once is replaced, and the tests run in a process of their own in which that module is the mutant;
nothing is written. A fragment that is not found exactly once, tests that are red without a mutant
and a mutant that keeps the tests from starting are errors, so the list can't rot unseen. Results
are kept while no source changes, so a run that was cut off goes on. The last line is `killed K of
N`; the exit status is 1 where fewer than 95 of 100 are, or a survivor is not explained.

Why not a tool: mutmut 3.8 stops, because the package is loaded by path under a name that is not
its folder's ("trampoline hits, but none match any mutant key"); cosmic-ray 8.7 makes 18,749
mutants of these rooms and starts torch anew for each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD, LOG = ROOT / "output" / "mutants.json", ROOT / "output" / "mutants.log"
SECONDS, SHARE = 60, 0.95
PASSED, FAILED = 0, 1  # pytest's exit statuses; any other means that nothing was tested


class Mutant(NamedTuple):
    """One wrong formula.

    Attributes:
        file: of the pack.
        find: what stands in it exactly once.
        replace: by what.
        tests: what must turn red: files below tests/, or tests in them as pytest names them.
        survives: why none does, where that is accepted.
    """

    file: str
    find: str
    replace: str
    tests: str
    survives: str = ""

    @property
    def source(self) -> str:
        """The file with the formula changed.

        Raises:
            ValueError: the fragment is not there exactly once, or the file would not compile.
        """
        path = ROOT / self.file
        text = path.read_text() if path.is_file() else ""
        found = text.count(self.find)
        if found != 1:
            raise ValueError(
                f"{self.file}: found {found} times what a mutant replaces, expected once; take the "
                f"list of mutants to today's source: {self.find!r}"
            )
        return text.replace(self.find, self.replace)

    @property
    def name(self) -> str:
        """File and change in a line."""
        return f"{self.file}: {' '.join(self.find.split())} -> {' '.join(self.replace.split())}"


def run_tests(mutant: Mutant, seconds: int = SECONDS) -> int:
    """Exit status of pytest in a process of its own, in which a module is the mutant."""
    child = os.fork()
    if child == 0:
        # Whatever happens in here, no second parent may come of it.
        status = 3
        try:
            # Of processor time, which a busy machine does not shorten.
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            status = _inside(mutant)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Tests that no longer end are seen as well as those that end red.
    return FAILED if status == -signal.SIGXCPU else status


def _inside(mutant: Mutant) -> int:
    import pytest

    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.dont_write_bytecode = True
    _stand_in(str(ROOT / mutant.file), mutant.source)
    for name in [n for n in sys.modules if n.startswith("mutual_forcing.")]:
        del sys.modules[name]
    arguments = [f"{ROOT}/tests/{word}" for word in mutant.tests.split()]
    return int(pytest.main(["-c", f"{ROOT}/tests/pytest.ini", "-q", "-x", *arguments]))


def _stand_in(path: str, source: str) -> None:
    """From now on a module of this path has another source."""
    compiled = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if self.path == path:
            return compile(source, path, "exec")
        return compiled(self, fullname)

    SourceFileLoader.get_code = get_code


def _state() -> str:
    """Fingerprint of all that decides what a test says, but for the list itself."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(ROOT.rglob("*.py")):
        elsewhere = {".venv", "output", "runs"} & set(path.relative_to(ROOT).parts)
        if not elsewhere and not path.name.startswith("mutant"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _remembered(state: str) -> dict[str, int]:
    if not RECORD.exists():
        return {}
    record = json.loads(RECORD.read_text())
    return record["results"] if record["state"] == state else {}


def say(line: str) -> None:
    """A line, at once."""
    print(line, flush=True)  # noqa: T201 - what a command answers


def main() -> int:
    """Command line."""
    # Imported once, here, so that no child needs to.
    import einops  # noqa: F401
    import hypothesis  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch.distributed.tensor
    import torch.utils.checkpoint

    from .mutant_list import MUTANTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose line holds this text")
    parser.add_argument("--list", action="store_true", help="show them and run none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for mutant in MUTANTS:
        compile(mutant.source, mutant.file, "exec")
    chosen = [mutant for mutant in MUTANTS if args.only in f"{mutant.name} {mutant.tests}"]
    if args.list or not chosen:
        say("\n".join(mutant.name for mutant in chosen) or f"no mutant has {args.only!r} in it")
        return int(not chosen)
    state = _state()
    results = _remembered(state)
    RECORD.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    tests = " ".join(sorted({word for mutant in chosen for word in mutant.tests.split()}))
    if f"unchanged, {tests}" not in results:
        # A module that stands in for itself, so that standing in is no reason to turn red.
        same = chosen[0]._replace(replace=chosen[0].find, tests=tests)
        results[f"unchanged, {tests}"] = status = run_tests(same, 10 * SECONDS)
        if status != PASSED:
            say(f"pytest says {status} without any mutant, see {LOG}: set that right first")
            return 2
    killed, wrong = 0, 0
    for mutant in chosen:
        key = f"{mutant.name}, {mutant.tests}"
        status = results.get(key)
        if status is None:
            status = run_tests(mutant)
            if status in (PASSED, FAILED):
                results[key] = status
                RECORD.write_text(json.dumps({"state": state, "results": results}, indent=1))
        killed += status == FAILED
        if status == PASSED:
            say(f"survived  {mutant.name} ({mutant.survives or 'not explained'})")
        elif status != FAILED:
            say(f"nothing was tested (pytest says {status})  {mutant.name}")
        elif mutant.survives:
            say(f"killed, though explained as a survivor  {mutant.name}")
        wrong += (status == FAILED) == bool(mutant.survives)
    say(f"{time.monotonic() - began:.0f} s")
    say(f"killed {killed} of {len(chosen)}")
    return int(bool(wrong) or killed < SHARE * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
