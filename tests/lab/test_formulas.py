"""Every loss and schedule of the method, worked out by hand over a network of known velocity.

Expected values are written from docs/mutual_forcing.md (sections 3.2 to 3.5), Shortcut Models
(arXiv 2410.12557), DMD (arXiv 2405.14867) and Self-Forcing (arXiv 2506.08009), never by calling
another form of our own. What is random is replaced by numbers that depend on what is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from mutual_forcing.lab.training.causal_ode import ode_loss
from mutual_forcing.lab.training.data import Asked, Batch
from mutual_forcing.lab.training.distillation import (
    Guided,
    draw_interval,
    few_step_sample,
    guided_teacher,
    matching_loss,
    shortcut_target,
)
from mutual_forcing.lab.training.draws import Draws
from mutual_forcing.lab.training.flow_matching import (
    flow_matching,
    flow_target,
    sample_sigma,
    whole_clip_matching,
)
from mutual_forcing.lab.training.history import HistoryMix, few_step_history
from mutual_forcing.lab.training.mutual_forcing import (
    MutualRecipe,
    Shown,
    Taught,
    distribution_loss,
    draw_level,
    fake_loss,
    flow_loss,
    shortcut_loss,
)
from mutual_forcing.lab.training.pair import Pair, clean_prediction, noised, velocity
from mutual_forcing.lab.training.self_forcing import (
    exit_rollout,
    rollout_matching,
    whole_rollout,
)
from mutual_forcing.lab.training.system import without_some
from mutual_forcing.networks.layout import BlockLayout
from mutual_forcing.tests.known_network import AUDIO, VIDEO, Rates, known_system, prompts
from torch import Tensor

LAYOUT, BLOCKS = BlockLayout(), 3
VIDEO_SPANS, AUDIO_SPANS = [(0, 1), (1, 4), (4, 7)], [(0, 1), (1, 26), (26, 51)]
GRID = (0.99999994, 0.90622896, 0.72652376, 0.42071861, 0.0)
LEVELS = torch.tensor([0.3, -0.6, 1.1])  # "normal" numbers of three blocks
E_VIDEO, E_AUDIO = 0.5, -0.3  # "noise" of every latent
PROMPT = prompts((2.0, -1.0))
ASKED = Asked(PROMPT)


class Fixed(Draws):
    """Draws that depend on what is asked for alone; one clip."""

    def __init__(self, index: int = 1, level: float = 0.5, uniform: float = 0.25) -> None:
        super().__init__(0, 0, range(1))
        self.index, self.number, self.share = index, level, uniform

    def normal(self, *shape: int) -> Tensor:
        """Noise by the number of axes: levels of blocks, sound, pictures."""
        if len(shape) == 1:
            return LEVELS[None, : shape[0]].clone()
        return torch.full((1, *shape), E_AUDIO if len(shape) == 2 else E_VIDEO)

    def uniform(self, *shape: int) -> Tensor:
        return torch.full((1, *shape), self.share) + 0.125 * torch.arange(math.prod(shape)).reshape(
            1, *shape
        )

    def integers(self, limit: int, *shape: int) -> Tensor:
        return torch.arange(self.index, self.index + math.prod(shape)).reshape(1, *shape) % limit

    def level(self) -> float:
        return self.number

    def choice(self, limit: int) -> int:
        return self.index % limit

    def every(self, step: int) -> tuple[list[int], Draws]:
        return [0], self


def clip(seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(
        torch.randn(1, 2, 7, 1, 2, generator=generator), torch.randn(1, 51, 2, generator=generator)
    )


def blocks(pair: Pair) -> list[tuple[Rates, Tensor, Tensor, float]]:
    """Per modality and block: its rates, its latents, and channel 0 of all before it."""
    found = []
    for start, stop in VIDEO_SPANS:
        found.append((VIDEO, pair.video[:, :, start:stop], pair.video[:, 0, :start].flatten()))
    for start, stop in AUDIO_SPANS:
        found.append((AUDIO, pair.audio[:, start:stop], pair.audio[:, :start, 0].flatten()))
    return found


def first_channel(latents: Tensor) -> Tensor:
    """Channel 0 of video (1, c, f, h, w) or audio (1, s, c), as one row."""
    return (latents[:, 0] if latents.ndim == 5 else latents[..., 0]).flatten()


def memory(past: Tensor, current: Tensor) -> float:
    return torch.cat((past, first_channel(current))).mean().item()


def error_of(
    clean: Pair,
    history: Pair,
    levels: list[float],
    target: Callable[[Tensor, float, float], Tensor],
    prompt: tuple[float, float] = (2.0, -1.0),
    d: list[float] = (0.0, 0.0, 0.0),
) -> tuple[float, float]:
    """Mean squared error of each modality, every block counting the same.

    `target` of (clean latents, noise, number of the block) is what the velocity is held against.
    """
    sums = [0.0, 0.0]
    for place, ((rates, x0, _), (_, _, past)) in enumerate(
        zip(blocks(clean), blocks(history), strict=True)
    ):
        kind, block = divmod(place, BLOCKS)
        noise, sigma = (E_VIDEO, E_AUDIO)[kind], levels[block]
        x = (1 - sigma) * x0 + sigma * noise
        v = rates.velocity(x, sigma, d[block], prompt[kind], memory(past, x))
        sums[kind] += (v - target(x0, noise, place)).square().mean().item() / BLOCKS
    return tuple(sums)


def sigmas_of(mean: float, spread: float) -> list[float]:
    return [1 / (1 + math.exp(-(mean + spread * n))) for n in LEVELS.tolist()]


def velocity_target(x0: Tensor, noise: float, place: int) -> Tensor:
    return noise - x0


def test_the_velocity_points_from_clean_to_noise() -> None:
    target = flow_target(
        Pair(torch.tensor(2.0), torch.tensor(3.0)), Pair(torch.tensor(0.5), torch.tensor(-1.0))
    )
    assert (target.video.item(), target.audio.item()) == (-1.5, -4.0)


def test_noise_levels_are_logit_normal() -> None:
    found = sample_sigma(3, 0.3, 1.2, Fixed())[0].tolist()
    assert found == pytest.approx(sigmas_of(0.3, 1.2), abs=1e-6)
    many = sample_sigma(20_000, 0.3, 1.2, Draws(0, 0, range(1)))
    logits = torch.log(many / (1 - many))
    assert logits.mean().item() == pytest.approx(0.3, abs=0.03)
    assert logits.std().item() == pytest.approx(1.2, abs=0.03)


def test_noising_and_its_inverse_block_by_block() -> None:
    """x = (1 - s) x0 + s e, and x0 = x - s v, with another s in every block of both modalities."""
    ones = Pair(torch.ones(1, 2, 7, 1, 2), torch.ones(1, 51, 2))
    levels = torch.tensor([[0.25, 0.5, 1.0]])
    x = noised(ones.map(lambda t: 3 * t), ones.map(lambda t: -t), levels, LAYOUT)
    back = clean_prediction(ones.map(lambda t: 3 * t), ones.map(lambda t: -t), levels, LAYOUT)
    for block, sigma in enumerate(levels[0].tolist()):
        for value, span in ((x.video[0, 0, :, 0, 0], VIDEO_SPANS), (x.audio[0, :, 0], AUDIO_SPANS)):
            assert torch.allclose(value[slice(*span[block])], torch.tensor(3 - 4 * sigma))
        for value, span in (
            (back.video[0, 0, :, 0, 0], VIDEO_SPANS),
            (back.audio[0, :, 0], AUDIO_SPANS),
        ):
            assert torch.allclose(value[slice(*span[block])], torch.tensor(3 + sigma))


@pytest.mark.parametrize("coupled", [True, False])
def test_flow_matching_by_hand(coupled: bool) -> None:
    """The history is the clip with a quarter of the stated noise, which the network isn't told."""
    clean, stated = clip(), 0.4
    batch = Batch(clean.video, clean.audio, PROMPT)
    found = flow_matching(
        known_system(),
        batch,
        Fixed(),
        coupled=coupled,
        sigma_mean=0.3,
        sigma_spread=1.2,
        caption_dropout=0.1,
        history_noise=stated,
    )
    level = 0.25 * stated
    history = Pair(clean.video + level * E_VIDEO, clean.audio + level * E_AUDIO)
    expected = error_of(clean, history, sigmas_of(0.3, 1.2), velocity_target)
    assert [loss.item() for loss in found] == pytest.approx(expected, rel=1e-4)


def test_a_dropped_caption_is_the_empty_prompt() -> None:
    system = known_system(empty=7.0)
    kept, dropped = (without_some(system, ASKED, share, Fixed()).ids for share in (0.2, 0.3))
    assert torch.equal(kept, PROMPT) and torch.equal(dropped, torch.full_like(PROMPT, 7.0))


def test_the_bidirectional_teacher_has_one_level_and_sees_all() -> None:
    clean = clip()
    batch = Batch(clean.video, clean.audio, PROMPT)
    found = whole_clip_matching(
        known_system(), batch, Fixed(), sigma_mean=0.3, sigma_spread=1.2, caption_dropout=0.1
    )
    sigma = sigmas_of(0.3, 1.2)[0]
    for loss, rates, x0, noise, prompt in (
        (found.video, VIDEO, clean.video, E_VIDEO, 2.0),
        (found.audio, AUDIO, clean.audio, E_AUDIO, -1.0),
    ):
        x = (1 - sigma) * x0 + sigma * noise
        error = rates.velocity(x, sigma, 0.0, prompt, first_channel(x).mean()) - (noise - x0)
        spans = VIDEO_SPANS if x0.ndim == 5 else AUDIO_SPANS
        dim = 2 if x0.ndim == 5 else 1
        parts = [error.narrow(dim, a, b - a).square().mean() for a, b in spans]
        assert loss.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-4)


def recipe(**changes: object) -> MutualRecipe:
    return MutualRecipe(**({"guidance": (3.0, 5.0), "teacher_steps": 8, "window": 2} | changes))


def test_multi_step_mode_learns_the_real_block_after_the_history_that_it_is_shown() -> None:
    """With d = 0; the history is another clip than the one whose flow is learned."""
    clean, history = clip(0), clip(1)
    found = flow_loss(known_system(), Shown(clean, history, ASKED), recipe(), Fixed())
    assert found.item() == pytest.approx(
        sum(error_of(clean, history, sigmas_of(0.3, 1.2), velocity_target)), rel=1e-4
    )


def test_a_guided_teacher_has_its_own_guidance_in_each_modality() -> None:
    """u + w (c - u) with w = 3 for pictures and 5 for sound; the empty prompt stands for 0.5."""
    system, x = known_system(empty=0.5), clip(2)
    history = clip(1)
    sigma = torch.tensor([[0.9, 0.2, 0.6]])
    found = guided_teacher(system, ASKED, (3.0, 5.0)).velocity(history, x, sigma)
    prompt = (0.5 + 3 * (2.0 - 0.5), 0.5 + 5 * (-1.0 - 0.5))
    for place, ((rates, now, _), (_, _, past)) in enumerate(
        zip(blocks(x), blocks(history), strict=True)
    ):
        kind, block = divmod(place, BLOCKS)
        made = found[kind]
        spans, dim = ((VIDEO_SPANS, 2), (AUDIO_SPANS, 1))[kind]
        made = made.narrow(dim, spans[block][0], spans[block][1] - spans[block][0])
        level = sigma[0, block].item()
        expected = rates.velocity(now, level, 0.0, prompt[kind], memory(past, now))
        assert torch.allclose(made, expected, atol=1e-4)


def test_intervals_are_whole_steps_of_the_list() -> None:
    start, end = draw_interval(3, 4, Fixed(index=1))
    assert start[0].tolist() == pytest.approx(GRID[1:4], abs=1e-6)
    assert end[0].tolist() == pytest.approx(GRID[2:5], abs=1e-6)


# Without a memory the teacher's path in one block does not depend on the others.
FORGETFUL = VIDEO._replace(memory=0.0), AUDIO._replace(memory=0.0)


def path(rates: Rates, x: Tensor, start: float, end: float, substeps: int, prompt: float) -> Tensor:
    """Euler steps of multi-step mode from one level to a lower one."""
    for step in range(substeps):
        sigma = start - (start - end) * step / substeps
        x = x - (start - end) / substeps * rates.velocity(x, sigma, 0.0, prompt)
    return x


def test_shortcuts_target_is_the_teachers_mean_velocity() -> None:
    """(x - y) / (s - s') where y is where four Euler steps of the teacher lead."""
    system, x = known_system(*FORGETFUL), clip()
    start, end = torch.tensor([[0.9, 0.5, 0.7]]), torch.tensor([[0.6, 0.1, 0.0]])
    teacher = Guided(system.transformer, system.told(ASKED), system.told(ASKED), 1.0, 1.0)
    found = shortcut_target(teacher, x, x, start, end, 4, LAYOUT)
    for kind, (rates, prompt) in enumerate(zip(FORGETFUL, (2.0, -1.0), strict=True)):
        spans, dim = ((VIDEO_SPANS, 2), (AUDIO_SPANS, 1))[kind]
        for block, (a, b) in enumerate(spans):
            s, e = start[0, block].item(), end[0, block].item()
            begun = x[kind].narrow(dim, a, b - a)
            expected = (begun - path(rates, begun, s, e, 4, prompt)) / (s - e)
            assert torch.allclose(found[kind].narrow(dim, a, b - a), expected, atol=1e-4)


@pytest.mark.parametrize("weighting", [0, 1, 2])
def test_shortcut_by_hand(weighting: int) -> None:
    """Few-step mode at (s, d = s - s') is held against the guided teacher over the same interval.

    Eight steps of the teacher over all levels are two in each interval of four.
    """
    system, teacher = known_system(*FORGETFUL, empty=0.5), known_system(*FORGETFUL, empty=0.5)
    states, history = clip(0), clip(1)
    taught = Taught(states, history, ASKED, 4, Fixed(index=1))
    found = shortcut_loss(system, teacher, taught, recipe(weighting=weighting))
    guided_prompt = (0.5 + 3 * 1.5, 0.5 + 5 * -1.5)
    total, lengths = 0.0, [a - b for a, b in itertools.pairwise(GRID[1 : 2 + BLOCKS])]
    for place, (rates, x0, _) in enumerate(blocks(states)):
        kind, block = divmod(place, BLOCKS)
        rates = rates._replace(memory=0.0)
        s, e = GRID[1 + block], GRID[2 + block]
        share = lengths[block] ** weighting / sum(d**weighting for d in lengths)
        x = (1 - s) * x0 + s * (E_VIDEO, E_AUDIO)[kind]
        target = (x - path(rates, x, s, e, 2, guided_prompt[kind])) / (s - e)
        few = rates.velocity(x, s, s - e, (2.0, -1.0)[kind])
        total += (few - target).square().mean().item() * share
    assert found.item() == pytest.approx(total, rel=1e-4)
    # The teacher is a constant; the network's bias adds to few-step mode alone.
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert system.transformer.proj_out.bias.grad.abs().sum() > 0


def few_path(rates: Rates, x: Tensor, grid: tuple[float, ...], prompt: float) -> Tensor:
    """Few-step mode along a list, told its step sizes."""
    for now, then in itertools.pairwise(grid):
        x = x - (now - then) * rates.velocity(x, now, now - then, prompt)
    return x


@pytest.mark.parametrize("gradient_step", range(4))
def test_a_few_step_sample_and_its_gradient_by_hand(gradient_step: int) -> None:
    """dx/db is -1 in the one step that carries the gradient, b being a constant in the velocity."""
    system, noise = known_system(*FORGETFUL), clip()
    sample = few_step_sample(system.transformer, noise, noise, system.told(ASKED), 4, gradient_step)
    for kind, prompt in ((0, 2.0), (1, -1.0)):
        expected = few_path(FORGETFUL[kind], noise[kind], GRID, prompt)
        assert torch.allclose(sample[kind], expected, atol=1e-4)
    sample.video.sum().backward()
    bias = system.transformer.proj_out.bias.grad
    assert bias.tolist() == pytest.approx([-14] * 2, rel=1e-5)


def test_dmds_gradient_by_hand() -> None:
    """(fake - real) / mean |x - real|, over the number of values; blocks by themselves if asked."""
    x = Pair(
        torch.tensor([[1.0, 2.0]], requires_grad=True),
        torch.tensor([[0.0, 0.0, 4.0]], requires_grad=True),
    )
    real = Pair(torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    fake = Pair(torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 2.0, 1.0]]))
    sum(matching_loss(x, real, fake, None)).backward()
    # mean |x - real| is 3 and 5/3.
    assert x.video.grad[0].tolist() == pytest.approx([-3 / 3 / 2, 7 / 3 / 2])
    assert x.audio.grad[0].tolist() == pytest.approx([0, 1 / (5 / 3) / 3, 0], abs=1e-6)


def test_dmd_by_hand() -> None:
    """The sample under two scores at known levels: the teacher's guided, the fake score's not."""
    fake_rates = tuple(r._replace(x=r.x + 0.3, sigma=0.9) for r in FORGETFUL)
    system, teacher = known_system(*FORGETFUL), known_system(*FORGETFUL, empty=0.5)
    fake = known_system(*fake_rates)
    history = clip(1)
    taught = Taught(clip(0), history, ASKED, 4, Fixed(index=1))
    found = distribution_loss(system, teacher, fake, taught, recipe())
    levels = [0.02 + 0.96 * u for u in (0.25, 0.375, 0.5)]
    total, guided_prompt = 0.0, (0.5 + 3 * 1.5, 0.5 + 5 * -1.5)
    for kind, noise, spans, dim in (
        (0, E_VIDEO, VIDEO_SPANS, 2),
        (1, E_AUDIO, AUDIO_SPANS, 1),
    ):
        prompt = (2.0, -1.0)[kind]
        start = torch.full_like(history[kind], noise)
        made = few_path(FORGETFUL[kind], start, GRID, prompt)
        assert torch.allclose(found.sample[kind], made, atol=1e-4)
        assert not found.sample[kind].requires_grad
        for level, (a, b) in zip(levels, spans, strict=True):
            x0 = made.narrow(dim, a, b - a)
            x = (1 - level) * x0 + level * noise
            real = x - level * FORGETFUL[kind].velocity(x, level, 0.0, guided_prompt[kind])
            false = x - level * fake_rates[kind].velocity(x, level, 0.0, prompt)
            g = (false - real) / (x0 - real).abs().mean()
            total += 0.5 * g.square().mean().item() / BLOCKS
    assert found.loss.item() == pytest.approx(total, rel=1e-4)
    found.loss.backward()
    assert all(p.grad is None for part in (teacher, fake) for p in part.parameters())


def test_levels_of_the_scores_fill_their_range() -> None:
    found = draw_level(3, recipe(matching_range=(0.1, 0.9)), Fixed())[0].tolist()
    assert found == pytest.approx([0.1 + 0.8 * u for u in (0.25, 0.375, 0.5)])


def test_the_fake_score_learns_the_flow_of_samples() -> None:
    sample, history = clip(0), clip(1)
    level = torch.tensor([[0.3, 0.6, 0.8]])
    found = fake_loss(known_system(), history, sample, ASKED, level, Fixed())
    expected = sum(error_of(sample, history, level[0].tolist(), velocity_target))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_shares_of_histories_change_with_progress() -> None:
    """Real 0.6 to 0.2, rollouts 0 to 0.4: in the middle 0.4 real, 0.2 rolled out, the rest low."""
    mix = HistoryMix((0.6, 0.2), (0.0, 0.4), highest=0.75)
    for progress, number, expected in (
        (0.0, 0.59, 4),
        (0.0, 0.61, 3),  # index 1 of the levels at most 0.75: 0.7265 and 0.4207
        (0.5, 0.39, 4),
        (0.5, 0.41, 0),
        (0.5, 0.61, 3),
        (1.0, 0.19, 4),
        (1.0, 0.59, 0),
        (1.0, 0.61, 3),
        (2.0, 0.59, 0),
    ):
        assert mix.start_step(4, progress, Fixed(index=1, level=number)) == expected


def history_by_hand(
    x: Pair, grid: tuple[float, ...], window: int, prompt: tuple[float, float], further: int = 0
) -> list[list[Tensor]]:
    """Each block noised to the list's first level and finished by few-step mode on those before.

    The past is what was finished, of which the first block and the last `window` are kept.
    """
    made = [[], []]
    for kind, (rates, noise) in enumerate(((VIDEO, E_VIDEO), (AUDIO, E_AUDIO))):
        dim, spans = ((2, VIDEO_SPANS), (1, AUDIO_SPANS))[kind]
        parts = [x[kind].narrow(dim, a, b - a) for a, b in spans]
        parts = parts[:1] + parts[1:2] * further + parts[1:]
        for clean in parts:
            value = (1 - grid[0]) * clean + grid[0] * noise
            done = made[kind]
            kept = done if len(done) <= 1 + window else done[:1] + done[-window:]
            past = torch.cat([first_channel(block) for block in kept] or [torch.zeros(0)])
            for now, then in itertools.pairwise(grid):
                v = rates.velocity(value, now, now - then, prompt[kind], memory(past, value))
                value = value - (now - then) * v
            done.append(value)
    return made


@pytest.mark.parametrize(("start", "further"), [(2, 0), (0, 0), (0, 2)])
def test_a_history_by_hand(start: int, further: int) -> None:
    """Resampled from level 0.7265, rolled out, and rolled out by two blocks more than it keeps."""
    system, x = known_system(), clip()
    found = few_step_history(
        system.transformer,
        system.told(ASKED),
        x,
        steps=4,
        start_step=start,
        window=1,
        draws=Fixed(),
        further=further,
    ).clip
    expected = history_by_hand(x, GRID[start:], 1, (2.0, -1.0), further)
    for kind, (dim, spans) in enumerate(((2, VIDEO_SPANS), (1, AUDIO_SPANS))):
        made = [expected[kind][0], *expected[kind][1 + further :]]
        for block, (a, b) in enumerate(spans):
            value = found[kind].narrow(dim, a, b - a)
            # Nobody looks at the last block of a resampled history; it stays as it is.
            real = x[kind].narrow(dim, a, b - a)
            wanted = real if start and block == BLOCKS - 1 else made[block]
            assert torch.allclose(value, wanted, atol=1e-4)


@pytest.mark.parametrize("last", range(3))
def test_the_rivals_rollout_by_hand(last: int) -> None:
    """Predict what is clean, noise it afresh, leave at one step, which alone has a gradient."""
    system = known_system()
    found = exit_rollout(system, clip(), ASKED, recipe(steps=(4,), window=1), Fixed(index=last))
    for kind, (rates, noise) in enumerate(((VIDEO, E_VIDEO), (AUDIO, E_AUDIO))):
        dim, spans = ((2, VIDEO_SPANS), (1, AUDIO_SPANS))[kind]
        made = []
        for a, b in spans:
            value = torch.full_like(clip()[kind].narrow(dim, a, b - a), noise)
            kept = made if len(made) <= 2 else made[:1] + made[-1:]
            past = torch.cat([first_channel(block) for block in kept] or [torch.zeros(0)])
            for step in range(last + 1):
                now, then = GRID[step], GRID[step + 1]
                v = rates.velocity(value, now, now - then, (2.0, -1.0)[kind], memory(past, value))
                clean = value - now * v
                value = (1 - then) * clean + then * noise
            made.append(clean)
            assert torch.allclose(found[kind].narrow(dim, a, b - a), clean, atol=1e-4)
    found.audio.sum().backward()
    # 51 audio latents; their history is a constant.
    assert system.transformer.audio_proj_out.bias.grad.tolist() == pytest.approx(
        [-GRID[last] * 51] * 2, rel=1e-5
    )


def test_the_rivals_loss_by_hand() -> None:
    """One level for the whole clip, both scores without masks, normalised over the clip."""
    fake_rates = tuple(r._replace(x=r.x + 0.3, sigma=0.9) for r in (VIDEO, AUDIO))
    system, teacher = known_system(), known_system(empty=0.5)
    fake = known_system(*fake_rates)
    chosen = recipe(steps=(4,))
    found = rollout_matching(system, teacher, fake, clip(), ASKED, chosen, Fixed(index=0)).loss
    sample = exit_rollout(system, clip(), ASKED, chosen, Fixed(index=0))
    level, total, guided_prompt = 0.02 + 0.96 * 0.25, 0.0, (0.5 + 3 * 1.5, 0.5 + 5 * -1.5)
    for kind, noise in ((0, E_VIDEO), (1, E_AUDIO)):
        x0 = sample[kind].detach()
        x = (1 - level) * x0 + level * noise
        seen = first_channel(x).mean()
        rates = (VIDEO, AUDIO)[kind]
        real = x - level * rates.velocity(x, level, 0.0, guided_prompt[kind], seen)
        false = x - level * fake_rates[kind].velocity(x, level, 0.0, (2.0, -1.0)[kind], seen)
        g = (false - real) / (x0 - real).abs().mean()
        total += 0.5 * g.square().mean().item()
    assert found.item() == pytest.approx(total, rel=1e-4)


def test_without_masks_every_block_reads_its_own_prompt_and_all_are_told_the_step_size() -> None:
    """The prompt changes at the last block; the mean over all tokens is what each sees."""
    system, x, sigma, d = known_system(), clip(), 0.6, 0.2
    asked = Asked(PROMPT, prompts((-3.0, 4.0)), torch.tensor([[0, 0, 1]]))
    levels = torch.full((1, BLOCKS), sigma)
    found = velocity(
        system.transformer, None, x, levels, system.told(asked), torch.full_like(levels, d)
    )
    for kind, (rates, numbers) in enumerate(((VIDEO, (2.0, -3.0)), (AUDIO, (-1.0, 4.0)))):
        spans, dim = ((VIDEO_SPANS, 2), (AUDIO_SPANS, 1))[kind]
        seen = first_channel(x[kind]).mean()
        for block, (a, b) in enumerate(spans):
            part, number = x[kind].narrow(dim, a, b - a), numbers[block == BLOCKS - 1]
            expected = rates.velocity(part, sigma, d, number, seen)
            assert torch.allclose(found[kind].narrow(dim, a, b - a), expected, atol=1e-4)


def whole_path(rates: Rates, x: Tensor, prompt: float, steps: int, noise: float | None) -> Tensor:
    """Whole states after so many steps of the grid without masks, by Euler or noised afresh."""
    for now, then in itertools.islice(itertools.pairwise(GRID), steps):
        v = rates.velocity(x, now, now - then, prompt, first_channel(x).mean())
        if noise is None:
            x = x - (now - then) * v
        else:
            x = (1 - then) * (x - now * v) + then * noise
    return x


@pytest.mark.parametrize("last", [0, 2])
def test_stage_one_by_hand(last: int) -> None:
    """Backward simulation of the whole clip; its one step has the gradient, weighted by lambda."""
    fake_rates = tuple(r._replace(x=r.x + 0.3, sigma=0.9) for r in (VIDEO, AUDIO))
    teacher, fake = known_system(empty=0.5), known_system(*fake_rates)
    guided_prompt, level = (0.5 + 3 * 1.5, 0.5 + 5 * -1.5), 0.02 + 0.96 * 0.25
    losses = []
    for lambdas in ((1.0, 0.0), (0.0, 1.0), (0.5, 3.0)):
        system, chosen = known_system(), recipe(steps=(4,), modalities=lambdas)
        given = clip(), ASKED, chosen, Fixed(index=last)
        losses.append(rollout_matching(system, teacher, fake, *given, whole_rollout).loss)
        losses[-1].backward()
    assert all(p.grad is None for part in (teacher, fake) for p in part.parameters())
    found = [loss.item() for loss in losses]
    assert found[2] == pytest.approx(0.5 * found[0] + 3 * found[1], rel=1e-5)
    sample = whole_rollout(system, *given)
    for kind, noise, prompt in ((0, E_VIDEO, 2.0), (1, E_AUDIO, -1.0)):
        rates, now, then = (VIDEO, AUDIO)[kind], GRID[last], GRID[last + 1]
        x = whole_path(rates, torch.full_like(clip()[kind], noise), prompt, last, noise)
        seen = first_channel(x).mean()
        x0 = x - now * rates.velocity(x, now, now - then, prompt, seen)
        assert torch.allclose(sample[kind], x0, atol=1e-4)
        x = (1 - level) * x0 + level * noise
        seen = first_channel(x).mean()
        real = x - level * rates.velocity(x, level, 0.0, guided_prompt[kind], seen)
        false = x - level * fake_rates[kind].velocity(x, level, 0.0, prompt, seen)
        g = (false - real) / (x0 - real).abs().mean()
        assert found[kind] == pytest.approx(0.5 * g.square().mean().item(), rel=1e-4)
    # x0 = x - s v, of which the head's bias is a part: its gradient is -s times the sum of g / n.
    bias = system.transformer.audio_proj_out.bias.grad.sum()
    assert bias.item() == pytest.approx(-3 * now * g.mean().item(), rel=1e-4)


def test_stage_two_by_hand() -> None:
    """Equation 6: what the teacher has at its own states, found from the clean past alone."""
    rates = tuple(r._replace(x=r.x + 0.2, sigma=0.4, d=0.5) for r in (VIDEO, AUDIO))
    system, teacher = known_system(), known_system(*rates)
    chosen = recipe(steps=(4,), modalities=(0.5, 3.0))
    found = ode_loss(system, teacher, clip(), ASKED, chosen, Fixed(index=1))
    total = 0.0
    for kind, noise, prompt in ((0, E_VIDEO, 2.0), (1, E_AUDIO, -1.0)):
        spans, dim = ((VIDEO_SPANS, 2), (AUDIO_SPANS, 1))[kind]
        begun = torch.full_like(clip()[kind], noise)
        end = whole_path(rates[kind], begun, prompt, 4, None)
        for block, (a, b) in enumerate(spans):
            # The levels of the three blocks are the second to the last of the grid.
            now, d = GRID[1 + block], GRID[1 + block] - GRID[2 + block]
            x = whole_path(rates[kind], begun, prompt, 1 + block, None)
            target = rates[kind].velocity(x, now, d, prompt, first_channel(x).mean())
            here = x.narrow(dim, a, b - a)
            seen = memory(first_channel(end.narrow(dim, 0, a)), here)
            v = (VIDEO, AUDIO)[kind].velocity(here, now, d, prompt, seen)
            error = (v - target.narrow(dim, a, b - a)).square().mean().item()
            total += (0.5, 3.0)[kind] * error / BLOCKS
    assert found.item() == pytest.approx(total, rel=1e-4)
    found.backward()
    assert system.transformer.proj_out.bias.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
