"""Who does the work: this process, or workers that Ray keeps on this machine or on many."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from ..launch import ROOT
from .worker import Refused

MOST_FAILED_STARTS = 3


class Lost(Exception):  # noqa: N818 - nobody's mistake
    """A worker is gone; its job is not."""


Outcome = dict[str, object] | Exception
"""What the worker says of a finished job; or `Refused`, `Lost` or OSError."""


Tell = Callable[[Mapping[str, tuple[str, float, float]]], None]
"""Called with what is being made, by the job's name: by whom, seconds made, seconds wanted."""


class Job(Protocol):
    """What a pool passes to a worker: clips of a file of jobs, rows of a table, trainings.

    Attributes:
        cost: about how long it takes, in any unit.
    """

    name: str
    cost: float

    def text(self) -> str:
        """What the worker reads it from, wherever it is."""


class Worker(Protocol):
    """Makes one job after the other."""

    name: str

    def read(self, text: str) -> Job:
        """A job from its text."""

    def run(self, job: Job, report: Callable[[float, float], None]) -> dict[str, object]:
        """Make it; what it was is in the answer: `seconds` of clip, what it `took`, by which
        `worker`.

        Raises:
            Refused: it cannot be made.
            OSError: a file cannot be written.
        """


class Pool(Protocol):
    """Takes jobs as long as it has room, and gives them back when something came of them."""

    def has_room(self) -> bool:
        """Whether a further job would be begun at once."""

    def begin(self, job: Job) -> None:
        """Give it to a worker."""

    def is_idle(self) -> bool:
        """Whether nothing is being made."""

    def finished(self, tell: Tell) -> Iterator[tuple[Job, Outcome]]:
        """What has ended, after a second of waiting at most; `tell` is told how far the rest is."""

    def close(self) -> None:
        """Let the workers go."""


class InTurn:
    """One job after the other in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._job: Job | None = None

    def has_room(self) -> bool:
        """Whether nothing waits."""
        return self._job is None

    def begin(self, job: Job) -> None:
        """It is made when the pool is asked what has finished."""
        self._job = job

    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return self._job is None

    def finished(self, tell: Tell) -> Iterator[tuple[Job, Outcome]]:
        """The one that waited, made now."""
        job, self._job = self._job, None

        def report(made: float, wanted: float) -> None:
            tell({job.name: (self.worker.name, made, wanted)})

        try:
            yield job, self.worker.run(job, report)
        except (Refused, OSError) as error:
            yield job, error

    def close(self) -> None:
        """There is nothing to let go."""


class OnRay:
    """A worker per card, or per core without cards, each in a process that Ray keeps.

    Args:
        settings: arguments of `of`; workers with another `device` than a card's take a core.
        address: of a running cluster; None = workers on this machine, for as long as this runs.
        workers: how many; None = as many as there are cards, or else cores.
        of: what makes a worker, as MODULE:NAME.

    Raises:
        ValueError: Ray is not installed, no such cluster, or no worker can begin there.
    """

    def __init__(
        self,
        settings: Mapping[str, object],
        address: str | None,
        workers: int | None,
        of: str = "mutual_forcing.jobs.worker:Worker",
    ) -> None:
        # Ray reports its use to its makers unless told otherwise, and a run reaches nobody.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # Its workers are the work here, not something that runs beside it.
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            import ray
        except ImportError as error:
            raise ValueError("--ray needs Ray: pip install ray, or leave --ray out") from error
        self.ray, self.settings, self.of = ray, dict(settings), of
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--ray: no cluster at {address} ({error})") from error
        there = ray.cluster_resources()
        card = str(settings.get("device", "cpu")).startswith("cuda")
        self.needs = {"num_cpus": 0, "num_gpus": 1} if card else {"num_cpus": 1}
        count = workers or int(there.get("GPU" if card else "CPU", 0))
        if not count:
            raise ValueError(f"--ray: the cluster has {dict(there)}, and no card for a worker")
        self._actor = self._class()
        self._workers = [self._new() for _ in range(count)]
        self._busy: dict[object, tuple[Job, int]] = {}
        self._names: dict[int, str] = {}
        self._failed = 0

    def _class(self) -> object:
        root = str(ROOT)

        @self.ray.remote(max_concurrency=2, **self.needs)
        class Actor:
            """A worker where this pack lies in the same place as here."""

            def __init__(self, of: str, settings: dict[str, object]) -> None:
                sys.path.insert(0, root)
                import launch

                launch.register()
                import torch

                torch.set_num_threads(1)
                module, name = of.split(":")
                made = getattr(importlib.import_module(module), name)
                self.worker, self.now = made(**settings), (0.0, 0.0)

            def run(self, job: str) -> dict[str, object] | Exception:
                from mutual_forcing.jobs.worker import Refused

                def report(made: float, wanted: float) -> None:
                    self.now = made, wanted

                self.now = 0.0, 0.0
                try:
                    return self.worker.run(self.worker.read(job), report)
                except (Refused, OSError) as error:
                    words = (isinstance(error, OSError) and error.strerror) or str(error)
                    return {"refused": words}

            def state(self) -> tuple[str, float, float]:
                return (self.worker.name, *self.now)

        return Actor

    def _new(self) -> object:
        return self._actor.remote(self.of, self.settings)

    def wait_until_ready(self) -> None:
        """Until every worker has its model."""
        self.ray.get([worker.state.remote() for worker in self._workers])

    def has_room(self) -> bool:
        """Whether a worker has nothing to do."""
        return len(self._busy) < len(self._workers)

    def begin(self, job: Job) -> None:
        """Give it to the first worker that has nothing to do."""
        taken = {index for _, index in self._busy.values()}
        index = next(i for i in range(len(self._workers)) if i not in taken)
        self._busy[self._workers[index].run.remote(job.text())] = job, index

    def is_idle(self) -> bool:
        """Whether no worker has anything to do."""
        return not self._busy

    def finished(self, tell: Tell) -> Iterator[tuple[Job, Outcome]]:
        """What has ended; a worker that is gone is replaced."""
        done, _ = self.ray.wait(list(self._busy), timeout=1.0)
        for answer in done:
            job, index = self._busy.pop(answer)
            try:
                outcome: Outcome = self.ray.get(answer)
                self._failed = 0
                if "refused" in outcome:
                    outcome = Refused(outcome["refused"])
            except self.ray.exceptions.RayActorError as error:
                self._failed += 1
                if self._failed > MOST_FAILED_STARTS * len(self._workers):
                    raise ValueError(f"--ray: workers die one after the other: {error}") from error
                outcome = Lost(f"{self._names.pop(index, 'its worker')} is gone")
                self._workers[index] = self._new()
            except self.ray.exceptions.RayTaskError as error:
                outcome = Refused(str(error).strip().splitlines()[-1])
            yield job, outcome
        tell(self._making())

    def _making(self) -> dict[str, tuple[str, float, float]]:
        """What the workers say; nothing of one that does not answer at once."""
        asked = {
            self._workers[index].state.remote(): (job, index) for job, index in self._busy.values()
        }
        if not asked:
            return {}
        answered, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=1.0)
        found = {}
        for answer in answered:
            job, index = asked[answer]
            try:
                found[job.name] = self.ray.get(answer)
                self._names[index] = found[job.name][0]
            except self.ray.exceptions.RayError:
                continue
        return found

    def close(self) -> None:
        """End the workers; what they were at stays in its checkpoints."""
        for worker in self._workers:
            self.ray.kill(worker)
        self.ray.shutdown()
