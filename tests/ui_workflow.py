"""A workflow as ComfyUI's page saves it, turned into the prompt that its API takes.

The page does this with the schemas from /object_info; so does this, for what our workflows use:
wires, widgets, widgets that were turned into inputs, and combos that bring widgets of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

NOTES = {"MarkdownNote", "Note"}
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def read_workflow(path: Path) -> dict:
    """The JSON of a workflow file."""
    return json.loads(path.read_text(encoding="utf-8"))


def api_prompt(workflow: dict, schemas: dict) -> dict:
    """Node id -> class_type and inputs. `schemas` is the answer of /object_info."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": _inputs(node, schemas[node["type"]], sources),
        }
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }


def _inputs(node: dict, schema: dict, sources: dict[int, list]) -> dict[str, object]:
    values = iter(node["widgets_values"])
    found = dict(_widget_values(schema["input"], "", values))
    left = list(values)
    if left:
        raise ValueError(f"{node['type']} has widget values that no widget takes: {left}")
    wired = {
        entry["name"]: sources[entry["link"]]
        for entry in node["inputs"]
        if entry["link"] is not None
    }
    return found | wired


def _widget_values(inputs: dict, prefix: str, values: Iterator) -> Iterator[tuple[str, object]]:
    for section in ("required", "optional"):
        for name, (kind, *rest) in inputs.get(section, {}).items():
            options = rest[0] if rest else {}
            if options.get("forceInput") or not (isinstance(kind, list) or kind in _WIDGETS):
                continue
            # A graph of an earlier version has no value for a later widget.
            value = next(values, options.get("default"))
            yield prefix + name, value
            if options.get("control_after_generate") or options.get("image_upload"):
                next(values, None)  # a widget of the page's own
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = next(option for option in options["options"] if option["key"] == value)
                yield from _widget_values(chosen["inputs"], f"{prefix}{name}.", values)
