"""The list of wrong formulas is at today's source; `make mutants` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutual_forcing.tests.mutant_list import MUTANTS
from mutual_forcing.tests.mutants import Mutant


def test_every_mutant_changes_one_place_and_names_tests_that_are_there() -> None:
    for mutant in MUTANTS:
        compile(mutant.source, mutant.file, "exec")
        for test in mutant.tests.split():
            file, *names = test.split("::")
            text = Path(__file__).with_name(file.split("/")[0]).joinpath(*file.split("/")[1:])
            names = [name.split("[")[0] for name in names]
            assert all(f"def {name}(" in text.read_text() for name in names), test
    assert len({(m.file, m.find, m.replace) for m in MUTANTS}) == len(MUTANTS) >= 60


def test_a_formula_that_moved_is_said() -> None:
    with pytest.raises(ValueError, match=r"found 0 times .* expected once"):
        _ = Mutant("samplers/steps.py", "no such formula", "", "").source
