"""The picture of a run, from its `metrics.jsonl` alone."""

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"

PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss (nats)", (("loss", "total", BLUE), ("nll_loss", "SFT (NLL)", GREEN))),
    (
        "odds-ratio loss (nats)",
        (("odds_ratio_loss", "$-\\log\\,\\sigma$(log odds ratio)", ORANGE),),
    ),
    ("beta", (("beta", "beta", GREY),)),
    (
        "preference accuracy",
        (
            ("preference_accuracy", "training", BLUE),
            ("eval_preference_accuracy", "held out", ORANGE),
        ),
    ),
    (
        "logp margin (nats)",
        (("logp_margin", "training", BLUE), ("eval_logp_margin", "held out", ORANGE)),
    ),
    ("learning rate", (("learning_rate", "learning rate", GREY),)),
)


def draw_training(metrics: list[dict[str, float]], title: str, file: Path) -> None:
    """Draw the loss and its parts, beta, accuracy, margin and learning rate over the steps.

    Args:
        metrics: the lines of `metrics.jsonl`.
        title: stands above the picture.
        file: the PNG to write.
    """
    # Not pyplot: it keeps every figure of a long sweep, and wants a display in some settings
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, curves) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        _draw_panel(axes, metrics, label, curves)
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_panel(
    axes: Any,
    metrics: list[dict[str, float]],
    label: str,
    curves: tuple[tuple[str, str, str], ...],
) -> None:
    drawn = 0
    for key, name, colour in curves:
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            marker = "o" if len(points) < 12 else None
            axes.plot(
                *zip(*points, strict=True), color=colour, label=name, marker=marker, markersize=3
            )
            drawn += 1
    axes.set_title(label, fontsize=9, loc="left")
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False)
    if label in ("preference accuracy",):
        axes.set_ylim(0, 1.02)
    if label in ("beta", "learning rate"):
        axes.set_ylim(bottom=0)
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False)
