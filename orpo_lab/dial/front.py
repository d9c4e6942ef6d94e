"""What the mixtures of two runs come to, and whether they predict what training between came to.

The statistics are those of a comparison (`compare.verdict`): over held-out pairs and seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from orpo_lab.compare.evidence import Setting, measured
from orpo_lab.compare.verdict import Interval, Quality
from orpo_lab.dial.ends import Ends, mean_beta
from orpo_lab.metrics import CHECKED, MARGINS, PREFERENCE

if TYPE_CHECKING:
    from orpo_lab.evaluate import Evaluation

# How far a mixture's figure may be from a trained setting's and still count as the same
SAME = {**MARGINS, PREFERENCE: MARGINS[CHECKED]}

Outcome = Literal["predicted", "missed", "open"]


@dataclass(frozen=True)
class Gaps:
    """How far the figures of a mixture are above those of a trained setting."""

    share: float
    """Share of the high run in the mixture."""
    gaps: dict[str, Interval]
    """By figure, with the interval of a comparison of two settings."""

    @property
    def is_near(self) -> bool:
        """Whether every estimate is within its margin."""
        return self.distance <= 1

    @property
    def distance(self) -> float:
        """The largest gap in units of its margin."""
        return max(abs(gap.estimate) / SAME[name] for name, gap in self.gaps.items())

    @property
    def outcome(self) -> Outcome:
        """Whether the mixture predicts the setting.

        Predicted: every interval lies within its margin, so every figure is shown to be the same
        (two one-sided tests: Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15, 1987,
        657-680). Missed: a gap is beyond its margin and its interval is without 0. Open: neither is
        shown; with one seed, nothing ever is.
        """
        named = [(gap, SAME[name]) for name, gap in self.gaps.items()]
        if all(-margin <= gap.low and gap.high <= margin for gap, margin in named):
            return "predicted"
        if any(
            abs(gap.estimate) > margin and (gap.low > 0 or gap.high < 0) for gap, margin in named
        ):
            return "missed"
        return "open"


@dataclass(frozen=True)
class Trained:
    """A trained setting beside the mixtures."""

    setting: Setting
    beta: float
    """The mean of beta over the steps."""
    figures: dict[str, Interval]
    by_rule: Gaps
    """Of the mixture that stands for this beta; see `Ends.share_of`."""
    nearest: Gaps
    """Of the mixture with the smallest `Gaps.distance`: chosen after looking."""


class Front:
    """The mixtures of two runs, measured.

    Args:
        ends: the two runs.
        shares: of the high run in each mixture, in rising order, from 0 to 1; the rule's share of
            every trained setting is among them.
        found: for every seed of `ends.by_seed`, the evaluation of the mixture at each share.
    """

    def __init__(
        self, ends: Ends, shares: Sequence[float], found: dict[int, "list[Evaluation]"]
    ) -> None:
        self.ends, self.shares, self.found = ends, list(shares), found
        self.settings = [self._setting(at) for at in range(len(shares))]
        self.figures = [figures(setting) for setting in self.settings]

    def _setting(self, at: int) -> Setting:
        """Return the mixtures of all seeds at a share, as a setting of a comparison."""
        runs = []
        for seed, (low, _) in self.ends.by_seed.items():
            columns = self.found[seed][at].by_pair()
            scores = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
            runs.append(replace(low, scores=scores))
        return Setting(f"share {self.shares[at]:.3g}", runs[0].values, runs)

    @cached_property
    def trained(self) -> list[Trained]:
        """Every trained setting between the ends, beside the mixtures."""
        return [self._beside(setting) for setting in self.ends.trained]

    def _beside(self, setting: Setting) -> Trained:
        gaps = [
            Gaps(share, _gaps(mixture, setting))
            for share, mixture in zip(self.shares, self.settings, strict=True)
        ]
        by_rule = gaps[self.shares.index(self.ends.share_of(setting))]
        nearest = min(gaps, key=lambda gap: gap.distance)
        return Trained(setting, mean_beta(setting.runs[0]), figures(setting), by_rule, nearest)

    @cached_property
    def best(self) -> float:
        """The share with the highest preference accuracy among those of good quality.

        Good quality: every quality is at most its margin below the best of all shares. If no share
        is good in all qualities, the first quality decides. Among equal shares it is the lowest.
        """
        accuracy, qualities = measured(self.settings, MARGINS)
        everyone = range(len(self.shares))

        def is_good(at: int, quality: Quality) -> bool:
            values = [quality.measure.value(other) for other in everyone]
            return values[at] >= max(values) - quality.margin

        good = [at for at in everyone if all(is_good(at, quality) for quality in qualities)]
        good = good or [at for at in everyone if is_good(at, qualities[0])]
        return self.shares[max(good, key=accuracy.value)]

    @cached_property
    def unlike(self) -> list[str]:
        """A line for each end that does not come to the figures of its run's `summary.json`."""
        lines = []
        for seed, ends in self.ends.by_seed.items():
            for run, end in zip(ends, (self.found[seed][0], self.found[seed][-1]), strict=True):
                assert run.summary is not None
                after = run.summary["after"]
                if end.metrics != after:
                    name, gap = _largest_gap(end.metrics, after)
                    lines.append(
                        f"{run.folder} came to other figures here than in its summary.json: the "
                        f"largest difference is {gap:.2g} in {name}"
                    )
        return lines


def figures(setting: Setting) -> dict[str, Interval]:
    """Return preference accuracy and the qualities of a setting, each with its interval."""
    accuracy, qualities = measured([setting], MARGINS)
    found = {PREFERENCE: accuracy.interval(0)}
    for quality in qualities:
        found[quality.name] = _turned(quality.measure.interval(0), quality.sign)
    return found


def _gaps(mixture: Setting, trained: Setting) -> dict[str, Interval]:
    """Return by figure how far a mixture is above a trained setting."""
    accuracy, qualities = measured([mixture, trained], MARGINS)
    found = {PREFERENCE: accuracy.difference(0, 1)}
    for quality in qualities:
        found[quality.name] = _turned(quality.measure.difference(0, 1), quality.sign)
    return found


def _turned(interval: Interval, sign: int) -> Interval:
    """Return the interval of a figure as it is shown: measures count higher as better."""
    if sign > 0:
        return interval
    return Interval(-interval.estimate, -interval.high, -interval.low)


def _largest_gap(found: dict[str, float], expected: dict[str, float]) -> tuple[str, float]:
    gaps = {
        name: abs(value - expected[name])
        for name, value in found.items()
        if isinstance(value, float) and name in expected
    }
    name = max(gaps, key=gaps.__getitem__)
    return name, gaps[name]
