"""What the texts say can be followed: links, sources, and every command, parsed as it stands."""

from __future__ import annotations

import argparse
import ast
import io
import re
import runpy
import subprocess
import sys
import tokenize
from itertools import chain
from pathlib import Path
from typing import NoReturn

import mutual_forcing.launch as launch
import pytest
import torch
from mutual_forcing.lab.world.captions import words as words_of
from mutual_forcing.lab.world.scene import VOCABULARY
from mutual_forcing.tests.pack.archive import ROOT
from mutual_forcing.tests.pack.commands import docstrings, in_docstrings, in_help, in_markdown

ROOMS = (
    *("nodes", "host", "model_loaders", "samplers", "networks", "measures", "jobs", "lab", "tests"),
)
SOURCES = sorted(chain(ROOT.glob("*.py"), *((ROOT / room).rglob("*.py") for room in ROOMS)))
TEXTS = sorted(chain(ROOT.glob("*.md"), *((ROOT / room).rglob("*.md") for room in ("docs", "web"))))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(source: str) -> str:
    """Docstrings and comments of a module, a paragraph in one line each."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    text = "\n\n".join([*docstrings(source), "\n".join(comments)])
    return re.sub(r"(?<!\n)\n(?!\n)\s*", " ", text)


def sections(path: Path) -> set[str]:
    """Numbers of a Markdown file's headings, and of its numbered points under each."""
    found, heading = set(), ""
    for line in path.read_text().splitlines():
        if match := re.match(r"##+ ([\d.]*\d)\.? ", line):
            heading = match[1]
            found.add(f"section {heading}")
        if match := re.match(r"(\d+)\. ", line):
            found |= {f"section {heading}, point {match[1]}", f"decision {match[1]}"}
    return found


def anchors(path: Path) -> set[str]:
    """What links into a Markdown file can point to, as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_sources_that_comments_name_can_be_opened() -> None:
    cited = 0
    for path in SOURCES:
        text = prose(path.read_text())
        # OUT.md, DIR/compare.md and the like are what a command writes.
        for file in re.findall(r"[\w./-]+\.md\b", text):
            assert file[0].isupper() or (ROOT / file).exists(), f"{name(path)}: {file}"
        for file, place in re.findall(
            r"(docs/\w+\.md),? ((?:section|decision) [\d.]*\d(?:, point \d+)?)", text
        ):
            cited += 1
            assert place in sections(ROOT / file), f"{name(path)}: {file}, {place}"
        # A section or an equation of something else is that of a paper, which is named by number.
        rest = re.sub(r"docs/\w+\.md\)?[,;]? (?:and )?(?:sections?|decisions?) [\d.]+", "", text)
        if re.search(r"\b(?:[Ss]ections?|[Ee]quations?) \d", rest):
            assert re.search(r"arXiv[ :]\d{4}\.\d{5}|ISO/IEC \d", text), (
                f"{name(path)}: which paper?"
            )
    assert cited > 20


def test_files_and_tests_that_texts_name_exist() -> None:
    functions = {name for path in SOURCES for name in re.findall(r"def (\w+)", path.read_text())}
    places = "|".join([*ROOMS, "docs", "web", "example_workflows", "locales", "models"])
    for path in TEXTS:
        text = path.read_text()
        for file in re.findall(rf"(?<![\w/])(?:{places})/[\w./]+\.\w+", text):
            assert (ROOT / file).exists(), f"{name(path)}: {file}"
        for test in re.findall(r"(?<![\w/])test_\w+(?![\w.])", text):
            assert test in functions, f"{name(path)}: {test}"


def test_examples_use_words_that_the_small_model_knows() -> None:
    commands = [*in_help("generate.py"), *(words for _, words in shown())]
    prompts = [words[2] for words in commands if words[1:2] == ["generate.py"]]
    prompts = [prompt for prompt in prompts if not prompt.startswith("-")]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    prompts += re.findall(r"^PROMPT \?= (.+)$", makefile, re.M)
    assert len(prompts) > 4
    for prompt in prompts:
        assert set(words_of(prompt)) <= set(VOCABULARY), prompt


class Parsed(Exception):  # noqa: N818 - nothing went wrong
    """The arguments were understood."""


@pytest.fixture
def stop_when_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: object) -> NoReturn:
        raise Parsed(plain(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def shown() -> list[tuple[str, list[str]]]:
    """Every command in Markdown and docstrings, with the file that shows it; each one once."""
    found: dict[str, tuple[str, list[str]]] = {}
    for path in (*TEXTS, *(path for path in SOURCES if path.parts[len(ROOT.parts)] != "tests")):
        commands = in_markdown if path.suffix == ".md" else in_docstrings
        for words in commands(path.read_text()):
            found.setdefault(" ".join(words), (name(path), words))
    return list(found.values())


def problem(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why a command would not even begin, or None."""
    script = next((i for i, x in enumerate(words) if x in ("launch.py", "generate.py")), None)
    if words[0] == "make":
        made = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        return made.stderr if made.returncode else None
    if script is None:
        paths = [word for word in words if word.startswith("tests/")]
        missing = [path for path in paths if not (ROOT / path).exists()]
        return f"{missing} missing" if missing or not paths else None
    start = 1 if words[script] == "generate.py" else 2
    words = [word.removesuffix(".py") for word in words[script:]]
    # A module that is named without arguments is no example of them.
    monkeypatch.setattr(sys, "argv", [words[start - 1], *(words[start:] or ["--help"])])
    grad = torch.is_grad_enabled()
    try:
        runpy.run_module(f"mutual_forcing.{words[start - 1]}", run_name="__main__")
    except Parsed:
        return None
    except SystemExit as error:
        return None if error.code == 0 and "--help" in sys.argv else "arguments are refused"
    except ImportError as error:
        return str(error)
    finally:
        torch.set_grad_enabled(grad)
    return "arguments are not read"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_commands_that_texts_show_are_understood(
    stop_when_parsed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "launch", launch)  # beside generate.py
    commands = shown()
    found = [(file, words, problem(words, monkeypatch)) for file, words in commands]
    wrong = [f"{file}: {' '.join(words)}: {why}" for file, words, why in found if why]
    assert not wrong, "\n".join(wrong)
    assert len(commands) > 30


def test_messages_that_readme_explains_are_ours() -> None:
    told = re.findall(r'^\| "(.+?)(?: \.\.\.)?"', (ROOT / "README.md").read_text(), re.M)
    strings = [
        node.value
        for path in SOURCES
        if path.parts[len(ROOT.parts)] != "tests"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(told) > 2
    for message in told:
        assert any(message in string for string in strings), message
