"""Is a setting better than the untrained model? Pure statistics, as in `verdict`.

The untrained model is one model: it has no seeds, and answers the same held-out pairs as every run.
So its score is subtracted pair by pair, and the differences have the interval of `verdict` over
pairs and seeds. Runs that began with another run's result (`start_from`) are compared with that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from orpo_lab.compare.evidence import Comparison, of_pairs, prefers
from orpo_lab.compare.read import Run
from orpo_lab.compare.verdict import (
    CONFIDENCE,
    Array,
    Interval,
    Measure,
    Quality,
    share_interval,
)
from orpo_lab.metrics import HELD_OUT, PREFERENCE


@dataclass(frozen=True)
class Untrained:
    """A model that settings were trained from, and its figures."""

    name: str
    settings: list[int]
    """The numbers of the settings that began with this model."""
    intervals: list[Interval]
    """Preference accuracy, then every quality of the comparison; higher is better. The intervals
    are over pairs."""
    figures: dict[str, Any]
    """What `summary.json` says of the model before training."""


@dataclass(frozen=True)
class Gain:
    """One figure of a setting minus that of the untrained model."""

    name: str
    unit: str
    is_share: bool
    sign: int
    """-1: lower is better."""
    interval: Interval

    @property
    def said(self) -> str:
        """The statement that the interval supports."""
        ends = (self.sign * self.interval.low, self.sign * self.interval.high)
        if min(ends) > 0:
            return "better"
        return "worse" if max(ends) < 0 else "not separated"


def untrained(comparison: Comparison) -> list[Untrained]:
    """Return the models that the settings were trained from, each once.

    Settings have several such models if they differ in the model, its quantization, the start or
    the engine. Settings whose folders hold no scores before training have none.
    """
    members: dict[tuple[str, ...], list[int]] = {}
    for number, setting in enumerate(comparison.settings):
        before = _before(comparison, setting.runs[0])
        if before:
            # As shown: processes may differ by rounding in what they measure of one model
            shown = tuple(f"{scores.mean():.3f}" for scores in before)
            members.setdefault(shown, []).append(number)
    found = []
    for numbers in members.values():
        run = comparison.settings[numbers[0]].runs[0]
        name = name_before(run)
        if len(members) > 1:
            names = [comparison.settings[number].name for number in numbers]
            name += f" ({listed(names)})"
        intervals = [
            over_pairs(scores, is_share=figure.measure.is_share)
            for figure, scores in zip(_figures(comparison), _before(comparison, run), strict=True)
        ]
        assert run.summary is not None
        found.append(Untrained(name, numbers, intervals, run.summary.get("before", {})))
    return found


def name_before(run: Run) -> str:
    """Return what the model before training is called in tables."""
    return "before training" if run.values.get("start_from") else "untrained"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return names as a list in words, of which at most `most` are named."""
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} others"]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def gains(comparison: Comparison, number: int) -> list[Gain]:
    """Return how a setting differs from the model that it was trained from, figure by figure.

    Empty: a run of the comparison has no scores before training. The variances are pooled over all
    settings, as in the verdict. With one seed the ends of the intervals are NaN.
    """
    befores = [_before(comparison, setting.runs[0]) for setting in comparison.settings]
    if not all(befores):
        return []
    found = []
    for place, quality in enumerate(_figures(comparison)):
        differences = [
            quality.sign * (scores - before[place])
            for scores, before in zip(quality.measure.scores, befores, strict=True)
        ]
        interval = Measure(differences, is_share=False).interval(number)
        is_share = quality.measure.is_share
        found.append(Gain(quality.name, quality.unit, is_share, quality.sign, interval))
    return found


def _figures(comparison: Comparison) -> list[Quality]:
    """Return preference accuracy, in the form of a quality, and every quality."""
    return [Quality(PREFERENCE, "", comparison.accuracy, 0.0), *comparison.qualities]


def _before(comparison: Comparison, run: Run) -> list[Array]:
    """Return preference, then every quality, of the model before training; higher is better.

    One array for each figure: [N], or as many as there are answers. Empty: there are no scores.
    """
    scores = run.scores_before
    if scores is None or not len(scores["chosen_logp"]):
        return []
    metrics = {metric.name: metric for metric in HELD_OUT}
    of_qualities = [
        quality.sign * of_pairs(metrics[quality.name], scores) for quality in comparison.qualities
    ]
    return [prefers(scores), *of_qualities]


def over_pairs(scores: Array, *, is_share: bool) -> Interval:
    """Return the mean of the scores of one model or guess, [N], with its interval over pairs.

    For a share the interval is Wilson's, for other figures Student's, which one pair does not have.
    """
    num, mean = len(scores), float(scores.mean())
    if is_share:
        return share_interval(int(scores.sum()), num)
    if num == 1:
        return Interval(mean, math.nan, math.nan)
    reach = float(stats.t.isf((1 - CONFIDENCE) / 2, num - 1) * scores.std(ddof=1) / num**0.5)
    return Interval(mean, mean - reach, mean + reach)
