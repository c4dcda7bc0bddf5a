"""A widget's limits, for values that ComfyUI does not hold against them.

It checks what is set on a node, and neither what comes over a wire nor an input that the node's own
`validate_inputs` looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from comfy_api.latest import io

from ..networks.checked import quoted


def check(node: type[io.ComfyNode], **values: object) -> None:
    """Refuse values, by the names of a node's inputs, that its widgets would not take.

    Args:
        values: those of widgets within a choice stand in a dict, as ComfyUI passes them.

    Raises:
        ValueError: naming the widget, what was found and what was expected.
    """
    for widget, value in _pairs(node.define_schema().inputs, values):
        name = widget.display_name or widget.id
        if isinstance(widget, io.Combo.Input | io.DynamicCombo.Input):
            options = _names(widget)
            if value not in options:
                raise ValueError(
                    f"'{name}' is {quoted(value)}, expected one of: {', '.join(options)}"
                )
            continue
        kind = int if isinstance(widget, io.Int.Input) else int | float
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"'{name}' is {quoted(value)}, expected a number")
        if not widget.min <= value <= widget.max:
            raise ValueError(
                f"'{name}' is {quoted(value)}, expected {widget.min} to {widget.max}: another "
                "number, here or where the wire comes from"
            )


def _pairs(
    widgets: Iterable[io.Input], values: Mapping[str, object]
) -> Iterator[tuple[io.Input, object]]:
    """Widgets with limits, and what is asked of them; what is not there is as it was set."""
    for widget in widgets:
        value = values.get(widget.id)
        if value is None:
            continue
        if isinstance(widget, io.DynamicCombo.Input):
            inner = value if isinstance(value, Mapping) else {widget.id: value}
            chosen = inner.get(widget.id)
            yield widget, chosen
            for option in widget.options:
                if option.key == chosen:
                    yield from _pairs(option.inputs, inner)
        elif isinstance(widget, io.Combo.Input | io.Int.Input | io.Float.Input):
            yield widget, value


def _names(widget: io.Combo.Input | io.DynamicCombo.Input) -> list[str]:
    return [getattr(option, "key", option) for option in widget.options]
