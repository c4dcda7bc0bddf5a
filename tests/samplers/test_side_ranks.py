"""Ranks beside a process: they end with it, and what can't be had is said."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mutual_forcing.model_loaders.bundle import load_part
from mutual_forcing.samplers.rank_process import Inbox
from mutual_forcing.samplers.side_ranks import Over, Place, SideRanks, _packed, devices_named
from mutual_forcing.tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(
    not (Path("/proc/self/net/tcp").exists() and dist.is_available() and dist.is_gloo_available()),
    reason="looks for processes in /proc, which talk over gloo",
)
CPU = torch.device("cpu")
_LISTENING = "0A"


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal, at which a process takes connections."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        inodes.add(str(file.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == _LISTENING and inode in inodes:
                found.add(local.split(":")[0])
    return found


def test_they_end_with_a_process_that_is_killed_and_nobody_reaches_them_from_elsewhere(
    tmp_path: Path,
) -> None:
    model = tmp_path / "tiny.safetensors"
    save_tiny(model)
    ours, theirs = multiprocessing.Pipe()

    def host() -> None:
        ranks = SideRanks((CPU, CPU, CPU), partial(load_part, model, dtype=torch.float32))
        ranks.start()
        ranks.ready()
        theirs.send([process.pid for process in ranks._processes.started])
        time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=host, daemon=True)
    process.start()
    assert ours.poll(300)
    others = ours.recv()
    for pid in (process.pid, *others):
        assert listening(pid) <= {"0100007F"}  # 127.0.0.1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in others):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_cannot_be_started_is_said_in_a_sentence(tmp_path: Path) -> None:
    ranks = SideRanks((CPU, CPU), partial(load_part, tmp_path / "gone", dtype=torch.float32))
    with pytest.raises(ValueError, match=r"process for cpu did not come up .*gone.*choose other"):
        ranks.ready()
    assert devices_named("cpu, cpu", CPU) == (CPU, CPU)
    assert devices_named(" One", CPU) == devices_named("all", CPU) == (CPU,)
    for wrong in ("meta", "cpu, cuda:63", "mps, cpu", "cpu,"):
        with pytest.raises(ValueError):
            devices_named(wrong, CPU)


def test_a_message_has_no_more_of_a_tensor_than_is_shown_and_a_rank_lets_go_of_its_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = torch.arange(2.0**18)
    shown = file[100:164].view(8, 8).t()
    sent = _packed((shown, shown))
    assert len(sent) < 2000
    assert all(torch.equal(one, shown) for one in pickle.loads(sent))
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    inbox = object.__new__(Inbox)
    inbox._queue, inbox.module = queue.Queue(), torch.nn.Linear(1, 1)
    for message in (Place("cpu"), Over()):
        inbox._queue.put(message)
    assert isinstance(inbox.next(), Over)
    assert emptied == [True]
