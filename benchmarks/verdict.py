"""How often a verdict is right, by simulation: `python benchmarks/verdict.py [part ...]`.

Sweeps with a planted truth: a pair is preferred rightly where a latent score is positive, which is
a setting's level, plus what the pair is worth to all settings, plus what it is worth to this one,
plus what the run is worth, plus noise. All but the run have a variance of 1 together (`PARTS`); the
run's standard deviation is the setting's own. Two settings are equal where their mean shares are.
Parts (all of them: an hour on a core):

    winners: sweeps in which a setting is named that is not the best, in SITUATIONS
    bootstrap: the same of a bootstrap over pairs alone
    power: sweeps in which a lead is found, all seeds scattering alike
    worse: sweeps in which any of several equal settings is worse in quality
    worse_looks: the same in any look of a race
    coverage: how often a setting's interval holds its share
    needed: how often as many pairs or seeds as a sweep asks for show the gap
    bound: what rules could do that know all that a verdict has to estimate
    race: what races over seeds name and take, beside sweeps of as many seeds for every setting
    close: the same where races come close to what is allowed, in ten times as many sweeps
    from_one: the same of races that begin with one seed
    of_two: what a race of two settings could do that knew all variances
    pairing: what tests on pairs of runs of one seed would name (some minutes, as the race)

Beside ours stand the rule before 2026-11-27, which pools the variance between seeds over all
settings (`pooled`). The last line is one JSON object.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy import special, stats

from orpo_lab.compare.race import next_step
from orpo_lab.compare.verdict import LEVEL, POWER, SHAPE, Array, Measure, Quality, decide

NUM_SETTINGS = 8
NUM_SWEEPS = 1000
RUN_EFFECT = 0.2
# Variances: what a pair is worth to all settings, to one of them, and noise
PARTS = (0.35, 0.25, 0.4)
RESAMPLES = 400
# False winners allowed to a rule of `bound`, a share of sweeps
ALLOWED = 17 / 200
BOUND_SWEEPS = 2000
DRAWS = 400_000
QUIET, NOISY = 0.1, 0.8
# Races: sweeps of each kind, seeds at the beginning and at most, how much one in log-odds is on the
# latent scale (at a share of 0.85), and how much of the runs' variance may be the seed's
NUM_RACES = 400
MIN_SEEDS, MAX_SEEDS = 2, 5
LOG_ODDS = 0.85 * 0.15 / stats.norm.pdf(stats.norm.ppf(0.85))
SHARED = 0.7
# Where 400 races come to what is allowed or close to it, and are too few to tell
CLOSE = (
    "2 equal, one noisy, seeds shared",
    "3 equal, one noisy",
    "2 lead equally, one noisy",
    "2 lead equally, one noisy, seeds shared",
    "8, one leads, 200 pairs",
    "8, one leads, 500 pairs",
)
NUM_CLOSE = 4000


@dataclass(frozen=True)
class Situation:
    """A planted truth."""

    shares: Array
    run_effects: Array
    num_seeds: Sequence[int]
    num_pairs: int = 500
    parts: tuple[float, float, float] = PARTS
    best: int | None = None
    """The setting that is truly above all others; None: there is none."""
    allowed: float = 0.065
    """Sweeps that may name another."""
    shared: float = 0.0
    """The share of the runs' variance that runs of one seed have in common."""


def draw(
    rng: Generator,
    shares: ArrayLike,
    num_seeds: Sequence[int],
    num_pairs: int,
    run_effects: ArrayLike = RUN_EFFECT,
    parts: tuple[float, float, float] = PARTS,
    shared: float = 0.0,
) -> list[Array]:
    """Return 0/1 scores [K, N] of every setting, whose mean over runs is the setting's share."""
    shares, run_effects = np.broadcast_arrays(shares, run_effects)
    levels = stats.norm.ppf(shares) * np.sqrt(1 + run_effects**2)
    pair, own, noise = (np.sqrt(part) for part in parts)
    pairs = pair * rng.standard_normal(num_pairs)
    of_seeds = np.sqrt(shared) * rng.standard_normal((max(num_seeds), 1)) if shared else 0.0
    alone = np.sqrt(1 - shared)
    return [
        (
            level
            + effect * (alone * rng.standard_normal((num, 1)) + np.resize(of_seeds, (num, 1)))
            + pairs
            + own * rng.standard_normal(num_pairs)
            + noise * rng.standard_normal((num, num_pairs))
            > 0
        ).astype(float)
        for level, effect, num in zip(levels, run_effects, num_seeds, strict=True)
    ]


def equal(
    effects: Sequence[float],
    num_seeds: int | Sequence[int] = 3,
    *,
    share: float = 0.85,
    lead: float = 0.0,
    num_leaders: int = 0,
    **more: Any,
) -> Situation:
    """Return settings with these run effects and one share, but for those that lead."""
    num = len(effects)
    seeds = [num_seeds] * num if isinstance(num_seeds, int) else num_seeds
    shares = np.where(np.arange(num) < num_leaders, share + lead, share)
    return Situation(shares, np.array(effects), seeds, **more)


def situations() -> dict[str, Situation]:
    """Return what may name a false winner."""
    quiet = [QUIET] * 7
    two = [NOISY, QUIET]
    tied: dict[str, Any] = {"lead": 0.08, "num_leaders": 2, "allowed": 0.12}
    worse: dict[str, Any] = {"lead": -0.03, "num_leaders": 1}
    deterministic = (0.35, 0.64, 0.01)
    at_ceiling = {
        f"{share:.1%} right, {num} settings, {num_seeds} x {num_pairs}": equal(
            [QUIET] * num, num_seeds, share=share, num_pairs=num_pairs, parts=deterministic
        )
        for share, num_seeds, num_pairs in (
            (0.95, 3, 64),
            (0.98, 3, 32),
            (0.98, 5, 64),
            (0.995, 3, 200),
        )
        for num in (2, 8)
    }
    return {
        "2 equal, alike": equal([RUN_EFFECT] * 2),
        "8 equal, alike": equal([RUN_EFFECT] * 8),
        "2 equal, one noisy": equal(two),
        "8 equal, one noisy": equal([NOISY, *quiet]),
        "8 equal, half noisy": equal([NOISY] * 4 + [QUIET] * 4),
        "8 equal, from 0.05 to 1": equal(list(np.geomspace(0.05, 1, 8))),
        "3 equal, one noisy": equal([NOISY, QUIET, QUIET]),
        "4 equal, one at 0.4": equal([0.4, QUIET, QUIET, QUIET]),
        "2 lead equally, alike": equal([RUN_EFFECT] * 8, **tied),
        "2 lead equally, one noisy": equal([NOISY, *quiet], **tied),
        "2 lead equally, both noisy": equal([NOISY, NOISY, *quiet[1:]], **tied),
        "2 lead equally, one at 0.3": equal([0.3, *quiet], **tied),
        "noisy 3 points worse, of 2": equal(two, best=1, **worse),
        "noisy 3 points worse, of 8": equal([NOISY, *quiet], **worse),
        "noisy with 1 seed against 3": equal(two, [1, 3]),
        "noisy with 2 seeds against 3": equal(two, [2, 3]),
        "noisy with 2 seeds against 6": equal(two, [2, 6]),
        "noisy with 1 seed against 3, of 8": equal([NOISY, *quiet], [1] + [3] * 7),
        "noisy with 2 seeds against 3, of 8": equal([NOISY, *quiet], [2] + [3] * 7),
        "noisy with 2 seeds against 6, of 8": equal([NOISY, *quiet], [2] + [6] * 7),
        **at_ceiling,
    }


def race_situations() -> dict[str, Situation]:
    """Return what races are tried on: no difference, one leader, two leaders; MAX_SEEDS seeds.

    Each with runs that share a part of their seed's effect, and with runs that share none.
    """
    quiet, noisy = 0.1 * LOG_ODDS, 0.8 * LOG_ODDS
    mixed = [noisy, *[quiet] * 7]
    spread = list(np.geomspace(quiet, noisy, 8))
    alike = [RUN_EFFECT] * 8
    none: dict[str, Any] = {"allowed": 0.05}
    one: dict[str, Any] = {"num_leaders": 1, "best": 0, "allowed": 0.05}
    tied: dict[str, Any] = {"lead": 0.08, "num_leaders": 2, "allowed": 0.12}
    steps = np.array([0.95, 0.87, 0.85, 0.82, 0.78, 0.74, 0.66, 0.55])
    found = {
        "2 equal, alike": equal([RUN_EFFECT] * 2, MAX_SEEDS, **none),
        "2 equal, one noisy": equal([noisy, quiet], MAX_SEEDS, **none),
        "3 equal, one noisy": equal([noisy, quiet, quiet], MAX_SEEDS, **none),
        "8 equal, alike": equal(alike, MAX_SEEDS, **none),
        "8 equal, one noisy": equal(mixed, MAX_SEEDS, **none),
        "8 equal, from 0.1 to 0.8": equal(spread, MAX_SEEDS, **none),
        "2, one leads": equal([RUN_EFFECT] * 2, MAX_SEEDS, lead=0.09, **one),
        "8, one leads, 200 pairs": equal(alike, MAX_SEEDS, lead=0.1, num_pairs=200, **one),
        "8, one leads, 500 pairs": equal(alike, MAX_SEEDS, share=0.88, lead=0.077, **one),
        "8, one leads, from 0.1 to 0.8": equal(spread, MAX_SEEDS, share=0.8, lead=0.15, **one),
        "8, one leads, in steps": replace(equal(alike, MAX_SEEDS, **one), shares=steps),
        "2 lead equally, alike": equal(alike, MAX_SEEDS, **tied),
        "2 lead equally, one noisy": equal(mixed, MAX_SEEDS, **tied),
        "2 lead equally, 0.8 to 0.1": equal(spread[::-1], MAX_SEEDS, **tied),
    }
    return found | {
        f"{name}, seeds shared": replace(situation, shared=SHARED)
        for name, situation in found.items()
    }


def ours(accuracy: list[Array]) -> int | None:
    """Return the winner that the verdict names."""
    return decide(Measure(accuracy, is_share=True), []).winner


def pooled(accuracy: list[Array]) -> int | None:
    """Return the winner by the rule before: one variance between seeds for all settings."""
    num_pairs = accuracy[0].shape[1]
    runs = [special.logit((setting.sum(1) + 0.5) / (num_pairs + 1)) for setting in accuracy]
    means = np.array([run.mean() for run in runs])
    shares = np.clip([setting.mean() for setting in accuracy], 0.5 / num_pairs, 1 - 0.5 / num_pairs)
    slopes = 1 / (shares * (1 - shares))
    freedom = sum(len(setting) - 1 for setting in accuracy)
    between = sum(
        ((run - run.mean()) ** 2).sum() - (len(setting) - 1) * _chance(setting) * slope**2
        for run, setting, slope in zip(runs, accuracy, slopes, strict=True)
    )
    variance = max(between / freedom, 0.0)
    best = int(means.argmax())
    for other in range(len(accuracy)):
        h = accuracy[best].mean(0) * slopes[best] - accuracy[other].mean(0) * slopes[other]
        seeds = 1 / len(accuracy[best]) + 1 / len(accuracy[other])
        error = np.sqrt(variance * seeds + h.var(ddof=1) / num_pairs)
        if other != best and means[best] - means[other] <= special.stdtrit(freedom, 0.95) * error:
            return None
    return best


def _chance(scores: Array) -> float:
    """Return what chance in the pairs adds to the variance of a run's share."""
    num_seeds, num_pairs = scores.shape
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    return float((rest**2).sum() / max(num_seeds - 1, 1) / (num_pairs - 1) / num_pairs)


def pairs_only(scores: list[Array], rng: Generator) -> int | None:
    """Return the winner of a bootstrap over pairs, which takes the runs at hand for the setting."""
    means = np.stack([setting.mean(0) for setting in scores])
    best = int(means.mean(1).argmax())
    num = means.shape[1]
    weights = rng.multinomial(num, np.full(num, 1 / num), size=RESAMPLES) / num
    leads = (means[best] - np.delete(means, best, axis=0)) @ weights.T
    return best if (np.quantile(leads, 0.025, axis=1) > 0).all() else None


def sweeps(
    situation: Situation, *, seed: int = 0, num_sweeps: int | None = None
) -> Iterator[list[Array]]:
    """Return the preference accuracies of sweeps; NUM_SWEEPS if no number is given."""
    rng = np.random.default_rng(seed)
    sizes = situation.num_seeds, situation.num_pairs
    for _ in range(num_sweeps or NUM_SWEEPS):
        effects = situation.run_effects
        yield draw(rng, situation.shares, *sizes, effects, situation.parts, situation.shared)


def count(
    situation: Situation,
    rules: Mapping[str, Callable[[list[Array]], int | None]] | None = None,
    *,
    num_sweeps: int | None = None,
) -> dict[str, float]:
    """Return the shares of sweeps in which each rule names a false winner, and the best setting.

    Args:
        situation: the planted truth.
        rules: by name; None: `ours` alone.
        num_sweeps: None: NUM_SWEEPS.
    """
    rules = rules or {"ours": ours}
    found = dict.fromkeys([f"{name}_{what}" for name in rules for what in ("false", "best")], 0)
    for accuracy in sweeps(situation, num_sweeps=num_sweeps):
        for name, rule in rules.items():
            winner = rule(accuracy)
            found[f"{name}_false"] += winner not in (None, situation.best)
            found[f"{name}_best"] += winner is not None and winner == situation.best
    return {name: num / (num_sweeps or NUM_SWEEPS) for name, num in found.items()}


def winners() -> Iterator[tuple[str, dict[str, float]]]:
    """Count false winners, by the rule before, too."""
    for name, situation in situations().items():
        counts = count(situation, {"ours": ours, "pooled": pooled})
        yield name, {**counts, "allowed": situation.allowed}


def bootstrap() -> Iterator[tuple[str, dict[str, float]]]:
    """Count false winners of a bootstrap over pairs among equal settings that scatter alike."""
    rng = np.random.default_rng(1)
    rules = {"ours": ours, "pairs_only": lambda accuracy: pairs_only(accuracy, rng)}
    for share in (0.8, 0.9):
        for num_seeds, num_pairs in ((2, 200), (3, 200), (3, 500)):
            alike = equal([RUN_EFFECT] * NUM_SETTINGS, num_seeds, share=share, num_pairs=num_pairs)
            yield f"8 equal, {share}, {num_seeds} x {num_pairs}", count(alike, rules)


def power() -> Iterator[tuple[str, dict[str, float]]]:
    """Count leads that are found where all seeds scatter alike."""
    for num_settings in (2, NUM_SETTINGS):
        for base, lead, num_pairs in ((0.85, 0.1, 200), (0.85, 0.08, 500), (0.88, 0.08, 500)):
            for num_seeds in (2, 3, 4, 5, 6):
                situation = equal(
                    [RUN_EFFECT] * num_settings,
                    num_seeds,
                    share=base,
                    lead=lead,
                    num_leaders=1,
                    num_pairs=num_pairs,
                    best=0,
                )
                name = f"{num_settings} settings, {lead} above {base}, {num_seeds} x {num_pairs}"
                yield name, count(situation, {"ours": ours, "pooled": pooled})


def likelihoods(rng: Generator, run_effects: Array, num_seeds: int, num_pairs: int) -> list[Array]:
    """Return NLLs [K, N] of equal settings: of the pair, of the setting, of the run, and noise."""
    pairs = rng.standard_normal(num_pairs)
    return [
        pairs
        + 0.3 * rng.standard_normal(num_pairs)
        + 0.3 * rng.standard_normal((num_seeds, num_pairs))
        + effect * rng.standard_normal((num_seeds, 1))
        for effect in run_effects
    ]


def worse() -> Iterator[tuple[str, dict[str, float]]]:
    """Count sweeps of equal settings in which any is shown to be worse than another."""
    for num_settings in (2, 8, 20):
        for name, noisy in (("alike", 0), ("one noisy", 1), ("half noisy", num_settings // 2)):
            effects = np.where(np.arange(num_settings) < noisy, 0.4, 0.05)
            for num_seeds in (2, 3, 5):
                rng = np.random.default_rng(0)
                found = sum(
                    any_worse(likelihoods(rng, effects, num_seeds, 100)) for _ in range(NUM_SWEEPS)
                )
                what = f"{num_settings} settings, {name}, {num_seeds} x 100"
                yield what, {"worse": found / NUM_SWEEPS}


def any_worse(scores: list[Array], max_seeds: int | None = None) -> bool:
    """Return whether a verdict takes any setting out for its quality, whatever the margin."""
    measure = Measure(scores, is_share=False, max_seeds=max_seeds)
    quality = Quality("nll", "nats", measure, margin=0.0)
    standings = decide(Measure([np.ones((2, 2))] * len(scores), is_share=True), [quality]).qualities
    return any(standing.worse_in for standing in standings)


def worse_looks() -> Iterator[tuple[str, dict[str, float]]]:
    """Count races of equal settings in which any look shows a setting to be worse than another.

    Every setting gets every seed, since a race that ends early looks less often.
    """
    looks = range(MIN_SEEDS, MAX_SEEDS + 1)
    for num_settings in (2, 8, 20):
        for name, noisy in (("alike", 0), ("one noisy", 1), ("half noisy", num_settings // 2)):
            effects = np.where(np.arange(num_settings) < noisy, 0.4, 0.05)
            rng, found = np.random.default_rng(0), 0
            for _ in range(NUM_RACES):
                scores = likelihoods(rng, effects, MAX_SEEDS, 100)
                found += any(any_worse([s[:num] for s in scores], MAX_SEEDS) for num in looks)
            what = f"{num_settings} settings, {name}, looks at {MIN_SEEDS} to {MAX_SEEDS} seeds"
            yield what, {"worse": found / NUM_RACES}


def coverage() -> Iterator[tuple[str, dict[str, float]]]:
    """Count intervals that hold their setting's share."""
    for num_settings, effect in ((2, RUN_EFFECT), (8, RUN_EFFECT), (2, NOISY)):
        for share in (0.8, 0.85, 0.9, 0.95, 0.98, 0.995):
            for num_pairs in (32, 64, 100, 200, 500):
                held = 0
                alike = equal([effect] * num_settings, share=share, num_pairs=num_pairs)
                for accuracy in sweeps(alike):
                    interval = Measure(accuracy, is_share=True).interval(0)
                    held += interval.low <= share <= interval.high
                name = f"{num_settings} settings at {effect}, share {share}, 3 x {num_pairs}"
                yield name, {"coverage": held / NUM_SWEEPS}


def needed() -> Iterator[tuple[str, dict[str, float]]]:
    """Count gaps that are shown with as many pairs, or seeds, as are asked for.

    `asked` knows the truth as well as 200 seeds on 5000 pairs do, `typical` is the median of what
    sweeps of the size of now ask for.
    """
    for what, num_settings, effect, lead, num_seeds, num_pairs in (
        ("pairs", 2, 0.05, 0.06, 4, 100),
        ("pairs", 8, 0.05, 0.06, 4, 100),
        ("pairs", 8, 0.1, 0.06, 6, 100),
        ("seeds", 2, 0.2, 0.06, 4, 500),
        ("seeds", 8, 0.2, 0.06, 3, 500),
        ("seeds", 8, 0.3, 0.08, 3, 500),
    ):
        truth = equal([effect] * num_settings, lead=lead, num_leaders=1)
        now = replace(truth, num_seeds=[num_seeds] * num_settings, num_pairs=num_pairs)
        known = replace(truth, num_seeds=[200] * num_settings, num_pairs=5000)
        exact = Measure(next(sweeps(known)), is_share=True)
        if what == "pairs":
            seeds = np.array(now.num_seeds)
            asked = next(n for n in count_from(10, 10) if exact.power(0, 1, seeds, n) >= POWER)
            then = replace(now, num_pairs=asked)
        else:
            asked = next(
                n
                for n in count_from(2)
                if exact.power(0, 1, np.full(num_settings, n), num_pairs) >= POWER
            )
            then = replace(now, num_seeds=[asked] * num_settings)
        typical = [
            (measure.pairs_needed if what == "pairs" else measure.seeds_needed)(0, 1) or np.inf
            for measure in (Measure(accuracy, is_share=True) for accuracy in sweeps(now))
        ]
        shown = [
            Measure(accuracy, is_share=True).is_above(0, 1) for accuracy in sweeps(then, seed=1)
        ]
        yield (
            f"{what}, {num_settings} settings, run effect {effect}, now {num_seeds} x {num_pairs}",
            {"asked": asked, "shown": float(np.mean(shown)), "typical": float(np.median(typical))},
        )


def planted(base: float, lead: float, num_leaders: int) -> Array:
    """Return every setting's share: the first ones lead the others, which are equal."""
    return np.where(np.arange(NUM_SETTINGS) < num_leaders, base + lead, base)


def latent_means(rng: Generator, shares: Array, num_seeds: int, num_pairs: int) -> Array:
    """Return the settings' levels as BOUND_SWEEPS sweeps show them, [BOUND_SWEEPS, NUM_SETTINGS].

    By the inverse of the law that the scores follow, so that a run moves every level alike.
    """
    seeds = [num_seeds] * len(shares)
    drawn = (draw(rng, shares, seeds, num_pairs) for _ in range(BOUND_SWEEPS))
    right = np.array([[setting.sum(1) for setting in scores] for scores in drawn])
    return stats.norm.ppf((right + 0.5) / (num_pairs + 1)).mean(2)


def bound(base: float, lead: float, num_seeds: int, num_pairs: int) -> dict[str, float]:
    """Return how often rules that know the law name a winner, as shares of BOUND_SWEEPS sweeps.

    They know the lead, the standard errors, and where to draw the line for a winner in ALLOWED of
    the sweeps without the planted truth. Nothing is estimated but which setting leads. (All
    settings share their standard error, so that to divide by it would change nothing.)

    second, mean: the best above the second best, and above the mean of the others, the line drawn
        by sweeps of equal settings. The latter is the most powerful of all that treat settings
        alike (Paulson 1952).
    tie: the likelihood ratio of the planted truth to a tie, the line drawn by sweeps in which two
        settings share half the lead (on the latent scale). By the lemma of Neyman and Pearson,
        nothing finds the planted lead more often that names one of such two in ALLOWED only
        (both on the settings' means, which are as good as normal).

    Each is counted where one setting leads (`_planted`), and where two do (`_tied`), of which
    neither is the better.
    """
    rng = np.random.default_rng(2)
    halfway = stats.norm.cdf(stats.norm.ppf([base, base + lead]).mean())
    equal, leading, tied, half_tied = (
        latent_means(rng, shares, num_seeds, num_pairs)
        for shares in (
            planted(base, 0.0, 0),
            planted(base, lead, 1),
            planted(base, lead, 2),
            planted(base, halfway - base, 2),
        )
    )
    gap = leading[:, :1] - leading[:, 1:]
    slope = gap.mean() / gap.var()
    rules: dict[str, tuple[Callable[[Array, Array], Array], Array]] = {
        "second": (lambda best, rest: best - rest.max(1), equal),
        "mean": (lambda best, rest: best - rest.mean(1), equal),
        "tie": (
            lambda best, rest: -special.logsumexp(slope * (rest - best[:, None]), axis=1),
            half_tied,
        ),
    }
    found: dict[str, float] = {}
    for name, (rule, null) in rules.items():
        of_null, of_leading, of_tied = (
            rule(ordered[:, -1], ordered[:, :-1])
            for ordered in (np.sort(means, axis=1) for means in (null, leading, tied))
        )
        line = np.quantile(of_null, 1 - ALLOWED)
        right = leading.argmax(1) == 0
        found[f"{name}_planted"] = float((right & (of_leading > line)).mean())
        found[f"{name}_tied"] = float((of_tied > line).mean())
    return found


def bounds() -> Iterator[tuple[str, dict[str, float]]]:
    """Count what rules find that know all but which setting leads."""
    for base, lead, num_seeds, num_pairs in ((0.85, 0.1, 3, 200), (0.88, 0.08, 3, 500)):
        name = f"{lead} above {base}, {num_seeds} x {num_pairs}"
        yield name, bound(base, lead, num_seeds, num_pairs)


def raced(accuracy: list[Array], num_seeds: int) -> tuple[int | None, int]:
    """Return the winner of a race and its number of runs.

    Args:
        accuracy: as many runs of every setting as the race may take.
        num_seeds: number of seeds with which every setting begins.
    """
    most, given = len(accuracy[0]), np.full(len(accuracy), num_seeds)
    while True:
        so_far = [runs[:num] for runs, num in zip(accuracy, given, strict=True)]
        verdict = decide(Measure(so_far, is_share=True, max_seeds=most), [])
        more = next_step(verdict, given.tolist(), most).more
        if not more:
            return verdict.winner, int(given.sum())
        given[more] += 1


def known(shape: float) -> dict[str, float]:
    """Return what a race of two settings could do that knew all variances.

    A lead that one look at the end finds in POWER of the races, at one level; here with looks after
    2 seeds up to MAX_SEEDS, by the boundary of the verdict (`level_of_look`), and at the same level
    over all looks together. The race ends with the first look that shows the lead, and at no look
    for want of hope: that would cost power.

    Args:
        shape: of the boundary, from 0 (O'Brien and Fleming) to 0.5 (Pocock).
    """
    level = LEVEL / 2
    share = np.arange(MIN_SEEDS, MAX_SEEDS + 1) / MAX_SEEDS
    steps = np.sqrt(np.diff(share, prepend=0))
    noise = (np.random.default_rng(3).standard_normal((DRAWS, len(share))) * steps).cumsum(1)
    noise /= np.sqrt(share)
    # The boundary's constant, such that noise alone crosses the boundary at `level` of the races
    highest = (noise * share ** (0.5 - shape)).max(1)
    boundary = np.quantile(highest, 1 - level) * share ** (shape - 0.5)
    lead = stats.norm.isf(level) + stats.norm.ppf(POWER)
    shown = noise + lead * np.sqrt(share) > boundary
    ends = np.where(shown.any(1), share[shown.argmax(1)], 1.0)
    return {"found": float(shown.any(1).mean()), "runs": float(ends.mean())}


def of_two() -> Iterator[tuple[str, dict[str, float]]]:
    """Return what races of two settings could do at best, for boundaries of several shapes."""
    for shape in (0.0, SHAPE, 0.3, 0.5):
        yield f"shape {shape:g}", known(shape)


def paired(accuracy: list[Array]) -> int | None:
    """Return the winner by tests on the differences of runs of one seed, for each pair of settings.

    No variance of a difference is below the mean of these variances, as in the verdict.
    """
    measure = Measure(accuracy, is_share=True)
    num_pairs, num_seeds = measure.num_pairs, len(accuracy[0])
    runs = special.logit((np.stack(accuracy).sum(2) + 0.5) / (num_pairs + 1))
    best = int(measure.means.argmax())
    others = [number for number in range(len(accuracy)) if number != best]
    own = (runs[best] - runs[others]).var(axis=1, ddof=1)
    shares = np.clip([setting.mean() for setting in accuracy], 0.5 / num_pairs, 1 - 0.5 / num_pairs)
    by_pair = np.stack([setting.mean(0) for setting in accuracy]) / (shares * (1 - shares))[:, None]
    for number, of_runs in zip(others, np.maximum(own, own.mean()), strict=True):
        of_pairs = (by_pair[best] - by_pair[number]).var(ddof=1) / num_pairs
        error = np.sqrt(of_runs / num_seeds + of_pairs)
        reach = special.stdtrit(num_seeds - 1, 1 - measure.level(best, number)) * error
        if measure.means[best] - measure.means[number] <= reach:
            return None
    return best


def races(
    names: Sequence[str] | None = None, num_races: int = NUM_RACES, min_seeds: int = MIN_SEEDS
) -> Iterator[tuple[str, dict[str, float]]]:
    """Count what races find and take, beside sweeps of MAX_SEEDS seeds for every setting.

    Args:
        names: of situations; None: all.
        num_races: number of races in each.
        min_seeds: number of seeds with which every setting begins.
    """
    situations = race_situations()
    for name in names or situations:
        situation = situations[name]
        num_runs: list[int] = []

        def race(accuracy: list[Array], num_runs: list[int] = num_runs) -> int | None:
            winner, num = raced(accuracy, min_seeds)
            num_runs.append(num)
            return winner

        counts = count(situation, {"race": race, "fixed": ours}, num_sweeps=num_races)
        share = float(np.mean(num_runs)) / (MAX_SEEDS * len(situation.shares))
        yield name, {**counts, "race_runs": share, "allowed": situation.allowed}


def pairing() -> Iterator[tuple[str, dict[str, float]]]:
    """Count what tests on pairs of runs name, in sweeps of MAX_SEEDS seeds for every setting."""
    for name, situation in race_situations().items():
        rules = {"paired": paired, "ours": ours}
        yield name, count(situation, rules, num_sweeps=NUM_RACES)


PARTS_OF_THIS: dict[str, Callable[[], Iterator[tuple[str, dict[str, float]]]]] = {
    "winners": winners,
    "bootstrap": bootstrap,
    "power": power,
    "worse": worse,
    "worse_looks": worse_looks,
    "coverage": coverage,
    "needed": needed,
    "bound": bounds,
    "race": races,
    "close": lambda: races(CLOSE, NUM_CLOSE),
    "from_one": lambda: races(min_seeds=1),
    "of_two": of_two,
    "pairing": pairing,
}


def main(asked: Sequence[str]) -> None:
    """Count and print."""
    report: dict[str, Any] = {"num_sweeps": NUM_SWEEPS}
    for part in asked or PARTS_OF_THIS:
        report[part] = {}
        for name, counts in PARTS_OF_THIS[part]():
            report[part][name] = counts
            print(f"{part}: {name}: {counts}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
