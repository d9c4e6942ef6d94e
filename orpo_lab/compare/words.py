"""The verdict in sentences."""

import math
from collections.abc import Sequence
from statistics import fmean

from orpo_lab.compare.evidence import Comparison
from orpo_lab.compare.guess import gain, guesses
from orpo_lab.compare.read import Run
from orpo_lab.compare.verdict import Interval, Verdict
from orpo_lab.metrics import IS_EVIDENCE, WIN_RATE


def verdict_text(comparison: Comparison) -> list[str]:
    """Return the verdict as sentences."""
    verdict, settings = comparison.verdict, comparison.settings
    leader = settings[verdict.leader].name
    reached = f"preference accuracy {interval_text(verdict.accuracies[verdict.leader])}"
    out = [
        f"{setting.name} ({', '.join(standing.worse_in)})"
        for setting, standing in zip(settings, verdict.qualities, strict=True)
        if standing.worse_in
    ]
    lines = []
    if len(settings) == 1:
        lines.append(f"One setting, nothing to compare: {reached}.")
    elif all(len(settings[number].runs) == 1 for number in (verdict.leader, *verdict.unbeaten)):
        lines.append(
            f"One seed cannot separate these: {_highest(comparison)} the highest preference "
            f"accuracy ({verdict.accuracies[verdict.leader].estimate:.3f}), and another seed might "
            "tell otherwise. "
            "Train every setting with at least two seeds, better three (seed=1,2,3)."
        )
    elif verdict.winner is not None:
        lines.append(f"The winner is {leader}: {reached}.")
        if verdict.nearest is not None and verdict.lead is not None:
            lines.append(
                "It is shown to be above every other setting of good quality; the nearest, "
                f"{settings[verdict.nearest].name}, by {gap_text(verdict.lead)}."
            )
    else:
        lines += _undecided(comparison, leader, reached)
    if out:
        lines.append(f"Out for their quality: {'; '.join(out)}.")
    return lines + against_guess(comparison, verdict.leader)


def against_guess(comparison: Comparison, number: int) -> list[str]:
    """Return what a guess by length alone reaches, and whether a setting is not above the guess."""
    found = next((guess for guess in guesses(comparison) if number in guess.settings), None)
    above = gain(comparison, number)
    if found is None:
        return []
    lines = [f"A guess by length alone: {interval_text(found.interval)}."]
    name = comparison.settings[number].name
    if above is None or (math.isnan(above.interval.low) and above.interval.estimate > 0):
        return lines
    if math.isnan(above.interval.low):
        lines.append(f"Not above that guess: {name}.")
    elif above.said != "better":
        lines.append(f"Not shown to be above that guess: {name} (by {gap_text(above.interval)}).")
    return lines


def tied(verdict: Verdict) -> list[int]:
    """Return the settings of good quality whose preference accuracy equals the leader's."""
    highest = verdict.accuracies[verdict.leader].estimate
    standings = zip(verdict.accuracies, verdict.qualities, strict=True)
    return [
        number
        for number, (accuracy, quality) in enumerate(standings)
        if accuracy.estimate == highest and not quality.worse_in
    ]


def _highest(comparison: Comparison) -> str:
    names = [comparison.settings[number].name for number in tied(comparison.verdict)]
    if len(names) == 1:
        return f"{names[0]} has"
    return f"{', '.join(names[:-1])} and {names[-1]} tie for"


def _undecided(comparison: Comparison, leader: str, reached: str) -> list[str]:
    verdict = comparison.verdict
    lines = []
    doubtful = verdict.qualities[verdict.leader].doubtful_in
    if doubtful:
        lines.append(
            f"The evidence names no winner: {leader} leads with {reached}, but its "
            f"{' and '.join(doubtful)} may be worse than the margin allows."
        )
    one_seed = [comparison.settings[number].name for number in verdict.one_seed]
    names = [comparison.settings[number].name for number in verdict.unbeaten]
    rest = ", ".join(name for name in names if name not in one_seed)
    if leader in one_seed:
        lines.append(f"The evidence names no winner: {leader} leads with {reached}, on one seed.")
    elif rest and verdict.lead is not None and verdict.lead.estimate == 0:
        lines.append(
            f"The evidence separates nothing: {_highest(comparison)} the highest {reached}. More "
            "held-out pairs or seeds may tell them apart."
        )
    elif rest and verdict.lead is not None:
        lines.append(
            f"The evidence does not separate {leader} ({reached}) from {rest}. The smallest "
            f"gap is {gap_text(verdict.lead)}. {needed_text(verdict)}"
        )
    elif not doubtful:
        lines.append(f"The evidence names no winner: {leader} leads with {reached}.")
    if one_seed:
        lines.append(
            "With one seed a setting can neither win nor be beaten; train with more, or leave out: "
            f"{', '.join(one_seed)}."
        )
    return lines


def needed_text(verdict: Verdict) -> str:
    """Return how many seeds or pairs would show the open gap, if it is real."""
    if verdict.seeds_needed is None:
        return "If it is real, it is too small to show with 50 seeds: take them as equal."
    text = f"If it is real, about {verdict.seeds_needed} seeds a setting would show it"
    if verdict.pairs_needed is None:
        return f"{text}; more held-out pairs alone would not."
    return f"{text}, or about {verdict.pairs_needed} held-out pairs with as many seeds as now."


def interval_text(interval: Interval) -> str:
    """Return an estimate with its interval, or alone if there is no interval."""
    if math.isnan(interval.low):
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def judged_text(runs: Sequence[Run]) -> str:
    """Return the judge's win rate of a setting, as a mean over its runs; empty: nobody has judged.

    One run has the interval over prompts; several have none, since the prompts are the same. Nor
    has a judge that tells nothing.
    """
    judged = [run.summary for run in runs if run.summary and WIN_RATE in run.summary]
    if not judged:
        return ""
    if not all(summary[IS_EVIDENCE] for summary in judged):
        return "no evidence"
    rates = [summary[WIN_RATE] for summary in judged]
    if len(rates) > 1:
        return f"{fmean(rates):.3f}"
    (summary,) = judged
    low, high = summary[f"{WIN_RATE}_low"], summary[f"{WIN_RATE}_high"]
    return interval_text(Interval(rates[0], low, high))


def amount_text(value: float, unit: str, *, is_share: bool) -> str:
    """Return a difference of shares in points, a difference of other figures in their unit."""
    if is_share:
        return f"{100 * value:.1f} points"
    return f"{value:.3f} {unit}".strip()


def gap_text(interval: Interval, unit: str = "", *, is_share: bool = True) -> str:
    """Return a difference as `amount_text` does, with its interval."""
    scale, digits = (100, 1) if is_share else (1, 3)
    ends = ", ".join(f"{scale * end:.{digits}f}" for end in (interval.low, interval.high))
    return f"{amount_text(interval.estimate, unit, is_share=is_share)} [{ends}]"
