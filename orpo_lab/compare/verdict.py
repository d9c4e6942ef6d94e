"""Is setting A really better than setting B? Pure statistics over per-pair scores of seeds.

A setting (say beta = 0.2) is trained with several seeds, and every run is scored on the same
held-out pairs. Two things then stand between a run's figure and its setting: which pairs happened
to be held out, and what the seed did to the run as a whole. The second does not shrink with more
pairs, so an interval over pairs alone names winners that another seed would not confirm
(`benchmarks/verdict.py` counts how often). Here a mean has both (two-way random effects):

    Var(mean) = v / K + (Var_i(h_i) - e / K) / N

with K seeds and N pairs, h_i a pair's score, a mean over seeds, e what chance adds to one score,
and v the variance between runs: what a seed does to a run as a whole, plus e / N. Shares (accuracy,
exact match) are compared as log-odds of the mean share, where a seed moves a good and a mediocre
setting alike; a share is known to half a pair at best, so that there is a variance at 100 %, too.

**Settings scatter differently**: a high beta's seeds may differ wildly and a low beta's not at all.
So each setting has a variance of its own, with K - 1 degrees of freedom, and two settings are
compared by Welch's test (Biometrika 34, 1947, 28-35) with Satterthwaite's freedom (Biometrics
Bulletin 2, 1946, 110-114). Three seeds can agree by chance: a variance below the one pooled over
all settings is taken to be the pooled one, never the other way round.

The winner has to beat every other setting in a test of its own. That is an intersection-union test
(Berger, Technometrics 24, 1982, 295-300), which needs no further correction for their number.
"Worse in quality" is a statement about any of all pairs of settings, so it takes the studentized
range with each pair's own variance (Games and Howell, Journal of Educational Statistics 1, 1976,
113-125). `benchmarks/verdict.py` plants truths and counts how often each is wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]

# One-sided level of every test. Not 0.05: Welch's freedom is an estimate, and where a setting's
# seeds differ wildly its log-odds are skewed; in simulation these take the rest
LEVEL = 0.03
# Of a setting's interval, two-sided
CONFIDENCE = 0.9
# A setting whose variance is below this quantile of what chance does to the pooled one is taken to
# scatter like the others, where the pool has at least this freedom
ALIKE, MIN_POOL = 0.9, 10
# Of a standard error that is zero
TINY = 1e-300
# Of a variance that is known
MAX_FREEDOM = 1e6
# Power that "how many more seeds" is worked out for, and the simulated sweeps it is worked out with
POWER, NUM_DRAWS = 0.8, 2000
# More seeds than this are not worth asking for, nor more pairs than this times those at hand
MAX_SEEDS, MAX_FACTOR = 50, 50


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval; NaN: there is no second seed, or pair."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate, and the degrees of freedom that the variance is known with."""

    variance: Array
    freedom: Array

    @property
    def error(self) -> Array:
        """The standard error."""
        return np.sqrt(self.variance)

    def reach(self, level: float) -> Array:
        """Return how far chance alone reaches to one side at a level, by Student's t."""
        return special.stdtrit(self.freedom, 1 - level) * self.error


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
        self.num_seeds = np.array([len(of_setting) for of_setting in scores])
        self.means = self._link(np.array([of_setting.mean() for of_setting in scores]))

    def _link(self, shares: Array) -> Array:
        """Return log-odds of shares, half a pair added to both sides so that 0 and 1 have some."""
        if not self.is_share:
            return shares
        num = self.num_pairs
        return np.log((shares * num + 0.5) / (num - shares * num + 0.5))

    def _unlink(self, value: float) -> float:
        return float(1 / (1 + np.exp(-value))) if self.is_share else float(value)

    @cached_property
    def _slopes(self) -> Array:
        """The link's derivative at every setting's mean (delta method)."""
        if not self.is_share:
            return np.ones(len(self.scores))
        half = 0.5 / self.num_pairs
        shares = np.clip([of_setting.mean() for of_setting in self.scores], half, 1 - half)
        return 1 / (shares * (1 - shares))

    @cached_property
    def _by_pair(self) -> list[Array]:
        """What each pair adds to its setting's mean, [N], on the scale of the link."""
        return [
            scores.mean(0) * slope for scores, slope in zip(self.scores, self._slopes, strict=True)
        ]

    @cached_property
    def _between(self) -> Array:
        """The variance between the runs of every setting; 0 where there is one."""
        runs = [self._link(scores.mean(1)) for scores in self.scores]
        return np.array([shares.var(ddof=1) if len(shares) > 1 else 0.0 for shares in runs])

    @cached_property
    def _chance(self) -> Array:
        """What chance in its pairs adds to the variance of a run, of every setting."""
        residuals = np.array([_residual(scores) for scores in self.scores])
        return residuals * self._slopes**2 / self.num_pairs

    def _by_run(
        self, between: Array, chance: Array, num_seeds: Array, *, min_pool: float
    ) -> tuple[Array, Array]:
        """Return the variance of every setting's runs, and its freedom, [..., S] both.

        Args:
            between: the variance found between runs, [..., S].
            chance: what chance in the pairs adds to it, [S].
            num_seeds: of every setting, [S].
            min_pool: the freedom that the pool needs to vouch for a setting that scatters somewhat
                more than the pool, with three seeds or more; without it only for those that
                scatter less.
        """
        freedom = num_seeds - 1
        total = max(int(freedom.sum()), 1)
        seed = ((between - chance) * freedom).sum(-1, keepdims=True) / total
        pool = np.maximum(seed, 0) + chance
        own = np.maximum(between, chance)
        may_pool = (freedom > 1) & (total >= min_pool)
        limit = np.where(may_pool, special.fdtri(np.maximum(freedom, 1), total, ALIKE), 1.0)
        is_own = own > limit * pool
        # Two seeds say next to nothing of their own noise, so nothing vouches for less of it
        return np.where(is_own, own, pool), np.where(is_own | (freedom == 1), freedom, total)

    @cached_property
    def _pooled(self) -> tuple[Array, Array]:
        return self._by_run(self._between, self._chance, self.num_seeds, min_pool=MIN_POOL)

    @cached_property
    def _safe(self) -> tuple[Array, Array]:
        return self._by_run(self._between, self._chance, self.num_seeds, min_pool=math.inf)

    def _pair_variance(self, a: int, b: int | None) -> float:
        """Return what pairs add to the variance of a mean or difference, less chance; NaN: one."""
        if self.num_pairs < 2:
            return math.nan
        settings = [a] if b is None else [a, b]
        h = self._by_pair[a] - (0.0 if b is None else self._by_pair[b])
        half_a_pair = sum((self._slopes[index] / 2 / self.num_pairs) ** 2 for index in settings)
        chance = sum(self._chance[index] / self.num_seeds[index] for index in settings)
        found = h.var(ddof=1) / self.num_pairs + (half_a_pair if self.is_share else 0.0)
        return max(float(found - chance), 0.0)

    def spread(self, a: int, b: int | None = None, *, pooled: bool = True) -> Spread:
        """Return the spread of a setting's mean, or of two settings' difference; NaN: one seed.

        Args:
            a: the setting.
            b: the other, if any.
            pooled: as for the winner; otherwise as safe as statements about any setting need.
        """
        by_run = self._pooled if pooled else self._safe
        settings = [a] if b is None else [a, b]
        pairs = self._pair_variance(a, b)
        return self._joined(settings, *by_run, self.num_seeds, pairs, self.num_pairs)

    def _joined(
        self,
        settings: list[int],
        variance: Array,
        freedom: Array,
        num_seeds: Array,
        by_pair: float,
        num_pairs: int,
    ) -> Spread:
        """Join runs and pairs: variances add, and their freedom by Satterthwaite, [...] both."""
        parts, rest = [], 1.0
        for index in settings:
            # The part of the pairs is no better known than the setting's whole with two seeds
            carried = (num_seeds[index] == 2) / len(settings)
            rest -= carried
            part = variance[..., index] / num_seeds[index] + carried * by_pair
            parts.append((part, freedom[..., index]))
        parts.append((np.asarray(rest * by_pair), np.asarray(num_pairs - 1)))
        whole = sum(part for part, _ in parts)
        squares = sum(part**2 / np.maximum(df, 1) for part, df in parts)
        with np.errstate(invalid="ignore", divide="ignore"):
            joined = np.where(squares > 0, whole**2 / squares, MAX_FREEDOM)
        alone = min(num_seeds[settings]) < 2
        return Spread(np.where(alone, np.nan, whole), np.where(alone, np.nan, joined))

    @property
    def level(self) -> float:
        """The level of one test for the winner.

        The fewer settings there are, the likelier chance puts one of several equals above all.
        """
        return LEVEL * min(len(self.scores) / 4, 1)

    def value(self, a: int) -> float:
        """Return a setting's plain mean over pairs and seeds."""
        return float(self.scores[a].mean())

    def interval(self, a: int) -> Interval:
        """Return a setting's mean with its interval over pairs and seeds."""
        spread = self.spread(a)
        reach = spread.reach((1 - CONFIDENCE) / 2)
        value = self.value(a)
        low, high = (self._unlink(self.means[a] + sign * reach) for sign in (-1, 1))
        # Half a pair is added to both sides of 0 and 1, which takes the estimate itself away
        if self.is_share and value in (0.0, 1.0) and not math.isnan(low):
            low, high = min(low, value), max(high, value)
        return Interval(value, low, high)

    def difference(self, a: int, b: int) -> Interval:
        """Return how far setting `a` is above `b`, with an interval by the test for the winner.

        For shares: in share points, `a` taken to be where it was measured.
        """
        spread = self.spread(a, b)
        reach = spread.reach(self.level)
        gap = self.means[a] - self.means[b]
        at = self._unlink(self.means[a])
        low, high = (at - self._unlink(self.means[a] - g) for g in (gap - reach, gap + reach))
        return Interval(self.value(a) - self.value(b), low, high)

    def is_above(self, a: int, b: int) -> bool:
        """Return whether `a` is shown to be above `b`: a one-sided test."""
        return bool(self._shows(self.means[a] - self.means[b], self.spread(a, b)))

    def _shows(self, gap: Array, spread: Spread) -> NDArray[np.bool_]:
        return (gap > 0) & (gap > spread.reach(self.level))

    def is_above_in_all(self, a: int, b: int) -> bool:
        """Return whether `a` is shown to be above `b`, said of any pair of settings."""
        spread = self.spread(a, b, pooled=False)
        gap = self.means[a] - self.means[b]
        chance = 2 * special.stdtr(spread.freedom, -gap / max(spread.error, TINY))
        num = len(self.scores)
        # The range's own probability takes a twentieth of a second, and lies between these
        if not chance < LEVEL:
            return False
        if chance * num * (num - 1) / 2 < LEVEL:
            return True
        reached = math.sqrt(2) * gap / spread.error
        return bool(stats.studentized_range.sf(reached, num, spread.freedom) < LEVEL)

    def falls_short(self, a: int) -> bool:
        """Return whether any setting is shown to be above `a`, among all pairs of settings."""
        return any(self.is_above_in_all(number, a) for number in range(len(self.scores)))

    def seeds_needed(self, a: int, b: int) -> int | None:
        """Return how many seeds of each would show the gap seen now; None: more than MAX_SEEDS."""
        return _smallest(
            lambda num: self.power(a, b, np.full(len(self.scores), num), self.num_pairs),
            2,
            MAX_SEEDS,
        )

    def pairs_needed(self, a: int, b: int) -> int | None:
        """Return how many pairs would show the gap with as many seeds as now; None: none would."""
        return _smallest(
            lambda num: self.power(a, b, self.num_seeds, num),
            self.num_pairs + 1,
            MAX_FACTOR * self.num_pairs,
        )

    def power(self, a: int, b: int, num_seeds: Array, num_pairs: int) -> float:
        """Return how often the test would show the gap seen now, by NUM_DRAWS simulated sweeps.

        Args:
            a: the setting that is above.
            b: the other.
            num_seeds: of every setting in these sweeps, [S].
            num_pairs: held out in these sweeps.
        """
        rng = np.random.default_rng(0)
        fewer = self.num_pairs / num_pairs
        # Not on the safe side, as the test's are: what is likely
        found, _ = self._by_run(self._between, self._chance, self.num_seeds, min_pool=0)
        chance = self._chance * fewer
        truth = found - self._chance + chance
        freedom = np.maximum(num_seeds - 1, 1)
        between = truth * rng.chisquare(freedom, (NUM_DRAWS, len(truth))) / freedom
        by_pair = self._pair_variance(a, b) * fewer
        true = self._joined(
            [a, b], truth, np.full(len(truth), MAX_FREEDOM), num_seeds, by_pair, num_pairs
        )
        gaps = self.means[a] - self.means[b] + true.error * rng.standard_normal(NUM_DRAWS)
        by_run = self._by_run(between, chance, num_seeds, min_pool=MIN_POOL)
        seen = self._joined([a, b], *by_run, num_seeds, by_pair, num_pairs)
        return float(self._shows(gaps, seen).mean())


def _residual(scores: Array) -> float:
    """Return the variance of a score that neither its pair nor its run explains, [K, N]."""
    num_seeds, num_pairs = scores.shape
    if num_seeds == 1 or num_pairs == 1:
        return 0.0
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    return float((rest**2).sum() / ((num_seeds - 1) * (num_pairs - 1)))


def _smallest(power: Callable[[int], float], low: int, high: int) -> int | None:
    """Return the smallest number from `low` to `high` with enough power; None: there is none."""
    if power(high) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low


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
    one_seed: list[int]
    """Settings of good quality with one seed, which can neither win nor be beaten."""
    contest: Measure
    """Preference accuracy of the settings of good quality."""
    open_gap: tuple[int, int] | None
    """The leader and the nearest in `contest`, where more seeds or pairs may tell them apart."""

    @cached_property
    def seeds_needed(self) -> int | None:
        """Seeds per setting that would show the smallest gap; None: not to be had."""
        return self.contest.seeds_needed(*self.open_gap) if self.open_gap else None

    @cached_property
    def pairs_needed(self) -> int | None:
        """Held-out pairs that would, with as many seeds as now; None: no number of pairs would."""
        return self.contest.pairs_needed(*self.open_gap) if self.open_gap else None


def decide(accuracy: Measure, qualities: Sequence[Quality]) -> Verdict:
    """Name the setting of highest preference accuracy among those of good quality, or none.

    A setting is out where one of its qualities is worse than the best setting's: by more than the
    margin in the estimate, and shown to be below some setting's. The leader is the highest of the
    others. It wins where it is shown to be above each of them and none of its own qualities is
    below the margin. A setting with one seed can neither win nor be beaten.

    Args:
        accuracy: per-pair preference accuracy, 0 or 1, of every setting.
        qualities: of the same settings in the same order.
    """
    everyone = range(len(accuracy.scores))
    quality_of = [_quality_of(number, qualities) for number in everyone]
    candidates = [number for number in everyone if not quality_of[number].worse_in]
    # Without those that are out: what seeds do to them says nothing of the others
    contest = Measure(
        [accuracy.scores[number] for number in candidates], is_share=accuracy.is_share
    )
    first = int(contest.means.argmax())
    others = [number for number in range(len(candidates)) if number != first]
    unbeaten = [number for number in others if not contest.is_above(first, number)]
    one_seed = [number for number in range(len(candidates)) if contest.num_seeds[number] == 1]
    # Those that another seed or pair could tell from the leader, and those that are told already
    open_ = [] if first in one_seed else [number for number in unbeaten if number not in one_seed]
    beaten = [number for number in others if number not in unbeaten]
    nearest = max(open_ or beaten, key=lambda number: contest.means[number], default=None)
    leader = candidates[first]
    wins = len(everyone) > 1 and not unbeaten and not quality_of[leader].doubtful_in
    intervals = [accuracy.interval(number) for number in everyone]
    for number, candidate in enumerate(candidates):
        intervals[candidate] = contest.interval(number)
    return Verdict(
        winner=leader if wins and first not in one_seed else None,
        leader=leader,
        accuracies=intervals,
        qualities=quality_of,
        unbeaten=[candidates[number] for number in unbeaten],
        nearest=None if nearest is None else candidates[nearest],
        lead=None if nearest is None else contest.difference(first, nearest),
        one_seed=[candidates[number] for number in one_seed],
        contest=contest,
        open_gap=(first, nearest) if open_ and nearest is not None else None,
    )


def _quality_of(number: int, qualities: Sequence[Quality]) -> Standing:
    worse: list[str] = []
    doubtful: list[str] = []
    for quality in qualities:
        measure = quality.measure
        best = int(measure.means.argmax())
        if measure.value(best) - measure.value(number) > quality.margin:
            shown = measure.falls_short(number)
            (worse if shown else doubtful).append(quality.name)
    intervals = [quality.measure.interval(number) for quality in qualities]
    return Standing(intervals, worse, doubtful)


def overoptimised(order: Sequence[int], accuracy: Measure, quality: Quality) -> int | None:
    """Return the first setting whose accuracy still rises while its quality is lost, if any.

    Args:
        order: settings that differ in beta alone, the one with the least preference first.
        accuracy: preference accuracy of all settings.
        quality: lost where it is shown to be below the best of those before, by more than the
            margin in the estimate.
    """
    measure = quality.measure
    for place in range(1, len(order)):
        here, before = order[place], order[:place]
        best = max(before, key=lambda number: measure.means[number])
        rises = accuracy.means[here] > accuracy.means[order[place - 1]]
        falls = measure.value(best) - measure.value(here) > quality.margin
        if rises and falls and measure.is_above_in_all(best, here):
            return here
    return None
