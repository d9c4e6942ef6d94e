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

# From dark to light; chosen so that colour-blind readers tell any two apart, and all are readable
# on white
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
# One each for a schedule, in turn: schedules of one's own come with names that nobody knows here
LINES = ("-", "--", "-.", ":", (0, (6, 2)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
# Settings above which a legend would be longer than anybody reads
MAX_LABELS = 24
Picture = tuple[str, bytes]


@matplotlib_as_shipped()
def draw(compared: Comparison) -> dict[str, Picture]:
    """Return the pictures of a comparison by name: a caption and a PNG."""
    pictures = {"pareto": _pareto(compared)}
    for metric in TRAINING:
        lines = (line for run in compared.runs for line in run.metrics)
        if metric.compared and any(metric.name in line for line in lines):
            pictures[metric.name] = _curves(compared.settings, metric.name, metric.compared)
    return pictures


@dataclass(frozen=True)
class Look:
    """What a setting is told by in every picture."""

    colour: str
    marker: str
    line: Any
    is_light: bool
    """Drawn with a thin line and an open marker, where there are more settings than colours."""


def _looks(settings: Sequence[Setting]) -> list[Look]:
    """Return a look for every setting: colours tell of beta (dark is low), the rest of schedules.

    Settings of one beta and one schedule, which differ in something else, have a colour each.
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
    # Fewer than there are colours are as far apart as they can be
    step = max(1.0, (len(COLOURS) - 1) / max(len(ranks) - 1, 1))
    looks = []
    for setting, key in zip(settings, keys, strict=True):
        turn, number = divmod(round(ranks[key] * step), len(COLOURS))
        style = in_order.index(setting.values["beta_schedule"])
        line, marker = LINES[style % len(LINES)], MARKERS[style % len(MARKERS)]
        looks.append(Look(COLOURS[number], marker, line, turn % 2 == 1))
    return looks


def _figure(settings: Sequence[Setting], height: float) -> tuple[Any, Any]:
    """Return a figure with axes of a height in inches, and room for the legend below them."""
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
    """Return a setting's name in lines that the picture has room for."""
    return plain("\n".join(textwrap.wrap(setting.name, 64, break_on_hyphens=False)))


def _png(figure: Any, settings: Sequence[Setting]) -> bytes:
    """Return the picture, its legend below it where it hides nothing."""
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
    """Preference accuracy against the first quality, with intervals over pairs and seeds."""
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


def _curves(settings: Sequence[Setting], key: str, label: str) -> Picture:
    """One metric over the steps: a setting's mean over its seeds, and their range."""
    figure, axes = _figure(settings, height=3.2)
    for setting, look in zip(settings, _looks(settings), strict=True):
        runs = [
            {line["step"]: line[key] for line in run.metrics if key in line} for run in setting.runs
        ]
        steps = sorted(set.intersection(*map(set, runs)))
        values = [[run[step] for run in runs] for step in steps]
        axes.plot(
            steps,
            [sum(value) / len(value) for value in values],
            color=look.colour,
            linestyle=look.line,
            linewidth=0.8 if look.is_light else 1.6,
            marker="o" if len(steps) < 12 else None,
            markersize=3,
            label=_label(setting),
        )
        if len(runs) > 1:
            axes.fill_between(
                steps,
                list(map(min, values)),
                list(map(max, values)),
                color=look.colour,
                alpha=0.15,
                linewidth=0,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    caption = f"{label[0].upper()}{label[1:]} over the steps, mean and range of the seeds"
    return caption, _png(figure, settings)
