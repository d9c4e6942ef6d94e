"""What lm-evaluation-harness has found of each setting (`evaluation=harness`), with intervals.

These figures decide nothing: the verdict reads the held-out pairs alone. Where the harness keeps a
number for each document, intervals are over documents and seeds, and the change is computed
document by document. Where a figure is no mean of such numbers (BLEU, perplexity, the mean of a
group of tasks), the interval of one run is that of the harness's standard error, and several runs
have none.

Figures are set against each other only where the task was asked in the same way and of the same
documents: those before and after training, and those of seeds. A row says where that is not so.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from scipy import stats

from orpo_lab.compare.evidence import Comparison
from orpo_lab.compare.read import Run
from orpo_lab.compare.untrained import Gain, over_seeds
from orpo_lab.compare.verdict import CONFIDENCE, Array, Interval
from orpo_lab.compare.words import interval_text
from orpo_lab.evaluation.reached import Reached
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
    """Of the untrained model; None: it was not judged, or not in the same way."""
    after: Interval
    change: Interval | None
    """After minus before, document by document; None: not known."""
    note: str = ""
    """What was asked in another way than what; empty: nothing was."""

    @property
    def said(self) -> str:
        """The statement that the interval of the change supports; empty: there is none."""
        if self.change is None or not self.better:
            return ""
        sign = -1 if self.better == "lower" else 1
        return Gain(self.name, "", is_share=False, sign=sign, interval=self.change).said

    def row(self) -> dict[str, str]:
        """Return the figure as text, by the names of a table's columns."""
        change = "" if self.change is None else f"{interval_text(self.change)} {self.said}"
        return {
            "figure": self.name.removeprefix(HARNESS),
            "better": self.better,
            "documents": f"{self.num_documents}",
            "setting": self.setting,
            "seeds": f"{self.num_seeds}",
            "before": "" if self.before is None else f"{self.before:.3f}",
            "after": interval_text(self.after),
            "change": "; ".join(filter(None, (change, self.note))),
        }

    def as_json(self) -> dict[str, object]:
        """Return the figure as JSON values; what does not exist is null."""
        change = self.change and {"said": self.said, **self.change.as_json()}
        parts = {"after": self.after.as_json(), "change": change}
        return vars(self) | parts


def task_figures(comparison: Comparison) -> list[TaskFigure]:
    """Return the harness's figures of all settings, figure by figure; empty: there are none."""
    judged = {
        setting.name: [_Judged(run) for run in setting.runs] for setting in comparison.settings
    }
    runs = [run for of_setting in judged.values() for run in of_setting]
    names = dict.fromkeys(name for run in runs for name in run.names)
    return [row for name in names for row in _rows(name, judged)]


class _Part:
    """What a model has reached on one task, ready to compare."""

    def __init__(self, reached: Reached) -> None:
        self.figures, self.better, self.way = reached.figures, reached.better, reached.way
        self.scores = reached.scores()


class _Judged:
    """What one run has reached, before and after training."""

    def __init__(self, run: Run) -> None:
        self.before = [_Part(one) for one in run.reached_before.values()]
        self.after = [_Part(one) for one in run.reached_after.values()]
        self.names = [name for part in self.after for name in harness_figures(part.figures)]

    def of(self, name: str) -> "_Pair":
        """Return the two sides of one of the run's figures."""
        after = [part for part in self.after if name in part.figures][-1]
        before = [part for part in self.before if name in part.figures]
        same = [part for part in before if part.way == after.way]
        return _Pair(after, same[-1] if same else None, None if same or not before else before[-1])


@dataclass(frozen=True)
class _Pair:
    """One figure of one run."""

    after: _Part
    before: _Part | None
    """Of the untrained model, asked in the same way; None: there is none."""
    other: _Part | None
    """Of the untrained model, which was asked in another way only; None: it was not."""


def _rows(name: str, judged: Mapping[str, Sequence[_Judged]]) -> Iterator[TaskFigure]:
    """Yield the rows of one figure: for each setting, and each way in which it was asked."""
    first: _Part | None = None
    for setting, all_runs in judged.items():
        by_way: dict[object, list[_Pair]] = {}
        for pair in [run.of(name) for run in all_runs if name in run.names]:
            by_way.setdefault(pair.after.way, []).append(pair)
        for pairs in by_way.values():
            first = first or pairs[0].after
            yield _row(name, setting, pairs, first)


def _row(name: str, setting: str, pairs: Sequence[_Pair], first: _Part) -> TaskFigure:
    """Return the row of runs that were asked in one way.

    Args:
        name: the figure.
        setting: the name of the setting.
        pairs: of the runs, all of this setting.
        first: what the first row of this figure shows.
    """
    shown, scores = pairs[0].after, _scores(pairs, name)
    if scores is None:
        after = _of_figures(pairs, name)
    else:
        after = over_seeds(scores, is_share=bool(np.isin(scores, (0, 1)).all()))
    change = None if scores is None else _change(pairs, name)
    # Runs of one setting may have started from several seeds of one run
    before = [pair.before.figures[name] for pair in pairs if pair.before]
    notes = [_difference("", shown, first)]
    notes += [_difference("before: ", pair.other, pair.after) for pair in pairs if pair.other]
    return TaskFigure(
        name=name,
        setting=setting,
        num_seeds=len(pairs),
        num_documents=num_documents(name, shown.figures),
        better=shown.better.get(name, ""),
        before=mean(before) if before else None,
        after=after,
        change=None if change is None else over_seeds(change, is_share=False),
        note="; ".join(note for note in dict.fromkeys(notes) if note),
    )


def _difference(start: str, one: _Part, other: _Part) -> str:
    """Return in what two parts differ, for a table; empty: in nothing.

    Args:
        start: of the text. Empty: `other` is that of the first row.
        one: the part that the text is about.
        other: what it would be compared with.
    """
    than = "after" if start else "in the first row"
    (asked, documents), (others_asked, others_documents) = one.way, other.way
    if documents != others_documents:
        return f"{start}asked of other documents than {than}"
    if asked == others_asked:
        return ""
    if asked is None or others_asked is None:
        return f"{start}not known to be asked as {than} (results of an earlier version)"
    return f"{start}asked in another way than {than}"


def _scores(pairs: Sequence[_Pair], name: str) -> Array | None:
    """Return the scores of a figure's documents, [K, N] for K runs.

    None: there are none, runs had other documents, or the figure is not their mean.
    """
    by_run = [pair.after.scores.get(name, {}) for pair in pairs]
    documents = by_run[0].keys()
    if not documents or any(scores.keys() != documents for scores in by_run):
        return None
    found = np.array([[scores[document] for document in documents] for scores in by_run])
    is_mean = np.allclose(found.mean(1), [one.after.figures[name] for one in pairs], atol=1e-6)
    return found if is_mean else None


def _change(pairs: Sequence[_Pair], name: str) -> Array | None:
    """Return the scores after training minus those before, [K, N]; None: not the same documents."""
    rows = []
    for pair in pairs:
        after = pair.after.scores[name]
        before = pair.before.scores.get(name, {}) if pair.before else {}
        if before.keys() != after.keys():
            return None
        documents = pairs[0].after.scores[name]
        rows.append([after[document] - before[document] for document in documents])
    return np.array(rows)


def _of_figures(pairs: Sequence[_Pair], name: str) -> Interval:
    """Return the mean of a figure over runs; for one run with the harness's standard error."""
    figures = [pair.after.figures for pair in pairs]
    middle = float(np.mean([one[name] for one in figures]))
    error = figures[0].get(name + STDERR, math.nan) if len(figures) == 1 else math.nan
    reach = float(stats.norm.isf((1 - CONFIDENCE) / 2)) * error
    return Interval(middle, middle - reach, middle + reach)
