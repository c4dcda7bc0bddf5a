"""Two ranks as two threads make what one network makes; what it takes processes to see is in
samplers/test_ranks.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, get_ident
from types import SimpleNamespace

import pytest
import torch
from mutual_forcing.networks import tensor_parallel
from mutual_forcing.networks.kept_keys import BlockKeys
from mutual_forcing.networks.kv_cache import OpenBlock, RollingCache
from mutual_forcing.networks.modulation import TokenModulation
from mutual_forcing.networks.tensor_parallel import Part, Shares
from mutual_forcing.networks.timestep import seeing
from mutual_forcing.networks.transformer import CausalAVTransformer, text_keys
from mutual_forcing.samplers.rollout import SigmaConstants
from mutual_forcing.tests.networks.test_networks import close
from mutual_forcing.tests.tiny import LATER, TRANSFORMER
from torch import Tensor

SHARES = Shares((3, 1), (1, 3), (2, 2))
CONFIG = replace(
    TRANSFORMER,
    num_attention_heads=4,
    audio_num_attention_heads=4,
    cross_attention_dim=64,
    audio_cross_attention_dim=32,
)
Found = tuple[tuple[Tensor, ...], BlockKeys]


class Threads:
    """Sums over ranks that are threads of this process."""

    def __init__(self, count: int) -> None:
        self.barrier, self.given = Barrier(count, timeout=60), {}

    def all_reduce(self, message: Tensor, **_options: object) -> object:
        self.given[get_ident()] = message.clone()
        self.barrier.wait()
        message.copy_(sum(self.given.values()))
        self.barrier.wait()
        return SimpleNamespace(wait=lambda: None)

    def run(self, work: Callable[[int], Found]) -> list[Found]:
        """Of every rank."""

        def watched(rank: int) -> Found:
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.barrier.parties) as pool:
            return list(pool.map(watched, range(self.barrier.parties)))


def two_blocks(model: CausalAVTransformer) -> Found:
    """Velocities of a block and of the next, which looks back at it; and its keys and values."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config, like = model.config, torch.empty(0)
    widths = config.caption_channels, config.caption_channels
    if config.caption_proj_before_connector:
        widths = config.cross_attention_dim, config.audio_cross_attention_dim
    with torch.no_grad():
        text = text_keys(model, *(drawn(1, 5, width) for width in widths))
        constants = SigmaConstants(model, like, 2.0)
        level, clean = (0.6, 0.25 if config.few_step_rank else 0.0), constants.at(0.0)
        noisy = constants.at(*level)
        if config.picture_track_rank:
            told = constants.embedding(*level)
            noisy = TokenModulation(model, told._replace(audio=seeing(told.audio)))
        cache, found = RollingCache(2), ()
        for _ in range(2):
            opened = OpenBlock(model, cache, 2, 3, like)
            latents = drawn(1, *opened.video_shape), drawn(1, *opened.audio_shape)
            found += opened.velocity(*latents, text, noisy)
            cache = opened.commit(*latents, text, clean)
    return found, cache.blocks[0]


SEEING = {"picture_track_hidden": 4, "picture_track_channels": 2, "picture_track_rank": 2}


@pytest.mark.parametrize(
    "changes",
    [{"few_step_rank": 2}, {"few_step_rank": 2, **SEEING}, LATER],
    ids=("LTX-2", "given pictures", "LTX-2.3"),
)
def test_two_ranks_make_what_one_network_makes(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = CausalAVTransformer(replace(CONFIG, **changes)).eval()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    expected, keys = two_blocks(whole)
    threads = Threads(2)
    monkeypatch.setattr(tensor_parallel.dist, "all_reduce", threads.all_reduce)

    def work(rank: int) -> Found:
        model = copy.deepcopy(whole)
        Part(whole.config, SHARES, rank).divide(model)
        return two_blocks(model)

    for rank, (made, own) in enumerate(threads.run(work)):
        assert all(close(*pair) < 1e-5 for pair in zip(made, expected, strict=True))
        # Its keys are its heads' of the whole network's.
        part = Part(whole.config, SHARES, rank)
        assert part.held("video") == (slice(0, 3), slice(3, 4))[rank]
        pairs = zip(own.tensors(), part.scattered(keys).tensors(), strict=True)
        assert all(a.shape == b.shape and close(a, b) < 1e-5 for a, b in pairs)


def test_heads_are_shared_in_proportion_by_the_largest_remainders() -> None:
    config = replace(CONFIG, num_attention_heads=7)
    assert Shares.of(config, (1, 1, 2)) == Shares((2, 2, 3), (1, 1, 2), (1, 1, 2))
    assert Shares.of(config, (5, 1, 1), (0, 1, 1)) == Shares((5, 1, 1), (0, 2, 2), (3, 1, 0))
