"""Values that come out of a file: checked, and quoted in a message with care."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Annotated, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

Config = TypeVar("Config")

# What sizes a network: far above any that exists, far below what a machine would die of.
Width = Annotated[int, Field(ge=1, le=65536)]
Count = Annotated[int, Field(ge=1, le=256)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_LONGEST_QUOTE = 60
_LONGEST_LINE = 1200


def quoted(text: object, longest: int = _LONGEST_QUOTE) -> str:
    """Somebody else's text for one of our sentences: in quotes, short and printable."""
    if not isinstance(text, str):
        # A number needs no quotes.
        return one_line(repr(text)[:longest])
    return repr(text if len(text) <= longest else f"{text[:longest]}…")


def some(names: Iterable[str]) -> str:
    """The first three names, not more of each than can be read, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(name if len(name) <= 200 else f"{name[:200]}…" for name in names[:3]) + more


def one_line(text: str) -> str:
    """A message without line ends and terminal codes, and no longer than a message is."""
    if len(text) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def reason_of(error: Exception) -> str:
    """Why something was refused: of what a library says in several lines, what counts."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        return one_line(f"{place[:_LONGEST_QUOTE] or 'all of it'}: {first['msg'][:200]}")
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return one_line(text.splitlines()[0][:300])


def build(config: type[Config], values: Mapping[str, object], what: str) -> Config:
    """A config, which is a dataclass, from JSON.

    Args:
        what: for messages: "audio codec config".

    Raises:
        ValueError: an entry that it does not have, or a value of the wrong type or out of range.
    """
    unknown = sorted(values.keys() - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(
            f"{what}: {quoted(', '.join(unknown))} is unknown; the file may be of a newer version "
            "of this pack, update it"
        )
    built = config(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    check(built, what)
    return built


def check(config: object, what: str) -> None:
    """Hold a dataclass's values against its annotations.

    Raises:
        ValueError: naming the entry, what was found and what was expected.
    """
    try:
        _model_of(type(config)).model_validate(asdict(config))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        problem = first["msg"].replace("Input should be", "expected").replace("Tuple", "list")
        raise ValueError(f"{what}: {name} is {quoted(first['input'])}, {problem}") from error


@cache
def _model_of(config: type) -> type[BaseModel]:
    types = get_type_hints(config, include_extras=True)
    entries = {field.name: (types[field.name], ...) for field in fields(config)}
    return create_model(config.__name__, __config__=ConfigDict(strict=True), **entries)
