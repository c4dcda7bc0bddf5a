"""What the recipes train: the transformer and its text encoder, and where they start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...networks.config import TransformerConfig
from ...networks.full_sequence import Told
from ...networks.memory_branch import is_memory
from ...networks.text_encoder import TextEncoder, TextEncoderConfig
from ...networks.timestep import sinusoid
from ...networks.transformer import CausalAVTransformer, TextKeys, text_keys
from ..world.scene import VOCABULARY
from .data import Asked
from .draws import Draws

Returned = TypeVar("Returned")
PartsType = TypeVar("PartsType", bound="Parts")


class Parts(nn.Module):
    """Trained parts under one roof. Their parameters are used within `forward` only."""

    transformer: CausalAVTransformer

    def text(self, ids: Tensor) -> TextKeys:
        """Text keys of prompts."""
        raise NotImplementedError

    def nothing(self, ids: Tensor) -> Tensor:
        """The empty prompt, as often as there are prompts in `ids`."""
        raise NotImplementedError

    def told(self, asked: Asked) -> Told:
        """What the network is told of a batch."""
        later = None
        if asked.prompts is not None:
            later = self.text(asked.later), asked.prompts.bool()
        return Told(self.text(asked.ids), later, asked.track, memory=asked.memory)

    def told_nothing(self, asked: Asked) -> Told:
        """The empty prompt for all of a batch: what guidance leads away from."""
        return Told(self.text(self.nothing(asked.ids)), memory=asked.memory)

    def forward(self, function: Callable[..., Returned], *args: object) -> Returned:
        """`function(*args)`: where many processes gather the weights and share gradients."""
        return function(*args)


class System(Parts):
    """The transformer and its text encoder; both modalities read the same caption embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = CausalAVTransformer(config)
        self.text_encoder = TextEncoder(TextEncoderConfig(VOCABULARY, dim=config.caption_channels))

    def text(self, ids: Tensor) -> TextKeys:
        """Text keys of token ids (b, m)."""
        context = self.text_encoder(ids)
        return text_keys(self.transformer, context, context)

    def nothing(self, ids: Tensor) -> Tensor:
        """The empty prompt, as often as there are prompts in `ids`."""
        return torch.zeros_like(ids)


class EmbeddedSystem(Parts):
    """A transformer whose prompts come as ready embeddings, as LTX-2's do.

    Args:
        empty: embedding of the empty prompt for both modalities, (m, 2, c).
    """

    def __init__(self, transformer: CausalAVTransformer, empty: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("empty", empty, persistent=False)

    def text(self, ids: Tensor) -> TextKeys:
        """Text keys of embeddings (b, m, 2, c): of video, then of audio."""
        video, audio = ids.to(self.transformer.patchify_proj.weight.dtype).unbind(dim=2)
        return text_keys(self.transformer, video, audio)

    def nothing(self, ids: Tensor) -> Tensor:
        """The empty prompt, as often as there are prompts in `ids`."""
        return self.empty.to(ids).expand_as(ids)


def without_some(
    system: Parts, asked: Asked, share: float, draws: Draws, track_share: float = 0.0
) -> Asked:
    """The prompts, a share of them replaced by the empty one: guidance needs to know it.

    Args:
        track_share: of those that keep their prompt, how many lose their transcript.
    """

    def where(dropped: Tensor, nothing: Tensor, value: Tensor) -> Tensor:
        return torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), nothing, value)

    dropped = draws.uniform() < share
    ids = where(dropped, system.nothing(asked.ids), asked.ids)
    later = track = None
    if asked.later is not None:
        later = where(dropped, system.nothing(asked.later), asked.later)
    if asked.track is not None:
        untold = dropped | (draws.uniform() < track_share)
        track = where(untold, torch.zeros_like(asked.track), asked.track)
    return asked._replace(ids=ids, later=later, track=track)


def of_few_step(name: str) -> bool:
    """Whether a parameter is few-step mode's own: of its adapters or the step size's embedders."""
    return ".few_step." in name or ".step_size_embedder." in name


def only_few_step(system: Parts) -> None:
    """Freeze all but few-step mode's own, and the memory branch."""
    for name, parameter in system.named_parameters():
        parameter.requires_grad_(of_few_step(name) or is_memory(name))


@torch.no_grad()
def rest_step_size(system: Parts, *, folded: bool) -> None:
    """Let a step size of 0 add nothing to the noise level's embedding.

    A network with adapters is told no step size in multi-step mode, one without is told 0.

    Args:
        folded: what it added becomes a part of that embedding: for weights that were told 0. Not
            folded, for weights that were told nothing.
    """
    for module in system.transformer.modules():
        embedder = getattr(module, "step_size_embedder", None)
        if embedder is not None:
            zero = torch.zeros(1, device=embedder.linear_2.weight.device)
            nothing = embedder.linear_2(F.silu(embedder.linear_1(sinusoid(zero))))[0]
            embedder.linear_2.bias.sub_(nothing)
            if folded:
                module.timestep_embedder.linear_2.bias.add_(nothing)


def twin(system: PartsType) -> PartsType:
    """A copy with weights of its own; what is frozen is shared with the original."""
    frozen = {id(p): p for p in system.parameters() if not p.requires_grad}
    return copy.deepcopy(system, frozen)


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention as two products: on the CPU its backward beats SDPA's several times."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def placed(system: PartsType, recipe: Mapping[str, object], device: torch.device) -> PartsType:
    """A system on a device, set up to be trained there."""
    if device.type == "cpu":
        system.transformer.kernel = math_attention
    system.transformer.recompute = recipe.get("recompute", False)
    return system.to(device)


@torch.no_grad()
def initialise(system: System, seed: int) -> None:
    """Fresh weights: every modulation starts at zero, so gates are closed and heads give zero.

    The closed gates of the cross-modal attentions let joint training couple the modalities
    gradually. The step size embedding's last layer is zero as well: both modes start as one
    (docs/mutual_forcing.md, section 3.2).
    """
    torch.manual_seed(seed)
    for module in system.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    nn.init.normal_(system.text_encoder.place, std=0.5)
    model = system.transformer
    if model.config.num_audio_sink_tokens:
        nn.init.normal_(model.audio_sink_tokens, std=0.02)
    for name, module in model.named_modules():
        if name.endswith("adaln_single"):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
            if hasattr(module.emb, "step_size_embedder"):
                nn.init.zeros_(module.emb.step_size_embedder.linear_2.weight)
    for block in model.transformer_blocks:
        # The text attention has no gate, so its own last layer starts small.
        for attention in (block.attn2, block.audio_attn2):
            attention.to_out[0].weight.mul_(0.1)
    if model.config.transcript_channels:
        nn.init.zeros_(model.audio_transcript_proj.linear_2.weight)
    if model.config.picture_track_channels:
        nn.init.zeros_(model.picture_track.proj_out.weight)
    for name, module in model.named_modules():
        if name.endswith((".few_step", ".pictures")):
            nn.init.zeros_(module.up.weight)
        if name.endswith(("_memory_attn.to_out", "_color_film.net.2")):
            nn.init.zeros_(module.weight)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.audio_proj_out.weight)
