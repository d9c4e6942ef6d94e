"""What the curves of a run and of a comparison are drawn from, point by point."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from orpo_lab.compare import pictures
from orpo_lab.compare.evidence import Setting, compare
from orpo_lab.compare.read import Run
from orpo_lab.metrics import MARGINS
from orpo_lab.records import plot

# Two seeds that logged at other steps, as one does that was resumed
SEEDS = {1: {1: 0.5, 5: 0.7, 9: 0.9}, 2: {1: 0.1, 4: 0.3, 9: 0.2}, 3: {1: 0.6, 9: 0.7}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, in their order."""
    figures: list[Any] = []
    init = FigureCanvasAgg.__init__

    def kept(canvas: Any, figure: Any = None) -> None:
        figures.append(figure)
        init(canvas, figure)

    monkeypatch.setattr(FigureCanvasAgg, "__init__", kept)
    return figures


def setting(name: str, beta: float, seeds: dict[int, dict[int, float]]) -> Setting:
    values = {"beta": beta, "beta_schedule": "constant"}
    runs = [
        Run(
            folder=Path(f"{name}-{seed}"),
            values=values | {"seed": seed},
            contents={},
            choices={},
            overrides=[],
            state="finished",
            reason="",
            summary=None,
            metrics=[{"step": step, "nll_loss": value} for step, value in curve.items()],
            scores=None,
            scores_before=None,
            samples=[],
        )
        for seed, curve in seeds.items()
    ]
    return Setting(name, values, runs)


def test_a_settings_curve_is_the_mean_of_its_seeds_and_the_band_their_range(
    drawn: list[Any],
) -> None:
    settings = [setting("one", 0.1, SEEDS), setting("other", 0.2, {1: {2: 0.4, 6: 0.8}})]
    curves = [pictures._curve(one, "nll_loss") for one in settings]
    pictures._curves(settings, curves, "SFT loss (nats)")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["one"] == [pytest.approx([1, 0.4]), pytest.approx([9, 0.6])]
    assert lines["other"] == [[2, 0.4], [6, 0.8]]
    (band,) = axes.collections  # one seed has no range
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(1, 0.1), (1, 0.6), (9, 0.2), (9, 0.9)} == corners


def test_the_curves_of_a_run_are_what_they_are_called(drawn: list[Any], tmp_path: Path) -> None:
    metrics = [
        {"step": 1, "loss": 5.0, "nll_loss": 4.0, "odds_ratio_loss": 0.9, "beta": 0.2},
        {"step": 1, "preference_accuracy": 0.3, "logp_margin": -0.5, "learning_rate": 1e-4},
        {"step": 3, "eval_preference_accuracy": 0.6, "eval_logp_margin": 0.7},
    ]
    plot.draw_training(metrics, "a run", tmp_path / "plots" / "training.png")
    found = {
        (axes.get_title(loc="left"), line.get_label()): line.get_xydata().tolist()
        for axes in drawn[0].axes
        for line in axes.lines
    }
    assert found == {
        ("loss (nats)", "total"): [[1, 5.0]],
        ("loss (nats)", "SFT (NLL)"): [[1, 4.0]],
        ("preference loss (nats)", "training"): [[1, 0.9]],
        ("beta", "beta"): [[1, 0.2]],
        ("preference accuracy", "training"): [[1, 0.3]],
        ("preference accuracy", "held out"): [[3, 0.6]],
        ("logp margin (nats)", "training"): [[1, -0.5]],
        ("logp margin (nats)", "held out"): [[3, 0.7]],
        ("learning rate", "learning rate"): [[1, 1e-4]],
    }


def test_what_was_not_measured_has_no_panel(drawn: list[Any], tmp_path: Path) -> None:
    line = {"step": 4, "loss": 5.0, "beta": 0.2, "learning_rate": 1e-4}
    measured = {"meter/likelihood_norm": 3.0, "meter/preference_norm": 1.0}
    measured |= {"meter/preference_share": 0.25, "meter/cosine": -0.5}
    for lines in ([line], [line, {"step": 4, **measured}], []):
        plot.draw_training(lines, "a run", tmp_path / "training.png")
    without, with_meter, empty = (
        {axes.get_title(loc="left"): axes for axes in figure.axes} for figure in drawn
    )
    assert list(without) == ["loss (nats)", "beta", "learning rate"]
    assert list(with_meter) == [
        *without,
        "gradient norm of each term",
        "preference share of the gradient",
        "cosine of the two gradients",
    ]
    assert not empty
    assert drawn[1].get_figheight() == 2 * drawn[0].get_figheight()
    norms, share, cosine = list(with_meter.values())[3:]
    assert [curve.get_label() for curve in norms.lines] == ["likelihood", "preference"]
    assert (share.get_ylim(), cosine.get_ylim()) == ((0, 1.02), (-1.02, 1.02))


def scored(beta: float, seed: int, nll: float) -> Run:
    """Return a finished run whose answers were not checked."""
    chosen = np.random.default_rng(seed).normal(-nll, 0.1, 40)
    none = np.full(40, np.nan)
    scores = {"chosen_logp": chosen, "rejected_logp": chosen - np.resize([0.1, -0.1, 0.2], 40)}
    scores |= {"chosen_tokens": np.full(40, 3.0), "generated_tokens": none}
    scores |= {"correct": none, "repetition": none}
    return Run(
        folder=Path(f"{beta}-{seed}"),
        values={"beta": beta, "beta_schedule": "constant", "seed": seed},
        contents={},
        choices={},
        overrides=[],
        state="finished",
        reason="",
        summary={"after": {}, "dataset_fingerprint": {"train": "", "held_out": ""}},
        metrics=[],
        scores=scores,
        scores_before=None,
        samples=[],
    )


def test_to_the_right_nll_is_lower_and_the_dotted_line_leaves_the_margin(drawn: list[Any]) -> None:
    runs = [scored(beta, seed, nll) for beta, nll in ((0.1, 1.0), (0.2, 2.0)) for seed in (1, 2)]
    compared = compare(runs, {"exact_match": 0.1, "chosen_nll": 0.2, "repetition": 0.3})
    pictures._pareto(compared)
    (axes,) = drawn[0].axes
    nll = [-quality.intervals[0].estimate for quality in compared.verdict.qualities]
    assert nll == pytest.approx([1, 2], abs=0.05)
    assert axes.get_xlabel() == "chosen_nll (nats)"
    assert axes.xaxis_inverted()
    places = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) == 1]
    accuracies = [interval.estimate for interval in compared.verdict.accuracies]
    assert places == [[[x, y]] for x, y in zip(nll, accuracies, strict=True)]
    (dotted,) = (line for line in axes.lines if line.get_linestyle() == ":")
    assert dotted.get_xdata() == pytest.approx([min(nll) + 0.2] * 2)


def test_a_comparison_shows_the_share_of_preference_if_it_was_measured() -> None:
    runs = [scored(beta, seed, 1.0) for beta in (0.1, 0.2) for seed in (1, 2)]
    assert "meter_preference_share" not in pictures.draw(compare(runs, MARGINS))
    lines = [{"step": step, "meter/preference_share": 0.1} for step in (2, 4)]
    # One of the runs was not measured
    measured = [dataclasses.replace(run, metrics=lines) for run in runs[1:]]
    found = pictures.draw(compare([runs[0], *measured], MARGINS))
    assert found["meter_preference_share"][0].startswith("Preference share of the gradient over")
