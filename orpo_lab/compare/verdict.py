"""Is setting A really better than setting B? Pure statistics over per-pair scores of seeds.

A setting (for example beta = 0.2) is trained with several seeds, and every run is scored on the
same held-out pairs. The figure of a run depends on chance in two ways: on which pairs were held
out, and on the effect of the seed on the run as a whole. The effect of the seed does not shrink
with more pairs. So an interval over pairs alone names winners that another seed would not confirm
(`benchmarks/verdict.py` counts how often). Here the variance of a mean covers both (two-way random
effects):

    Var(mean) = v / K + (Var_i(h_i) - e / K) / N

K is the number of seeds and N the number of pairs. h_i is the score of pair i, averaged over seeds.
e is the variance that chance adds to a single score. v is the variance between runs: the variance
of the seed's effect, plus e / N. Shares (accuracy, exact match) are compared as log-odds of the
mean share, on which a seed has the same effect in a good and in a mediocre setting. A share is
known to half a pair at best, so a share of 100 % has a variance, too.

**Settings scatter differently**: the seeds of a high beta may differ much, those of a low beta not
at all. So each setting has its own variance, with K - 1 degrees of freedom. Two settings are
compared by Welch's test (Biometrika 34, 1947, 28-35) with the degrees of freedom of Satterthwaite
(Biometrics Bulletin 2, 1946, 110-114). Three seeds can agree by chance. So a variance below the
variance pooled over all settings is replaced by the pooled one. A variance above the pooled one is
replaced only where ALIKE allows it.

The winner must beat every other setting, each in a separate test. This is an intersection-union
test (Berger, Technometrics 24, 1982, 295-300), which needs no correction for the number of tests.
"Worse in quality" may be said of any pair of settings. So it is tested by the studentized range
with the variance of each pair of settings (Games and Howell, Journal of Educational Statistics 1,
1976, 113-125). `benchmarks/verdict.py` simulates sweeps with a known truth, and counts how often
each statement is wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]

# One-sided level of every test. The level is below 0.05 for two reasons: Welch's degrees of freedom
# are an estimate, and the log-odds of a setting with very different seeds are skewed. In simulation
# these two make up the rest
LEVEL = 0.03
# A race looks several times: the shape of the boundary of its tests (`level_of_look`)
SHAPE = 0.15
# Confidence of a setting's two-sided interval
CONFIDENCE = 0.9
# A setting whose variance is somewhat above the pooled one gets the pooled variance, if chance
# explains the difference: if the ratio of the two is below this quantile of its F distribution. For
# that the pool needs at least MIN_POOL degrees of freedom
ALIKE, MIN_POOL = 0.9, 10
# Stands in for a standard error of zero
TINY = 1e-300
# Degrees of freedom of a variance that is known exactly
MAX_FREEDOM = 1e6
# "How many more seeds" is computed for this power, from this number of simulated sweeps
POWER, NUM_DRAWS = 0.8, 2000
# More seeds than MAX_SEEDS are never proposed, nor more than MAX_FACTOR times the present pairs
MAX_SEEDS, MAX_FACTOR = 50, 50


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval, whose ends are NaN with one seed or one pair."""

    estimate: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """Return the figures by name, as JSON has them: null for what does not exist."""
        return {key: None if math.isnan(value) else value for key, value in vars(self).items()}


def share_interval(num: int, total: int) -> Interval:
    """Return the share of `num` pairs of `total`, with Wilson's interval over pairs (1927)."""
    low, high = stats.binomtest(num, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(num / total, float(low), float(high))


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate, and the degrees of freedom of this variance."""

    variance: Array
    freedom: Array

    @property
    def error(self) -> Array:
        """The standard error of the estimate."""
        return np.sqrt(self.variance)

    def reach(self, level: float) -> Array:
        """Return the deviation to one side that chance exceeds with probability `level`.

        By Student's t.
        """
        return special.stdtrit(self.freedom, 1 - level) * self.error


class Measure:
    """One figure of every setting, given by a score for each seed and pair; S settings.

    Args:
        scores: for each setting [K, N]: a row with the scores of the N held-out pairs for each of
            its K seeds. Higher is better. K may differ between settings.
        is_share: whether every score is 0 or 1.
        max_seeds: the largest number of seeds of the race that the runs come from. None: the runs
            are looked at once.
    """

    def __init__(
        self, scores: Sequence[Array], *, is_share: bool, max_seeds: int | None = None
    ) -> None:
        self.scores = scores
        self.is_share = is_share
        self.max_seeds = max_seeds
        self.num_pairs = scores[0].shape[1]
        self.num_seeds = np.array([len(of_setting) for of_setting in scores])
        self.means = self._link(np.array([of_setting.mean() for of_setting in scores]))

    def _link(self, shares: Array) -> Array:
        """Return the log-odds of shares; figures that are no shares are returned unchanged.

        Half a pair is added to both sides, so that shares of 0 and 1 have finite log-odds.
        """
        if not self.is_share:
            return shares
        num = self.num_pairs
        return np.log((shares * num + 0.5) / (num - shares * num + 0.5))

    def _unlink(self, value: float) -> float:
        return float(1 / (1 + np.exp(-value))) if self.is_share else float(value)

    @cached_property
    def _slopes(self) -> Array:
        """The derivative of `_link` at the mean of every setting, [S] (delta method)."""
        if not self.is_share:
            return np.ones(len(self.scores))
        half = 0.5 / self.num_pairs
        shares = np.clip([of_setting.mean() for of_setting in self.scores], half, 1 - half)
        return 1 / (shares * (1 - shares))

    @cached_property
    def _by_pair(self) -> list[Array]:
        """For each setting, each pair's mean score over seeds, [N], on the scale of `_link`."""
        return [
            scores.mean(0) * slope for scores, slope in zip(self.scores, self._slopes, strict=True)
        ]

    @cached_property
    def _between(self) -> Array:
        """The variance between the runs of every setting, [S]; 0 for a setting with one run."""
        runs = [self._link(scores.mean(1)) for scores in self.scores]
        return np.array([shares.var(ddof=1) if len(shares) > 1 else 0.0 for shares in runs])

    @cached_property
    def _chance(self) -> Array:
        """For every setting, what chance in single scores adds to the variance of a run, [S]."""
        residuals = np.array([_residual(scores) for scores in self.scores])
        return residuals * self._slopes**2 / self.num_pairs

    def _by_run(
        self, between: Array, chance: Array, num_seeds: Array, *, min_pool: float
    ) -> tuple[Array, Array]:
        """Return the variance between every setting's runs and its degrees of freedom, [..., S].

        Args:
            between: the variance found between the runs of each setting, [..., S].
            chance: what chance in single scores adds to this variance, [S].
            num_seeds: number of seeds of every setting, [S].
            min_pool: the degrees of freedom that the pool needs to be used for a setting with three
                seeds or more that scatters somewhat more than the pool. A smaller pool is used only
                for settings that scatter less.
        """
        freedom = num_seeds - 1
        total = max(int(freedom.sum()), 1)
        seed = ((between - chance) * freedom).sum(-1, keepdims=True) / total
        pool = np.maximum(seed, 0) + chance
        own = np.maximum(between, chance)
        may_pool = (freedom > 1) & (total >= min_pool)
        limit = np.where(may_pool, special.fdtri(np.maximum(freedom, 1), total, ALIKE), 1.0)
        is_own = own > limit * pool
        # Two seeds say almost nothing about their variance, so they keep one degree of freedom
        return np.where(is_own, own, pool), np.where(is_own | (freedom == 1), freedom, total)

    @cached_property
    def _pooled(self) -> tuple[Array, Array]:
        return self._by_run(self._between, self._chance, self.num_seeds, min_pool=MIN_POOL)

    @cached_property
    def _safe(self) -> tuple[Array, Array]:
        return self._by_run(self._between, self._chance, self.num_seeds, min_pool=math.inf)

    def _pair_variance(self, a: int, b: int | None) -> float:
        """Return what the choice of pairs adds to the variance of a mean, or of a difference.

        Chance in single scores is not included. NaN: there is only one pair.
        """
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
            a: a setting.
            b: the other setting of a difference, if any.
            pooled: True: with the variances that the tests for the winner use. False: with the more
                careful variances that statements about any pair of settings need.
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
        """Return the sum of the variances of runs and pairs, with its degrees of freedom.

        The degrees of freedom are those of Satterthwaite. Both are [...], and NaN if a setting has
        one seed.
        """
        parts, rest = [], 1.0
        for index in settings:
            # With two seeds, the pairs' part of a setting is known no better than the runs' part
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

    def level(
        self, a: int, b: int, num_seeds: Array | None = None, *, of_all: bool = False
    ) -> float:
        """Return the one-sided level of the test of a difference.

        Args:
            a: a setting.
            b: the other setting.
            num_seeds: number of seeds of every setting, [S]; None: those at hand.
            of_all: False: the level of a test for the winner. It is lower if there are fewer than
                four settings, or six in a race: then it is more likely that chance puts one of
                equal settings above all others. True: the level of a statement about any pair of
                settings.
        """
        few = 4 if self.max_seeds is None else 6
        level = LEVEL if of_all else LEVEL * min(len(self.scores) / few, 1)
        if self.max_seeds is None:
            return level
        given = self.num_seeds if num_seeds is None else num_seeds
        return level_of_look(level, given[[a, b]], self.max_seeds)

    def value(self, a: int) -> float:
        """Return a setting's plain mean over pairs and seeds."""
        return float(self.scores[a].mean())

    def interval(self, a: int) -> Interval:
        """Return a setting's mean, with its interval over pairs and seeds."""
        spread = self.spread(a)
        reach = spread.reach((1 - CONFIDENCE) / 2)
        value = self.value(a)
        low, high = (self._unlink(self.means[a] + sign * reach) for sign in (-1, 1))
        # The half pairs that `_link` adds would leave an estimate of 0 or 1 outside the interval
        if self.is_share and value in (0.0, 1.0) and not math.isnan(low):
            low, high = min(low, value), max(high, value)
        return Interval(value, low, high)

    def difference(self, a: int, b: int) -> Interval:
        """Return how far setting `a` is above `b`, with the interval of the test for the winner.

        The interval of a share is converted from log-odds to a difference of shares. For this, `a`
        is fixed at its measured value.
        """
        spread = self.spread(a, b)
        reach = spread.reach(self.level(a, b))
        gap = self.means[a] - self.means[b]
        at = self._unlink(self.means[a])
        low, high = (at - self._unlink(self.means[a] - g) for g in (gap - reach, gap + reach))
        return Interval(self.value(a) - self.value(b), low, high)

    def is_above(self, a: int, b: int) -> bool:
        """Return whether `a` is shown to be above `b`: a one-sided test."""
        gap = self.means[a] - self.means[b]
        return bool(_shows(gap, self.spread(a, b), self.level(a, b)))

    def is_above_in_all(self, a: int, b: int) -> bool:
        """Return whether `a` is shown to be above `b`; the test covers all pairs of settings."""
        spread = self.spread(a, b, pooled=False)
        gap = self.means[a] - self.means[b]
        chance = 2 * special.stdtr(spread.freedom, -gap / max(spread.error, TINY))
        num, level = len(self.scores), self.level(a, b, of_all=True)
        # The probability of the studentized range takes 0.05 seconds, and lies between two bounds
        if not chance < level:
            return False
        if chance * num * (num - 1) / 2 < level:
            return True
        reached = math.sqrt(2) * gap / spread.error
        return bool(stats.studentized_range.sf(reached, num, spread.freedom) < level)

    def falls_short(self, a: int) -> bool:
        """Return whether any setting is shown to be above `a`; see `is_above_in_all`."""
        return any(self.is_above_in_all(number, a) for number in range(len(self.scores)))

    def seeds_needed(self, a: int, b: int) -> int | None:
        """Return how many seeds per setting would show the present gap; None: above MAX_SEEDS."""
        return _smallest(
            lambda num: self.power(a, b, np.full(len(self.scores), num), self.num_pairs),
            2,
            MAX_SEEDS,
        )

    def pairs_needed(self, a: int, b: int) -> int | None:
        """Return how many pairs would show the gap with the present seeds; None: too many."""
        return _smallest(
            lambda num: self.power(a, b, self.num_seeds, num),
            self.num_pairs + 1,
            MAX_FACTOR * self.num_pairs,
        )

    def outlook(self, a: int, b: int, num_seeds: Array) -> float:
        """Return roughly how often sweeps with so many seeds would show the present gap.

        As `power`, but as if all variances were known: quick, and somewhat too high for few seeds.
        """
        likely, _ = self._by_run(self._between, self._chance, self.num_seeds, min_pool=0)
        by_run = sum(likely[index] / num_seeds[index] for index in (a, b))
        error = max(math.sqrt(by_run + self._pair_variance(a, b)), TINY)
        needed = special.ndtri(self.level(a, b, num_seeds))
        return float(special.ndtr((self.means[a] - self.means[b]) / error + needed))

    def power(self, a: int, b: int, num_seeds: Array, num_pairs: int) -> float:
        """Return the share of NUM_DRAWS simulated sweeps in which the test shows the present gap.

        Args:
            a: the setting that is above.
            b: the other setting.
            num_seeds: number of seeds of every setting in these sweeps, [S].
            num_pairs: number of held-out pairs in these sweeps.
        """
        rng = np.random.default_rng(0)
        fewer = self.num_pairs / num_pairs
        # The likely variances, not the careful ones of the test
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
        return float(_shows(gaps, seen, self.level(a, b, num_seeds)).mean())


def level_of_look(level: float, num_seeds: Array, max_seeds: int) -> float:
    """Return the level of a test at one look of a race, so that all looks together err rarely.

    The boundary is that of Wang and Tsiatis (Biometrics 43, 1987, 193-199). A difference must reach
    z t^(SHAPE - 1/2) standard errors. Here z is the quantile of `level`, and t is the share of the
    information that the race may at most collect. SHAPE = 1/2 is Pocock's boundary, SHAPE = 0 that
    of O'Brien and Fleming. Which settings get seeds does not enter.

    Args:
        level: the level of the test with `max_seeds` seeds for both settings.
        num_seeds: number of seeds of the two settings, [2].
        max_seeds: the largest number of seeds that the race gives to a setting.
    """
    share = min(2 / (1 / num_seeds).sum() / max_seeds, 1.0)
    return float(special.ndtr(special.ndtri(level) * share ** (SHAPE - 0.5)))


def _shows(gap: Array, spread: Spread, level: float) -> NDArray[np.bool_]:
    return (gap > 0) & (gap > spread.reach(level))


def _residual(scores: Array) -> float:
    """Return the variance in scores [K, N] that neither the pair nor the run explains."""
    num_seeds, num_pairs = scores.shape
    if num_seeds == 1 or num_pairs == 1:
        return 0.0
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    return float((rest**2).sum() / ((num_seeds - 1) * (num_pairs - 1)))


def _smallest(power: Callable[[int], float], low: int, high: int) -> int | None:
    """Return the smallest number from `low` to `high` with power POWER or more; None: no number."""
    if power(high) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Quality:
    """A figure at whose cost preference accuracy must not rise."""

    name: str
    unit: str
    """Unit of the margin; empty: there is no unit."""
    measure: Measure
    margin: float
    """How far below the best setting's a value may be and still count as not worse."""
    sign: int = 1
    """-1: reports show the figure with the opposite sign, and lower is better there."""


@dataclass(frozen=True)
class Standing:
    """The qualities of one setting, and how they compare with those of the best settings."""

    intervals: list[Interval]
    worse_in: list[str]
    """Qualities whose estimate is worse by more than the margin, and that are shown to be worse."""
    doubtful_in: list[str]
    """Qualities whose estimate is worse by more than the margin, but perhaps by chance."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison; settings are given by their numbers."""

    winner: int | None
    """The setting that wins; None: the evidence does not name a winner."""
    leader: int
    """The setting with the highest preference accuracy among those of good quality."""
    accuracies: list[Interval]
    """Preference accuracy of every setting."""
    qualities: list[Standing]
    best_in: dict[str, int]
    """The best setting of each quality, by the quality's name."""
    unbeaten: list[int]
    """Settings of good quality that the leader is not shown to beat."""
    nearest: int | None
    """The highest of `unbeaten` with several seeds; without such, the highest beaten setting. None:
    there is neither, or the leader has one seed."""
    lead: Interval | None
    """How far the leader is above `nearest`."""
    one_seed: list[int]
    """Settings of good quality with one seed, which can neither win nor be beaten."""
    in_contest: list[int]
    """Settings of good quality."""
    contest: Measure
    """Preference accuracy of the settings of good quality, in the same order."""
    open_gap: tuple[int, int] | None
    """Numbers in `contest` of the leader and of `nearest`, if more seeds or pairs may separate
    them."""

    @cached_property
    def seeds_needed(self) -> int | None:
        """Number of seeds per setting that would show `open_gap`.

        None: more than MAX_SEEDS, or there is no open gap.
        """
        return self.contest.seeds_needed(*self.open_gap) if self.open_gap else None

    @cached_property
    def pairs_needed(self) -> int | None:
        """Number of held-out pairs that would show `open_gap` with the present seeds.

        None: MAX_FACTOR times the present pairs would not show it, or there is no open gap.
        """
        return self.contest.pairs_needed(*self.open_gap) if self.open_gap else None


def decide(accuracy: Measure, qualities: Sequence[Quality]) -> Verdict:
    """Compare settings: name the winner, or say that the evidence names none.

    A setting is out if one of its qualities is worse: the estimate is below the best setting's by
    more than the margin, and the quality is shown to be below that of some setting. All other
    settings are of good quality. The leader is the one of them with the highest preference
    accuracy. The leader wins if it is shown to be above each of the others, and none of its own
    qualities is below the margin. A setting with one seed can neither win nor be beaten. If there
    is only one setting, there is no winner.

    Args:
        accuracy: per-pair preference accuracy, 0 or 1, of every setting.
        qualities: the qualities of the same settings, in the same order.
    """
    everyone = range(len(accuracy.scores))
    quality_of = [_quality_of(number, qualities) for number in everyone]
    candidates = [number for number in everyone if not quality_of[number].worse_in]
    # Settings that are out do not take part: their variance says nothing about the others
    contest = Measure(
        [accuracy.scores[number] for number in candidates],
        is_share=accuracy.is_share,
        max_seeds=accuracy.max_seeds,
    )
    first = int(contest.means.argmax())
    others = [number for number in range(len(candidates)) if number != first]
    unbeaten = [number for number in others if not contest.is_above(first, number)]
    one_seed = [number for number in range(len(candidates)) if contest.num_seeds[number] == 1]
    # Settings that more seeds or pairs could separate from the leader, then the separated ones
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
        best_in={quality.name: int(quality.measure.means.argmax()) for quality in qualities},
        unbeaten=[candidates[number] for number in unbeaten],
        nearest=None if nearest is None else candidates[nearest],
        lead=None if nearest is None else contest.difference(first, nearest),
        one_seed=[candidates[number] for number in one_seed],
        in_contest=candidates,
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
    """Return the first setting whose accuracy still rises while its quality is lost; None: none.

    A quality is lost if its estimate is below the best of the settings before by more than the
    margin, and if it is shown to be below that setting's.

    Args:
        order: settings that differ in beta alone, the setting with the least preference first.
        accuracy: preference accuracy of all settings.
        quality: a quality of all settings.
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
