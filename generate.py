"""A prompt becomes a clip with sound: `python generate.py "a red drum beats" -o clip.mp4`.

The clip is made second by second and written while it is made, so Ctrl-C keeps everything up to
there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import launch

launch.register()

from mutual_forcing import shell  # noqa: E402

shell.hold_standard_streams()

import torch  # noqa: E402
from mutual_forcing.jobs.request import (  # noqa: E402
    A_DAY,
    lines_of,
    read_jobs,
    sampler_of,
    starting_state,
)
from mutual_forcing.model_loaders.bundle import (  # noqa: E402
    Bundle,
    load_bundle,
    shipped_model_path,
)
from mutual_forcing.networks.execution import AUTOMATIC, WAYS, Execution, device_named  # noqa: E402
from mutual_forcing.networks.tensor_parallel import RankLostError  # noqa: E402
from mutual_forcing.networks.video_codec import SPACE_STRIDE  # noqa: E402
from mutual_forcing.samplers.clip_writer import ClipWriter  # noqa: E402
from mutual_forcing.samplers.clock import Clock  # noqa: E402
from mutual_forcing.samplers.contact_sheet import ContactSheet  # noqa: E402
from mutual_forcing.samplers.decode import DecodedBlock  # noqa: E402
from mutual_forcing.samplers.live import live_clip  # noqa: E402
from mutual_forcing.samplers.parking import spooled  # noqa: E402
from mutual_forcing.samplers.ranks import Ranks, is_first  # noqa: E402
from mutual_forcing.samplers.rollout import (  # noqa: E402
    NonFiniteBlockError,
    SamplerSettings,
    Step,
    rollout,
)
from mutual_forcing.samplers.schedule import Line, written  # noqa: E402
from mutual_forcing.samplers.state import StreamState  # noqa: E402
from mutual_forcing.samplers.state_file import save_state  # noqa: E402

SAVED_EVERY, MOST_BEHIND = 1.0, 2
"""The stream is saved after so many seconds, or blocks; one more may be in the making."""
EXAMPLES = """examples:
  python generate.py "a blue bell swings slowly on a white background" -o bell.mp4
  python generate.py "a girl with red hair says ba mi tu" --seconds 20 --contact-sheet sheet.png
  python generate.py "a red drum beats fast" --state-out drum.state
  python generate.py "a red drum beats fast" --state-in drum.state -o more.mp4
The last one goes on where the one before it ended.

For several prompts give --schedule a file with a line such as "12.5: a blue ball bounces" for each.

Started by torchrun --nproc-per-node 2, two cards make one stream (docs/many_clips.md).

Ctrl-C (or SIGTERM, or a closed terminal) keeps what was made: clip, stream and contact sheet.

exit status: 0 the clip is whole; 1 it broke off (full disk, numbers that are not finite); 2 it
never began; 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP
"""


def parser() -> shell.Parser:
    """The command line."""
    made = shell.Parser(
        prog="generate.py",
        description="Make a video clip with sound from a prompt, in a stream of one-second blocks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("prompt", nargs="?", help="what to see and hear, in English words that the model knows")
    add(
        "--schedule",
        metavar="FILE_OR_TEXT",
        help="instead of a prompt several, a line each: '0: a red ball bounces' and '12.5: a blue "
        "ball bounces', in seconds of the stream; '12.5 reread 3: ...' has the last 3 s read again "
        "under the new prompt, '12.5 blend 2: ...' takes 2 s to change. Without either a saved "
        "stream goes on with its last prompt",
    )
    add(
        "-o",
        "--output",
        type=shell.Output(".mp4"),
        default=Path("clip.mp4"),
        help="the mp4 to write (clip.mp4)",
    )
    add(
        "--seconds",
        type=float,
        default=10.0,
        help="shortest length; whole blocks are made (10)",
    )
    add("--seed", type=int, help="another number is another clip (0; a state goes on with its own)")
    add(
        "--mode",
        choices=("few", "multi"),
        help="few: 4 or 8 quick steps a block; multi: about 50 with guidance (the model's own: few "
        "for the shipped one, which is at its best with it)",
    )
    add("--steps", type=int, help="denoising steps per block (few: 4, multi: 50)")
    add(
        "--guidance",
        type=float,
        help="how closely to follow the prompt (3); multi: 1 = off and twice as fast; few: 1 to 4, "
        "for a model that has learned it as a knob",
    )
    add(
        "--window",
        type=int,
        help="seconds that the model looks back; more costs time and memory (the model's own)",
    )
    add(
        "--model",
        type=shell.Input(),
        default=shipped_model_path(),
        help="model file (the shipped one)",
    )
    add(
        "--contact-sheet",
        type=shell.Output(".png"),
        metavar="PNG",
        help="also draw frames over the waveform",
    )
    add(
        "--state-out",
        type=shell.Output(),
        metavar="FILE",
        help="save the stream, to go on from it later; it is saved all along as well, beside "
        "--state-in (NAME.unfinished) if that is the same file",
    )
    add(
        "--drop-history",
        action="store_true",
        help="save only what going on needs: as small and as quick at any age of a stream, which "
        "can't be rewound any more, nor decoded from its beginning",
    )
    add("--state-in", type=shell.Input(), metavar="FILE", help="go on from a saved stream")
    add(
        "--threads",
        type=shell.threads,
        default=1,
        help="CPU threads (1): with one, decoding and writing run beside denoising, on another "
        "core; with more, after it, which is slower and much slower where other programs run",
    )
    add("--device", type=shell.device, default="cpu", help="cpu, cuda, cuda:1 or mps (cpu)")
    add(
        "--decode-device",
        type=shell.device,
        help="another one for pictures and sound (cuda:1, say), which are decoded there while the "
        "next block is denoised (--device)",
    )
    add(
        "--path",
        default=AUTOMATIC,
        help="how the work is carried out, the clip stays the same: automatic, which is what this "
        f"machine does fastest, eager, or some of {', '.join(WAYS)} joined by + (lanes and graph "
        "are for a GPU)",
    )
    add(
        "--shares",
        type=shell.shares,
        metavar="A:B",
        help="under torchrun, how much of the model each process holds and computes, such as 2:1 "
        "for a first card that is twice the second one (alike)",
    )
    many = made.add_argument_group(
        "many clips",
        '--jobs FILE has an object in each line, such as {"name": "bell", "prompt": "a blue bell '
        'swings", "seconds": 20, "seed": 3}; further entries are named as the options above, and '
        "state_out is true or false. What is kept meanwhile lies in --out as well, so a run that "
        "was killed goes on where it was, and its clips are the same.",
    )
    add = many.add_argument
    add("--jobs", type=shell.Input(), metavar="FILE", help="make these clips, the longest first")
    add("--out", default="clips", metavar="FOLDER", help="or an address of fsspec's (clips)")
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="by workers that Ray keeps: of the cluster at this address, or on this machine",
    )
    add("--workers", type=shell.whole(1, 4096), help="how many (one per card, or else per core)")
    return made


def make_all(arguments: argparse.Namespace) -> int:
    """Make the clips of a file of jobs; the exit status.

    Raises:
        ValueError: no clip can be made.
        OSError: likewise.
    """
    # A single clip begins sooner without them.
    from mutual_forcing.jobs.manifest import Manifest
    from mutual_forcing.jobs.pools import InTurn, OnRay
    from mutual_forcing.jobs.run import run
    from mutual_forcing.jobs.storage import Storage
    from mutual_forcing.jobs.worker import Worker

    plain = parser().parse_args([])
    here = {"jobs", "out", "ray", "workers", "model", "device", "decode_device", "path", "threads"}
    strange = [name for name, value in vars(arguments).items() if value != getattr(plain, name)]
    strange = [name for name in strange if name not in here]
    if strange:
        raise ValueError(f"--jobs: found {', '.join(strange)} as well, expected it in the jobs")
    jobs = read_jobs(arguments.jobs)
    # For workers in other folders.
    model = arguments.model.absolute()
    out = arguments.out if "://" in arguments.out else str(Path(arguments.out).absolute())
    settings = {
        "model": model,
        "address": out,
        "device": arguments.device,
        "decode_device": arguments.decode_device,
        "path": arguments.path,
    }
    worker = Worker(**settings) if arguments.ray is None else None
    bundle = load_bundle(model) if worker is None else worker.bundle

    def pool() -> InTurn | OnRay:
        if worker is not None:
            return InTurn(worker)
        return OnRay(settings, arguments.ray or None, arguments.workers)

    with Storage(out).for_one() as storage:
        failed, all_had_their_turn = run(jobs, Manifest(storage, jobs, bundle.model_id), pool)
    if not all_had_their_turn:
        return shell.STOPPED + signal.SIGINT
    return int(failed > 0)


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked to stop; raised between two steps, so that nothing is left half done."""


class Outputs:
    """Where finished blocks go: the clip, the contact sheet, the stream's state; and what is told.

    Raises:
        OSError: the clip cannot be written.
    """

    def __init__(
        self, arguments: argparse.Namespace, clock: Clock, state: StreamState, blocks: int
    ) -> None:
        self.arguments, self.clock, self.state = arguments, clock, state
        self.start, self.blocks = state.next_block, 0
        size = state.settings.height * SPACE_STRIDE, state.settings.width * SPACE_STRIDE
        self.writer = ClipWriter(arguments.output, clock, *size)
        total = clock.frames(self.start + blocks) - clock.frames(self.start)
        self.sheet = ContactSheet(clock, total) if arguments.contact_sheet else None
        self.began = self.now = time.perf_counter()
        self.first_chunk: float | None = None
        self.saved, self.saved_blocks = self.began, 0
        self.saved_along = _saved_along(arguments.state_in, arguments.state_out)

    def write(self, decoded: DecodedBlock, state: StreamState) -> None:
        """Append a block; `state` is the stream after it.

        Raises:
            OSError: the disk is full.
        """
        self.state = state
        self.writer.tag(written(state.schedule))
        self.writer.write(decoded)
        if self.sheet:
            self.sheet.add(*decoded)
        self.blocks += 1
        self.now = time.perf_counter()
        if self.start + self.blocks == 2:
            self.first_chunk = self.now - self.began
        behind = self.blocks - self.saved_blocks
        due = self.now - self.saved >= SAVED_EVERY or behind >= MOST_BEHIND or self.blocks == 1
        if self.saved_along and due:
            with suppress(OSError):  # the last time tells why
                # Without what going on does not need, so that it takes as long at any age.
                save_state(self.saved_along, state.trimmed())
            self.saved, self.saved_blocks = time.perf_counter(), self.blocks

    def finish(self) -> tuple[list[str], list[str]]:
        """Close the clip and save the rest: what lies where, and what could not be written."""
        lines: list[str] = []
        failures: list[str] = []
        seconds = float(
            self.clock.seconds(self.start + self.blocks) - self.clock.seconds(self.start)
        )
        sheet, state_out = self.arguments.contact_sheet, self.arguments.state_out
        files = [
            (f"{self.arguments.output}: {seconds:.2f} s of video with sound", self.writer.close)
        ]
        if state_out:
            line = f"{state_out}: the stream after {self.state.next_block} blocks"
            kept = self.state.trimmed() if self.arguments.drop_history else self.state
            files.append((line, partial(save_state, state_out, kept)))
        if self.sheet and self.sheet.pictures:
            texts = " / ".join(line.texts[0] for line in self.state.schedule)
            save_sheet = partial(self.sheet.save, sheet, texts)
            files.append((f"{sheet}: frames over the waveform", save_sheet))
        if not self.blocks:
            self.writer.close()
            return lines, failures
        for line, save in files:
            try:
                save()
                lines.append(line)
            except OSError as error:
                failures.append(error.strerror)
        if self.saved_along != state_out and not failures:
            self.saved_along.unlink(missing_ok=True)
        if self.first_chunk is not None:
            lines.append(f"first chunk (blocks 0 and 1, decoded) after {self.first_chunk:.2f} s")
        took = self.now - self.began
        lines.append(f"{seconds / took:.2f} times real time ({took:.1f} s, loading not counted)")
        return lines, failures


def _saved_along(state_in: Path | None, state_out: Path | None) -> Path | None:
    """Where the stream is saved while it is made.

    Beside the file that it goes on from, where both are one: what is saved along lacks the stream's
    beginning, which must not be lost to a run that is killed.
    """
    if state_in is None or state_out is None or not state_out.exists():
        return state_out
    beside = state_out.with_name(f"{state_out.stem}.unfinished{state_out.suffix}")
    return beside if state_out.samefile(state_in) else state_out


def make(
    arguments: argparse.Namespace,
    bundle: Bundle,
    state: StreamState,
    sampler: SamplerSettings,
    execution: Execution,
    lines: Sequence[Line],
    ranks: Ranks | None = None,
) -> int:
    """Generate, decode and write block after block; the exit status.

    Args:
        ranks: the processes that make it together, of which this is the first.

    Raises:
        OSError: the clip cannot be written; nothing was made.
    """
    blocks = bundle.clock.blocks_for(arguments.seconds, state.next_block)
    outputs = Outputs(arguments, bundle.clock, state, blocks)
    failures: list[str] = []
    status = 1
    with shell.stoppable() as stop:
        with shell.progress(total=blocks * sampler.steps, unit="step") as bar:

            def advance(steps: int) -> None:
                bar.update(steps)
                if bool(stop) if ranks is None else ranks.any(bool(stop)):
                    name = stop.name if stop else "a signal to another process"
                    raise Interrupted(f"stopped by {name}; what was finished is kept")

            def on_step(step: Step) -> None:
                bar.set_description(f"second {step.block}")
                advance(1)

            def settle(state: StreamState) -> StreamState:
                if arguments.state_out is None:
                    return state.trimmed(decoding=False)
                return spooled(state, arguments.state_out.parent)

            try:
                for _ in live_clip(
                    bundle,
                    bundle.schedule(lines, guided=sampler.guidance != 1),
                    state,
                    blocks,
                    sampler,
                    bundle.decoder(),
                    outputs.write,
                    on_step=on_step,
                    on_rebuild=lambda done, of: advance(0),
                    execution=execution,
                    settle=settle,
                    whole=arguments.state_out is not None,
                ):
                    pass
            except (Interrupted, NonFiniteBlockError, RankLostError) as error:
                failures.append(str(error))
            except ValueError as error:  # the stream and the model do not fit together after all
                failures.append(str(error))
                status = 2
            except OSError as error:
                failures.append(error.strerror)
        lines, unwritten = outputs.finish()
    failures += unwritten
    shell.tell("".join(f"{line}\n" for line in lines), sys.stdout)
    if failures:
        shell.tell(f"generate.py: {'; '.join(failures)}\n", sys.stderr)
    return stop.status if stop else bool(failures) * status


def follow(
    arguments: argparse.Namespace,
    bundle: Bundle,
    state: StreamState,
    sampler: SamplerSettings,
    execution: Execution,
    lines: Sequence[Line],
    ranks: Ranks,
) -> int:
    """Take the steps that the first process takes, which writes the clip; the exit status."""
    with shell.stoppable() as stop:

        def agree(*_: object) -> None:
            if ranks.any(bool(stop)):
                raise Interrupted

        try:
            for _ in rollout(
                bundle,
                bundle.schedule(lines, guided=sampler.guidance != 1),
                state,
                bundle.clock.blocks_for(arguments.seconds, state.next_block),
                sampler,
                on_step=agree,
                on_rebuild=agree,
                execution=execution,
                settle=partial(StreamState.trimmed, decoding=False),
                whole=arguments.state_out is not None,
            ):
                pass
        except (Interrupted, NonFiniteBlockError, RankLostError, ValueError) as error:
            # The first process says why, if it can.
            if isinstance(error, RankLostError) and not ranks.first_has_ended():
                shell.tell(f"generate.py: {error}\n", sys.__stderr__)
            return stop.status if stop else 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status, as --help explains it."""
    if not is_first():
        shell.silence()
    try:
        arguments = parser().parse_args(argv)
        torch.set_num_threads(arguments.threads)
        device, execution = device_named(arguments.device), Execution.named(arguments.path)
        ranks = Ranks.joined(device)
        if ranks is None and arguments.shares is not None:
            raise ValueError(
                "--shares is for several processes, and this is one by itself; start them with "
                "torchrun --nproc-per-node"
            )
        if arguments.jobs is not None:
            if ranks is not None:
                raise ValueError(
                    f"--jobs: found {ranks.world} processes that share one stream, expected one; "
                    "many clips have a card each, by --ray"
                )
            return make_all(arguments)
        reason = execution.unavailable(device)
        if reason:
            raise ValueError(f"--path {arguments.path}: {reason}")
        elsewhere = arguments.decode_device and device_named(arguments.decode_device)
        place = {"device": device if ranks is None else ranks.device, "decode_device": elsewhere}
        part = None if ranks is None else partial(ranks.part, weights=arguments.shares)
        bundle = load_bundle(arguments.model, **place, part=part)
        sampler = sampler_of(arguments, bundle)
        state = starting_state(arguments, bundle)
        lines = lines_of(arguments, bundle, state)
        if arguments.seconds > A_DAY:
            raise ValueError(
                f"--seconds is {arguments.seconds:g}, expected at most {A_DAY} (a day): save the "
                "stream with --state-out and go on from it"
            )
        what = arguments, bundle, state, sampler, execution, lines
        if ranks is None:
            return make(*what)
        if ranks.rank:
            return follow(*what, ranks)
        try:
            return make(*what, ranks)
        finally:
            ranks.end()
    except SystemExit as done:  # the parser has said why
        return done.code
    except (ValueError, OSError) as error:
        message = (isinstance(error, OSError) and error.strerror) or str(error)
        shell.tell(f"generate.py: {message}\n", sys.stderr)
        return 2
    except KeyboardInterrupt:
        shell.tell("generate.py: interrupted\n", sys.stderr)
        return shell.STOPPED + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
