"""One stream on several processes is the stream of one: its latents, its states, its files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import av
import pytest
import torch
import torch.distributed as dist
from mutual_forcing.lab.bench.parallel_plan import RECIPE, exchange
from mutual_forcing.lab.bench.setups import setup
from mutual_forcing.model_loaders import parity, parity_ltx23
from mutual_forcing.model_loaders.bundle import Bundle, load_bundle, shipped_model_path
from mutual_forcing.model_loaders.fixture import Golden, relative_error
from mutual_forcing.model_loaders.ltx2 import load_transformer
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.execution import Execution
from mutual_forcing.networks.kept_keys import EIGHT_BITS, ON_HOST, Kept
from mutual_forcing.networks.tensor_parallel import Part, Shares
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.ranks import Ranks
from mutual_forcing.samplers.rollout import (
    Prompt,
    SamplerSettings,
    new_stream,
    rollout,
    sampler_settings,
)
from mutual_forcing.samplers.schedule import Line, Schedule, Transition
from mutual_forcing.samplers.state import StreamState
from mutual_forcing.samplers.state_file import load_state, save_state
from mutual_forcing.tests.ltx2_files import HEADS, WEIGHTS, in_one_file
from mutual_forcing.tests.ranks import on_ranks, started
from mutual_forcing.tests.tiny import LATER, TRANSFORMER, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and dist.is_available() and dist.is_gloo_available()),
    reason="processes are forked here, and talk over gloo",
)
DATA = Path(__file__).parents[1] / "data"
FOUR_HEADS = replace(
    TRANSFORMER,
    num_attention_heads=4,
    audio_num_attention_heads=4,
    cross_attention_dim=64,
    audio_cross_attention_dim=32,
    few_step_rank=2,
)
# Of video, audio, and between them. A rank may have no head of some kind.
SHARES = {
    2: Shares((3, 1), (2, 2), (2, 2)),
    3: Shares((2, 1, 1), (4, 0, 0), (1, 1, 2)),
    4: Shares((1, 2, 1, 0), (1, 1, 1, 1), (0, 3, 1, 0)),
}
FEW = SamplerSettings("few", (1.0, 0.6, 0.0), few_step_guidance=2.0)
FOUR = sampler_settings("few")
GUIDED = SamplerSettings("multi", (1.0, 0.6, 0.0), 2.0)
PROMPT = "a girl with red hair says ba mi tu"
KINDS = (EIGHT_BITS, ON_HOST)
Split = Callable[[TransformerConfig], Part] | None
Found = dict[str, Tensor]


def joined(made: list[tuple], name: str) -> Found:
    """A rollout's latents by name."""
    return {
        f"{name}.{modality}": torch.cat([block[at] for block, _ in made], dim=(2, 1)[at])
        for at, modality in enumerate(("video", "audio"))
    }


def fixtures(split: Split) -> Found:
    """What is made of both parity fixtures; of the later one the rollout with everything, until
    its window has rolled and its prompt has changed."""
    found: Found = {}

    class Divided(Golden):
        def model(self, config: TransformerConfig | None = None) -> nn.Module:
            model = super().model(config)
            if split is not None:
                split(model.config).divide(model)
            return model

        def compare(self, name: str, video: Tensor, audio: Tensor, _suffix: str) -> Iterator[tuple]:
            found.update({f"ltx2 {name}.video": video, f"ltx2 {name}.audio": audio})
            yield from ()

    list(parity.errors(Divided(DATA / "ltx2_causal_golden.safetensors")))
    later = Divided(DATA / "ltx23_golden.safetensors")
    later.blocks = 6
    video, audio = parity_ltx23.rolled(later, "full")
    return found | {"ltx23.video": video, "ltx23.audio": audio}


def shipped(split: Split) -> Found:
    """A short stream of the shipped model, which is told what to say."""
    bundle = load_bundle(shipped_model_path(), part=split)
    made = rollout(bundle, bundle.prompt(PROMPT), bundle.begin((7,)), 2, FEW)
    return joined(list(made), "shipped")


def switching(bundle: Bundle, guided: bool = False) -> Schedule:
    """The second prompt has the window read again, the third one comes gradually."""
    lines = [
        Line(0.0, ("red ball",)),
        Line(2.0, ("low drum",), Transition(reread=2)),
        Line(4.0, ("high bell",), Transition(blend=1)),
    ]
    return bundle.schedule(lines, guided=guided)


class Streams:
    """Streams of a tiny network, and what was found."""

    def __init__(self, split: Split, folder: Path) -> None:
        self.bundle, self.found = load_bundle(folder / "tiny.safetensors", part=split), {}

    def roll(
        self, name: str, state: StreamState, blocks: int, sampler: SamplerSettings = FEW
    ) -> StreamState:
        schedule = switching(self.bundle, sampler is GUIDED)
        made = list(rollout(self.bundle, schedule, state, blocks, sampler))
        self.found |= joined(made, name)
        return made[-1][1]

    def new(self, seeds: tuple[int, ...] = (3, 4), kept: Kept | None = None) -> StreamState:
        if kept is None:
            return self.bundle.begin(seeds)
        return new_stream(self.bundle, replace(self.bundle.begin(seeds).settings, kept=kept))


def streams(split: Split, folder: Path, name: str, *, kinds: tuple[Kept, ...]) -> Found:
    """Past the window's end, over a switch; and what is made of the state then."""
    streams = Streams(split, folder)
    middle = streams.roll("whole", streams.new(), 5)
    streams.roll("went on", middle, 1)
    if split is None or not dist.get_rank():
        save_state(folder / f"{name}.state", middle)
    if split is not None:
        streams.roll("of one process", load_state(folder / "one.state"), 1)
    streams.roll("guided", streams.new((3,)), 3, GUIDED)
    streams.roll("forked", middle.reseeded((8, 9)), 1)
    for kept in kinds:
        streams.roll(f"on, {kept}", streams.roll(kept, streams.new((3,), kept), 2), 1)
    streams.roll("without keys", middle.without_keys(), 1)
    return streams.found


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of every message that is summed."""
    sizes, all_reduce = [], dist.all_reduce

    def noted(tensor: Tensor, *rest: object, **options: object) -> object:
        sizes.append(tensor.nbytes)
        return all_reduce(tensor, *rest, **options)

    dist.all_reduce = noted
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def count_messages(split: Split) -> None:
    """Seven a layer and pass, where a message for each sum makes sixteen; and their bytes."""
    small = setup("small")
    for config in (FOUR_HEADS, replace(FOUR_HEADS, **LATER, few_step_rank=0)):
        made = replace(small, config=config, height=1, width=2, window=2, text_tokens=5)
        model = made.model(torch.float32, torch.device("cpu"))
        split(config).divide(model)
        with counted() as sizes:
            text = made.text(model, torch.empty(0))
        # LTX-2's text keys are those of a prompt; LTX-2.3's those of a pass.
        assert len(sizes) == (not config.cross_attention_adaln)
        bare, ends = BareModel(model, ""), []
        with counted() as sizes:
            steps = replace(FEW, few_step_guidance=None)
            told = {"on_step": lambda _step, sizes=sizes, ends=ends: ends.append(len(sizes))}
            list(rollout(bare, Prompt(text), made.begin(bare), 3, steps, **told, whole=False))
        passes = sizes[ends[-3] : ends[-2]], sizes[ends[-2] : ends[-1]]
        expected = exchange(made, 2, 4, reads_before=True), exchange(made, 2, 4)
        assert [(len(sent), sum(sent)) for sent in passes] == list(expected)
        assert expected[0].messages == 7 * config.num_layers < RECIPE * config.num_layers


def work(ranks: Ranks, folder: Path) -> None:
    """Everything of one count of ranks, in one start."""

    def split(config: TransformerConfig) -> Part:
        return Part(config, SHARES[ranks.world], ranks.rank)

    kinds = KINDS if ranks.world == 2 else ()
    found = streams(split, folder, f"{ranks.world}", kinds=kinds) | fixtures(split) | shipped(split)
    if ranks.world == 2:
        count_messages(ranks.part)
    if not ranks.rank:
        save_file({k: x.contiguous() for k, x in found.items()}, folder / f"{ranks.world}.found")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny(folder / "tiny.safetensors", transformer=FOUR_HEADS)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """What one process makes."""
    return streams(None, folder, "one", kinds=KINDS) | fixtures(None) | shipped(None)


@pytest.mark.parametrize("count", SHARES)
def test_several_processes_make_the_latents_of_one(folder: Path, alone: Found, count: int) -> None:
    on_ranks(count, partial(work, folder=folder))
    found = load_file(folder / f"{count}.found")
    one = Streams(None, folder)
    # And the reverse of "of one process".
    one.roll("of several processes", load_state(folder / f"{count}.state"), 1)
    found |= one.found
    assert found.keys() - alone.keys() == {
        f"of {who}.{modality}"
        for who in ("one process", "several processes")
        for modality in ("video", "audio")
    }
    for name, value in found.items():
        expected = alone.get(name, alone[f"went on.{name.rpartition('.')[2]}"])
        # A key that lies between two of eight bits may fall on either side.
        limit = 1e-3 if EIGHT_BITS in name else 1e-5
        assert value.shape == expected.shape and relative_error(value, expected) < limit, name


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_clip_with_a_sentence_and_what_was_made_stays(
    folder: Path, generate: ModuleType, capfd: pytest.CaptureFixture, killed: int
) -> None:
    model, state, clip = (folder / name for name in ("tiny.safetensors", "cut.state", "cut.mp4"))
    command = ["red ball", "--model", model, "--mode", "few", "--seconds", 8, "--seed", 5]
    command += ["-o", clip, "--state-out", state]

    def run(rank: int) -> int:
        if rank == killed:
            count, all_reduce = 0, dist.all_reduce

            def until_killed(*given: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == 200:  # in the fourth block
                    os.kill(os.getpid(), signal.SIGKILL)
                return all_reduce(*given, **options)

            dist.all_reduce = until_killed
        return generate.main([str(word) for word in command])

    processes = started(2, run)
    for process in processes:
        process.join(60)
    told = capfd.readouterr().err
    assert processes[killed].exitcode == -signal.SIGKILL and processes[1 - killed].exitcode == 1
    sentences = [line for line in told.splitlines() if line.startswith("generate.py")]
    assert len(sentences) == 1 and "is gone" in sentences[0] and "Traceback" not in told
    kept = load_state(state)
    blocks = kept.next_block
    assert 1 <= blocks < 9
    bundle = load_bundle(model)
    with av.open(str(clip)) as file:
        frames = sum(1 for _ in file.decode(video=0))
    # Killed itself, the first one had saved the stream a moment before it was killed.
    assert frames == bundle.clock.frames(blocks) or (not killed and frames > 1)
    one = list(rollout(bundle, bundle.prompt("red ball"), bundle.begin((5,)), blocks + 1, FOUR))
    *_, (latents, _) = rollout(bundle, bundle.prompt("red ball"), kept, 1, FOUR)
    assert relative_error(latents.video, one[-1][0].video) < 1e-5


@pytest.mark.parametrize("rank", range(3))
def test_each_process_reads_its_part_of_a_file(tmp_path: Path, rank: int) -> None:
    """Of positions that are interleaved in the file; together they hold all of it."""
    path = in_one_file(tmp_path, WEIGHTS)
    whole = load_transformer(path, overrides=HEADS).transformer
    total, sizes = whole.state_dict(), [0, 0, 0]
    parts = [Part(whole.config, SHARES[3], rank) for rank in range(3)]
    mine = load_transformer(path, overrides=HEADS, part=lambda _: parts[rank]).transformer
    parts[rank].divide(whole)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, mine.state_dict()[name]), name
    name = "transformer_blocks.1.ff.net.0.proj.weight"
    sizes = [part.cut(name, total[name]).numel() for part in parts]
    assert sizes == [total[name].numel() * share // 4 for share in (2, 1, 1)]


def test_what_cannot_be_had_on_several_processes_is_refused(bundle: Bundle, folder: Path) -> None:
    def part(config: TransformerConfig) -> Part:
        return Part(config, SHARES[3], 2)

    shared = load_bundle(folder / "tiny.safetensors", part=part)
    cpu = torch.device("cpu")
    for path in ("lanes", "graph"):
        assert "neither lanes nor graphs" in Execution.named(path).unfit(shared.transformer, cpu)
    assert "some heads of every kind" in Execution.named("compiled").unfit(shared.transformer, cpu)
    assert Execution.named("automatic").chosen(shared.transformer, cpu).name == "eager"
    with pytest.raises(ValueError, match="keys of 5 heads, expected 4, or this process's 1"):
        keys = torch.zeros(1, 1, 5, 2, 4)
        shared.transformer.part.scattered(((keys,),) * 4)
    with pytest.raises(ValueError, match="not negative, and not all 0"):
        Shares.of(shared.transformer.config, (0.0, 0.0))
    assert Shares.of(FOUR_HEADS, (2, 1), (1, 0)) == Shares((3, 1), (4, 0), (3, 1))
