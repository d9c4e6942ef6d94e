"""Is a setting better than the untrained model? Pure statistics, as in `verdict`.

The untrained model is one model: it has no seeds, and answers the same held-out pairs as every run.
So its score is subtracted pair by pair, and the differences have the interval of `verdict` over
pairs and seeds. Runs that began with another run's result (`start_from`) are compared with that:
each run of a setting with its own start, which may have a seed of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from scipy import stats

from orpo_lab.compare.evidence import Comparison, Setting, of_pairs, prefers
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
    """A model that settings were trained from, possibly with several seeds, and its figures."""

    name: str
    settings: list[int]
    """The numbers of the settings that began with this model."""
    intervals: list[Interval]
    """Preference accuracy, then every quality of the comparison; higher is better. The intervals
    are over pairs, of a start with several seeds over pairs and seeds."""
    figures: dict[str, Any]
    """What `summary.json` says of the model before training; means over the seeds of a start."""


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
    members: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    models: list[dict[tuple[str, ...], Run]] = []
    for number, setting in enumerate(comparison.settings):
        models.append(_models(comparison, setting))
        if models[number]:
            members.setdefault(tuple(sorted(models[number])), []).append(number)
    found = []
    for numbers in members.values():
        runs = list(models[numbers[0]].values())
        name = name_before(runs[0])
        if len(members) > 1:
            names = [comparison.settings[number].name for number in numbers]
            name += f" ({listed(names)})"
        intervals = [
            over_seeds(scores, is_share=figure.measure.is_share)
            for figure, scores in zip(_figures(comparison), _befores(comparison, runs), strict=True)
        ]
        found.append(Untrained(name, numbers, intervals, _mean_figures(runs)))
    return found


def _models(comparison: Comparison, setting: Setting) -> dict[tuple[str, ...], Run]:
    """Return a run for each model that a setting's runs began with; empty: there are no scores.

    The keys are the model's figures as shown: processes may differ by rounding in what they measure
    of one model.
    """
    found: dict[tuple[str, ...], Run] = {}
    for run in setting.runs:
        before = _before(comparison, run)
        if not before:
            return {}
        found.setdefault(tuple(f"{scores.mean():.3f}" for scores in before), run)
    return found


def _mean_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what `summary.json` says of the models before training, in the mean over the runs."""
    befores = [(run.summary or {}).get("before", {}) for run in runs]
    if len(befores) == 1:
        return dict(befores[0])
    return {
        key: mean(before[key] for before in befores)
        for key, value in befores[0].items()
        if isinstance(value, int | float) and all(key in before for before in befores)
    }


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
    befores = [_befores(comparison, setting.runs) for setting in comparison.settings]
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


def _befores(comparison: Comparison, runs: Sequence[Run]) -> list[Array]:
    """Return what `_before` does of the models that K runs began with, [K, N] for each figure.

    Empty: one of them has no scores.
    """
    befores = [_before(comparison, run) for run in runs]
    return [np.stack(figure) for figure in zip(*befores, strict=True)] if all(befores) else []


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


def over_seeds(scores: Array, *, is_share: bool) -> Interval:
    """Return the mean of scores with its interval over pairs, and over seeds if K > 1.

    Args:
        scores: of N pairs, or documents, in each of K runs, [K, N].
        is_share: whether every score is 0 or 1.
    """
    if len(scores) == 1:
        return over_pairs(scores[0], is_share=is_share)
    return Measure([scores], is_share=is_share).interval(0)


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
