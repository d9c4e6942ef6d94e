"""How often a verdict is right, by simulation: `python benchmarks/verdict.py`, two minutes.

Sweeps of eight settings with a planted truth: a pair is preferred rightly where a latent score is
positive, which is a setting's level, plus what the pair is worth, plus what the run is worth, plus
noise. Pairs and noise have a standard deviation of 1 together, in halves of the variance; the run's
is 0.2. Answers are right by the same law, with nothing planted. Counted: sweeps in which a winner
is named, and in which it is a planted one; beside ours, a bootstrap over pairs alone with and
without Bonferroni's correction, and what rules could do that know all that a verdict has to
estimate (`bound`). The last line is one JSON object.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import special, stats

from orpo_lab.verdict import Array, Measure, Quality, decide

NUM_SETTINGS = 8
NUM_SWEEPS = 200
RUN_EFFECT = 0.2
EXACT_MATCH = 0.95
MARGIN = 0.05
RESAMPLES = 400
# False winners allowed to a rule of `bound`, a share of sweeps
ALLOWED = 17 / 200
BOUND_SWEEPS = 2000


def draw(rng: Generator, shares: Array, num_seeds: int, num_pairs: int) -> list[Array]:
    """Return 0/1 scores [K, N] of every setting, whose mean is the setting's share."""
    levels = stats.norm.ppf(shares) * np.sqrt(1 + RUN_EFFECT**2)
    runs = RUN_EFFECT * rng.standard_normal((len(shares), num_seeds, 1))
    pairs = rng.standard_normal(num_pairs) * np.sqrt(0.5)
    noise = rng.standard_normal((len(shares), num_seeds, num_pairs)) * np.sqrt(0.5)
    return list((levels[:, None, None] + runs + pairs + noise > 0).astype(float))


def planted(base: float, lead: float, num_leaders: int = 1) -> Array:
    """Return every setting's share: the first ones lead the others, which are equal."""
    return np.where(np.arange(NUM_SETTINGS) < num_leaders, base + lead, base)


def sweep(
    rng: Generator, shares: Array, num_seeds: int, num_pairs: int
) -> tuple[list[Array], list[Array]]:
    """Return accuracy and exact match of a sweep of settings with these shares of accuracy."""
    right = np.full(NUM_SETTINGS, EXACT_MATCH)
    return draw(rng, shares, num_seeds, num_pairs), draw(rng, right, num_seeds, num_pairs)


def ours(accuracy: list[Array], exact_match: list[Array]) -> int | None:
    """Return the winner that the verdict names."""
    quality = Quality("exact_match", "", Measure(exact_match, is_share=True), MARGIN)
    return decide(Measure(accuracy, is_share=True), [quality]).winner


def pairs_only(scores: list[Array], rng: Generator, *, corrected: bool) -> int | None:
    """Return the winner of a bootstrap over pairs, which takes the runs at hand for the setting."""
    means = np.stack([one.mean(0) for one in scores])
    best = int(means.mean(1).argmax())
    num = means.shape[1]
    weights = rng.multinomial(num, np.full(num, 1 / num), size=RESAMPLES) / num
    leads = (means[best] - np.delete(means, best, axis=0)) @ weights.T
    level = 0.025 / (len(means) - 1 if corrected else 1)
    return best if (np.quantile(leads, level, axis=1) > 0).all() else None


def count(
    base: float,
    lead: float,
    num_seeds: int,
    num_pairs: int,
    *,
    num_leaders: int = 1,
    bootstrap: bool = False,
) -> dict[str, int]:
    """Return in how many of NUM_SWEEPS sweeps each method names a winner, and a planted one."""
    shares = planted(base, lead, num_leaders)
    rng = np.random.default_rng(0)
    methods: dict[str, Callable[..., int | None]] = {"ours": ours}
    if bootstrap:
        again = np.random.default_rng(1)
        methods["pairs_only"] = lambda one, _: pairs_only(one, again, corrected=False)
        methods["pairs_only_corrected"] = lambda one, _: pairs_only(one, again, corrected=True)
    counts = dict.fromkeys([f"{m}_{what}" for m in methods for what in ("named", "planted")], 0)
    for _ in range(NUM_SWEEPS):
        both = sweep(rng, shares, num_seeds, num_pairs)
        for name, method in methods.items():
            winner = method(*both)
            counts[f"{name}_named"] += winner is not None
            counts[f"{name}_planted"] += lead > 0 and winner is not None and winner < num_leaders
    return counts


def latent_means(rng: Generator, shares: Array, num_seeds: int, num_pairs: int) -> Array:
    """Return the settings' levels as BOUND_SWEEPS sweeps show them, [BOUND_SWEEPS, NUM_SETTINGS].

    By the inverse of the law that the scores follow, so that a run moves every level alike.
    """
    drawn = (draw(rng, shares, num_seeds, num_pairs) for _ in range(BOUND_SWEEPS))
    right = np.array([[one.sum(1) for one in scores] for scores in drawn])
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
            planted(base, 0.0),
            planted(base, lead),
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


def main() -> None:
    """Count over a grid of levels, leads, seeds and pairs, and print."""
    report: dict[str, Any] = {"num_sweeps": NUM_SWEEPS}
    for base in (0.8, 0.85, 0.88, 0.9):
        for num_seeds, num_pairs in ((1, 200), (2, 200), (3, 200), (3, 500)):
            counts = count(base, 0.0, num_seeds, num_pairs, bootstrap=True)
            report[f"no lead, base {base}, {num_seeds} x {num_pairs}"] = counts
            print(f"no lead, base {base}, {num_seeds} seeds x {num_pairs} pairs: {counts}")
        for lead, num_seeds, num_pairs in ((0.1, 3, 200), (0.08, 3, 500), (0.08, 5, 500)):
            if base + lead < 0.995:
                what = f"lead {lead}, base {base}, {num_seeds} x {num_pairs}"
                size = (base, lead, num_seeds, num_pairs)
                report[what] = count(*size)
                report[f"shared {what}"] = count(*size, num_leaders=2)
                report[f"bound, {what}"] = bound(*size)
                for key in (what, f"shared {what}", f"bound, {what}"):
                    print(f"{key}: {report[key]}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
