"""A schedule: which prompt a stream follows from which second on, and what becomes of the past.

A running rollout reads its schedule at every block, so a prompt that is told to it from another
thread takes effect at the next one. What was played is a row of lines in the stream's state: going
on and making the stream again need nothing else.

As text, a line each, seconds of the stream first, then what happens to the past, if it is not what
is usual:

    0: a red ball bounces on a white background
    12.5 reread 3: a blue ball bounces on a white background
    20 blend 2: a green ball bounces on a white background
     slowly

A line that begins with a space goes on with the prompt above it.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right, insort_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise
from operator import itemgetter
from typing import Annotated, NamedTuple

from pydantic import Field

from ..networks.checked import quoted
from ..networks.layer import Text
from .clock import Clock
from .speech import Transcript

LONGEST = 20_000
"""Characters of a prompt."""
MOST_BLOCKS, LAST_SECOND = 9999, 999_999_999
WIRED = "?"
"""Begins what stands for a prompt whose text nobody knows: it was encoded elsewhere."""
_MARK = re.compile(rf"{re.escape(WIRED)}[0-9a-f]*")


def is_mark(text: str) -> bool:
    """Whether a text stands for a prompt that nobody knows; words may begin with a `?` too."""
    return _MARK.fullmatch(text) is not None


@dataclass(frozen=True)
class Transition:
    """What happens to the past where a new prompt takes over, and how fast it takes over.

    With neither, the past stays as it was read: every block under the prompt that it was made with.

    Attributes:
        reread: the keys and values of that many of the last blocks are made anew from their clean
            latents under the new prompt, one after the other, each seeing those that are kept
            before it; from all that the window keeps on, the prefix too (KV re-cache of LongLive,
            arXiv 2509.22622; TaoMate's released code does it with all).
        blend: so many blocks go over to the new prompt in equal steps, by a mix of both prompts'
            text keys and values.
    """

    reread: Annotated[int, Field(ge=0, le=MOST_BLOCKS)] = 0
    blend: Annotated[int, Field(ge=0, le=MOST_BLOCKS)] = 0

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in vars(self).items() if value]
        return " ".join(words) or "keep"


KEEP = Transition()
USUAL = Transition(reread=1)
"""Where nobody chooses: as the network learned it, for which a block's keys are written when the
stream goes on, under the prompt that it goes on with. docs/measured.md has it beside the others.
"""


@dataclass(frozen=True)
class Line:
    """A prompt and when it begins.

    Attributes:
        start: second of the stream; it begins with the first block at or after it.
        texts: as written, one for all clips of the stream or one each.
        transition: from the prompt before it.

    Raises:
        ValueError: a second that no stream has, or a prompt that is too long.
    """

    start: Annotated[float, Field(ge=0, le=LAST_SECOND, allow_inf_nan=False)]
    texts: Annotated[
        tuple[Annotated[str, Field(max_length=LONGEST)], ...], Field(min_length=1, max_length=256)
    ]
    transition: Transition = USUAL

    def __post_init__(self) -> None:
        if not 0 <= self.start <= LAST_SECOND:
            raise ValueError(f"a prompt begins at {self.start} s, expected 0 to {LAST_SECOND}")
        # As the text of a schedule has them, so that the same prompt is equal whatever way it came.
        plain = (text.replace("\0", "") for text in self.texts)  # where an mp4's tag would end
        rows = ([row.strip() for row in text.splitlines()] for text in plain)
        texts = tuple("\n".join(filter(None, row)) for row in rows)
        for text in texts:
            if len(text) > LONGEST:
                raise ValueError(f"the prompt has {len(text)} characters, expected up to {LONGEST}")
        # What a shell passed on may not be Unicode, and a file must be.
        whole = (text.encode("utf-8", "replace").decode() for text in texts)
        object.__setattr__(self, "texts", tuple(whole))


class Prompt(NamedTuple):
    """What a stream is asked for.

    Attributes:
        text: keys of the prompt.
        unguided: keys of the empty prompt, where guidance needs it.
        transcripts: what is to be spoken, one for all clips or one each; None where nothing is
            told. A network that cannot be told does not look at them.
        texts: as written, one for all clips or one each.
    """

    text: Text
    unguided: Text | None = None
    transcripts: tuple[Transcript | None, ...] = (None,)
    texts: tuple[str, ...] = (WIRED,)


Encode = Callable[[tuple[str, ...]], Prompt | None]


class Schedule:
    """Lines in the order of their times, and what makes prompts of their texts.

    Attributes:
        clock: of the stream.
        encode: texts to a prompt; None for what it cannot encode. It is called in the rollout's
            thread, when the prompt is due: text keys of large models are too large to keep many.

    Args:
        lines: in any order.

    Raises:
        ValueError: two lines begin with the same block.
    """

    def __init__(self, clock: Clock, lines: Iterable[Line], encode: Encode) -> None:
        self.clock, self.encode = clock, encode
        self._begun = sorted(((clock.block_at(line.start), line) for line in lines), key=_BLOCK)
        for (block, line), (other, later) in pairwise(self._begun):
            if block == other:
                raise ValueError(
                    f"two prompts begin at {_seconds(line.start)} and {_seconds(later.start)} s, "
                    "which is the same block of the stream: give each at least a second"
                )
        self._how = self._begun[-1][1].transition if self._begun else USUAL
        self._told: list[tuple[str, Transition]] = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, clock: Clock, prompt: Prompt) -> Schedule:
        """One prompt from the beginning to the end."""
        line = Line(0.0, prompt.texts)
        return cls(clock, [line], lambda texts: prompt if texts == line.texts else None)

    def tell(self, text: str, transition: Transition | None = None) -> None:
        """Follow another prompt from the next block on, until a later line of the schedule is due.

        From any thread. Of several before the same block the last one counts.

        Args:
            transition: None = as that of the schedule's last line.

        Raises:
            ValueError: no words, but what stands for some.
        """
        if is_mark(Line(0.0, (text,)).texts[0]):
            raise ValueError(f"{quoted(text)} stands for a prompt that was written elsewhere")
        with self._lock:
            self._told.append((text, transition or self._how))

    def heard(self, block: int) -> None:
        """Let what was told since the last call begin with this block."""
        with self._lock:
            told, self._told = self._told, []
        start = self.clock.time_of(block)
        for text, transition in told:
            insort_right(self._begun, (block, Line(start, (text,), transition)), key=_BLOCK)

    def due(self, block: int) -> Line | None:
        """What to follow in a block; None before the first line."""
        place = bisect_right(self._begun, block, key=_BLOCK)
        return self._begun[place - 1][1] if place else None


def line_at(lines: Sequence[Line], clock: Clock, block: int) -> int | None:
    """Which of a stream's lines, in the order of their times, it follows in a block, if any."""
    # From the end, where a rollout looks: as quick after an hour as after a second.
    places = range(len(lines) - 1, -1, -1)
    return next((i for i in places if clock.block_at(lines[i].start) <= block), None)


def check_lines(lines: Sequence[Line], clips: int, blocks: int, clock: Clock) -> None:
    """Refuse what a stream of so many clips and blocks cannot have followed.

    Raises:
        ValueError: naming the line.
    """
    before = -1
    for number, line in enumerate(lines, start=1):
        block = clock.block_at(line.start)
        if not before < block < blocks or len(line.texts) not in (1, clips):
            raise ValueError(
                f"line {number} of the stream's schedule has {len(line.texts)} prompts from block "
                f"{block} on, expected 1 or {clips} from a block after {before} and below "
                f"{blocks}: make the stream again"
            )
        before = block


_BLOCK = itemgetter(0)
_LINE = re.compile(
    r"(?P<start>\d{1,9}(?:\.\d*)?)(?P<how>(?:[ \t]+(?:keep|(?:reread|blend)[ \t]+\d{1,4}))*)[ \t]*:"
    r"(?P<text>.*)",
    re.ASCII,
)
_MINUTES = re.compile(r"\d+(?:\.\d*)?[ \t]*:")
_EXAMPLE = "'12.5: a blue ball bounces'"


def parse_schedule(text: str, usual: Transition = USUAL) -> list[Line]:
    """The lines that somebody wrote, as the head of this file shows them.

    Args:
        usual: what happens to the past where a line does not say it.

    Raises:
        ValueError: naming the line, what was found and what was expected.
    """
    lines: list[Line] = []
    for number, row in enumerate(text.splitlines(), start=1):
        found = _LINE.match(row.strip())
        if not row.strip():
            continue
        if row[0].isspace() and lines and not found:
            lines[-1] = replace(lines[-1], texts=(f"{lines[-1].texts[0]}\n{row}",))
        elif row[0].isspace() or not found:
            raise _wrong(number, f"is {quoted(row)}, expected seconds, a colon and a prompt")
        else:
            lines.append(_parsed(number, found, usual))
            if any(line.start == lines[-1].start for line in lines[:-1]):
                raise _wrong(number, "begins at the same second as another, expected one a second")
    return lines


def _parsed(number: int, found: re.Match[str], usual: Transition) -> Line:
    start, text = float(found["start"]), found["text"].strip()
    words = found["how"].split()
    counts = {name: int(n) for name, n in pairwise([*words, ""]) if name in ("reread", "blend")}
    if _MINUTES.match(text):
        raise _wrong(number, f"begins with {quoted(found[0][:9])}, expected seconds (90, not 1:30)")
    if is_mark(text):
        raise _wrong(
            number,
            f"has {quoted(text)}, which stands for a prompt that was written elsewhere: expected "
            "its words",
        )
    if not text:
        raise _wrong(number, "has no prompt, expected words after the colon")
    return Line(start, (text,), Transition(**counts) if words else usual)


def written(lines: Sequence[Line]) -> str:
    """The same as text; a prompt whose text nobody knows, or one for each clip, is a mark."""
    rows = []
    for line in lines:
        how = f" {line.transition}" if line.start else ""
        text = line.texts[0] if len(line.texts) == 1 else WIRED
        # A row that looks like a line of its own is joined to the one before.
        text = re.sub(rf"\n(?={_LINE.pattern})", " ", text).replace("\n", "\n ")
        rows.append(f"{_seconds(line.start)}{how}: {text}\n")
    return "".join(rows)


def _seconds(start: float) -> str:
    return f"{Decimal(repr(start)):f}".removesuffix(".0")


def _wrong(number: int, what: str) -> ValueError:
    return ValueError(f"line {number} of the schedule {what}, as in {_EXAMPLE}")
