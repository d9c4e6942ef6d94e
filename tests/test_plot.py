"""What the curves of a run and of a comparison are drawn from, point by point."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from orpo_lab.compare import pictures
from orpo_lab.compare.evidence import Setting, compare
from orpo_lab.compare.read import Run
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
            state="finished",
            reason="",
            summary=None,
            metrics=[{"step": step, "nll_loss": value} for step, value in curve.items()],
            scores=None,
        )
        for seed, curve in seeds.items()
    ]
    return Setting(name, values, runs)


def test_a_settings_curve_is_the_mean_of_its_seeds_and_the_band_their_range(
    drawn: list[Any],
) -> None:
    settings = [setting("one", 0.1, SEEDS), setting("other", 0.2, {1: {2: 0.4, 6: 0.8}})]
    pictures._curves(settings, "nll_loss", "SFT loss (nats)")
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
        state="finished",
        reason="",
        summary={"after": {}, "dataset_fingerprint": {"train": "", "held_out": ""}},
        metrics=[],
        scores=scores,
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
