"""What training takes that is too large to try here: bytes, FLOPs, hours and data.

    python launch.py lab.training.plan --config lab/training/configs/ltx2_19b.json --gpus 8

b clips, k blocks, m text tokens, c channels. Nothing is loaded and nothing is trained: the recipe's
own step (lab.training.stages) runs on torch's meta device, on which tensors have shapes and no
values. Parameters are counted there, products are counted as they are called (those that are
computed again for the backward pass too), and tensors are followed from where they come to where
they go. FLOPs are the mean of some steps as the recipe draws them. All layers being alike, both are
taken at a few layers and drawn out in a straight line. Where another moment of the step is the
fullest at more layers, that line is too low (--depths).
Attention is a GPU's, which keeps no scores. Fragments, libraries and loading are not counted. Hours
are FLOPs at a utilisation that is assumed, not measured. Takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...model_loaders.blank import BlankWeights
from ...networks.config import TransformerConfig
from ...networks.transformer import CausalAVTransformer
from .. import command
from ..report import publish, said, table
from .adapters import AdapterSettings, adapt
from .data import Batch
from .draws import Draws
from .optimiser import MasterWeights
from .parallel import Processes
from .stages import FlowStage, Stage, Trained, build_stage, wants_teacher
from .system import EmbeddedSystem, Parts, System, placed, twin
from .train import CONFIGS, read_settings

META = torch.device("meta")
GB, HALF = 1e9, torch.float16.itemsize
STEPS = 2000
# Steps that are drawn, in cycles of the recipe; depths at which FLOPs and bytes are taken.
CYCLES, FLOP_DEPTHS, BYTE_DEPTHS = 2, (1, 2), (2, 4)
Settings = Mapping[str, Mapping[str, object]]


class Shapes(Draws):
    """Draws whose numbers per clip have a shape and no value; shared ones are drawn as ever."""

    def __init__(self, seed: int, step: int, clips: int) -> None:
        super().__init__(seed, step, ())
        self.clips = clips

    def normal(self, *shape: int) -> Tensor:
        """(b, *shape) float32."""
        return torch.empty(self.clips, *shape, device=META)

    def uniform(self, *shape: int) -> Tensor:
        """(b, *shape) float32."""
        return self.normal(*shape)

    def integers(self, limit: int, *shape: int) -> Tensor:
        """(b, *shape) int64."""
        return torch.empty(self.clips, *shape, device=META, dtype=torch.long)

    def every(self, step: int) -> tuple[list[int], Shapes]:
        """Each `step`-th of the clips."""
        rows, some = list(range(0, self.clips, step)), copy(self)
        some.clips = len(rows)
        return rows, some


class Watch(TorchDispatchMode):
    """What is done on the meta device: FLOPs of products, bytes that live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were there before and do not count."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run an operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func.overloadpacket)
        if cost is not None:
            self.flops += cost(*args, **(kwargs or {}), out_val=out)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.device == META:
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def gpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as a fused kernel computes it, (b, a, n, d): a bias, and no scores kept."""
    bias = None
    if mask is not None:
        bias = q.new_empty(mask.shape).expand(q.shape[0], q.shape[1], *mask.shape)
    keep = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, keep)[0]


def build(settings: Settings, stage: str, layers: int, text_tokens: int) -> Stage:
    """A stage over a network of so many layers, all of it on the meta device.

    Its first step is one with all of its terms: the fake score counts as warm.
    """
    settings = {**settings, "mutual": {**settings["mutual"], "fake_warmup": 0}}
    config = TransformerConfig.from_dict({**settings["transformer"], "num_layers": layers})
    recipe = settings["recipe"]
    trained = Trained.from_recipe(recipe, Processes(device=META))
    with torch.device(META), BlankWeights():
        if "adapters" in settings:
            model = CausalAVTransformer(config, dtype=trained.dtype)
            adapt(model, AdapterSettings(**settings["adapters"]))
            system: Parts = EmbeddedSystem(
                model, torch.empty(text_tokens, 2, config.caption_channels)
            )
        else:
            system = System(config)
    system = placed(system, recipe, META)
    system.transformer.kernel = gpu_attention
    other = wants_teacher(stage, settings["mutual"])
    return build_stage(stage, twin(system), settings, trained, twin(system) if other else None)


def empty_batch(settings: Settings, clips: int, blocks: int, text_tokens: int) -> Batch:
    """Latents and captions without values: (b, c, f, h, w), (b, s, c), (b, m) or (b, m, 2, c)."""
    config, stream = TransformerConfig.from_dict(settings["transformer"]), settings["stream"]
    layout, grid = config.layout, (stream["height"], stream["width"])
    with torch.device(META):
        if "adapters" in settings:
            ids = torch.empty(clips, text_tokens, 2, config.caption_channels)
        else:
            ids = torch.empty(clips, 32, dtype=torch.long)
        return Batch(
            torch.empty(clips, config.in_channels, layout.video_latents(blocks), *grid),
            torch.empty(clips, layout.audio_latents(blocks), config.audio_in_channels),
            ids,
        )


def drawn_out(found: Callable[[int], float], depths: tuple[int, int], layers: int) -> float:
    """What holds at `layers` layers, on the straight line through two smaller depths."""
    low, high = (found(depth) for depth in depths)
    return low + (layers - depths[0]) * (high - low) / (depths[1] - depths[0])


def flops_per_step(settings: Settings, stage: str, text_tokens: int) -> float:
    """FLOPs of a step of the whole batch, the mean over what the recipe draws."""
    return drawn_out(
        lambda depth: _flops(settings, stage, depth, text_tokens),
        FLOP_DEPTHS,
        settings["transformer"]["num_layers"],
    )


def _flops(settings: Settings, stage: str, layers: int, text_tokens: int) -> float:
    made = build(settings, stage, layers, text_tokens)
    cycle = 1 if isinstance(made, FlowStage) else settings["mutual"]["matching_every"]
    steps = CYCLES * cycle
    lengths = settings["recipe"]["lengths"]
    total = 0.0
    for length in lengths:
        batch = empty_batch(settings, length["batch"], length["blocks"], text_tokens)
        with Watch() as watch:
            for step in range(steps):
                progress = (step + 0.5) / steps
                made.step(batch, Shapes(0, step, length["batch"]), step, progress, 1.0)
        total += length["share"] * watch.flops / steps
    return total / sum(length["share"] for length in lengths)


@dataclass(frozen=True)
class Part:
    """Something that lies in memory: bytes of it all, and of what one GPU holds."""

    name: str
    whole: float
    per_gpu: float


def _rows(name: str, tensors: Sequence[Tensor], gpus: int) -> Part:
    """Tensors that are split by rows, as lab.training.parallel does; the first GPU has the most."""
    whole = sum(t.nbytes for t in tensors)
    mine = sum(t.nbytes * -(-len(t) // gpus) / len(t) if t.ndim else t.nbytes for t in tensors)
    return Part(name, whole, mine)


def _moments_of(weights: MasterWeights) -> list[Tensor]:
    states = (optimiser.state for optimiser, _ in weights.optimisers)
    return [value for state in states for kept in state.values() for value in kept.values()]


def _trained(name: str, weights: MasterWeights, gpus: int) -> list[Part]:
    moments = _moments_of(weights)
    held = [
        _rows(f"{name}: float32 weights", weights.parameters, gpus),
        _rows(f"{name}: optimiser's moments", moments, gpus),
    ]
    if weights.average:
        held.append(_rows(f"{name}: moving average", weights.average, gpus))
    copy = sum(p.nbytes for p in weights.sources)
    return [*held, Part(f"{name}: weights to compute with", copy, copy)]


def _moments(made: Stage) -> None:
    """A step without a network: it makes the optimisers' moments, and no tensor beside them."""
    for weights in filter(None, (made.weights, getattr(made, "fake_weights", None))):
        for p in weights.sources:
            p.grad = torch.empty_like(p)
        weights.step(0.0)


def working_bytes(settings: Settings, stage: str, layers: int, text_tokens: int, gpus: int) -> int:
    """The most that one GPU's share of a step adds to what lies in memory from step to step.

    The step has all of its terms, a real history and the recipe's largest batch.

    Raises:
        ValueError: a batch that cannot be split among so many.
    """
    # A history that is made takes less than the losses that come after it.
    mutual = {**settings["mutual"], "history": {"real": [1, 1], "rollout": [0, 0]}}
    made = build({**settings, "mutual": mutual}, stage, layers, text_tokens)
    _moments(made)
    longest = max(settings["recipe"]["lengths"], key=lambda x: x["batch"] * x["blocks"])
    clips = len(Processes(0, gpus).share(longest["batch"]))
    batch = empty_batch(settings, clips, longest["blocks"], text_tokens)
    with Watch() as watch:
        watch.known(_held(made))
        made.step(batch, Shapes(0, 0, clips), 0, 0.0, 1.0)
    return watch.peak


def _held(made: Stage) -> Iterator[Tensor]:
    """All tensors that a stage keeps from step to step."""
    for system in (made.system, getattr(made, "teacher", None), getattr(made, "fake", None)):
        if system is not None:
            yield from system.parameters()
            yield from system.buffers()
    for weights in filter(None, (made.weights, getattr(made, "fake_weights", None))):
        yield from weights.parameters
        yield from weights.average
        yield from _moments_of(weights)


def parts(
    settings: Settings,
    stage: str,
    text_tokens: int,
    gpus: int,
    depths: tuple[int, int] = BYTE_DEPTHS,
) -> list[Part]:
    """All that a GPU holds at the fullest moment of a step, working memory drawn out from `depths`.

    Raises:
        ValueError: a batch that cannot be split among so many.
    """
    layers = settings["transformer"]["num_layers"]
    working = drawn_out(
        lambda depth: working_bytes(settings, stage, depth, text_tokens, gpus), depths, layers
    )
    made = build(settings, stage, layers, text_tokens)
    _moments(made)
    fake, teacher = getattr(made, "fake_weights", None), getattr(made, "teacher", None)
    frozen = [p for p in made.system.parameters() if not p.requires_grad]
    found = _trained("network", made.weights, gpus)
    if frozen:
        size = sum(p.nbytes for p in frozen)
        found.insert(0, Part("frozen base, one for all", size, size))
    if fake is not None:
        found += _trained("fake score", fake, gpus)
    if teacher is not None and teacher is not made.system:
        # Placed as the network is; its base is the network's where there are adapters.
        shared = {id(p) for p in frozen}
        own = [p for p in teacher.parameters() if id(p) not in shared]
        if gpus > 1:
            floats = [torch.empty(p.shape, device=META) for p in own]
            found.append(_rows("teacher: float32 weights", floats, gpus))
        copy = sum(p.nbytes for p in own)
        found.append(Part("teacher: weights to compute with", copy, copy))
    found.append(Part("activations, gradients, temporaries", working, working))
    if gpus > 1:
        # FSDP2 brings all gradients to float32 in one flat tensor and gets its rows of them back.
        flat = _rows("", made.weights.parameters, gpus)
        exchanged = flat.whole + flat.per_gpu
        found.append(Part("exchange of gradients, at most", exchanged, exchanged))
    return found


def clip_bytes(settings: Settings, text_tokens: int) -> dict[str, int]:
    """Bytes on disk of one encoded clip of the longest length (lab.training.data), float16."""
    blocks = max(length["blocks"] for length in settings["recipe"]["lengths"])
    latents = empty_batch(settings, 1, blocks, text_tokens)
    held = latents._asdict().items()
    return {name: HALF * value.numel() for name, value in held if value is not None}


def report(
    settings: Settings, stage: str, text_tokens: int, arguments: argparse.Namespace
) -> dict[str, object]:
    """Everything about one stage, as JSON."""
    gpus = arguments.gpus
    found = parts(settings, stage, text_tokens, gpus, tuple(arguments.depths))
    flops = flops_per_step(settings, stage, text_tokens)
    seconds = flops / gpus / (arguments.tflops * 1e12 * arguments.utilisation)
    steps = arguments.steps or settings["recipe"].get("steps", STEPS)
    return {
        "parts GB per GPU": {part.name: part.per_gpu / GB for part in found},
        "parts GB on all GPUs together, each once": {part.name: part.whole / GB for part in found},
        "sum GB per GPU": sum(part.per_gpu for part in found) / GB,
        "PFLOP per step": flops / 1e15,
        "seconds per step": seconds,
        "steps": steps,
        "hours": seconds * steps / 3600,
        "GPU hours": seconds * steps * gpus / 3600,
    }


def lines_of(stage: str, found: Mapping[str, object], arguments: argparse.Namespace) -> list[str]:
    """The same for people, in Markdown."""
    per_gpu = found["parts GB per GPU"]
    whole = found["parts GB on all GPUs together, each once"]
    rows = [[name, said(whole[name], 2), said(size, 2)] for name, size in per_gpu.items()]
    fits = "fits" if found["sum GB per GPU"] < arguments.memory else "does not fit"
    name = f"**sum** ({fits} into {arguments.memory:.0f} GB)"
    rows.append([name, "", f"**{found['sum GB per GPU']:.1f}**"])
    return [
        f"Stage {stage}, {arguments.gpus} GPUs",
        "",
        *table(["GB", "whole", "per GPU"], rows),
        "",
        f"{found['PFLOP per step']:.1f} PFLOP per step of the whole batch; at "
        f"{arguments.utilisation:.0%} of {arguments.tflops:.0f} TFLOP/s (assumed) "
        f"{found['seconds per step']:.1f} s per step, {found['steps']} steps in "
        f"{found['hours']:.0f} h ({found['GPU hours']:.0f} GPU hours).",
        "",
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.plan", __doc__)
    p.add_argument("--config", type=Path, default=CONFIGS / "ltx2_19b.json")
    p.add_argument("--stages", nargs="+", default=["joint", "mutual"])
    p.add_argument("--method", default="mutual", help="of stage mutual, from configs/methods.json")
    p.add_argument("--gpus", type=int, default=8)
    p.add_argument("--steps", type=int, help="of each stage; default: the config's, or 2000")
    p.add_argument("--text-tokens", type=int, default=1024, help="of an embedded prompt (1024)")
    p.add_argument(
        "--depths",
        type=int,
        nargs=2,
        default=BYTE_DEPTHS,
        help="layers at which working memory is taken; deeper is slower and surer (2 4)",
    )
    p.add_argument("--memory", type=float, default=80.0, help="GB of a GPU (80)")
    p.add_argument("--tflops", type=float, default=989.0, help="peak of a GPU (989: H100, bf16)")
    p.add_argument("--utilisation", type=float, default=0.35, help="share of it, assumed (0.35)")
    p.add_argument("--out", type=Path, help="write OUT.json and OUT.md as well")
    return p


def work(arguments: argparse.Namespace) -> None:
    """Report on the stages, and on the disk that their data takes."""
    tokens, found, lines = arguments.text_tokens, {}, []
    for stage in arguments.stages:
        settings = read_settings(arguments.config, stage, arguments.method)
        found[stage] = report(settings, stage, tokens, arguments)
        lines += lines_of(stage, found[stage], arguments)
    sizes = {name: size / 1e6 for name, size in clip_bytes(settings, tokens).items()}
    found["MB on disk per clip"] = sizes
    lines.append(f"MB on disk of the longest clip, with one caption: {said(sizes, 2)}")
    publish(arguments.out, found, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
