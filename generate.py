"""A prompt becomes a clip with sound, without ComfyUI: `python generate.py "a prompt" -o clip.mp4`.

The clip is made second by second and written while it is made, so Ctrl-C keeps everything up to
there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import launch

launch.register()

import torch  # noqa: E402
from mutual_forcing.model_loaders.bundle import (  # noqa: E402
    Bundle,
    load_bundle,
    shipped_model_path,
)
from mutual_forcing.networks.execution import WAYS, Execution, device_named  # noqa: E402
from mutual_forcing.networks.video_codec import SPACE_STRIDE  # noqa: E402
from mutual_forcing.samplers.clip_writer import ClipWriter  # noqa: E402
from mutual_forcing.samplers.clock import Clock  # noqa: E402
from mutual_forcing.samplers.contact_sheet import ContactSheet  # noqa: E402
from mutual_forcing.samplers.decode import DecodedBlock  # noqa: E402
from mutual_forcing.samplers.live import decoded_live  # noqa: E402
from mutual_forcing.samplers.rollout import (  # noqa: E402
    NonFiniteBlockError,
    SamplerSettings,
    Step,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.state import StreamState, check_state  # noqa: E402
from mutual_forcing.samplers.state_file import load_state, save_state  # noqa: E402
from tqdm import tqdm  # noqa: E402

EXAMPLES = """examples:
  python generate.py "a red ball bounces on green ground" -o ball.mp4
  python generate.py "a face with red hair says ba mi tu" --seconds 20 --contact-sheet sheet.png
  python generate.py "a bell swings" --state-out bell.state
  python generate.py "a bell swings" --state-in bell.state -o more.mp4
the last one goes on where the one before it ended
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="generate.py",
        description="Make a video clip with sound from a prompt, in a stream of one-second blocks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("prompt", help="what to see and hear, in English words that the model knows")
    add("-o", "--output", type=Path, default=Path("clip.mp4"), help="the mp4 to write (clip.mp4)")
    add("--seconds", type=float, default=10.0, help="shortest length; whole blocks are made (10)")
    add("--seed", type=int, help="another number is another clip (0; a state goes on with its own)")
    add(
        "--mode",
        choices=("few", "multi"),
        help="few: 4 or 8 quick steps a block; multi: about 50 with guidance (the model's best)",
    )
    add("--steps", type=int, help="denoising steps per block (few: 4, multi: 50)")
    add(
        "--guidance",
        type=float,
        help="multi mode: how closely to follow the prompt; 1 = off and twice as fast (3)",
    )
    add(
        "--window",
        type=int,
        help="seconds that the model looks back; more costs time and memory (the model's own)",
    )
    add("--model", type=Path, default=shipped_model_path(), help="model file (the shipped one)")
    add("--contact-sheet", type=Path, metavar="PNG", help="also draw frames over the waveform")
    add("--state-out", type=Path, metavar="FILE", help="save the stream, to go on from it later")
    add("--state-in", type=Path, metavar="FILE", help="go on from a saved stream")
    add("--threads", type=int, help="CPU threads (all)")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu)")
    add(
        "--path",
        default="eager",
        help="how the work is carried out, the clip stays the same: eager, or some of "
        f"{', '.join(WAYS)} "
        "joined by + (streams and graph are for a GPU, and not tried on one yet)",
    )
    return made


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Ctrl-C was pressed; raised between two steps, so that nothing is left half done."""


@contextmanager
def stop_on_ctrl_c() -> Iterator[list[int]]:
    """While inside, the first Ctrl-C only fills the list given; a second one acts as usual."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def starting_state(arguments: argparse.Namespace, bundle: Bundle) -> StreamState:
    """A new stream, or the saved one.

    Raises:
        ValueError: the saved stream does not fit the model or the other arguments.
    """
    if arguments.state_in is None:
        return bundle.begin((arguments.seed or 0,), arguments.window)
    state = load_state(arguments.state_in)
    check_state(state, bundle.model_id, bundle.transformer.config.layout)
    if arguments.window not in (None, state.settings.window):
        raise ValueError(
            f"--window is {arguments.window} but the saved stream has {state.settings.window}, "
            "which stays for its whole life; leave --window out"
        )
    if len(state.settings.seeds) != 1:
        raise ValueError(f"the saved stream holds {len(state.settings.seeds)} clips, expected 1")
    return state if arguments.seed is None else state.reseeded((arguments.seed,))


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse file names that could not be written after the work.

    Raises:
        ValueError: saying which.
    """
    if arguments.output.suffix.lower() != ".mp4":
        raise ValueError(f"--output is {arguments.output}, expected a name that ends in .mp4")
    sheet = arguments.contact_sheet
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"--contact-sheet is {sheet}, expected a name that ends in .png")
    for path in (arguments.output, sheet, arguments.state_out):
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder, expected the name of a file")


class Outputs:
    """Where finished blocks go: the clip, the contact sheet, and what is told at the end."""

    def __init__(
        self, arguments: argparse.Namespace, clock: Clock, state: StreamState, total: int
    ) -> None:
        self.arguments, self.clock, self.state = arguments, clock, state
        self.start, self.blocks = state.next_block, 0
        self.size = state.settings.height * SPACE_STRIDE, state.settings.width * SPACE_STRIDE
        self.writer: ClipWriter | None = None
        self.sheet = ContactSheet(clock, total) if arguments.contact_sheet else None
        self.began = self.now = time.perf_counter()
        self.first_chunk: float | None = None

    def write(self, decoded: DecodedBlock, state: StreamState) -> None:
        """Append a block; `state` is the stream after it.

        Raises:
            OSError: the disk is full.
        """
        self.state = state
        # Opened no earlier, so that an older clip is not lost for one that never begins.
        self.writer = self.writer or ClipWriter(self.arguments.output, self.clock, *self.size)
        self.writer.write(decoded)
        if self.sheet:
            self.sheet.add(*decoded)
        self.blocks += 1
        self.now = time.perf_counter()
        if self.start + self.blocks == 2:
            self.first_chunk = self.now - self.began

    def finish(self) -> tuple[list[str], list[str]]:
        """Close the clip and save the rest: what lies where, and what could not be written."""
        lines: list[str] = []
        failures: list[str] = []
        if not self.writer:
            return lines, failures
        seconds = float(
            self.clock.seconds(self.start + self.blocks) - self.clock.seconds(self.start)
        )
        sheet, state_out = self.arguments.contact_sheet, self.arguments.state_out
        files = [
            (f"{self.arguments.output}: {seconds:.2f} s of video with sound", self.writer.close)
        ]
        if state_out:
            line = f"{state_out}: the stream after {self.state.next_block} blocks"
            files.append((line, partial(save_state, state_out, self.state)))
        if self.sheet and self.sheet.pictures:
            save_sheet = partial(self.sheet.save, sheet, self.arguments.prompt)
            files.append((f"{sheet}: frames over the waveform", save_sheet))
        for line, save in files:
            try:
                save()
                lines.append(line)
            except OSError as error:
                failures.append(error.strerror)
        if self.first_chunk is not None:
            lines.append(f"first chunk (blocks 0 and 1, decoded) after {self.first_chunk:.2f} s")
        took = self.now - self.began
        lines.append(f"{seconds / took:.2f} times real time ({took:.1f} s, loading not counted)")
        return lines, failures


def make(
    arguments: argparse.Namespace,
    bundle: Bundle,
    state: StreamState,
    sampler: SamplerSettings,
    execution: Execution,
) -> int:
    """Generate, decode and write block after block; the exit status."""
    clock, start = bundle.clock, state.next_block
    blocks = clock.blocks_for(arguments.seconds, start)
    outputs = Outputs(arguments, clock, state, clock.frames(start + blocks) - clock.frames(start))
    failures: list[str] = []
    with stop_on_ctrl_c() as pressed, tqdm(total=blocks * sampler.steps, unit="step") as bar:

        def advance(steps: int) -> None:
            bar.update(steps)
            if pressed:
                raise Interrupted("stopped by Ctrl-C; what was finished is kept")

        def on_step(step: Step) -> None:
            bar.set_description(f"second {step.block}")
            advance(1)

        try:
            made = rollout(
                bundle,
                bundle.prompt(arguments.prompt, guided=sampler.guidance != 1),
                state,
                blocks,
                sampler,
                on_step=on_step,
                on_rebuild=lambda done, of: advance(0),
                execution=execution,
            )
            for decoded, after in decoded_live(made, bundle.decoder(), state):
                outputs.write(decoded, after)
        except (Interrupted, NonFiniteBlockError) as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(error.strerror)
    lines, unwritten = outputs.finish()
    failures += unwritten
    for line in lines:
        sys.stdout.write(f"{line}\n")
    if failures:
        sys.stderr.write(f"generate.py: {'; '.join(failures)}\n")
    return 130 if pressed else int(bool(failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0: the clip is whole, 130: Ctrl-C, 1: it broke off, 2: it never began."""
    arguments = parser().parse_args(argv)
    try:
        check_outputs(arguments)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        device, execution = device_named(arguments.device), Execution.named(arguments.path)
        reason = execution.unavailable(device)
        if reason:
            raise ValueError(f"--path {arguments.path}: {reason}")
        bundle = load_bundle(arguments.model, device=device)
        bundle.check_prompt(arguments.prompt)
        mode = arguments.mode or bundle.stream.default_mode
        sampler = sampler_settings(mode, arguments.steps, arguments.guidance)
        state = starting_state(arguments, bundle)
        bundle.clock.blocks_for(arguments.seconds, state.next_block)
    except ValueError as error:
        sys.stderr.write(f"generate.py: {error}\n")
        return 2
    return make(arguments, bundle, state, sampler, execution)


if __name__ == "__main__":
    sys.exit(main())
