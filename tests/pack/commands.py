"""Commands that texts show: found in Markdown and docstrings, for tests to run or check."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import dropwhile

from mutual_forcing.tests.pack.archive import ROOT

_FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\S*python3? [^-]|(?:torchrun|make|pytest) )")


def _commands(lines: list[str]) -> list[list[str]]:
    """Words of the lines that are commands, less the environment; unfinished ones are left out."""
    found = [shlex.split(line, comments=True) for line in lines if _COMMAND.match(line.strip())]
    whole = [words for words in found if not any("..." in word for word in words)]
    return [list(dropwhile(lambda word: "=" in word, words)) for words in whole]


def in_markdown(text: str) -> list[list[str]]:
    """Commands in fenced blocks and in code spans."""
    blocks = "\n".join(_FENCE.findall(text)).replace("\\\n", " ")
    spans = [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("", text))]
    return _commands([*blocks.splitlines(), *spans])


def in_docstrings(source: str) -> list[list[str]]:
    """Commands in the docstrings of a module: indented lines, and code spans."""
    found: list[list[str]] = []
    for text in docstrings(source):
        spans = [" ".join(span.split()) for span in _SPAN.findall(text)]
        found += _commands([*text.replace("\\\n", " ").splitlines(), *spans])
    return found


def docstrings(source: str) -> Iterator[str]:
    """Every string of a module that stands for itself: docstrings, attributes' ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.value.value


def in_help(script: str) -> list[list[str]]:
    """Commands that a script's --help shows, as lines of their own."""
    said = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return _commands(said.stdout.splitlines())
