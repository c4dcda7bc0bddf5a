"""The shipped model makes of a prompt and a seed what it made when it was shipped."""

from __future__ import annotations

import json

import pytest
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from mutual_forcing.tests.golden import FILE, MODES, PROMPT, SEED, difference, numbers


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return load_bundle(shipped_model_path())


@pytest.mark.parametrize("mode", MODES)
def test_the_shipped_model_makes_what_it_made(shipped: Bundle, mode: str) -> None:
    golden = json.loads(FILE.read_text())
    assert golden["model_id"] == shipped.model_id, (
        f"the shipped model is {shipped.model_id}, and {FILE.name} was made by "
        f"{golden['model_id']}: if a new model is shipped on purpose, look at its clips and then "
        "write it anew with `make golden`"
    )
    assert (golden["prompt"], golden["seed"]) == (PROMPT, SEED)
    apart = difference(numbers(shipped, MODES[mode]), golden["numbers"][mode])
    assert apart < golden["tolerance"], f"numbers of {mode}-step mode lie apart by {apart:.1e}"
