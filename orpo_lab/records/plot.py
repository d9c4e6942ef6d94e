"""Draw the picture of a run; only the run's `metrics.jsonl` is needed."""

import itertools
import math
from pathlib import Path
from typing import Any

from orpo_lab.metrics import HELD_OUT_PREFIX, TRAINING, TrainingMetric
from orpo_lab.upstream import matplotlib_as_shipped

# Okabe and Ito's colours, which colour-blind readers can distinguish
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
# How many panels of a run's plot are side by side
NUM_COLUMNS = 3
# Height of a row of panels, in inches
ROW = 2.8
# Margins of the figure, as shares of its width, and spaces between panels, as shares of a panel's
# size. They leave room for tick labels of six digits
SPACES = {"left": 0.07, "right": 0.99, "wspace": 0.3, "hspace": 0.42}
# Margins below and above all panels, as shares of a row's height
BELOW, ABOVE = 0.18, 0.24
# The y-axis of metrics with these units
RANGES = {"0 to 1": (0, 1.02), "-1 to 1": (-1.02, 1.02)}
# Colours of curves that share a panel
COLOURS_OF_A_PANEL = (BLUE, GREEN, ORANGE)


def plain(text: str) -> str:
    """Return a text with $ escaped: matplotlib would read text between two $ as a formula."""
    return text.replace("$", r"\$")


@matplotlib_as_shipped()
def draw_training(metrics: list[dict[str, float]], title: str, file: Path) -> None:
    """Draw the loss and its parts, beta, accuracy, margin and learning rate over the steps.

    If the run was measured by the meter of preference, what the meter has measured is drawn too.

    Args:
        metrics: the lines of `metrics.jsonl`.
        title: text above the picture.
        file: the PNG file to write.
    """
    # Not pyplot: it keeps all figures of a long sweep in memory, and may require a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(metrics)
    num_rows = max(1, math.ceil(len(panels) / NUM_COLUMNS))
    figure = Figure(figsize=(10, ROW * num_rows), dpi=160)
    # Fixed margins: matplotlib's own layout draws everything twice, which takes half a second
    figure.subplots_adjust(bottom=BELOW / num_rows, top=1 - ABOVE / num_rows, **SPACES)
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).flat
    for axes, panel in itertools.zip_longest(grid, panels):
        if panel is None:
            axes.remove()
        else:
            _draw_panel(axes, metrics, panel)
    figure.suptitle(plain(title), fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _panels(lines: list[dict[str, float]]) -> list[str]:
    """Return the titles of the panels that have a curve."""
    known = {name.removeprefix(HELD_OUT_PREFIX) for line in lines for name in line}
    shown = [metric for metric in TRAINING if metric.panel and metric.name in known]
    return list(dict.fromkeys(metric.panel for metric in shown))


def _draw_panel(axes: Any, lines: list[dict[str, float]], panel: str) -> None:
    of_panel = [metric for metric in TRAINING if metric.panel == panel]
    # Each method has its own metrics
    members = [metric for metric in of_panel if any(metric.name in line for line in lines)]
    members = members or of_panel
    drawn = 0
    for key, name, colour in _panel_curves(members):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            marker = "o" if len(points) < 12 else None
            axes.plot(
                *zip(*points, strict=True), color=colour, label=name, marker=marker, markersize=3
            )
            drawn += 1
    axes.set_title(panel, fontsize=9, loc="left")
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False)
    if members[0].unit in RANGES:
        axes.set_ylim(*RANGES[members[0].unit])
    elif members[0].is_setting:
        axes.set_ylim(bottom=0)
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False)


def _panel_curves(members: list[TrainingMetric]) -> list[tuple[str, str, str]]:
    """Return key, name and colour of a panel's curves.

    A panel with a single metric also shows this metric on the held-out pairs, unless the metric is
    a setting, such as beta.
    """
    if len(members) > 1:
        return [
            (metric.name, metric.curve, colour)
            for metric, colour in zip(members, COLOURS_OF_A_PANEL, strict=False)
        ]
    (metric,) = members
    if metric.is_setting:
        return [(metric.name, metric.panel, GREY)]
    return [
        (metric.name, "training", BLUE),
        (HELD_OUT_PREFIX + metric.name, "held out", ORANGE),
    ]
