"""Is setting A really better than setting B? Pure statistics over per-pair scores of seeds.

A setting (say beta = 0.2) is trained with several seeds, and every run is scored on the same
held-out pairs. Two things then stand between a run's figure and its setting: which pairs happened
to be held out, and what the seed did to the run as a whole. The second does not shrink with more
pairs, so an interval over pairs alone names winners that another seed would not confirm
(`benchmarks/verdict.py` counts how often). Here a difference has both:

    Var(mean) = r^2 / K + Var_i(h_i) / N

with K seeds and N pairs, h_i the pair's score, a mean over seeds, and r^2 the variance of what a
seed does to a run as a whole, pooled over settings: the variance between a setting's seeds less
what pairs of that setting add to it by chance (two-way random effects). Shares (accuracy, exact
match) are compared as log-odds, where a seed moves a good and a mediocre setting alike; chance does
not, so what it adds is taken from each setting before pooling.

The winner has to beat every other setting in a test of its own at `LEVEL`. That is an
intersection-union test (Berger 1982), which needs no further correction: however many settings
there are, a setting that is not the best is named with a probability of at most `LEVEL`, where
seeds move all settings alike. Statements about a single other setting among many ("its quality is
worse") are Bonferroni-corrected.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

# One-sided level of every test
LEVEL = 0.05
# Power that "how many more seeds" is worked out for
POWER = 0.8
# More seeds than this are not worth asking for
MAX_SEEDS = 50


@dataclass(frozen=True)
class Interval:
    """An estimate and the two-sided interval of confidence 1 - 2 LEVEL; NaN: no second seed."""

    estimate: float
    low: float
    high: float


class Measure:
    """One figure of every setting: per-pair scores by seed.

    Args:
        scores: for each setting [K, N]: a row of the N held-out pairs' scores for every seed;
            higher is better. K may differ between settings.
        is_share: the scores are 0 or 1.
    """

    def __init__(self, scores: Sequence[Array], *, is_share: bool) -> None:
        self.scores = scores
        self.is_share = is_share
        self.num_pairs = scores[0].shape[1]
        self.num_seeds = [len(one) for one in scores]
        self._by_run = [self._link(one.mean(1)) for one in scores]
        self.means = np.array([one.mean() for one in self._by_run])
        self.freedom = sum(num - 1 for num in self.num_seeds)

    def _link(self, shares: Array) -> Array:
        """Return log-odds of shares, half a pair added to both sides so that 0 and 1 have some."""
        if not self.is_share:
            return shares
        num = self.num_pairs
        return np.log((shares * num + 0.5) / (num - shares * num + 0.5))

    def _unlink(self, value: float) -> float:
        return float(1 / (1 + np.exp(-value))) if self.is_share else float(value)

    @cached_property
    def _by_pair(self) -> list[Array]:
        """What each pair adds to its setting's mean, [N], on the scale of the link."""
        return [one.mean(0) * self._slope(one) for one in self.scores]

    @cached_property
    def _residuals(self) -> list[float]:
        """The variance that chance in its pairs adds to a run's mean, of every setting."""
        return [self._residual(one) if len(one) > 1 else 0.0 for one in self.scores]

    def _residual(self, scores: Array) -> float:
        num_seeds, num_pairs = scores.shape
        rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
        variance = (rest**2).sum() / ((num_seeds - 1) * (num_pairs - 1))
        return float(variance / num_pairs * self._slope(scores) ** 2)

    @cached_property
    def seed_variance(self) -> float:
        """The variance r^2 between a setting's runs that no number of pairs takes away."""
        if not self.freedom:
            return math.nan
        between = sum(
            ((one - one.mean()) ** 2).sum() - (len(one) - 1) * residual
            for one, residual in zip(self._by_run, self._residuals, strict=True)
        )
        return max(float(between / self.freedom), 0.0)

    def _slope(self, scores: Array) -> float:
        """Return the link's derivative at a setting's mean (delta method)."""
        if not self.is_share:
            return 1.0
        share = np.clip(scores.mean(), 0.5 / self.num_pairs, 1 - 0.5 / self.num_pairs)
        return float(1 / (share * (1 - share)))

    def _pair_variance(self, a: int, b: int | None) -> float:
        h = self._by_pair[a] if b is None else self._by_pair[a] - self._by_pair[b]
        return float(h.var(ddof=1)) / self.num_pairs

    def standard_error(self, a: int, b: int | None = None) -> float:
        """Return the standard error of a setting's mean, or of two settings' difference."""
        per_seed = 1 / self.num_seeds[a] + (0 if b is None else 1 / self.num_seeds[b])
        return math.sqrt(self.seed_variance * per_seed + self._pair_variance(a, b))

    def _quantile(self, level: float) -> float:
        return float(stats.t.ppf(1 - level, self.freedom)) if self.freedom else math.nan

    def value(self, a: int) -> float:
        """Return a setting's plain mean over pairs and seeds."""
        return float(np.mean([row.mean() for row in self.scores[a]]))

    def interval(self, a: int) -> Interval:
        """Return a setting's mean with its interval over pairs and seeds."""
        reach = self._quantile(LEVEL) * self.standard_error(a)
        center = float(self._link(np.array([self.value(a)]))[0])
        low, high = (self._unlink(center + sign * reach) for sign in (-1, 1))
        return Interval(self.value(a), low, high)

    def difference(self, a: int, b: int) -> Interval:
        """Return how far setting `a` is above `b`, with its interval over pairs and seeds.

        For shares: in share points, `a` taken to be where it was measured.
        """
        reach = self._quantile(LEVEL) * self.standard_error(a, b)
        gap = float(self.means[a] - self.means[b])
        at = self._unlink(float(self.means[a]))
        low, high = (
            at - self._unlink(float(self.means[a]) - g) for g in (gap - reach, gap + reach)
        )
        return Interval(self.value(a) - self.value(b), low, high)

    def is_above(self, a: int, b: int, *, level: float = LEVEL) -> bool:
        """Return whether `a` is shown to be above `b`: a one-sided t-test."""
        if not self.freedom:
            return False
        gap = float(self.means[a] - self.means[b])
        return gap > 0 and gap > self._quantile(level) * self.standard_error(a, b)

    def seeds_needed(self, a: int, b: int) -> int | None:
        """Return how many seeds of both would show the gap seen now; None: more than MAX_SEEDS."""
        return self._smallest(a, b, [(num, self.num_pairs) for num in range(2, MAX_SEEDS + 1)], 0)

    def pairs_needed(self, a: int, b: int) -> int | None:
        """Return how many pairs would show the gap with as many seeds as now; None: none would."""
        num = min(self.num_seeds[a], self.num_seeds[b])
        steps = [(num, round(self.num_pairs * factor)) for factor in (1.5, 2, 3, 5, 10, 20, 50)]
        return self._smallest(a, b, steps, 1)

    def _smallest(self, a: int, b: int, sizes: list[tuple[int, int]], which: int) -> int | None:
        gap = float(self.means[a] - self.means[b])
        chance = sum(self._residuals[one] / self.num_seeds[one] for one in (a, b))
        by_pair = max(self._pair_variance(a, b) - chance, 0.0) * self.num_pairs
        by_run_and_pair = (self._residuals[a] + self._residuals[b]) * self.num_pairs
        for seeds, pairs in sizes:
            by_run = 2 * self.seed_variance + by_run_and_pair / pairs
            variance = by_run / seeds + by_pair / pairs
            freedom = len(self.scores) * (seeds - 1)
            wanted = stats.t.ppf(1 - LEVEL, freedom) + stats.norm.ppf(POWER)
            if gap > wanted * math.sqrt(variance):
                return (seeds, pairs)[which]
        return None


@dataclass(frozen=True)
class Quality:
    """A figure that a higher preference accuracy must not be bought with."""

    name: str
    unit: str
    """Of the margin; empty: none."""
    measure: Measure
    margin: float
    """How much below the best setting's still counts as not worse."""
    sign: int = 1
    """-1: people read it with the opposite sign, lower is better."""


@dataclass(frozen=True)
class Standing:
    """Where one setting stands in quality."""

    intervals: list[Interval]
    worse_in: list[str]
    """Qualities shown to be worse than the best's, and by more than the margin in the estimate."""
    doubtful_in: list[str]
    """Qualities below the margin in the estimate, while the difference may be chance."""


@dataclass(frozen=True)
class Verdict:
    """What the evidence says."""

    winner: int | None
    """The setting that wins; None: the evidence does not name one."""
    leader: int
    """The highest preference accuracy among the settings whose quality is not worse."""
    accuracies: list[Interval]
    """Preference accuracy of every setting."""
    qualities: list[Standing]
    unbeaten: list[int]
    """Settings of good quality that the leader is not shown to beat."""
    nearest: int | None
    """The highest of these, or of those beaten; None: nothing else is of good quality."""
    lead: Interval | None
    """How far the leader is above the nearest."""
    seeds_needed: int | None
    """Seeds per setting that would show the smallest gap; None: not to be had."""
    pairs_needed: int | None
    """Held-out pairs that would, with as many seeds as now; None: no number of pairs would."""
    one_seed: bool
    """No setting has a second seed, so nothing can be said."""


def decide(accuracy: Measure, qualities: Sequence[Quality]) -> Verdict:
    """Name the setting of highest preference accuracy among those of good quality, or none.

    A setting is out where one of its qualities is worse than the best setting's: by more than the
    margin in the estimate, and shown to be below it. The leader is the highest of the others. It
    wins where it is shown to be above each of them and none of its own qualities is below the
    margin.

    Args:
        accuracy: per-pair preference accuracy, 0 or 1, of every setting.
        qualities: of the same settings in the same order.
    """
    everyone = range(len(accuracy.scores))
    quality_of = [_quality_of(number, qualities) for number in everyone]
    candidates = [number for number in everyone if not quality_of[number].worse_in]
    # Without those that are out: near 100 % accuracy a seed's log-odds vary wildly
    contest = Measure(
        [accuracy.scores[number] for number in candidates], is_share=accuracy.is_share
    )
    first = int(contest.means.argmax())
    others = [number for number in range(len(candidates)) if number != first]
    unbeaten = [number for number in others if not contest.is_above(first, number)]
    nearest = max(unbeaten or others, key=lambda number: contest.means[number], default=None)
    one_seed = contest.freedom == 0
    undecided = nearest is not None and bool(unbeaten) and not one_seed
    leader = candidates[first]
    wins = not one_seed and not unbeaten and not quality_of[leader].doubtful_in
    intervals = [accuracy.interval(number) for number in everyone]
    for number, candidate in enumerate(candidates):
        intervals[candidate] = contest.interval(number)
    return Verdict(
        winner=leader if wins and len(everyone) > 1 else None,
        leader=leader,
        accuracies=intervals,
        qualities=quality_of,
        unbeaten=[candidates[number] for number in unbeaten],
        nearest=None if nearest is None else candidates[nearest],
        lead=None if nearest is None else contest.difference(first, nearest),
        seeds_needed=contest.seeds_needed(first, nearest)
        if undecided and nearest is not None
        else None,
        pairs_needed=contest.pairs_needed(first, nearest)
        if undecided and nearest is not None
        else None,
        one_seed=one_seed,
    )


def _quality_of(number: int, qualities: Sequence[Quality]) -> Standing:
    worse: list[str] = []
    doubtful: list[str] = []
    for quality in qualities:
        measure = quality.measure
        best = int(measure.means.argmax())
        shortfall = measure.value(best) - measure.value(number)
        if shortfall > quality.margin:
            level = LEVEL / max(len(measure.scores) - 1, 1)
            shown = measure.is_above(best, number, level=level)
            (worse if shown else doubtful).append(quality.name)
    intervals = [quality.measure.interval(number) for quality in qualities]
    return Standing(intervals, worse, doubtful)


def overoptimised(order: Sequence[int], accuracy: Measure, quality: Quality) -> int | None:
    """Return the first setting whose accuracy still rises while its quality is lost, if any.

    Args:
        order: settings that differ in beta alone, lowest beta first.
        accuracy: preference accuracy of all settings.
        quality: lost where it is shown to be below the best of the lower betas, by more than the
            margin in the estimate.
    """
    measure = quality.measure
    for place in range(1, len(order)):
        here, before = order[place], order[:place]
        best = max(before, key=lambda number: measure.means[number])
        rises = accuracy.means[here] > accuracy.means[order[place - 1]]
        falls = measure.value(best) - measure.value(here) > quality.margin
        if rises and falls and measure.is_above(best, here, level=LEVEL / (len(order) - 1)):
            return here
    return None
