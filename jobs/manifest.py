"""What became of each job: a JSON file that is whole at any moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from ..samplers.version import VERSION
from .request import Job
from .storage import Storage

NAME = "manifest.json"
_LONGEST = 2**28


def fingerprint(job: Job, model_id: str) -> str:
    """Of everything that decides about a clip's bits."""
    asked = job.model_dump(mode="json", exclude={"name", "state_out"})
    return hashlib.sha256(json.dumps([asked, model_id], sort_keys=True).encode()).hexdigest()[:16]


class Manifest:
    """An entry per job, in the order of the jobs.

    Raises:
        ValueError: the folder's manifest cannot be read, or one of its clips was made otherwise.
    """

    def __init__(self, storage: Storage, jobs: Sequence[Job], model_id: str) -> None:
        self.storage = storage
        self.made_as = {job.name: fingerprint(job, model_id) for job in jobs}
        self.entries: dict[str, dict[str, object]] = {}
        if storage.has(NAME):
            with storage.reading(NAME) as path:
                try:
                    with path.open(encoding="utf-8") as file:
                        entries = json.loads(file.read(_LONGEST))["jobs"]
                    self.entries = {entry["name"]: dict(entry) for entry in entries}
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(
                        f"{NAME} in {storage.address} is damaged; choose another folder, or delete "
                        "it and have everything made again"
                    ) from error
        for job in jobs:
            entry = self.entries.get(job.name)
            if entry and entry.get("made as") != self.made_as[job.name]:
                raise ValueError(
                    f"{storage.address} has a {job.name} of another prompt, seed, model or "
                    "setting; choose another name or folder, or delete the manifest there"
                )

    def is_done(self, job: Job) -> bool:
        """Whether its clip was made and is there, and its stream if it is wanted."""
        entry = self.entries.get(job.name, {})
        files = [f"{job.name}.mp4", *([f"{job.name}.state"] if job.state_out else [])]
        return entry.get("status") == "done" and all(map(self.storage.has, files))

    def note(self, job: Job, status: str, **facts: object) -> None:
        """Say what became of a job, at once and on disk.

        Raises:
            OSError: it cannot be written.
        """
        asked = job.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        made_as = {"made as": self.made_as[job.name], "version": VERSION}
        self.entries[job.name] = {**asked, "status": status, **facts, **made_as}
        text = json.dumps({"jobs": list(self.entries.values())}, indent=1, ensure_ascii=False)
        with self.storage.writing(NAME) as path:
            path.write_text(text, encoding="utf-8")
