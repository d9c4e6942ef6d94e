"""Three simulated annotators vote through the page, and what alpha comes of it.

    python benchmarks/curation.py FOLDER OUT [--independent]

FOLDER holds prompts, candidates and comparisons; it is copied to OUT. The annotators vote in
headless Chromium by keys and clicks, with the error rates RATES: which answer of a comparison is
the better one is drawn. Their errors are planned: as often as the rates say, and on the same
comparison as often as independence says. With `--independent` each error is drawn for itself, and
alpha scatters as `python benchmarks/agreement.py alpha` says. The last line is one JSON object.
"""

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from orpo_lab.curate.agreement import implied_alpha, lines, measure
from orpo_lab.curate.folder import read_candidates
from orpo_lab.curate.store import Comparison, Store
from tests.voters import CHROMIUM, choose, served, shown_on

RATES = {"ann": 0.1, "ben": 0.2, "eve": 0.3}
SEED = 1


def planned(rates: Sequence[float], num: int) -> list[tuple[bool, ...]]:
    """Return who errs on each of `num` comparisons, as often as independent errors do on average.

    A pattern of errors has the probability of the product of its rates. Its number is rounded so
    that all numbers add up (largest remainders).
    """
    patterns = list(product((False, True), repeat=len(rates)))
    wanted = [
        num * prod(rate if errs else 1 - rate for errs, rate in zip(pattern, rates, strict=True))
        for pattern in patterns
    ]
    numbers = [int(one) for one in wanted]
    rest = sorted(range(len(wanted)), key=lambda at: numbers[at] - wanted[at])
    for at in rest[: num - sum(numbers)]:
        numbers[at] += 1
    found = [
        pattern for pattern, number in zip(patterns, numbers, strict=True) for _ in range(number)
    ]
    random.Random(SEED).shuffle(found)
    return found


def independent(rates: Sequence[float], num: int) -> list[tuple[bool, ...]]:
    """Return who errs on each of `num` comparisons, each error drawn for itself."""
    draws = random.Random(SEED)
    return [tuple(draws.random() < rate for rate in rates) for _ in range(num)]


class Annotator:
    """Votes for the answer that is on a list, whichever place it has; knows texts alone."""

    def __init__(self, wanted: dict[str, tuple[str, str]]) -> None:
        # By comparison: the text that is voted for, and the other one
        self._wanted = wanted

    def vote(self, page: Page) -> bool:
        """Vote on the pair that is shown; return whether there was one."""
        shown = shown_on(page)
        if shown is None:
            return False
        wanted, other = self._wanted[shown["comparison"]]
        left, right = shown["texts"]
        is_left = alike(left, wanted) + alike(right, other) > alike(left, other) + alike(
            right, wanted
        )
        choose(page, shown, 0 if is_left else 1)
        return True


def alike(one: str, other: str) -> float:
    """Return how alike two texts are, 0 to 1; Markdown's signs do not count."""
    one, other = (re.sub(r"\W+", " ", text) for text in (one, other))
    return SequenceMatcher(None, one, other).ratio()


def lists(
    comparisons: Sequence[Comparison], texts: dict[str, str], errors: Sequence[tuple[bool, ...]]
) -> dict[str, dict[str, tuple[str, str]]]:
    """Return by annotator and comparison the text to vote for and the other one."""
    draws = random.Random(SEED)
    found: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in RATES}
    for one, of_people in zip(comparisons, errors, strict=True):
        better, worse = draws.sample([texts[one.first], texts[one.second]], 2)
        for name, errs in zip(RATES, of_people, strict=True):
            found[name][one.id] = (worse, better) if errs else (better, worse)
    return found


def main() -> None:
    """Have the annotators vote, and print what they agree on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--independent", action="store_true")
    options = parser.parse_args()
    shutil.copytree(options.folder, options.out)
    store = Store(options.out)
    comparisons = store.comparisons()
    texts = {one.id: one.text for one in read_candidates(options.out)}
    draw = independent if options.independent else planned
    rates = list(RATES.values())
    wanted = lists(comparisons, texts, draw(rates, len(comparisons)))
    start = time.monotonic()
    with (
        served(options.out, f"--annotators={','.join(RATES)}", "--repeats=0") as server,
        sync_playwright() as started,
    ):
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in RATES:
            page = browser.new_context().new_page()
            page.goto(server.links[name])
            page.wait_for_url("**/")
            annotator = Annotator(wanted[name])
            while annotator.vote(page):
                pass
        browser.close()
    votes = store.votes()
    found = measure(comparisons, votes)
    print("\n".join(lines(found)))
    result: dict[str, Any] = {
        "comparisons": len(comparisons),
        "votes": len(votes),
        "seconds": round(time.monotonic() - start, 1),
        "alpha": found.alpha.as_json(),
        "implied": implied_alpha(rates),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
