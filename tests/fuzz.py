"""Hostile files through the loaders and through a run: `python launch.py tests.fuzz --cases 5000`.

A case begins as a whole file (a stream state, a model, an LTX-2 checkpoint in any container, a
folder that is listed) and is changed in one to three places: tensors with other shapes, dtypes and
values, headers with other types and extreme numbers, JSON that nests, bytes that flip, names that
lead away. What is still accepted goes through two blocks of a rollout and, a part of it, through
the decoders. A case is wrong that ends in anything but one sentence of the pack's own, takes over
10 s of processor time (or a minute in which nothing happens), or needs over 2 GB.

Cases run in processes of their own, whose memory is limited, so that one that hangs or is killed is
seen. `--only N` runs one case again, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle
from mutual_forcing.model_loaders.catalog import (
    list_bases,
    list_ltx2,
    list_models,
    list_streams,
)
from mutual_forcing.model_loaders.identity import what_is
from mutual_forcing.model_loaders.ltx2 import load_transformer
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import (
    NonFiniteBlockError,
    Prompt,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import StreamSettings, StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.samplers.tensor_file import TensorFileError
from mutual_forcing.tests import ltx2_files
from mutual_forcing.tests.tiny import save_tiny
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BATCH, SECONDS, SILENCE = 1000, 10.0, 60.0
GIGABYTES, ADDRESS_SPACE = 2.0, 6 << 30
# A state or a model may ask for large pictures, or a whole minute at once, and is right to take
# long over them.
LARGEST_RUN = 4096

EXTREME = (
    *(0, -1, 1, 2, 3, 255, 2**31, 2**53, 2**63, 2**64, 10**12, 10**15, -(10**30), 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *(
        None,
        True,
        False,
        "",
        "3",
        "text",
        "\x1b[31mred\x1b[0m\n\r",
        "\u202e\ud800"[:1],
        "n" * 10**5,
    ),
    *([], {}, [1], [0] * 1000, [[1, 2], 3], {"a": {"b": []}}, "../x", "/dev/zero", "C:\\x", "\0"),
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.complex64),
)


def nested(rng: random.Random) -> str:
    """JSON that is as deep as a reader may fear."""
    depth, (left, right) = rng.choice((200, 5000, 60_000)), rng.choice(("[]", ('{"a":', "}")))
    return left * depth + ("" if rng.random() < 0.3 else "1" + right * depth)


def places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a tree of JSON."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items if isinstance(tree, dict | list) else ():
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def changed_json(text: str, rng: random.Random) -> str:
    """JSON with one thing in it otherwise; now and then no JSON."""
    if rng.random() < 0.06:
        return rng.choice(("", "{", "null", "[]", '"x"', text[:-1], text + "}", nested(rng)))
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):  # an earlier change left no JSON
        return text
    inside = [path for path in places(tree) if path]
    if not inside:
        return text
    *way, last = rng.choice(inside)
    at = tree
    for key in way:
        at = at[key]
    action = rng.random()
    if action < 0.1:
        del at[last]
    elif action < 0.2 and isinstance(at, dict):
        at[rng.choice(("other", "x" * 300, "\n", "__metadata__"))] = rng.choice(EXTREME)
    elif action < 0.25:
        at[last] = "HERE"
        return json.dumps(tree).replace('"HERE"', nested(rng))
    elif action < 0.4 and isinstance(at[last], int | float) and abs(at[last]) < 2**60:
        at[last] = rng.choice(
            (at[last] + 1, at[last] - 1, at[last] * 2, at[last] * 1000, at[last] / 2)
        )
    else:
        at[last] = rng.choice(EXTREME)
    return json.dumps(tree)


def changed_tensor(value: Tensor, rng: random.Random) -> Tensor:
    """A tensor of another shape or dtype, or with other numbers."""
    axis = rng.randrange(value.ndim) if value.ndim else 0
    shaped: list[Callable[[], Tensor]] = [
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value[0] if value.ndim and value.shape[0] else value[None],
        lambda: value.transpose(0, -1) if value.ndim else value,
        lambda: value.narrow(axis, 0, value.shape[axis] // 2) if value.ndim else value,
        lambda: value.narrow(axis, 0, 0) if value.ndim else value,
        lambda: torch.cat((value, value), dim=axis) if value.ndim else value,
        lambda: torch.zeros(rng.choice(((), (0,), (1,), (0, 10**12), (2,) * 9))),
    ]
    filled: list[Callable[[], Tensor]] = [
        lambda: value.to(rng.choice(DTYPES)),
        lambda: torch.full_like(value, rng.choice((float("nan"), float("inf"), 3e38, 1e-40, 0.0))),
        lambda: value.clone().index_fill_(axis, torch.tensor([0]), float("nan")),
    ]
    try:
        return rng.choice(shaped if rng.random() < 0.6 else filled)().contiguous()
    except (RuntimeError, IndexError):
        # Not every change is one of every tensor.
        return value[:0] if value.ndim else value


class Parts:
    """A safetensors file taken apart: tensors and metadata."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.tensors, self.metadata = dict(tensors), dict(metadata)

    def change(self, rng: random.Random) -> None:
        """One change that leaves it a safetensors file."""
        key = rng.choice(sorted(self.tensors)) if self.tensors else None
        action = rng.random()
        if action < 0.35 and self.metadata:
            entry = rng.choice(sorted(self.metadata))
            text = self.metadata[entry]
            is_json = text.startswith("{")
            self.metadata[entry] = changed_json(text, rng) if is_json else str(rng.choice(EXTREME))
        elif action < 0.4 and self.metadata:
            del self.metadata[rng.choice(sorted(self.metadata))]
        elif action < 0.45 or key is None:
            odd = ("", "x", "\n\x1b[2J", "n" * 10**5, "cache.-1.video.k", "cache.99.audio.v")
            layer = "model.diffusion_model.transformer_blocks.999999999.attn1.to_q.weight"
            self.tensors[rng.choice((*odd, layer))] = torch.zeros(rng.choice(((), (1,), (2, 3))))
        elif action < 0.52:
            del self.tensors[key]
        elif action < 0.58:
            other = rng.choice(sorted(self.tensors))
            self.tensors[key], self.tensors[other] = self.tensors[other], self.tensors[key]
        elif action < 0.64:
            # A whole family alike, so that no tensor gives the others away.
            end, state = key.rpartition(".")[2], rng.getstate()
            for name in [name for name in self.tensors if name.endswith(end)]:
                rng.setstate(state)
                self.tensors[name] = changed_tensor(self.tensors[name], rng)
        else:
            self.tensors[key] = changed_tensor(self.tensors[key], rng)

    def change_alike(self, rng: random.Random) -> None:
        """One change of all tensors of a kind, or of a header, that a first look cannot refuse."""
        kinds = ("video", "audio", "cache.", "unguided.", ".video.", ".audio_to_video.k", "memory.")
        kind = rng.choice(kinds)
        factor = rng.choice((0.0, 1e-30, 10.0, 1e4, 1e30))
        changes: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: x * factor,
            lambda x: x.flip(-1),
            lambda x: torch.randn(x.shape, generator=dice).to(x.dtype) * 3,
            lambda x: x.to(torch.bfloat16) if "." in kind else x,
            lambda x: x[..., : x.shape[-1] // 2],
            lambda x: torch.cat((x, x), dim=min(2, x.ndim - 1)),
        )
        dice = torch.Generator().manual_seed(rng.randrange(2**32))
        change = rng.choices(changes, (4, 2, 2, 2, 1, 1))[0]
        for name, value in self.tensors.items():
            if kind in name if "." in kind else name == kind:
                self.tensors[name] = change(value).contiguous()
        header = json.loads(self.metadata["header"])
        action = rng.random()
        if action < 0.1:
            entry = rng.choice(("blocks", "dropped", "window"))
            header[entry] += rng.choice((-1, 1, 2, 10**6, 10**12))
        elif action < 0.2:
            header["seeds"] = [rng.randrange(2**64) for _ in header["seeds"]]
        elif action < 0.3:
            header["model_title"] = str(rng.choice(EXTREME))
        elif action < 0.6:
            dropped = rng.choice(("cache.", "unguided.", ""))
            header["keys"] = {
                k: v for k, v in header["keys"].items() if not f"{k}.".startswith(dropped)
            }
            self.tensors = {
                name: value
                for name, value in self.tensors.items()
                if "." not in name or not name.startswith(dropped)
            }
        self.metadata["header"] = json.dumps(header)

    def bytes(self) -> bytes:
        """The file."""

        text = {
            key: value.encode(errors="replace").decode() for key, value in self.metadata.items()
        }
        return save(self.tensors, text)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with other bytes, or with another header over the same data."""
    size = int.from_bytes(content[:8], "little")
    action = rng.random()
    if action < 0.2:
        return content[: rng.randrange(len(content))]
    if action < 0.5:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            flipped[rng.randrange(min(len(content), 8 + size))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if action < 0.6:
        length = rng.choice((0, 1, size - 1, size + 1, len(content), 2**24, 2**40, 2**63))
        return length.to_bytes(8, "little") + content[8:]
    header = changed_json(content[8 : 8 + size].decode(), rng).encode(errors="replace")
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


class Case:
    """The whole files that cases begin as, and what is done with each.

    Args:
        folder: for files; emptied between cases.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = folder / "model.safetensors"
        self.bundle = load_bundle(save_tiny(model))
        state = self._goes_on(self.bundle, self.bundle.begin((3, 4)), 4, guided=True)
        decoded = self.bundle.decoder().caught_up(state)
        states = {"state": state, "decoded": decoded, "trimmed": decoded.trimmed()}
        for name, one in states.items():
            save_state(folder / name, one)
        self.files, self.states = {}, tuple(states)
        for path in (model, *(folder / name for name in states)):
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
                self.files[path.stem] = (tensors, dict(file.metadata()))
            path.unlink()
        self.outcomes: Counter[str] = Counter()

    def run(self, rng: random.Random) -> str:
        """One case; what became of it: refused, or how far it went.

        Raises:
            Exception: what should not have left the loaders or the run.
        """
        kinds = {"state": 0.5, "model": 0.2, "ltx2": 0.15, "folder": 0.15}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        return f"{kind} {getattr(self, f'_{kind}')(rng)}"

    def _written(self, rng: random.Random, tensors: dict, metadata: dict, name: str) -> Path:
        parts = Parts(tensors, metadata)
        changes = rng.choice((1, 1, 1, 2, 3))
        raw = rng.random() < 0.25
        for _ in range(changes - raw):
            parts.change(rng)
        content = parts.bytes()
        path = self.folder / name
        path.write_bytes(changed_bytes(content, rng) if raw else content)
        return path

    def _state(self, rng: random.Random) -> str:
        name, base = rng.choice(("s.state", "\n\x1b[31m")), rng.choice(self.states)
        if rng.random() < 0.5:
            parts = Parts(*self.files[base])
            parts.change_alike(rng)
            path = self.folder / name
            path.write_bytes(parts.bytes())
        else:
            path = self._written(rng, *self.files[base], name)
        try:
            state = load_state(path)
        except (TensorFileError, OSError) as error:
            return refused(error)
        settings = state.settings
        if settings.height * settings.width * len(settings.seeds) > LARGEST_RUN:
            return "is too large to run here"
        return self._run_on(
            self.bundle, state, decoded=rng.random() < (0.1 if base == "state" else 0.3)
        )

    def _model(self, rng: random.Random) -> str:
        path = self._written(rng, *self.files["model"], "m.safetensors")
        try:
            bundle = load_bundle(path)
        except (TensorFileError, OSError) as error:
            return refused(error)
        stream, layout = bundle.stream, bundle.transformer.config.layout
        sizes = layout.video_latents(2) * stream.height * stream.width, layout.audio_latents(2)
        if max(sizes) * max(1, bundle.text_encoder.config.length // 64) > LARGEST_RUN // 8:
            return "is too large to run here"
        return self._run_on(bundle, bundle.begin(), decoded=True)

    def _run_on(self, bundle: Bundle, state: StreamState, *, decoded: bool) -> str:
        try:
            after = self._goes_on(bundle, state, 2)
            # Both, with what the decoders remember of all before; most of a case's time.
            for _ in bundle.decoder().decode_from(after, after.next_block - 2) if decoded else ():
                pass
        except (ValueError, NonFiniteBlockError) as error:
            return f"loaded, {refused(error)}"
        return "went through two blocks"

    def _goes_on(
        self, bundle: Bundle, state: StreamState, blocks: int, guided: bool = False
    ) -> StreamState:
        sampler = sampler_settings("multi", 2) if guided else sampler_settings("few", 1)
        *_, (_, after) = rollout(bundle, bundle.prompt("red", guided), state, blocks, sampler)
        return after

    def _ltx2(self, rng: random.Random) -> str:
        container = rng.choice(sorted(ltx2_files.CONTAINERS))
        save, _, part = ltx2_files.CONTAINERS[container]
        place = self.folder / "checkpoint"
        place.mkdir()
        weights = ltx2_files.prefixed(rng.choice(("model.", "", "model.diffusion_model.")))
        header = {"config": json.dumps({"transformer": ltx2_files.HEADS})}
        parts = Parts(weights, header)
        if rng.random() < 0.6:
            parts.change(rng)
        path = save(place, parts.tensors)
        victims = sorted(file for file in place.iterdir() if file.is_file())
        if container == "file":
            path.write_bytes(parts.bytes())
        if rng.random() < 0.5:
            victim = rng.choice(victims)
            content = victim.read_bytes()
            if victim.suffix == ".json":
                victim.write_text(changed_json(content.decode(), rng), errors="replace")
            elif victim.suffix == ".pt":
                flipped = bytearray(content)
                for _ in range(rng.choice((1, 5))):
                    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                victim.write_bytes(bytes(flipped))
            else:
                victim.write_bytes(changed_bytes(content, rng))
        if rng.random() < 0.1:
            victim = rng.choice(victims)
            victim.rename(victim.with_name(f"x-{rng.randrange(9):05d}-of-{10**9 - 1}.safetensors"))
        try:
            loaded = load_transformer(
                path, overrides=ltx2_files.HEADS, ema=part == "generator_ema"
            ).transformer
        except (TensorFileError, OSError) as error:
            return refused(error)
        return self._run_bare(loaded)

    def _run_bare(self, network: CausalAVTransformer) -> str:
        config, like = network.config, next(network.parameters())
        if config.layout.video_latents(2) + config.layout.audio_latents(2) > LARGEST_RUN // 8:
            return "is too large to run here"
        text = torch.zeros(1, 2, config.caption_channels, dtype=like.dtype)
        model = BareModel(network, "fuzz", like=like.new_empty(0))
        state = new_stream(model, StreamSettings(2, 2, 2, (0,)))
        prompt = Prompt(text_keys(network, text, text))
        try:
            for _ in rollout(model, prompt, state, 2, sampler_settings("few", 1)):
                pass
        except (ValueError, NonFiniteBlockError) as error:
            return f"loaded, {refused(error)}"
        return "went through two blocks"

    def _folder(self, rng: random.Random) -> str:
        place = self.folder / "models"
        place.mkdir()
        (place / "ours.safetensors").write_bytes(Parts(*self.files["model"]).bytes())
        for number in range(rng.randrange(1, 8)):
            self._strange(place, number, rng)
        found = [(file.name, file) for file in sorted(place.iterdir())]
        found.append(("n" * 300, place / f"{'n' * 300}.safetensors"))
        listed = list_models(place / "none", found)
        list_ltx2(found)
        list_bases(found)
        list_streams({"": place, "input": place})
        if listed.get("ours.safetensors") != place / "ours.safetensors":
            raise AssertionError(f"the model in the folder is not listed: {sorted(listed)}")
        for name, path in listed.items():
            what_is(path)
            if not name:
                raise AssertionError("a file without a name is listed")
        return "was listed"

    def _strange(self, place: Path, number: int, rng: random.Random) -> None:
        names = (
            "{}.safetensors",
            "{}.pt",
            "{}-00001-of-00002.safetensors",
            "\x1b[31m{}\n.safetensors",
        )
        path = place / rng.choice(names).format(number)
        kind = rng.randrange(7)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            target = rng.choice((place / "none", path, Path("/dev/zero"), place, Path("n" * 255)))
            path.symlink_to(target)
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            content = nested(rng).encode()
            path.write_bytes(len(content).to_bytes(8, "little") + content)
        elif kind == 4:
            path.write_bytes(rng.randbytes(rng.choice((0, 3, 8, 9, 1000))))
        else:
            tensors, metadata = self.files[rng.choice(sorted(self.files))]
            parts = Parts(dict(list(tensors.items())[:4]), metadata)
            parts.change(rng)
            path.write_bytes(changed_bytes(parts.bytes(), rng))


def refused(error: Exception) -> str:
    """The outcome of a file that was refused.

    Raises:
        AssertionError: not in one sentence that can be read.
    """
    text = str(error) if not isinstance(error, OSError) else str(error.strerror)
    if not text.isprintable() or not 10 < len(text) < 1500 or "pydantic" in text:
        raise AssertionError(f"not one readable sentence: {text[:3000]!r}") from error
    return "refused"


def run_cases(cases: range, seed: int, tell: Callable[[dict], None]) -> None:
    """Run cases here, telling of each what became of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        for index in cases:
            tell({"begins": index})
            began, problem, outcome = time.process_time(), None, "failed"
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                outcome = case.run(random.Random(f"{seed}/{index}"))
            except Hang:
                outcome = "hung"
            except BaseException as error:  # also a panic of a library in Rust
                problem = "".join(traceback.format_exception(error))
            signal.setitimer(signal.ITIMER_PROF, 0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            seconds = time.process_time() - began
            tell({"outcome": outcome, "problem": problem, "gigabytes": peak, "seconds": seconds})
            for path in Path(folder).iterdir():
                remove(path)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            remove(inside)
        path.rmdir()
    else:
        path.unlink()


class Hang(BaseException):
    """Raised inside a case that took too long; not an Exception, so that nothing catches it."""


def _alarm(_number: int, _frame: object) -> None:
    raise Hang


def work(cases: range, seed: int) -> None:
    """A process of its own: limits itself, and writes one line of JSON for what happens."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGPROF, _alarm)

    def tell(news: dict) -> None:
        sys.stdout.write(json.dumps(news) + "\n")
        sys.stdout.flush()

    run_cases(cases, seed, tell)


def watch(cases: range, seed: int) -> Iterator[tuple[int, dict]]:
    """Have cases run in another process; one in which it dies or is silent counts too."""
    start = cases.start
    while start < cases.stop:
        command = [sys.executable, str(ROOT / "launch.py"), "tests.fuzz", "--seed", str(seed)]
        command += ["--work", str(start), str(cases.stop)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0) as process:
            # Only the first word may take longer, while Python imports.
            current, patience = start, 10 * SILENCE
            while True:
                ready, _, _ = select.select([process.stdout], [], [], patience)
                patience = SILENCE
                line = process.stdout.readline() if ready else b""
                if not line:
                    process.kill()
                    break
                news = json.loads(line)
                current = news.get("begins", current)
                if "outcome" in news:
                    yield current, news
                    start = current + 1
            if start < cases.stop:
                reason = f"the process ended ({process.wait()})" if ready else None
                yield start, {"outcome": "hung" if reason is None else "failed", "problem": reason}
                start += 1


def report(cases: int, seed: int) -> tuple[str, bool]:
    """The one line, and whether all is well; how it goes is said on the way."""
    counts: Counter[str] = Counter()
    tracebacks = hangs = large = 0
    slowest = largest = 0.0

    def line() -> str:
        became = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        return (
            f"{counts.total()} cases: {tracebacks} tracebacks, {hangs} hangs, {large} above 2 GB; "
            f"slowest {slowest:.1f} s, largest {largest:.2f} GB ({became})"
        )

    for first in range(0, cases, BATCH):
        for index, news in watch(range(first, min(cases, first + BATCH)), seed):
            counts[news["outcome"]] += 1
            tracebacks += news["outcome"] == "failed"
            hangs += news["outcome"] == "hung"
            large += news.get("gigabytes", 0) > GIGABYTES
            slowest = max(slowest, news.get("seconds", 0))
            largest = max(largest, news.get("gigabytes", 0))
            if news["outcome"] in ("failed", "hung"):
                sys.stderr.write(f"case {index}: {news['outcome']}\n{news.get('problem')}\n")
            if counts.total() % 100 == 0:
                sys.stderr.write(f"{line()}\n")
                sys.stderr.flush()
    return line(), not (tracebacks or hangs or large)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description="Hostile files.")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run one case in this process")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(range(*arguments.work), arguments.seed)
    elif arguments.only is not None:
        signal.signal(signal.SIGPROF, _alarm)
        cases = range(arguments.only, arguments.only + 1)
        run_cases(cases, arguments.seed, lambda news: sys.stdout.write(f"{news}\n"))
    else:
        line, well = report(arguments.cases, arguments.seed)
        sys.stdout.write(line + "\n")
        sys.exit(not well)


if __name__ == "__main__":
    main()
