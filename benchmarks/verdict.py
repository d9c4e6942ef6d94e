"""How often a verdict is right, by simulation: `python benchmarks/verdict.py`, two minutes.

Sweeps of eight settings with a planted truth: a pair is preferred rightly where a latent score is
positive, which is a setting's level, plus what the pair is worth, plus what the run is worth, plus
noise. Pairs and noise have a standard deviation of 1 together, in halves of the variance; the run's
is 0.2. Answers are right by the same law, with nothing planted. Counted: sweeps in which a winner
is named, and in which it is the planted one; beside ours, a bootstrap over pairs alone with and
without Bonferroni's correction. The last line is one JSON object.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import stats

from orpo_lab.verdict import Array, Measure, Quality, decide

NUM_SETTINGS = 8
NUM_SWEEPS = 200
RUN_EFFECT = 0.2
EXACT_MATCH = 0.95
MARGIN = 0.05
RESAMPLES = 400


def draw(rng: Generator, shares: Array, num_seeds: int, num_pairs: int) -> list[Array]:
    """Return 0/1 scores [K, N] of every setting, whose mean is the setting's share."""
    levels = stats.norm.ppf(shares) * np.sqrt(1 + RUN_EFFECT**2)
    runs = RUN_EFFECT * rng.standard_normal((len(shares), num_seeds, 1))
    pairs = rng.standard_normal(num_pairs) * np.sqrt(0.5)
    noise = rng.standard_normal((len(shares), num_seeds, num_pairs)) * np.sqrt(0.5)
    return list((levels[:, None, None] + runs + pairs + noise > 0).astype(float))


def sweep(
    rng: Generator, base: float, lead: float, num_seeds: int, num_pairs: int
) -> tuple[list[Array], list[Array]]:
    """Return accuracy and exact match of a sweep in which the first setting leads, in points."""
    shares = np.full(NUM_SETTINGS, base)
    shares[0] += lead
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
    base: float, lead: float, num_seeds: int, num_pairs: int, *, bootstrap: bool = False
) -> dict[str, int]:
    """Return in how many of NUM_SWEEPS sweeps each method names a winner, and the planted one."""
    rng = np.random.default_rng(0)
    methods: dict[str, Callable[..., int | None]] = {"ours": ours}
    if bootstrap:
        again = np.random.default_rng(1)
        methods["pairs_only"] = lambda one, _: pairs_only(one, again, corrected=False)
        methods["pairs_only_corrected"] = lambda one, _: pairs_only(one, again, corrected=True)
    counts = dict.fromkeys([f"{m}_{what}" for m in methods for what in ("named", "planted")], 0)
    for _ in range(NUM_SWEEPS):
        both = sweep(rng, base, lead, num_seeds, num_pairs)
        for name, method in methods.items():
            winner = method(*both)
            counts[f"{name}_named"] += winner is not None
            counts[f"{name}_planted"] += winner == 0 and lead > 0
    return counts


def main() -> None:
    """Count over a grid of levels, leads, seeds and pairs, and print."""
    report: dict[str, Any] = {"num_sweeps": NUM_SWEEPS}
    for base in (0.8, 0.85, 0.9):
        for num_seeds, num_pairs in ((1, 200), (2, 200), (3, 200), (3, 500)):
            counts = count(base, 0.0, num_seeds, num_pairs, bootstrap=True)
            report[f"no lead, base {base}, {num_seeds} x {num_pairs}"] = counts
            print(f"no lead, base {base}, {num_seeds} seeds x {num_pairs} pairs: {counts}")
        for lead, num_seeds, num_pairs in ((0.1, 3, 200), (0.08, 3, 500), (0.08, 5, 500)):
            if base + lead < 0.995:
                counts = count(base, lead, num_seeds, num_pairs)
                report[f"lead {lead}, base {base}, {num_seeds} x {num_pairs}"] = counts
                print(f"lead {lead}, base {base}, {num_seeds} x {num_pairs}: {counts}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
