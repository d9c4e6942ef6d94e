"""A curation that is made up: prompts, candidates, comparisons, and annotators who err."""

import argparse
import random
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from orpo_lab.curate.folder import CANDIDATES, PROMPTS, Candidate, Prompt, append
from orpo_lab.curate.store import Choice, Comparison, Kind, Store, Vote


def vote(
    comparison: str,
    annotator: str,
    choice: Choice,
    *,
    kind: Kind = "person",
    round_: int = 0,
    left: Literal["first", "second"] = "first",
    seconds: float = 1.0,
) -> Vote:
    key = f"{comparison} {annotator} {round_}"
    return Vote(key, comparison, annotator, kind, choice, left, round_, "", seconds, "2026-11-28")


def votes_of(table: dict[str, str]) -> list[Vote]:
    """Return votes from a line for each annotator: a letter for each comparison, from 0 on.

    f: first, s: second, t: tie, b: both bad, k: skip, a dot: no vote.
    """
    choices: dict[str, Choice]
    choices = {"f": "first", "s": "second", "t": "tie", "b": "both_bad", "k": "skip"}
    return [
        vote(str(number), annotator, choices[letter])
        for annotator, letters in table.items()
        for number, letter in enumerate(letters)
        if letter != "."
    ]


def erring(
    better: Sequence[Literal["first", "second"]], rates: Sequence[float], seed: int
) -> list[Vote]:
    """Return votes of annotators who take the worse answer, each at a rate of their own.

    Args:
        better: the better answer of each comparison, from 0 on.
        rates: of the annotators, who are called 0, 1, ...
        seed: of the errors, which are independent.
    """
    draws = random.Random(seed)
    found = []
    for (number, answer), (name, rate) in product(enumerate(better), enumerate(rates)):
        other: Choice = "second" if answer == "first" else "first"
        found.append(vote(str(number), str(name), other if draws.random() < rate else answer))
    return found


def alternating(num: int) -> list[Literal["first", "second"]]:
    """Return better answers: first, second, first, ..."""
    answers: tuple[Literal["first", "second"], ...] = ("first", "second")
    return [answers[number % 2] for number in range(num)]


def comparisons(num: int) -> list[Comparison]:
    """Return comparisons 0, 1, ... of the candidates a0 and b0, a1 and b1, ..."""
    return [Comparison(f"{n}", f"p{n}", f"a{n}", f"b{n}") for n in range(num)]


def prompts(num: int, **changes: Any) -> list[Prompt]:
    """Return prompts p0, p1, ..., in which a sum is asked for."""
    given = {"source": "sums.jsonl", "licence": "mit"} | changes
    return [
        Prompt(f"p{n}", [{"role": "user", "content": f"what is {n} plus {n}?"}], row=n, **given)
        for n in range(num)
    ]


def candidates(num: int, **made_by: Any) -> list[Candidate]:
    """Return the candidates of all prompts: those called a are right, those called b wrong."""
    given = {"model": "org/small", "temperature": 0.7, "seed": 5} | made_by
    return [
        Candidate(f"{side}{n}", f"p{n}", number, text, "stop", 4, "2026-11-28", given)
        for n in range(num)
        for number, (side, text) in enumerate([("a", f"it is {2 * n}."), ("b", f"{2 * n + 1}.")])
    ]


def write(
    folder: Path,
    votes: Iterable[Vote],
    num: int,
    of_prompts: Sequence[Prompt] | None = None,
    of_candidates: Sequence[Candidate] | None = None,
) -> Path:
    """Write a folder with `num` comparisons."""
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / PROMPTS, list(of_prompts or prompts(num)))
    append(folder / CANDIDATES, list(of_candidates or candidates(num)))
    store = Store(folder)
    store.add_comparisons(comparisons(num))
    for one in votes:
        store.add_vote(one)
    return folder


def step(module: Any, *arguments: str) -> None:
    """Run a step with the arguments of its command line."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))
