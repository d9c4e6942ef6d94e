"""What lm-evaluation-harness has found of each setting (`evaluation=harness`), with intervals.

These figures decide nothing: the verdict reads the held-out pairs alone. Where the harness keeps a
number for each document, intervals are over documents and seeds, and the change is computed
document by document. Where a figure is no mean of such numbers (BLEU, perplexity, the mean of a
group of tasks), the interval of one run is that of the harness's standard error, and several runs
have none.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from scipy import stats

from orpo_lab.compare.evidence import Comparison, Setting
from orpo_lab.compare.read import Run
from orpo_lab.compare.untrained import Gain, over_seeds
from orpo_lab.compare.verdict import CONFIDENCE, Array, Interval
from orpo_lab.compare.words import interval_text
from orpo_lab.evaluation.reached import better_of, figures_of, scores_of
from orpo_lab.metrics import HARNESS, STDERR, Better, harness_figures, num_documents


@dataclass(frozen=True)
class TaskFigure:
    """One figure of the harness, of one setting."""

    name: str
    setting: str
    num_seeds: int
    num_documents: int
    better: Better
    before: float | None
    """Of the untrained model; None: it was not judged."""
    after: Interval
    change: Interval | None
    """After minus before, document by document; None: not known."""

    @property
    def said(self) -> str:
        """The statement that the interval of the change supports; empty: there is none."""
        if self.change is None or not self.better:
            return ""
        sign = -1 if self.better == "lower" else 1
        return Gain(self.name, "", is_share=False, sign=sign, interval=self.change).said

    def row(self) -> dict[str, str]:
        """Return the figure as text, by the names of a table's columns."""
        return {
            "figure": self.name.removeprefix(HARNESS),
            "better": self.better,
            "documents": f"{self.num_documents}",
            "setting": self.setting,
            "seeds": f"{self.num_seeds}",
            "before": "" if self.before is None else f"{self.before:.3f}",
            "after": interval_text(self.after),
            "change": "" if self.change is None else f"{interval_text(self.change)} {self.said}",
        }

    def as_json(self) -> dict[str, object]:
        """Return the figure as JSON values; what does not exist is null."""
        change = self.change and {"said": self.said, **self.change.as_json()}
        parts = {"after": self.after.as_json(), "change": change}
        return vars(self) | parts


def task_figures(comparison: Comparison) -> list[TaskFigure]:
    """Return the harness's figures of all settings, figure by figure; empty: there are none."""
    found = [one for setting in comparison.settings for one in _of_setting(setting)]
    names = list(dict.fromkeys(one.name for one in found))
    return sorted(found, key=lambda one: names.index(one.name))


class _Judged:
    """The harness's figures of one run, before and after training, and those of the documents."""

    def __init__(self, run: Run) -> None:
        self.before, self.after = figures_of(run.reached_before), figures_of(run.reached_after)
        self.scores_before = scores_of(run.reached_before)
        self.scores = scores_of(run.reached_after)
        self.better = better_of(run.reached_after)


def _of_setting(setting: Setting) -> Iterator[TaskFigure]:
    judged = [_Judged(run) for run in setting.runs]
    for name in dict.fromkeys(name for one in judged for name in harness_figures(one.after)):
        runs = [one for one in judged if name in one.after]
        first, scores = runs[0], _scores(runs, name)
        # Runs of one setting may have started from several seeds of one run
        before = [one.before[name] for one in runs if name in one.before]
        if scores is None:
            after = _of_figures(runs, name)
        else:
            after = over_seeds(scores, is_share=bool(np.isin(scores, (0, 1)).all()))
        change = None if scores is None else _change(runs, name)
        yield TaskFigure(
            name=name,
            setting=setting.name,
            num_seeds=len(runs),
            num_documents=num_documents(name, first.after),
            better=first.better.get(name, ""),
            before=mean(before) if before else None,
            after=after,
            change=None if change is None else over_seeds(change, is_share=False),
        )


def _scores(runs: Sequence[_Judged], name: str) -> Array | None:
    """Return the scores of a figure's documents, [K, N] for K runs.

    None: there are none, runs had other documents, or the figure is not their mean.
    """
    by_run = [one.scores.get(name, {}) for one in runs]
    documents = by_run[0].keys()
    if not documents or any(scores.keys() != documents for scores in by_run):
        return None
    found = np.array([[scores[document] for document in documents] for scores in by_run])
    is_mean = np.allclose(found.mean(1), [one.after[name] for one in runs], atol=1e-6)
    return found if is_mean else None


def _change(runs: Sequence[_Judged], name: str) -> Array | None:
    """Return the scores after training minus those before, [K, N]; None: not the same documents."""
    rows = []
    for one in runs:
        before, after = one.scores_before.get(name, {}), one.scores[name]
        if before.keys() != after.keys():
            return None
        rows.append([after[document] - before[document] for document in runs[0].scores[name]])
    return np.array(rows)


def _of_figures(runs: Sequence[_Judged], name: str) -> Interval:
    """Return the mean of a figure over runs; for one run with the harness's standard error."""
    middle = float(np.mean([one.after[name] for one in runs]))
    error = runs[0].after.get(name + STDERR, math.nan) if len(runs) == 1 else math.nan
    reach = float(stats.norm.isf((1 - CONFIDENCE) / 2)) * error
    return Interval(middle, middle - reach, middle + reach)
