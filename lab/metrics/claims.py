"""What "within 5 %", "better" and "no worse" mean, and which claims a comparison meets.

Every metric has a direction, and a mean with the limits that chance leaves it: the 95 % interval of
Student's t. Where a row has several trainings of its method, what differs by chance from one to the
next is the training seed, and a training counts once, as the mean over its sampling seeds. Where it
has one, the limits are those of the sampling seeds, and say nothing of another training. With `a`
the row and `b` the row that it is held against:

within 5 %   a is worse than b by no more than 5 % of b. Shares, correlations and distances alike
             are compared as they are measured: a distance with its floor, not as the excess over
             it. The two readings allow the same but for 5 % of the floor; near the floor, where
             both rows are as good as the estimate can tell, an excess is the noise of the estimate,
             and 5 % of it means nothing. Floors and the ratio of the excesses are told beside it.
better       a's mean is better than b's, by however little; or nothing is left to be better at.
no worse     a is worse than b by no more than the limits of their difference, nor by more than 5 %
             of b. Sampling seeds are paired, since rows share prompts and noise; trainings are not
             (Welch's interval).
kept         of a window against an earlier one: the ratio of the means, upside down where lower is
             better, so 1 is as good as before and less is worse.

Where half of the hits have no partner there is no offset to be within anything of: that meets no
claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

from ...samplers.rollout import Mode
from .candidates import FARTHEST_MS, Candidate
from .score import Table

TOLERANCE = 0.05
CONFIDENCE = 0.95
KEPT = 0.95
FEW, MORE, MANY = 4, 8, 50  # steps


@dataclass(frozen=True)
class Metric:
    """A number of `candidates.scores`.

    Attributes:
        higher: whether more is better.
        floored: a distance, which is not 0 even between true clips.
        lost: the value that stands for "nothing was found"; it meets no claim.
        full: the best there can be; where both rows have it, neither could be better.
    """

    key: str
    title: str
    digits: int
    higher: bool
    floored: bool = False
    lost: float | None = None
    full: float | None = None

    def gain(self, value: float, other: float) -> float:
        """By how much a value is better than another; negative when it is worse."""
        return value - other if self.higher else other - value

    def limit(self, value: float, slack: float) -> float:
        """What is worse than `value` by `slack`."""
        return value - slack if self.higher else value + slack

    def kept(self, first: float, last: float) -> float | None:
        """How much of `first` is left in `last`; None where a ratio says nothing."""
        part, whole = (last, first) if self.higher else (first, last)
        if self.lost in (first, last):
            return None
        if first == last:
            return 1.0
        return part / whole if whole > 0 else None


METRICS = (
    Metric("attributes", "attributes right", 3, higher=True, full=1.0),
    Metric("offset ms", "hits: median offset, ms", 1, higher=False, lost=FARTHEST_MS),
    Metric("paired", "clips whose hits pair", 3, higher=True, full=1.0),
    Metric("mouth", "mouth against loudness", 3, higher=True),
    Metric("video distance", "Fréchet, video", 2, higher=False, floored=True),
    Metric("audio distance", "Fréchet, audio", 2, higher=False, floored=True),
)


@dataclass(frozen=True)
class Estimate:
    """A number, found several times.

    Attributes:
        values: one for each training, where there are several, or else for each sampling seed.
        trainings: which of the two.
    """

    values: tuple[float, ...]
    trainings: bool = False

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def limit(self) -> float | None:
        """How far off the mean may be by chance, either way; None with one value."""
        if len(self.values) < 2:
            return None
        return student(stats.sem(self.values), len(self.values) - 1)


def student(error: float, freedom: float) -> float:
    """Half the width of the interval about a mean with this standard error."""
    return float(error * stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def limit_of_difference(found: Estimate, other: Estimate) -> float | None:
    """How far off the difference of two means may be by chance; None where that is not known."""
    a, b = found.values, other.values
    if not (found.trainings or other.trainings) and len(a) == len(b):
        return Estimate(tuple(np.subtract(a, b).tolist())).limit
    if min(len(a), len(b)) < 2:
        return None
    errors = np.square([stats.sem(a), stats.sem(b)])
    if not errors.any():
        return 0.0
    freedom = errors.sum() ** 2 / (errors**2 / [len(a) - 1, len(b) - 1]).sum()
    return student(np.sqrt(errors.sum()), freedom)


# By the metric's key; a metric that nothing was found for is not there.
Estimates = Mapping[str, Estimate]


def estimates(scored: Sequence[Sequence[Table]]) -> dict[str, Estimate]:
    """Each metric from one table of scores per training and sampling seed."""
    found = {}
    for metric in METRICS:
        values = [[table[metric.key] for table in seeds] for seeds in scored]
        if any(None in seeds for seeds in values):
            continue
        several = len(values) > 1
        means = (float(np.mean(seeds)) for seeds in values)
        found[metric.key] = Estimate(tuple(means if several else values[0]), several)
    return found


@dataclass(frozen=True)
class Claim:
    """One metric of one row held against that of another.

    Attributes:
        found, limit: the row's mean, and the worst mean that would do.
        gain: by how much the row is better.
        chance: how far off that may be by chance; None where that is not known.
        excess: of distances, the row's excess over the floor in units of the other row's.
    """

    name: str
    metric: str
    row: str
    against: str
    found: float
    limit: float
    met: bool
    gain: float
    chance: float | None
    excess: float | None = None


Rule = Callable[[Metric, Estimate, Estimate], tuple[float, bool]]
"""From a metric, a row's estimate and the other's: the worst mean that would do; is it met?"""


def within(metric: Metric, found: Estimate, other: Estimate) -> tuple[float, bool]:
    """Worse by no more than 5 %."""
    limit = metric.limit(other.mean, TOLERANCE * abs(other.mean))
    return limit, metric.gain(found.mean, limit) >= 0


def better(metric: Metric, found: Estimate, other: Estimate) -> tuple[float, bool]:
    """Better by however little, or both as good as can be."""
    full = found.mean == other.mean == metric.full
    return other.mean, full or metric.gain(found.mean, other.mean) > 0


def no_worse(metric: Metric, found: Estimate, other: Estimate) -> tuple[float, bool]:
    """Worse by no more than chance explains, and by no more than 5 %."""
    chance = limit_of_difference(found, other) or 0.0
    limit = metric.limit(other.mean, min(chance, TOLERANCE * abs(other.mean)))
    return limit, metric.gain(found.mean, limit) >= 0


@dataclass(frozen=True)
class Question:
    """A claim before it is looked at: which rows are held against which others, by what rule."""

    name: str
    rule: Rule
    candidates: tuple[Candidate, ...]
    others: tuple[Candidate, ...]

    def answers(self, found: Mapping[str, Estimates], floor: Estimates) -> list[Claim]:
        """Every pair of rows, metric by metric; none where a row is missing."""
        told = []
        for row, other in product(self.candidates, self.others):
            for metric in METRICS:
                a, b = (found[one.label].get(metric.key) for one in (row, other))
                if a is None or b is None:
                    continue
                limit, met = self.rule(metric, a, b)
                met &= a.mean != metric.lost
                gain, chance = metric.gain(a.mean, b.mean), limit_of_difference(a, b)
                least = floor.get(metric.key) if metric.floored else None
                above = least is not None and b.mean > least.mean
                excess = (a.mean - least.mean) / (b.mean - least.mean) if above else None
                which = self.name, metric.key, row.label, other.label
                told.append(Claim(*which, a.mean, limit, met, gain, chance, excess))
        return told


def questions(rows: Sequence[Candidate], model: str, baselines: Sequence[str]) -> list[Question]:
    """The three claims of a comparison.

    Args:
        rows: those that were measured.
        model: whose claims these are.
        baselines: names of the models that it is to beat.
    """

    def asked(steps: int, modes: Sequence[Mode], names: Sequence[str]) -> tuple[Candidate, ...]:
        return tuple(
            row
            for row in rows
            if row.sampler is not None
            and row.name in names
            and row.sampler.steps == steps
            and row.sampler.mode in modes
        )

    few, more = asked(FEW, ["few"], [model]), asked(MORE, ["few"], [model])
    many = asked(MANY, ["multi"], [model])
    rivals = asked(FEW, ["few", "multi"], baselines)
    return [
        Question(f"{FEW} steps within 5 % of {MANY}", within, few, many),
        Question(f"better than every baseline at {FEW} steps", better, few, rivals),
        Question(f"{MORE} steps no worse than {MANY}", no_worse, more, many),
    ]
