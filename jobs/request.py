"""What is asked of a stream in words, by the shell or by a line of a file of jobs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..model_loaders.bundle import Bundle
from ..networks.checked import reason_of
from ..samplers.rollout import Mode, SamplerSettings, check_guidance, sampler_settings
from ..samplers.schedule import LONGEST, Line, parse_schedule
from ..samplers.state import MOST_WINDOW, SEEDS_END, StreamState, check_state
from ..samplers.state_file import load_state
from ..samplers.tensor_file import is_regular

A_DAY = 86_400
LONGEST_FILE = 2**24
MOST_JOBS = 100_000


class Asked(Protocol):
    """One clip, as it is asked for.

    Attributes:
        schedule: a file with the lines of one, or the lines.
        seed, window, mode, steps, guidance: None = as the saved stream or the model has it.
        state_in: what it goes on from.
    """

    prompt: str | None
    schedule: str | None
    seconds: float
    seed: int | None
    mode: Mode | None
    steps: int | None
    guidance: float | None
    window: int | None
    state_in: Path | None


class Job(BaseModel):
    """A line of a file of jobs, which is an `Asked`.

    Attributes:
        name: of the clip's file, without its ending.
        state_out: keep the stream, to go on from its end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w-][\w .-]*$", max_length=100)]
    prompt: Annotated[str, Field(max_length=LONGEST)] | None = None
    schedule: Annotated[str, Field(max_length=LONGEST_FILE)] | None = None
    seconds: Annotated[float, Field(gt=0, le=A_DAY, allow_inf_nan=False)] = 10.0
    seed: Annotated[int, Field(ge=-SEEDS_END, lt=SEEDS_END)] | None = None
    mode: Mode | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    window: Annotated[int, Field(ge=1, le=MOST_WINDOW)] | None = None
    state_in: Path | None = None
    state_out: bool = False

    @property
    def cost(self) -> float:
        """About how long it takes, in any unit."""
        passes = (self.steps or (100 if self.mode == "multi" else 4)) + 1
        return self.seconds * passes

    def text(self) -> str:
        """What `Worker.read` reads."""
        return self.model_dump_json()


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a file with a JSON object in each line; empty lines are none.

    Raises:
        ValueError: a line that is no job, a name that stands twice, or no job at all.
        OSError: it cannot be read.
    """
    if not is_regular(path):
        raise ValueError(f"--jobs is {path}, which is no file with text in it")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = file.read(LONGEST_FILE).splitlines()
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            job = Job.model_validate(json.loads(line))
        except (ValidationError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: line {number} is no job ({reason_of(error)}); expected such as "
                '{"name": "bell", "prompt": "a blue bell swings", "seconds": 20, "seed": 3}'
            ) from error
        # A file system may not tell capitals apart.
        if job.name.lower() in jobs:
            raise ValueError(f"{path}: line {number} has the name {job.name!r} again")
        jobs[job.name.lower()] = job
    if not 1 <= len(jobs) <= MOST_JOBS:
        raise ValueError(f"{path} has {len(jobs)} jobs, expected 1 to {MOST_JOBS}")
    return list(jobs.values())


def sampler_of(asked: Asked, bundle: Bundle) -> SamplerSettings:
    """How its blocks are sampled.

    Raises:
        ValueError: a number of steps or a guidance that the model does not have.
    """
    mode = asked.mode or bundle.stream.default_mode
    sampler = sampler_settings(mode, asked.steps, asked.guidance)
    check_guidance(sampler, bundle.transformer.config)
    return sampler


def starting_state(asked: Asked, bundle: Bundle) -> StreamState:
    """A new stream, or the saved one.

    Raises:
        ValueError: the saved stream does not fit the model or what else is asked.
        OSError: it cannot be read.
    """
    if asked.state_in is None:
        return bundle.begin((asked.seed or 0,), asked.window)
    state = load_state(asked.state_in)
    check_state(state, bundle)
    if asked.window not in (None, state.settings.window):
        raise ValueError(
            f"window is {asked.window} but the saved stream has {state.settings.window}, "
            "which stays for its whole life; leave it out"
        )
    if len(state.settings.seeds) != 1:
        raise ValueError(f"the saved stream holds {len(state.settings.seeds)} clips, expected 1")
    return state if asked.seed is None else state.reseeded((asked.seed,))


def lines_of(asked: Asked, bundle: Bundle, state: StreamState) -> list[Line]:
    """What is to be followed; nothing where a saved stream goes on with its last prompt.

    Raises:
        ValueError: neither prompt nor schedule, both, or one that cannot be read or followed.
        OSError: the schedule's file cannot be read.
    """
    prompt, schedule = asked.prompt, asked.schedule
    if prompt is None and schedule is None and state.schedule:
        return []
    if (prompt is None) == (schedule is None):
        raise ValueError(
            f"found {'no prompt' if prompt is None else 'a prompt and a schedule'}, expected a "
            "prompt or a schedule, and one of them only"
        )
    if prompt is not None:
        bundle.check_prompt(prompt)
        return [Line(0.0, (prompt,))]
    # A schedule has a colon after its first number, and few files are named so.
    if re.match(r"\s*\d[^:\n]*:", schedule) is None:
        if not is_regular(Path(schedule)):
            raise ValueError(
                f"the schedule is {schedule[:200]!r}, which is no file with text in it: "
                "expected one, or its lines"
            )
        with Path(schedule).open(encoding="utf-8-sig", errors="replace") as file:
            schedule = file.read(LONGEST_FILE)
    lines = parse_schedule(schedule)
    for number, line in enumerate(lines, start=1):
        refusal = bundle.prompt_refusal(line.texts[0])
        if refusal:
            raise ValueError(f"the schedule's line {number}: {refusal}")
    return lines
