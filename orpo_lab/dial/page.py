"""What the dial shows: `dial.md` with `dial.png`, `dial.json`, and the lines for the terminal."""

import io
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from orpo_lab.compare.verdict import CONFIDENCE, Interval
from orpo_lab.compare.words import interval_text
from orpo_lab.dial.front import SAME, Front, Gaps
from orpo_lab.metrics import PREFERENCE, qualities_among
from orpo_lab.records.plot import BLUE, GREY, ORANGE, plain
from orpo_lab.records.run_folder import RunFolder, versions
from orpo_lab.upstream import matplotlib_as_shipped

Row = dict[str, str]


def write(front: Front, folder: Path, share: float) -> list[str]:
    """Write the files, and return the lines for the terminal.

    Args:
        front: the measured mixtures.
        folder: where the files go.
        share: of the high run in the mixture that is chosen.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dial.png").write_bytes(draw(front))
    text = [*said(front, share), *(table(rows) for rows in _tables(front, share))]
    title = f"# Mixtures of {front.ends.low.name} and {front.ends.high.name}"
    picture = "![Preference accuracy against quality, of mixtures and of trained runs](dial.png)"
    place = RunFolder(folder)
    place.write("dial.md", "\n\n".join([title, *text, picture]) + "\n")
    place.write_json("dial.json", report(front, share))
    return [*"\n\n".join(text).splitlines(), "", f"dial     {folder / 'dial.md'}"]


def said(front: Front, share: float) -> list[str]:
    """Return in sentences what the mixtures come to."""
    num = 2 * len(front.ends.by_seed)
    own = [f"Shares 0 and 1 come to exactly the figures of summary.json ({num} runs)."]
    figures = ", ".join(
        f"{name} {interval_text(interval)}"
        for name, interval in front.figures[front.shares.index(share)].items()
    )
    chosen = [
        f"Share {share:.3g} of {front.ends.high.name}: {figures}. "
        "If you choose a mixture by this table, its figures flatter it: the same held-out pairs "
        "have chosen it. Report figures on pairs of their own."
    ]
    return [*(front.unlike or own), *chosen, *_predictions(front)]


def _predictions(front: Front) -> list[str]:
    if not front.trained:
        return []
    num = len(front.trained)
    by_rule = [trained.by_rule for trained in front.trained]
    nearest = [trained.nearest for trained in front.trained]
    margins = ", ".join(f"{SAME[name]:g} of {name}" for name in front.figures[0])
    return [
        f"Settings trained between the two: {num}. The mixture at the share of the rule (linear in "
        f"the logarithm of the mean beta, fixed in advance) {_counted(by_rule)}.",
        f"The nearest mixture {_counted(nearest)}. It is chosen after looking, which favours the "
        "dial.",
        f"Predicted: every figure is shown to be within its margin ({margins}). Missed: a figure "
        f"is beyond its margin, and shown to differ. In brackets: {100 * CONFIDENCE:.0f} % "
        "intervals over pairs and seeds.",
    ]


def _counted(gaps: Sequence[Gaps]) -> str:
    counts = Counter(gap.outcome for gap in gaps)
    near = sum(gap.is_near for gap in gaps)
    return (
        f"predicts {counts['predicted']} and misses {counts['missed']} (open: {counts['open']}); "
        f"the estimates alone are within the margins of {near}"
    )


def _tables(front: Front, share: float) -> list[list[Row]]:
    return [mixture_rows(front, share), *([trained_rows(front)] if front.trained else [])]


def mixture_rows(front: Front, chosen: float) -> list[Row]:
    """Return the table of mixtures: a row for each share, as text by column name."""
    notes = {0.0: front.ends.low.name, 1.0: front.ends.high.name}
    rows = []
    for share, figures in zip(front.shares, front.figures, strict=True):
        note = ", ".join(filter(None, [notes.get(share), "chosen" * (share == chosen)]))
        rows.append({"share": f"{share:.3g}", **_texts(figures), "": note})
    return rows


def trained_rows(front: Front) -> list[Row]:
    """Return the table of trained settings, each above the mixtures that stand for it."""
    rows = []
    for trained in front.trained:
        num = len(trained.setting.runs)
        what = f"trained, {num} seed{'s' * (num > 1)}"
        row = {"setting": trained.setting.name, "what": what, "share": ""}
        rows.append(row | _texts(trained.figures) | {"outcome": ""})
        for what, gaps in (("by the rule", trained.by_rule), ("nearest", trained.nearest)):
            figures = front.figures[front.shares.index(gaps.share)]
            row = {"setting": "", "what": f"mixture, {what}", "share": f"{gaps.share:.3g}"}
            rows.append(row | _texts(figures) | {"outcome": _outcome_text(gaps)})
    return rows


def _texts(figures: dict[str, Interval]) -> Row:
    return {name: interval_text(interval) for name, interval in figures.items()}


def _outcome_text(gaps: Gaps) -> str:
    if gaps.outcome == "open":
        return "open, within the margins" if gaps.is_near else "open, beyond a margin"
    return gaps.outcome


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table of Markdown, whose columns are aligned."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def report(front: Front, share: float) -> dict[str, Any]:
    """Return the content of `dial.json`; the ends of an interval of one seed are null."""
    low, high = next(iter(front.ends.by_seed.values()))
    return {
        "date": str(date.today()),
        "versions": versions(),
        "low": str(low.folder),
        "high": str(high.folder),
        "betas": front.ends.betas,
        "seeds": [*front.ends.by_seed],
        "unlike": front.unlike,
        "chosen": share,
        "mixtures": [
            {"share": share, "figures": _plain(figures)}
            for share, figures in zip(front.shares, front.figures, strict=True)
        ],
        "trained": [
            {
                "setting": trained.setting.name,
                "beta": trained.beta,
                "seeds": trained.setting.seeds,
                "figures": _plain(trained.figures),
                "by_rule": _gaps(trained.by_rule),
                "nearest": _gaps(trained.nearest),
            }
            for trained in front.trained
        ],
        "left_out": front.ends.left_out,
    }


def _gaps(gaps: Gaps) -> dict[str, Any]:
    found = {"share": gaps.share, "outcome": gaps.outcome, "is_near": gaps.is_near}
    return found | {"gaps": _plain(gaps.gaps)}


def _plain(figures: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {name: interval.as_json() for name, interval in figures.items()}


def card(front: Front, share: float) -> str:
    """Return the model card of a mixture."""
    low, high = next(iter(front.ends.by_seed.values()))
    rows = [
        {"held out": name, "": interval_text(interval)}
        for name, interval in front.figures[front.shares.index(share)].items()
    ]
    return f"""---
tags: [orpo_lab, merge]
---
# A mixture of two runs

{1 - share:.3g} of the change that {low.folder.resolve().name} made to its base, and {share:.3g} of
that of {high.folder.resolve().name}. The mean betas of the two are {front.ends.betas[0]:.3g} and
{front.ends.betas[1]:.3g}. No step was trained for the mixture.

{table(rows)}

If the mixture was chosen by these figures, they flatter it.
"""


@matplotlib_as_shipped()
def draw(front: Front) -> bytes:
    """Draw preference accuracy against the first quality, of mixtures and trained runs; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    (quality, *_) = qualities_among(front.figures[0])
    front_at = [_point(figures, quality.name) for figures in front.figures]
    axes.plot(*zip(*front_at, strict=True), "o-", color=BLUE, markersize=4, label="mixtures")
    for name, at in ((front.ends.low.name, front_at[0]), (front.ends.high.name, front_at[-1])):
        axes.annotate(plain(name), at, xytext=(5, -11), textcoords="offset points", color=BLUE)
    for number, trained in enumerate(front.trained):
        at = _point(trained.figures, quality.name)
        x, y = trained.figures[quality.name], trained.figures[PREFERENCE]
        axes.errorbar(
            *at,
            xerr=[[max(at[0] - x.low, 0)], [max(x.high - at[0], 0)]],
            yerr=[[max(at[1] - y.low, 0)], [max(y.high - at[1], 0)]],
            fmt="s",
            color=ORANGE,
            elinewidth=1,
            label="trained" if number == 0 else None,
        )
        by_rule = front_at[front.shares.index(trained.by_rule.share)]
        axes.plot(*zip(at, by_rule, strict=True), ":", color=GREY, linewidth=1, zorder=0)
        axes.annotate(
            plain(trained.setting.name), at, xytext=(5, 4), textcoords="offset points", color=ORANGE
        )
    if quality.sign < 0:
        axes.invert_xaxis()  # better is to the right, whatever is measured
    axes.set_xlabel(quality.name + (f" ({quality.unit})" if quality.unit else ""))
    axes.set_ylabel("preference accuracy")
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _point(figures: dict[str, Interval], quality: str) -> tuple[float, float]:
    return figures[quality].estimate, figures[PREFERENCE].estimate
