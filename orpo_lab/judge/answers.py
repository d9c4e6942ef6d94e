"""The answers that a judge compares: those of `samples.json` of run folders."""

from collections.abc import Iterable, Mapping

from orpo_lab.curate.folder import storable
from orpo_lab.judge.verdicts import Pair

Sample = Mapping[str, str]


def after_and_before(samples: Iterable[Sample]) -> list[Pair]:
    """Return the answers after training against those before."""
    found = list(samples)
    return _pairs(_by_prompt(found, "after"), _by_prompt(found, "before"))


def after_in_both(a: Iterable[Sample], b: Iterable[Sample]) -> list[Pair]:
    """Return the answers of run A against those of run B, to the prompts that both have."""
    return _pairs(_by_prompt(a, "after"), _by_prompt(b, "after"))


def num_prompts(samples: Iterable[Sample]) -> int:
    """Return how many prompts there are."""
    return len(_by_prompt(samples, "after"))


def _by_prompt(samples: Iterable[Sample], when: str) -> dict[str, str]:
    """Return the answers by prompt; a prompt of several pairs has one answer, as it is greedy."""
    # An earlier version of orpo_lab kept the prompt in the chat template alone
    return {
        storable(sample.get("asked") or sample["prompt"]): storable(sample[when])
        for sample in samples
    }


def _pairs(a: Mapping[str, str], b: Mapping[str, str]) -> list[Pair]:
    return [Pair(prompt, a[prompt], b[prompt]) for prompt in a if prompt in b]
