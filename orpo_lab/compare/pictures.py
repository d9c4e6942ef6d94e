"""The pictures of a comparison of runs."""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo_lab.compare.evidence import Comparison, Setting
from orpo_lab.metrics import TRAINING
from orpo_lab.records.plot import GREY, plain
from orpo_lab.upstream import matplotlib_as_shipped

# From dark to light. Colour-blind readers can distinguish any two of them, and all are visible on
# white
COLOURS = (
    "#000000",
    "#332288",
    "#663333",
    "#AA3377",
    "#006CD1",
    "#DC3220",
    "#EE6677",
    "#E69F00",
    "#33BBEE",
)
# Schedules get lines and markers in turn, not by name: users may add schedules of their own
LINES = ("-", "--", "-.", ":", (0, (6, 2)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
# The largest number of settings with a legend; a longer legend would not be read
MAX_LABELS = 24
Picture = tuple[str, bytes]


@matplotlib_as_shipped()
def draw(compared: Comparison) -> dict[str, Picture]:
    """Return the pictures of a comparison by name: a caption and a PNG.

    Between settings of several methods only figures that compare across methods are drawn.
    """
    pictures = {"pareto": _pareto(compared)}
    methods = {setting.values.get("method") for setting in compared.settings}
    for metric in TRAINING:
        if not metric.compared or (len(methods) > 1 and not metric.is_method_free):
            continue
        curves = [_curve(setting, metric.name) for setting in compared.settings]
        if any(curves):
            name = metric.name.replace("/", "_")  # the name of a file
            pictures[name] = _curves(compared.settings, curves, metric.compared)
    return pictures


@dataclass(frozen=True)
class Look:
    """How a setting is drawn in every picture."""

    colour: str
    marker: str
    line: Any
    is_light: bool
    """Whether line is thin and marker open; used if there are more settings than colours."""


def _looks(settings: Sequence[Setting]) -> list[Look]:
    """Return a look for every setting.

    The colour shows beta (dark is low). Line and marker show the beta schedule. Settings with the
    same beta and schedule, which differ in something else, get different colours.
    """
    schedules = {setting.values["beta_schedule"] for setting in settings}
    in_order = sorted(schedules, key=lambda name: (name != "constant", name))
    seen: Counter[tuple[float, str]] = Counter()
    keys = []
    for setting in settings:
        beta, schedule = setting.values["beta"], setting.values["beta_schedule"]
        keys.append((beta, seen[beta, schedule]))
        seen[beta, schedule] += 1
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    # If not all colours are needed, use colours that are as far apart as possible
    step = max(1.0, (len(COLOURS) - 1) / max(len(ranks) - 1, 1))
    looks = []
    for setting, key in zip(settings, keys, strict=True):
        turn, number = divmod(round(ranks[key] * step), len(COLOURS))
        style = in_order.index(setting.values["beta_schedule"])
        line, marker = LINES[style % len(LINES)], MARKERS[style % len(MARKERS)]
        looks.append(Look(COLOURS[number], marker, line, turn % 2 == 1))
    return looks


def _figure(settings: Sequence[Setting], height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, `height` inches high, with room below for the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = sum(_label(setting).count("\n") + 1 for setting in settings)
    rows = math.ceil(lines / _num_columns(settings)) if _has_legend(settings) else 0
    figure = Figure(figsize=(5, height + 0.2 * rows), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _has_legend(settings: Sequence[Setting]) -> bool:
    return len(settings) <= MAX_LABELS


def _num_columns(settings: Sequence[Setting]) -> int:
    return 1 if max(len(setting.name) for setting in settings) > 28 else 2


def _label(setting: Setting) -> str:
    """Return a setting's name, broken into lines that fit into the picture."""
    return plain("\n".join(textwrap.wrap(setting.name, 64, break_on_hyphens=False)))


def _png(figure: Any, settings: Sequence[Setting]) -> bytes:
    """Return the picture as PNG, with its legend, if there is one, below the axes."""
    if _has_legend(settings):
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=_num_columns(settings),
            fontsize=9,
            frameon=False,
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _pareto(compared: Comparison) -> Picture:
    """Draw preference accuracy against the first quality, with intervals over pairs and seeds."""
    quality = compared.qualities[0]
    figure, axes = _figure(compared.settings, height=4)
    verdict, looks = compared.verdict, _looks(compared.settings)
    for setting, standing, y, look in zip(
        compared.settings, verdict.qualities, verdict.accuracies, looks, strict=True
    ):
        x = standing.intervals[0]
        at = quality.sign * x.estimate
        ends = sorted((quality.sign * x.low, quality.sign * x.high))
        axes.errorbar(
            at,
            y.estimate,
            xerr=[[max(at - ends[0], 0)], [max(ends[1] - at, 0)]],
            yerr=[[max(y.estimate - y.low, 0)], [max(y.high - y.estimate, 0)]],
            fmt=look.marker,
            color=look.colour,
            markerfacecolor="white" if look.is_light else look.colour,
            elinewidth=1,
            label=_label(setting),
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
    return caption, _png(figure, compared.settings)


# One value for each run, by step
Curve = dict[float, list[float]]


def _curve(setting: Setting, key: str) -> Curve:
    """Return a metric at the steps where all runs of a setting have it; empty: it is not there."""
    runs = [
        {line["step"]: line[key] for line in run.metrics if key in line} for run in setting.runs
    ]
    steps = sorted(set.intersection(*map(set, runs)))
    return {step: [run[step] for run in runs] for step in steps}


def _curves(settings: Sequence[Setting], curves: Sequence[Curve], label: str) -> Picture:
    """Draw one metric over the steps: for each setting the mean and the range of its seeds.

    Settings with an empty curve are named in the caption alone.
    """
    drawn = [setting for setting, curve in zip(settings, curves, strict=True) if curve]
    figure, axes = _figure(drawn, height=3.2)
    for setting, look, curve in zip(settings, _looks(settings), curves, strict=True):
        if not curve:
            continue
        axes.plot(
            list(curve),
            [sum(values) / len(values) for values in curve.values()],
            color=look.colour,
            linestyle=look.line,
            linewidth=0.8 if look.is_light else 1.6,
            marker="o" if len(curve) < 12 else None,
            markersize=3,
            label=_label(setting),
        )
        if len(setting.runs) > 1:
            axes.fill_between(
                list(curve),
                list(map(min, curve.values())),
                list(map(max, curve.values())),
                color=look.colour,
                alpha=0.15,
                linewidth=0,
            )
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(label)
    caption = f"{label[0].upper()}{label[1:]} over the steps, mean and range of the seeds"
    absent = [setting.name for setting in settings if setting not in drawn]
    if absent:
        caption += f"; not logged by {', '.join(absent)}"
    return caption, _png(figure, drawn)
