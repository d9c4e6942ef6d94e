"""The harness's figures in a comparison, on folders written as a run writes them."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from orpo_lab import metrics
from orpo_lab.compare.evidence import compare
from orpo_lab.compare.page import write as write_report
from orpo_lab.compare.read import find_runs
from orpo_lab.compare.tasks import TaskFigure, task_figures
from orpo_lab.compare.verdict import Measure, share_interval
from orpo_lab.compare.words import verdict_text
from orpo_lab.evaluation.reached import Reached, keep
from orpo_lab.records.run_folder import RunFolder
from tests.test_compare import Write, write  # noqa: F401  (a fixture)

NUM = 40


def reach(scores: Sequence[float], **others: float) -> dict[str, Reached]:
    """Return what was reached on a task with these scores of its documents, less is better."""
    documents = [
        {
            "task": "t",
            "filter": "none",
            "document": number,
            "hash": f"{number}",
            "prompt": "p",
            "target": "t",
            "answers": [],
            "scores": {"wrong": score},
        }
        for number, score in enumerate(scores)
    ]
    figures = {"harness/t/wrong": float(np.mean(scores)), "harness/t/num_documents": len(scores)}
    better = {"harness/t/wrong": "lower"}
    return {"t": Reached("key", figures | others, better, documents, 1.0)}  # type: ignore[arg-type]


def scores(num_wrong: int) -> list[float]:
    return [float(number < num_wrong) for number in range(NUM)]


def figures(folder: Path) -> list[TaskFigure]:
    return task_figures(compare(find_runs([folder]), metrics.MARGINS))


@pytest.fixture
def sweep(write: Write) -> Path:  # noqa: F811
    """Two settings with three seeds each and one with one seed, all judged on one task."""
    for beta, numbers in {0.1: (12, 14, 13), 0.5: (30, 28, 27), 1.0: (10,)}.items():
        for seed, num in enumerate(numbers):
            place = RunFolder(write(f"{beta}-{seed}", beta=beta, seed=seed))
            keep(place, "before", reach(scores(28)))
            keep(place, "after", reach(scores(num)))
    return place.path.parent


def test_intervals_are_over_documents_and_over_seeds_where_there_are_several(sweep: Path) -> None:
    low, _, alone = figures(sweep)
    of_seeds = np.array([scores(12), scores(14), scores(13)])
    assert low.after == Measure([of_seeds], is_share=True).interval(0)
    assert (low.num_seeds, low.num_documents, low.before) == (3, NUM, 0.7)
    assert alone.after == share_interval(10, NUM)


def test_a_change_is_computed_document_by_document_in_the_task_s_own_direction(
    sweep: Path,
) -> None:
    low, high, alone = figures(sweep)
    assert [low.said, high.said, alone.said] == ["better", "not separated", "better"]
    differences = np.array(scores(10)) - np.array(scores(28))
    assert alone.change is not None
    assert alone.change.estimate == pytest.approx(differences.mean())
    reach = stats.t.isf(0.05, NUM - 1) * differences.std(ddof=1) / NUM**0.5
    assert alone.change.high == pytest.approx(differences.mean() + reach)


def test_other_documents_have_no_change(write: Write) -> None:  # noqa: F811
    place = RunFolder(write("a"))
    keep(place, "before", reach(scores(20)[1:]))
    keep(place, "after", reach(scores(20)))
    (figure,) = figures(place.path)
    assert figure.before is None
    assert figure.change is None
    assert figure.row()["change"] == "before: asked of other documents than after"
    assert figure.said == ""


def asked(how: str | None, num_wrong: int) -> dict[str, Reached]:
    return {name: replace(one, asked=how) for name, one in reach(scores(num_wrong)).items()}


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ("one way", "one way", ""),
        ("one way", "another", "before: asked in another way than after"),
        (None, "one way", "before: not known to be asked as after (results of an earlier version)"),
        (None, None, ""),
    ],
)
def test_a_model_that_was_asked_in_another_way_is_not_compared(
    write: Write,  # noqa: F811
    before: str | None,
    after: str | None,
    note: str,
) -> None:
    place = RunFolder(write("a"))
    keep(place, "before", asked(before, 28))
    keep(place, "after", asked(after, 10))
    (figure,) = figures(place.path)
    assert figure.before == (None if note else 0.7)
    assert figure.said == ("" if note else "better")
    assert figure.note == note
    assert note in figure.row()["change"]


def test_seeds_that_were_asked_in_another_way_are_no_further_seeds_of_the_first(
    write: Write,  # noqa: F811
) -> None:
    for seed, (how, num_wrong) in enumerate((("a", 12), ("a", 14), ("b", 30))):
        place = RunFolder(write(f"{seed}", seed=seed))
        keep(place, "after", asked(how, num_wrong))
    first, other = figures(place.path.parent)
    assert (first.num_seeds, other.num_seeds) == (2, 1)
    assert first.after == Measure([np.array([scores(12), scores(14)])], is_share=True).interval(0)
    assert other.after == share_interval(30, NUM)
    assert (first.note, other.note) == ("", "asked in another way than in the first row")


def test_a_figure_that_is_no_mean_of_documents_has_the_harness_s_standard_error(
    write: Write,  # noqa: F811
) -> None:
    for seed in (1, 2):
        place = RunFolder(write(f"{seed}", seed=seed))
        keep(
            place,
            "after",
            reach(scores(20), **{"harness/t/wrong": 7.0, "harness/t/wrong_stderr": 2.0}),
        )
    (one,) = figures(place.path)
    assert one.after.estimate == 7.0
    assert one.after.high - 7.0 == pytest.approx(2 * stats.norm.isf(0.05))
    (two,) = figures(place.path.parent)
    assert math.isnan(two.after.low)


def test_the_report_shows_them_and_the_verdict_does_not_read_them(
    sweep: Path, tmp_path: Path
) -> None:
    comparison = compare(find_runs([sweep]), metrics.MARGINS)
    write_report(comparison, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Tasks of lm-evaluation-harness" in text
    assert f"| t/wrong | lower | {NUM} | beta=1 | 1 | 0.700 | 0.250 [" in text
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    said = [task["change"]["said"] for task in record["tasks"]]
    assert said == ["better", "not separated", "better"]
    said = verdict_text(comparison)
    for run in sweep.iterdir():
        keep(RunFolder(run), "after", {})
    assert verdict_text(compare(find_runs([sweep]), metrics.MARGINS)) == said
