"""What a stream is said to need is what it allocates, on no device and on a CPU."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from mutual_forcing.lab.bench.setups import setup
from mutual_forcing.model_loaders.memory import stream_bytes
from mutual_forcing.networks.allocated import allocated_bytes
from mutual_forcing.networks.config import TransformerConfig
from mutual_forcing.networks.kept_keys import (
    AS_COMPUTED,
    ATTENTIONS,
    EIGHT_BITS,
    KEPT,
    ON_HOST,
    BlockKeys,
    Kept,
    room,
)
from mutual_forcing.networks.kv_cache import BlockInput, OpenBlock, RollingCache, key_bytes
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.model import BareModel
from mutual_forcing.samplers.rollout import SigmaConstants, new_stream, rollout, sampler_settings
from mutual_forcing.samplers.schedule import Prompt
from mutual_forcing.samplers.sigmas import few_step_sigmas
from mutual_forcing.samplers.state import StreamSettings
from mutual_forcing.tests.tiny import TRANSFORMER
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS = 1024


class Allocated(TorchDispatchMode):
    """Bytes that are held by what was made inside, and the most there ever were."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held = {x.untyped_storage()._cdata for x in known.parameters()}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.held:
                self.held.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.let_go, storage._cdata, storage.nbytes())
        return out

    def let_go(self, storage: int, size: int) -> None:
        self.held.discard(storage)
        self.now -= size


def without_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """On no device torch's attention makes all scores, which no fused one does."""
    return torch.empty_like(q)


@torch.no_grad()
def peak(
    config: TransformerConfig, window: int, grid: tuple[int, int], how: Kept = AS_COMPUTED
) -> int:
    """The most bytes of a stream in 16 bits whose window is full, in the pass over two blocks."""
    new = {"dtype": torch.bfloat16, "device": "meta"}
    model, like = CausalAVTransformer(config, **new), torch.empty(0, **new)
    model.kernel = without_scores
    with Allocated(model) as allocated:
        context = torch.empty(1, TOKENS, config.caption_channels, **new)
        text, constants = text_keys(model, context, context), SigmaConstants(model, like)
        del context
        _, *later = few_step_sigmas(4)
        held = [constants.at(sigma) for sigma in (*later, 0.0)]
        both = constants.after_refresh(1.0)
        blocks = [kept(config, block, grid, like, how) for block in range(1 + window)]
        cache = RollingCache(window, tuple(range(1 + window)), tuple(blocks), kept=how)
        del blocks
        opened = OpenBlock(model, cache, *grid, like)
        latents = (
            torch.empty(1, *shape, **new) for shape in (opened.video_shape, opened.audio_shape)
        )
        given = BlockInput(*latents, text)
        opened = opened.followed(given)
        opened.velocity(*given[:2], text, both)
    assert len(held) == 5 and opened.cache.bytes() == cache.bytes()
    return allocated.most


def kept(
    config: TransformerConfig, block: int, grid: tuple[int, int], like: Tensor, how: Kept
) -> BlockKeys:
    def span(of: tuple[int, int]) -> int:
        return of[1] - of[0]

    video = span(config.layout.video_span(block)) * grid[0] * grid[1]
    audio = span(config.layout.audio_span(block))
    heads = config.num_attention_heads, config.audio_num_attention_heads
    dims = config.attention_head_dim, config.audio_attention_head_dim

    def one(name: str) -> tuple[Tensor, ...]:
        tokens = video if name in ("video", "video_to_audio") else audio
        which = 0 if name == "video" else 1
        shape = config.num_layers, 1, heads[which], tokens, dims[which]
        return room(how, shape, like)

    return BlockKeys(*map(one, ATTENTIONS))


@pytest.mark.parametrize(
    ("window", "grid", "how"),
    [(3, (16, 24), AS_COMPUTED), (1, (22, 40), AS_COMPUTED), (3, (16, 24), EIGHT_BITS)],
)
def test_a_stream_of_19b_is_in_memory_once(window: int, grid: tuple[int, int], how: Kept) -> None:
    """What each further layer adds is found with few of them."""
    whole = setup("19b").config
    few, more = (peak(replace(whole, num_layers=n), window, grid, how) for n in (3, 4))
    found = few + (whole.num_layers - 3) * (more - few)
    said = allocated_bytes(
        whole, window, *grid, batch=1, element_size=2, branches=1, text_tokens=TOKENS, kept=how
    )
    assert said == pytest.approx(found, rel=0.05)
    if (window, grid) == (3, (16, 24)):
        # 7.4 GB of keys and values and 1.2 of the prompt's; there were two copies of the former.
        assert found <= (1.1 * 8.6e9 if how == AS_COMPUTED else 0.7 * 8.6e9)


@pytest.mark.parametrize("how", KEPT)
def test_a_rollout_on_a_cpu_allocates_what_it_was_said_to(how: Kept) -> None:
    config = replace(
        TRANSFORMER,
        num_layers=3,
        attention_head_dim=64,
        audio_attention_head_dim=32,
        cross_attention_dim=128,
        audio_cross_attention_dim=64,
    )
    model = BareModel(CausalAVTransformer(config).eval(), "wide", torch.empty(0))
    context = torch.randn(1, 64, config.caption_channels)
    grid, window = (8, 12), 2
    state = new_stream(model, StreamSettings(*grid, window, kept=how))
    with torch.no_grad(), Allocated(model.transformer) as allocated:
        prompt = Prompt(text_keys(model.transformer, context, context))
        for _ in rollout(model, prompt, state, 5, sampler_settings("few", 4)):
            pass
    most = allocated.most
    if how == ON_HOST:  # on a card this would not lie there
        most -= key_bytes(config, window + 2, *grid, 4)
    said = {
        "kept": how,
        "batch": 1,
        "element_size": 4,
        "branches": 1,
        "text_tokens": 64,
        "on_cpu": True,
    }
    assert allocated_bytes(config, window, *grid, **said) == pytest.approx(most, rel=0.05)
    if how == AS_COMPUTED:
        said["on_cpu"] = False
        assert stream_bytes(config, window, *grid, guided=False, text_tokens=64) > most
        laid_out = allocated_bytes(config, window, *grid, **said, laid_out=True)
        twice = 2 * key_bytes(config, window + 2, *grid, 4)
        assert laid_out - allocated_bytes(config, window, *grid, **said) == twice
