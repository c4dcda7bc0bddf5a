"""Low-rank adapters over a frozen network: how a network too large for three copies is trained.

Mutual Forcing wants a generator, an average of it and a fake score (docs/mutual_forcing.md, section
7). Over one frozen base each of them is a set of adapters and of the step size's embedders; the
base lies in memory once. There are two forms, and a config says which a stage has. Adapters that
change the weights in every mode add up(down(x)) to a linear layer: stage joint, which makes multi-
step mode causal, or both modes of a network that shares all (arXiv:2604.25819), and OmniForcing's
three stages, where one set is trained on and on (lab.training.omniforcing). Few-step adapters
(networks/few_step.py) act in few-step mode alone, so that multi-step mode stays what it was.

    python launch.py lab.training.adapters --run runs/ltx2 --base ltx2.safetensors \
        --out made.safetensors

writes a checkpoint of a run's averaged adapters over the base: the first form is added to the
weights, few-step adapters lie beside them, as the loaders expect them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ...model_loaders.identity import SINKS
from ...model_loaders.ltx2 import load_transformer
from ...networks.few_step import attach
from ...networks.timestep import AdaLNSingle, TimestepEmbedder
from ...networks.transformer import CausalAVTransformer
from ...samplers.tensor_file import write_tensors
from .. import command


@dataclass(frozen=True)
class AdapterSettings:
    """Which layers are adapted and how.

    Attributes:
        rank: of the change that an adapter can make.
        alpha: what comes out of an adapter is multiplied by alpha / rank.
        modules: regular expression that finds names of linear layers. Without it and alpha the
            adapters are few-step mode's, which have their own places and factor.
        sinks: sink tokens that a network gets which has none (arXiv 2603.11647, section 3.3).
    """

    rank: int
    alpha: float | None = None
    modules: str | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapters: rank is {self.rank}, expected at least 1")
        if (self.alpha is None) != (self.modules is None):
            raise ValueError(
                f"adapters: alpha is {self.alpha} and modules {self.modules!r}, expected both for "
                "adapters that change the weights, or neither for few-step adapters"
            )


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Linear, settings: AdapterSettings) -> None:
        super().__init__()
        kwargs = {"dtype": torch.float32, "device": base.weight.device}
        self.base = base
        self.scale = settings.alpha / settings.rank
        down = torch.randn(settings.rank, base.in_features, **kwargs) * base.in_features**-0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, settings.rank, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output (..., out) plus the adapter's."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The base's weight with the adapter in it, in the base's dtype."""
        weight = self.base.weight
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(
            weight.dtype
        )


def adapt(model: CausalAVTransformer, settings: AdapterSettings) -> None:
    """Freeze a network and give it adapters, and embedders of the step size where it has none.

    Raises:
        ValueError: no layer has a name that `settings.modules` finds.
    """
    model.requires_grad_(False)
    if not model.config.step_size_embedding:
        for module in model.modules():
            if isinstance(module, AdaLNSingle):
                _add_step_size(module)
        model.config = replace(model.config, step_size_embedding=True)
    if settings.modules is None:
        device = model.proj_out.weight.device
        attach(model, settings.rank, nn, torch.float32, device)
        model.config = replace(model.config, few_step_rank=settings.rank)
    else:
        _adapt_linear(model, settings, re.compile(settings.modules))
    for name, parameter in model.named_parameters():
        if ".step_size_embedder." in name:
            parameter.requires_grad_(True)
    if settings.sinks and not model.config.num_audio_sink_tokens:
        shape = 1, settings.sinks, model.config.audio_dim
        fresh = torch.randn(shape, dtype=torch.float32, device=model.proj_out.weight.device)
        model.audio_sink_tokens = nn.Parameter(0.02 * fresh)
        model.config = replace(model.config, num_audio_sink_tokens=settings.sinks)


def without_sinks(model: CausalAVTransformer) -> None:
    """Take a network's sink tokens away."""
    del model.audio_sink_tokens
    model.config = replace(model.config, num_audio_sink_tokens=0)


def _adapt_linear(
    model: CausalAVTransformer, settings: AdapterSettings, pattern: re.Pattern[str]
) -> None:
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.search(name)
    ]
    if not found:
        raise ValueError(
            f"adapters: found no linear layer that {settings.modules!r} names, expected some; "
            "names look like transformer_blocks.0.attn1.to_q"
        )
    for name in found:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, AdaptedLinear(getattr(owner, last), settings))


@torch.no_grad()
def _add_step_size(module: AdaLNSingle) -> None:
    """An embedder whose output is zero, so that both modes start as what the network is."""
    like = module.emb.timestep_embedder.linear_2.weight
    embedder = TimestepEmbedder(like.shape[0], nn, torch.float32, like.device)
    nn.init.normal_(embedder.linear_1.weight, std=embedder.linear_1.in_features**-0.5)
    for value in (embedder.linear_1.bias, embedder.linear_2.weight, embedder.linear_2.bias):
        nn.init.zeros_(value)
    module.emb.step_size_embedder = embedder


@torch.no_grad()
def load_trained(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set what is trained of a module from a run's weights; sinks that it lacks stay as they are.

    Raises:
        ValueError: the weights are not those of these adapters.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    trained = {
        name: p for name, p in trained.items() if name in weights or not name.endswith(SINKS)
    }
    expected = {name: tuple(p.shape) for name, p in trained.items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        strange = sorted(found.items() ^ expected.items())[:3]
        raise ValueError(
            f"found weights that are not of these adapters (such as {strange}), expected "
            f"{len(expected)} tensors of the same names and shapes; use the config that they were "
            "trained with"
        )
    for name, parameter in trained.items():
        parameter.copy_(weights[name])


def merged_weights(model: CausalAVTransformer) -> dict[str, Tensor]:
    """The weights of the same network by LTX-2's names; few-step adapters stay what they are."""
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    merged = {}
    for key, value in model.state_dict().items():
        owner, _, last = key.rpartition(".")
        if owner in adapted:
            continue
        layer = owner.removesuffix(".base")
        if layer not in adapted:
            merged[key] = value
        elif last == "weight":
            merged[f"{layer}.weight"] = adapted[layer].merged()
        else:
            merged[f"{layer}.{last}"] = value
    return merged


def write_checkpoint(path: Path, model: CausalAVTransformer) -> None:
    """Write an adapted network as a checkpoint that the loaders read."""
    # In memory q and k are in split order, whatever the base was in.
    header = {"transformer": model.config.to_dict() | {"rope_type": "split"}}
    tensors = {
        f"model.diffusion_model.{key}": value.contiguous()
        for key, value in merged_weights(model).items()
    }
    write_tensors(path, tensors, {"config": json.dumps(header)}, "the checkpoint")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser("lab.training.adapters", __doc__)
    p.add_argument("--run", type=Path, required=True, help="folder of lab.training.train")
    p.add_argument("--base", type=Path, required=True, help="the file it was trained over")
    p.add_argument("--out", type=Path, required=True)
    return p


def work(args: argparse.Namespace) -> None:
    """Write the checkpoint."""
    settings = json.loads((args.run / "config.json").read_text())["adapters"]
    model = load_transformer(args.base).transformer
    adapt(model, AdapterSettings(**settings))
    weights = load_file(args.run / "weights.safetensors")
    prefix = "transformer."
    load_trained(model, {name.removeprefix(prefix): value for name, value in weights.items()})
    write_checkpoint(args.out, model)


def main() -> int:
    """Command line."""
    return command.run(parser(), work)


if __name__ == "__main__":
    sys.exit(main())
