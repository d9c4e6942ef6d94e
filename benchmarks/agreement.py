"""How well alpha is measured, and what diversity costs: `python benchmarks/agreement.py [part]`.

Parts (all of them: some minutes on a core):

    alpha: alphas of simulated annotators with known error rates, beside the implied one: how far
        they scatter, how often one is within 0.05, and how often the interval holds the implied one
    rules: what a rule's pairs are worth: the share whose chosen answer is the better one, beside
        the share that is expected from the votes alone
    diversity: time and memory of 10,000 prompts

The last line is one JSON object.
"""

import json
import random
import resource
import sys
import time
from statistics import mean, stdev
from typing import Any

from orpo_lab.curate import diversity
from orpo_lab.curate.agreement import alpha, alpha_interval, implied_alpha, implied_error_rate
from orpo_lab.curate.folder import Prompt
from orpo_lab.curate.rules import decide, opinions, outcomes
from tests.curation import alternating, erring

RATES = (0.1, 0.2, 0.3)
# Numbers of comparisons; of the same annotators three times over, 40 stand for 9 people's votes
SIZES = (40, 100, 400, 700, 1600)
NEAR = 0.05
NUM_SETS, NUM_WITH_INTERVAL = 1000, 200
NUM_PROMPTS = 10_000


def of_alpha() -> dict[str, Any]:
    """Return how alpha scatters, by annotators and comparisons."""
    found = {}
    for rates in (RATES, RATES * 3):
        implied = implied_alpha(rates)
        for num in SIZES:
            sets = [opinions(erring(alternating(num), rates, seed)) for seed in range(NUM_SETS)]
            alphas = [alpha(said.values()) for said in sets]
            intervals = [
                alpha_interval(said.values(), num_resamples=400)
                for said in sets[:NUM_WITH_INTERVAL]
            ]
            name = f"{len(rates)} annotators, {num} comparisons"
            found[name] = {
                "implied": implied,
                "mean": mean(alphas),
                "deviation": stdev(alphas),
                "within": mean(abs(one - implied) <= NEAR for one in alphas),
                "covered": mean(one.low <= implied <= one.high for one in intervals),
            }
            print(name, found[name], flush=True)
    return found


def of_rules() -> dict[str, Any]:
    """Return what each rule keeps of 4,000 comparisons, and how much of that is right."""
    better = alternating(4000)
    votes = erring(better, RATES, seed=1)
    said = opinions(votes)
    error_rate = implied_error_rate(alpha(said.values()))
    found = {}
    for outcome in outcomes(votes, error_rate):
        decisions = {key: decide(one.values(), outcome.rule) for key, one in said.items()}
        right = [one.winner == better[int(key)] for key, one in decisions.items() if one.winner]
        found[outcome.name] = {
            "kept": outcome.num_kept / len(better),
            "right": mean(right),
            "expected": outcome.expected,
            "observed": outcome.observed,
        }
        print(outcome.name, found[outcome.name], flush=True)
    return found


def of_diversity() -> dict[str, Any]:
    """Return CPU seconds and the growth of the peak of memory in MiB, for made-up prompts."""
    draws = random.Random(1)
    words = [f"{draws.choice('bdgklmnprst')}{draws.choice('aeiou')}{n}" for n in range(30_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    prompts = [
        Prompt(
            str(n),
            [{"role": "user", "content": " ".join(draws.choices(words, weights, k=k))}],
            "made up",
            n,
        )
        for n, k in enumerate(draws.choices(range(5, 250), k=NUM_PROMPTS))
    ]
    diversity.measure(prompts[:100])  # imports
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = diversity.measure(prompts)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    result = {"seconds": seconds, "mebibytes": grown, "clusters": len(found.clusters)}
    print(result)
    return result


PARTS = {"alpha": of_alpha, "rules": of_rules, "diversity": of_diversity}

if __name__ == "__main__":
    print(json.dumps({name: PARTS[name]() for name in sys.argv[1:] or PARTS}))
