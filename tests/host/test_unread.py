"""What a wire carries is read or named; `check_wires` in tests/inside_comfyui_ltx2.py has core's
own nodes.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mutual_forcing.host.conditioning import START, TRANSITION, UNPROCESSED
from mutual_forcing.host.unread import unread

PROMPT = torch.zeros(1, 2, 3)


class SomeNode:
    """A node that patches a model."""

    @staticmethod
    def patch() -> object:
        def inside() -> None:
            """What it puts there."""

        return inside


def model(**parts: object) -> SimpleNamespace:
    usual = {"optimized_attention_override": SomeNode.patch()}
    return SimpleNamespace(**{"model_options": {"transformer_options": usual}} | parts)


def said(wire: object, **extras: object) -> list[str]:
    return list(unread(wire, {"positive": [[PROMPT, extras]]}, guided=True))


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ({"object_patches": {"model_sampling": SomeNode.patch()}}, "SomeNode"),
        ({"object_patches": {"model_sampling": 3}}, "model_sampling"),
        ({"model_options": {"sampler_cfg_function": SomeNode.patch()}}, "SomeNode"),
        ({"model_options": {"something": 1}}, "something"),
        ({"model_options": {"transformer_options": {"rope_options": {"x": 1}}}}, "ScaleROPE"),
        (
            {"model_options": {"transformer_options": {"patches": {"p": [SomeNode.patch()]}}}},
            "SomeNode",
        ),
        ({"wrappers": {"outer_sample": {"easycache": [len]}}}, "EasyCache"),
        ({"wrappers": {"outer_sample": {None: [SomeNode.patch()]}}}, "SomeNode"),
        ({"callbacks": {"on_pre_run": {"their_key": [len]}}}, "their_key"),
        ({"additional_models": {"another": [1]}}, "another"),
        ({"hook_patches": {"x": [1]}}, "hooks"),
    ],
)
def test_what_changes_a_model_in_ways_that_are_not_read_is_named(parts: dict, name: str) -> None:
    assert said(model(**parts)) == [f"does nothing here, on the wire to 'model': {name}"]


def test_what_is_read_or_changes_nothing_is_not_named() -> None:
    wire = model(
        object_patches={"manual_cast_dtype": torch.float32},
        callbacks={"on_load_after": {"x": [len]}},
        wrappers={},
        injections={"bypass_lora": [1]},
        hook_patches={},
    )
    extras = {START: 1.0, TRANSITION: None, UNPROCESSED: True, "frame_rate": 24.0}
    neutral = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0, "keyframe_idxs": None}
    assert said(wire, **extras, **neutral, pooled_output=PROMPT, guide_attention_entries=[]) == []


def test_extras_of_a_prompt_are_named_by_the_node_that_writes_them() -> None:
    (line,) = said(model(), mask=PROMPT, set_area_to_bounds=False, start_percent=0.5, theirs=PROMPT)
    names = "Conditioning (Set Mask), ConditioningSetTimestepRange, theirs"
    assert line == f"does nothing here, on the wire to 'positive': {names}"


def test_a_negative_prompt_without_guidance_is_named_once() -> None:
    prompts = {"positive": [[PROMPT, {}]], "negative": [[PROMPT, {"mask": PROMPT}]]}
    (line,) = unread(model(), prompts, guided=False)
    assert line.startswith("'negative' does nothing here")
    assert "Set Mask" in next(unread(model(), prompts, guided=True))
    assert not list(unread(model(), prompts | {"negative": None}, guided=False))
