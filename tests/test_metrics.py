"""The table of metrics: what is documented, and that a new row is all that a new metric takes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_lab import config, methods, metrics
from orpo_lab.config.method import METHODS
from orpo_lab.evaluate import Generation, Scores, generation_metrics, preference_metrics
from orpo_lab.methods.base import Batch
from orpo_lab.metrics import HELD_OUT, TRAINING, HeldOutMetric
from orpo_lab.records import card
from tests.conftest import ROOT

Load = Callable[..., config.Config]


def documented(title: str) -> dict[str, list[str]]:
    """Return the rows of a table of docs/reading_curves.md by the names in their first column."""
    text = (ROOT / "docs" / "reading_curves.md").read_text().split(f"## {title}\n")[1]
    rows: dict[str, list[str]] = {}
    for line in text.split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1:])
    return rows


def test_every_training_metric_is_documented_with_its_direction_and_whether_beta_scales_it() -> (
    None
):
    rows = documented("`metrics.jsonl`")
    for metric in TRAINING:
        _, unit, better, across_beta = rows[metric.name]
        if metric.better:
            assert better == metric.better, metric.name
        if metric.unit and not metric.is_setting:
            assert unit == metric.unit, metric.name
        if not metric.is_setting:
            expected = ("yes", "yes, for beta above 0", "-") if metric.is_beta_free else ("**no**",)
            assert across_beta in expected, metric.name


def test_what_does_not_compare_across_methods_is_documented() -> None:
    text = (ROOT / "docs" / "reading_curves.md").read_text().split("**Across methods**")[1]
    named = re.findall(r"`([^`]+)`", text.split("A comparison")[0])
    assert named == [metric.name for metric in TRAINING if not metric.is_method_free]


def test_what_beta_scales_does_not_compare_across_methods() -> None:
    for metric in TRAINING:
        assert metric.is_beta_free or not metric.is_method_free, metric.name


def test_every_held_out_metric_is_documented_with_its_direction() -> None:
    rows = documented("`summary.json`")
    assert rows.keys() == {metric.name for metric in HELD_OUT} | {"by_wording", "by_source"}
    for metric in HELD_OUT:
        assert not metric.better or rows[metric.name][2] == metric.better, metric.name


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_terms_are_in_the_table(load: Load, method: str) -> None:
    num, ones = torch.tensor(2.0), torch.ones(2, 3)
    known = {"reference": -ones[:, 1:], "divergence": num}
    batch = Batch(-ones, ones, num_supervised=num, num_pairs=num, **known)
    losses = methods.build(load(f"method={method}")).losses(batch, beta=0.1)
    assert losses.terms.keys() <= {metric.name for metric in TRAINING}


def test_where_answers_are_checked_their_being_right_is_the_only_quality() -> None:
    names = [metric.name for metric in HELD_OUT]
    assert [metric.name for metric in metrics.qualities_among(names)] == ["exact_match"]
    names.remove("exact_match")
    assert [metric.name for metric in metrics.qualities_among(names)] == [
        "chosen_nll",
        "repetition",
    ]
    assert metrics.qualities_among(["preference_accuracy"]) == []
    assert metrics.MARGINS == {"exact_match": 0.03, "chosen_nll": 0.03, "repetition": 0.05}


def test_a_row_is_all_that_a_new_metric_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = HeldOutMetric(
        name="worst_margin",
        unit="nats",
        better="higher",
        is_brief=True,
        of_scores=lambda s: (s.chosen_logps - s.rejected_logps).min(),
    )
    longest = HeldOutMetric(
        name="longest_answer",
        of_answers=lambda answers: max(answer.num_tokens for answer in answers),
    )
    # One list, of which every reader holds the same
    table: Any = [*HELD_OUT, worst, longest]
    for home in (metrics, card):
        monkeypatch.setattr(home, "HELD_OUT", table)
    scores = Scores(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5]), torch.ones(2))
    answers = [Generation("p", "c", "a", num, 0.0, None) for num in (3, 8)]
    after = preference_metrics(scores) | generation_metrics(answers)
    assert after["worst_margin"] == -0.5
    assert after["longest_answer"] == 8
    assert metrics.brief(after)["worst_margin"] == "-0.500"
    summary = {"before": after, "after": after}
    rows = [line for line in card.table(summary).splitlines() if "worst" in line]
    assert len(rows) == 1
    assert rows[0].split("|")[4].strip() == "nats, higher is better"


def test_a_figure_is_a_plain_number(tmp_path: Path) -> None:
    scores = Scores(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.ones(1))
    assert {type(value) for value in preference_metrics(scores).values()} == {int, float}
