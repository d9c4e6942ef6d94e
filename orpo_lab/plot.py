"""The pictures of a run, from its `metrics.jsonl` alone, and of a comparison of runs."""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lab.compare import Comparison, Setting

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


@contextmanager
def _as_shipped() -> Iterator[None]:
    """Have matplotlib as it ships: no MPLBACKEND and no matplotlibrc has a say in our pictures.

    A notebook names a backend in the environment that need not be installed here, and matplotlib
    then fails as it is imported.
    """
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def _plain(text: str) -> str:
    """Return a text as matplotlib shows it letter by letter: between two $ it reads formulas."""
    return text.replace("$", r"\$")


@_as_shipped()
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
    figure.suptitle(_plain(title), fontsize=11)
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


# What is drawn over the steps for every setting: metric, axis label. Free of beta, so comparable.
CURVES = (
    ("beta", "beta"),
    ("nll_loss", "SFT loss (nats)"),
    ("preference_accuracy", "training preference accuracy"),
    ("logp_margin", "training logp margin (nats)"),
)
# One each for a schedule, in turn: schedules of one's own come with names that nobody knows here
LINES = ("-", "--", "-.", ":", (0, (6, 2)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")

Picture = tuple[str, bytes]


@_as_shipped()
def comparison(compared: "Comparison") -> dict[str, Picture]:
    """Return the pictures of a comparison by name: a caption and a PNG."""
    pictures = {"pareto": _pareto(compared)}
    for key, label in CURVES:
        if any(key in line for run in compared.runs for line in run.metrics):
            pictures[key] = _curves(compared.settings, key, label)
    return pictures


def _colours(settings: Sequence["Setting"]) -> list[Any]:
    """Return a colour for every setting: the same beta, the same colour; dark is low.

    Settings of one beta and one schedule, which differ in something else, have a colour each. The
    ramp ends before its yellow, which is not readable on white.
    """
    from matplotlib import colormaps

    seen: Counter[tuple[float, str]] = Counter()
    keys = []
    for setting in settings:
        beta, schedule = setting.values["beta"], setting.values["beta_schedule"]
        keys.append((beta, seen[beta, schedule]))
        seen[beta, schedule] += 1
    order = sorted(set(keys))
    ramp = colormaps["inferno"]
    return [ramp(0.8 * order.index(key) / max(len(order) - 1, 1)) for key in keys]


def _by_schedule(settings: Sequence["Setting"], styles: Sequence[Any]) -> list[Any]:
    """Return a style for every setting, one for each schedule; constant has the first."""
    names = {setting.values["beta_schedule"] for setting in settings}
    order = sorted(names, key=lambda name: (name != "constant", name))
    return [
        styles[order.index(setting.values["beta_schedule"]) % len(styles)] for setting in settings
    ]


def _figure(height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any, num_labels: int) -> bytes:
    """Return the picture, its legend below it where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 28 else 2
    if num_labels <= 24:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _pareto(compared: "Comparison") -> Picture:
    """Preference accuracy against the first quality, with intervals over pairs and seeds."""
    quality = compared.qualities[0]
    figure, axes = _figure(height=5)
    verdict, colours = compared.verdict, _colours(compared.settings)
    markers = _by_schedule(compared.settings, MARKERS)
    for setting, standing, y, colour, marker in zip(
        compared.settings, verdict.qualities, verdict.accuracies, colours, markers, strict=True
    ):
        x = standing.intervals[0]
        at = quality.sign * x.estimate
        ends = sorted((quality.sign * x.low, quality.sign * x.high))
        axes.errorbar(
            at,
            y.estimate,
            xerr=[[max(at - ends[0], 0)], [max(ends[1] - at, 0)]],
            yerr=[[max(y.estimate - y.low, 0)], [max(y.high - y.estimate, 0)]],
            fmt=marker,
            color=colour,
            elinewidth=1,
            label=_plain(setting.name),
        )
    best = max(standing.intervals[0].estimate for standing in verdict.qualities)
    axes.axvline(quality.sign * (best - quality.margin), color=GREY, linestyle=":", linewidth=1)
    if quality.sign < 0:
        axes.invert_xaxis()  # better is to the right, whatever is measured
    axes.set_xlabel(quality.name + (f" ({quality.unit})" if quality.unit else ""))
    axes.set_ylabel("preference accuracy")
    caption = (
        f"Preference accuracy against {quality.name}: up and to the right is better; left of the "
        "dotted line quality is worse than the margin allows"
    )
    return caption, _png(figure, len(compared.settings))


def _curves(settings: Sequence["Setting"], key: str, label: str) -> Picture:
    """One metric over the steps: a setting's mean over its seeds, and their range."""
    figure, axes = _figure()
    for setting, colour, line_style in zip(
        settings, _colours(settings), _by_schedule(settings, LINES), strict=True
    ):
        runs = [
            {line["step"]: line[key] for line in run.metrics if key in line} for run in setting.runs
        ]
        steps = sorted(set.intersection(*map(set, runs)))
        values = [[run[step] for run in runs] for step in steps]
        axes.plot(
            steps,
            [sum(one) / len(one) for one in values],
            color=colour,
            linestyle=line_style,
            marker="o" if len(steps) < 12 else None,
            markersize=3,
            label=_plain(setting.name),
        )
        if len(runs) > 1:
            axes.fill_between(
                steps,
                list(map(min, values)),
                list(map(max, values)),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    return f"{label[0].upper()}{label[1:]} over the steps, mean and range of the seeds", _png(
        figure, len(settings)
    )
