"""How often the interval holds the true win rate: `python benchmarks/judge.py [part]`.

Parts:

    coverage: judges with known preferences, simulated: how often the interval holds the true rate,
        how often a side is named that is not preferred, how often the judge is found to tell
        nothing (one to two minutes on a core)
    length: judges that like long answers: how often the interval at equal length holds the share
        that A wins there (two minutes)
    endpoint: the same judges behind a loopback server, asked over HTTP as a run asks (a minute)

The last line is one JSON object.
"""

import itertools
import json
import math
import random
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from orpo_lab.config.judge import EndpointJudge
from orpo_lab.curate.question import Place
from orpo_lab.judge.verdicts import Pair, compare, open_judge
from orpo_lab.judge.win_rate import Judged, WinRate, win_rate
from tests import endpoint_server

SIZES = (10, 30, 100, 400)
NUM_REPETITIONS = 2000
# Over HTTP
NUM_PROMPTS, NUM_COMMANDS = 40, 60
# Of `of_length`: A's share at equal length, how much length counts, how much longer A is
LENGTHS = ((0.5, 0, 0), (0.5, 2, 0.5), (0.7, 2, 1), (0.5, 6, 1), (0.9, 2, 0.5))
LETTERS: dict[Place, str] = {"first": "A", "second": "B", "tie": "tie"}


@dataclass(frozen=True)
class KnownJudge:
    """A judge whose preferences are known.

    Each prompt has a chance of its own that a verdict on it is for A; on average it is `prefers_a`.
    """

    prefers_a: float = 0.5
    spread: float = 0.0
    """How much prompts differ: 0: not at all; 1: the same answer is preferred in every verdict."""
    ties: float = 0.0
    """Share of the verdicts that are ties."""
    first: float = 0.0
    """Share of the other verdicts that name the first place, whatever stands there."""

    @property
    def true_rate(self) -> float:
        """The win rate over all prompts that there could be."""
        follows_answer = (1 - self.ties) * (1 - self.first)
        return 0.5 * (1 - follows_answer) + self.prefers_a * follows_answer

    def chance(self, draws: random.Random) -> float:
        """Draw the chance of a prompt that a verdict on it is for A."""
        if not self.spread:
            return self.prefers_a
        if self.spread == 1:
            return float(draws.random() < self.prefers_a)
        size = 1 / self.spread - 1
        return draws.betavariate(self.prefers_a * size, (1 - self.prefers_a) * size)

    def verdict(self, draws: random.Random, chance: float, *, a_is_first: bool) -> Place:
        """Draw one verdict."""
        if draws.random() < self.ties:
            return "tie"
        if draws.random() < self.first:
            return "first"
        return "first" if (draws.random() < chance) == a_is_first else "second"

    def judged(self, draws: random.Random) -> Judged:
        """Draw the two verdicts on a prompt."""
        chance = self.chance(draws)
        a_first, b_first = (self.verdict(draws, chance, a_is_first=it) for it in (True, False))
        return Judged(a_first, b_first)


JUDGES = {
    "noisy, no preference": KnownJudge(0.5),
    "noisy, 0.6": KnownJudge(0.6),
    "prompts differ, 0.7": KnownJudge(0.7, spread=0.5),
    "sure, 0.7": KnownJudge(0.7, spread=1),
    "sure, 0.95": KnownJudge(0.95, spread=1),
    "half ties, 0.7": KnownJudge(0.7, spread=0.5, ties=0.5),
    "nearly all ties, 0.7": KnownJudge(0.7, spread=0.5, ties=0.95),
    "half by place, 0.8": KnownJudge(0.8, spread=0.5, first=0.5),
    "always first": KnownJudge(0.8, first=1),
    "first in 9 of 10, else no preference": KnownJudge(0.5, first=0.9),
}


def summed_up(judge: KnownJudge, found: list[WinRate]) -> dict[str, float]:
    """Return how often the intervals hold the truth, and what is said."""
    num = len(found)
    right = {True: "A", False: "B"}[judge.true_rate > 0.5] if judge.true_rate != 0.5 else None
    return {
        "true": judge.true_rate,
        "mean": sum(one.win_rate.estimate for one in found) / num,
        "covered": sum(one.win_rate.low <= judge.true_rate <= one.win_rate.high for one in found)
        / num,
        "width": sum(one.win_rate.high - one.win_rate.low for one in found) / num,
        "wrong side": sum(one.winner not in (None, right) for one in found) / num,
        "right side": sum(right is not None and one.winner == right for one in found) / num,
        "tells nothing": sum(not one.is_evidence for one in found) / num,
    }


def said(name: str, figures: dict[str, float]) -> None:
    """Print a line of figures."""
    print(f"{name:44}", "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))


def of_coverage(
    num_repetitions: int = NUM_REPETITIONS, sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """Return the figures of every judge and number of prompts, simulated."""
    draws = random.Random(1)
    found = {}
    for name, judge in JUDGES.items():
        for num in sizes:
            rates = [
                win_rate(judge.judged(draws) for _ in range(num)) for _ in range(num_repetitions)
            ]
            found[f"{name}, {num} prompts"] = summed_up(judge, rates)
            said(f"{name}, {num} prompts", found[f"{name}, {num} prompts"])
    return found


def of_length(
    num_repetitions: int = NUM_REPETITIONS // 10, sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """Return how often the interval at equal length holds the truth, simulated."""
    found = {}
    for (share, by_length, longer), num in itertools.product(LENGTHS, sizes):
        draws, covered, plain = random.Random(4), 0, 0.0
        for _ in range(num_repetitions):
            rate = win_rate(like_longer(num, share, by_length, longer, draws))
            at_equal = rate.length_controlled
            covered += at_equal is not None and at_equal.low <= share <= at_equal.high
            plain += rate.win_rate.estimate / num_repetitions
        name = f"{share} at equal length, effect {by_length}, longer by {longer}, {num} prompts"
        found[name] = {"covered": covered / num_repetitions, "plain": plain}
        said(name, found[name])
    return found


def like_longer(
    num: int, share: float, by_length: float, longer: float, draws: random.Random
) -> list[Judged]:
    """Draw the verdicts of a sure judge who likes long answers.

    Args:
        num: number of prompts.
        share: how often A wins at equal length.
        by_length: how much length counts: b of `judge.length`.
        longer: how much longer A's answers are on average, in standard deviations.
        draws: random numbers.
    """
    lengths = [round(100 * draws.gauss(longer, 1)) for _ in range(num)]
    scale = mean(length**2 for length in lengths) ** 0.5
    judged = []
    for length in lengths:
        odds = share / (1 - share) * math.exp(by_length * math.tanh(length / scale))
        wins = draws.random() < odds / (1 + odds)
        judged.append(Judged(*("first", "second") if wins else ("second", "first"), length))
    return judged


def replying(judge: KnownJudge, draws: random.Random) -> Callable[[dict[str, Any]], str]:
    """Return what a server replies that sees in the answers which one is A's."""
    chances: dict[str, float] = {}

    def reply(body: dict[str, Any]) -> str:
        text = body["messages"][0]["content"]
        prompt, first = re.findall(r"<(?:conversation|answer_A)>\n(.*?)\n</", text)
        chance = chances.setdefault(prompt, judge.chance(draws))
        return LETTERS[judge.verdict(draws, chance, a_is_first="(good)" in first)]

    return reply


def ask_over_http(url: str, num: int, folder: Path) -> WinRate:
    """Return the win rate of the answers with a hidden property, judged by a server."""
    asked = EndpointJudge(
        url=url,
        model="known",
        key_variable="NONE",
        num_prompts=None,
        max_new_tokens=4,
        concurrency=4,
        rate=None,
        timeout=10.0,
        retries=2,
    )
    pairs = [Pair(f"question {n}", f"answer {n} (good)", f"answer {n}") for n in range(num)]
    return compare(open_judge(asked), pairs, folder, asked.max_new_tokens)[0]


def of_endpoint(num_commands: int = NUM_COMMANDS, num_prompts: int = NUM_PROMPTS) -> dict[str, Any]:
    """Return the figures of some judges behind a loopback server."""
    draws = random.Random(2)
    found = {}
    for name in ("noisy, 0.6", "prompts differ, 0.7", "half ties, 0.7", "always first"):
        rates = []
        with endpoint_server.serving() as server, tempfile.TemporaryDirectory() as folder:
            for number in range(num_commands):
                server.usual = endpoint_server.say(replying(JUDGES[name], draws))
                rates.append(ask_over_http(server.url, num_prompts, Path(folder, str(number))))
        found[name] = summed_up(JUDGES[name], rates)
        said(f"{name}, {num_prompts} prompts over HTTP", found[name])
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "coverage": of_coverage,
    "length": of_length,
    "endpoint": of_endpoint,
}

if __name__ == "__main__":
    print(json.dumps({name: PARTS[name]() for name in sys.argv[1:] or PARTS}))
