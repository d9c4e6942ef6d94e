"""Which settings of a race get another seed. Pure: the race and its simulation both call this."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from orpo_lab.compare.verdict import Verdict

# A race ends if all seeds that it may still give would show the smallest gap with less than this
# probability. While the leader has one seed or two, little is known of any gap, so these count
HOPE, HOPES = 0.2, {1: 0.0, 2: 0.06}
# A rival waits if the leader's own further seeds will show it beaten with this probability
LIKELY = 0.25
# With fewer seeds a setting is not shown to be beaten (`verdict.Measure.spread`)
FEWEST = 3


@dataclass(frozen=True)
class Step:
    """What a look finds, and what a race does after it; settings are given by their numbers."""

    leader: int
    """The setting with the highest preference accuracy, of those that do not wait."""
    rivals: list[int]
    """Settings that the leader is not shown to beat."""
    waiting: list[int]
    """Those of them that have one run whose quality is in doubt."""
    more: list[int]
    """Settings that get one more seed; empty: the race is over."""
    reason: str
    """Why the race is over; empty: the race goes on."""


def next_step(verdict: Verdict, num_seeds: Sequence[int], max_seeds: int) -> Step:
    """Return which settings get another seed: those on which the winner still depends.

    The leader gets a seed, since its seeds count in every comparison. So do the rivals that are the
    hardest to beat: half of those that the leader will hardly beat without. The others wait. If the
    quality of the leader is in doubt, the settings that are best in this quality get one, too. With
    one seed nothing is shown, so a setting whose one run is in doubt waits as well.

    A test has its level by the number of seeds of its two settings (`verdict.level_of_look`). What
    all looks and choices together come to is simulated (`benchmarks/verdict.py race`).

    Args:
        verdict: the result of the look.
        num_seeds: number of seeds that each setting has been given, failed runs included.
        max_seeds: the largest number of seeds of a setting.
    """
    given, means = np.array(num_seeds), verdict.contest.means
    of_contest = dict(zip(verdict.in_contest, means, strict=True))
    doubted = {n for n in of_contest if given[n] == 1 and verdict.qualities[n].doubtful_in}
    leader = max(of_contest.keys() - doubted or of_contest, key=of_contest.__getitem__)
    rivals = [n for n in of_contest if n != leader and not _is_beaten(verdict, leader, n)]
    found = partial(Step, leader, rivals, [n for n in rivals if n in doubted])
    if verdict.winner is not None:
        return found([], "a winner is shown")
    better = {verdict.best_in[name] for name in verdict.qualities[leader].doubtful_in} - {leader}
    if not rivals and not better:
        return found([], "no other setting is left")
    open_ = {number for number in {leader, *rivals, *better} if given[number] < max_seeds}
    near = [rival for rival in rivals if rival not in doubted]
    # A rival with all its seeds stays unbeaten, once the leader has all its own
    is_stuck = given[leader] >= max_seeds and any(given[rival] >= max_seeds for rival in near)
    if is_stuck or not open_:
        return found([], f"more than {max_seeds} seeds are needed")
    hopes = [_outlook(verdict, leader, rival, max_seeds, max_seeds) for rival in near]
    if not better and min(hopes, default=1.0) < HOPES.get(int(given[leader]), HOPE):
        return found([], f"{max_seeds} seeds would hardly separate what is open")
    outlooks = {
        rival: _outlook(verdict, leader, rival, max_seeds, max(given[rival], FEWEST))
        for rival in near
        if rival in open_
    }
    hard = sorted(
        (rival for rival in outlooks if outlooks[rival] < LIKELY), key=outlooks.__getitem__
    )
    now = {leader, *better, *hard[: (len(hard) + 1) // 2]} & open_
    return found(sorted(now or open_), "")


def _is_beaten(verdict: Verdict, leader: int, rival: int) -> bool:
    """Return whether the leader is shown to be above a rival."""
    first, second = (verdict.in_contest.index(number) for number in (leader, rival))
    return verdict.contest.is_above(first, second)


def _outlook(verdict: Verdict, leader: int, rival: int, of_leader: int, of_rival: int) -> float:
    """Return how likely so many seeds of the two show the leader above a rival."""
    contest, numbers = verdict.contest, verdict.in_contest
    first, second = numbers.index(leader), numbers.index(rival)
    num_seeds = contest.num_seeds.copy()
    num_seeds[[first, second]] = of_leader, of_rival
    return contest.outlook(first, second, num_seeds)
