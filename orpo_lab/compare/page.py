"""The report: `report.html`, which opens offline, `report.md` with pictures, and `report.json`."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orpo_lab.compare import pictures
from orpo_lab.compare.evidence import Comparison, as_measured
from orpo_lab.compare.guess import guesses
from orpo_lab.compare.read import Run
from orpo_lab.compare.record import record
from orpo_lab.compare.ship import Ship, choose
from orpo_lab.compare.tasks import task_figures
from orpo_lab.compare.untrained import name_before, untrained
from orpo_lab.compare.verdict import CONFIDENCE, Verdict
from orpo_lab.compare.words import interval_text, judged_text, tied, verdict_text
from orpo_lab.metrics import HELD_OUT, JUDGED_PREFIX, PREFERENCE, WIN_RATE, brief
from orpo_lab.records.markdown import fenced
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.records.templates import environment

# What the table of settings shows even where it is no quality
NOTED = [metric.name for metric in HELD_OUT if metric.is_noted]


def write(comparison: Comparison, folder: Path) -> None:
    """Write `report.html`, `report.md` with its pictures in `report/*.png`, and `report.json`."""
    drawn = pictures.draw(comparison)
    (folder / "report").mkdir(parents=True, exist_ok=True)
    for name, (_, png) in drawn.items():
        (folder / "report" / f"{name}.png").write_bytes(png)
    templates = environment()
    ship = choose(comparison)
    context = {
        "ship": ship,
        "samples": ship.samples(),
        "fenced": fenced,
        "best": _of_run(ship.best),
        "typical": _of_run(ship.typical),
        "expected": interval_text(comparison.verdict.accuracies[ship.number]),
        "verdict": verdict_text(comparison),
        "warnings": comparison.warnings,
        "margins": _margins(comparison),
        "confidence": round(100 * CONFIDENCE),
        "num_pairs": comparison.accuracy.num_pairs,
        "settings": table_of_settings(comparison, ship),
        "judges": judges(comparison.runs),
        "sources": source_rows(comparison),
        "tasks": [figure.row() for figure in task_figures(comparison)],
        "runs": _run_rows(comparison.runs),
        "failed": [run for run in comparison.runs if not run.is_complete],
        "pictures": {
            name: {"caption": caption, "data": base64.b64encode(png).decode()}
            for name, (caption, png) in drawn.items()
        },
    }
    place = RunFolder(folder)
    for name in ("report.html", "report.md"):
        place.write(name, templates.get_template(f"{name}.jinja").render(context))
    place.write_json("report.json", record(comparison, ship))


def _margins(comparison: Comparison) -> str:
    return " and ".join(
        f"{quality.margin:g}{quality.unit and ' ' + quality.unit} of {quality.name}"
        for quality in comparison.qualities
    )


def _of_run(run: Run) -> str:
    """Return a run folder with its figures."""
    assert run.summary is not None
    figures = ", ".join(f"{name} {value}" for name, value in brief(run.summary["after"]).items())
    return f"{run.folder} (seed {run.seeds_text}: {figures})"


def table_of_settings(comparison: Comparison, ship: Ship) -> list[dict[str, str]]:
    """Return a row for each setting, for each model before training, and for a guess by length."""
    rows = setting_rows(comparison)
    columns = list(rows[0])
    guessed = [
        dict.fromkeys(columns, "")
        | {"setting": guess.name, PREFERENCE: interval_text(guess.interval)}
        for guess in guesses(comparison)
    ]
    return [*rows, *_untrained_rows(comparison, ship, columns), *guessed]


def _untrained_rows(comparison: Comparison, ship: Ship, columns: list[str]) -> list[dict[str, str]]:
    """Return a row for each model before training, with a statement about the setting to ship."""
    rows = []
    for model in untrained(comparison):
        accuracy, *of_qualities = model.intervals
        row = {"setting": model.name, "seeds": "", PREFERENCE: interval_text(accuracy)}
        for quality, interval in zip(comparison.qualities, of_qualities, strict=True):
            row[quality.name] = interval_text(as_measured(quality, interval))
        for key in NOTED:
            if key in model.figures:
                row.setdefault(key, f"{model.figures[key]:.3f}")
        if ship.gains and ship.number in model.settings:
            said = ", ".join(f"{gain.said} in {gain.name}" for gain in ship.gains)
            row["verdict"] = f"{ship.setting.name} is {said}"
        rows.append({key: row.get(key, "") for key in columns})
    return rows


def setting_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return the table of settings: a row for each setting, as text by column name."""
    verdict = comparison.verdict
    is_judged = bool(judges(comparison.runs))
    rows = []
    for number, (setting, standing) in enumerate(
        zip(comparison.settings, verdict.qualities, strict=True)
    ):
        row = {"setting": setting.name, "seeds": str(len(setting.runs))}
        row[PREFERENCE] = interval_text(verdict.accuracies[number])
        for quality, interval in zip(comparison.qualities, standing.intervals, strict=True):
            row[quality.name] = interval_text(as_measured(quality, interval))
        for key in NOTED:
            values = [
                run.summary["after"][key]
                for run in setting.runs
                if run.summary and key in run.summary["after"]
            ]
            if values and key not in row:
                row[key] = _mean_text(values)
        if is_judged:
            row[WIN_RATE] = judged_text(setting.runs)
        row["verdict"] = _standing_text(verdict, number)
        rows.append(row)
    return rows


def judges(runs: Sequence[Run]) -> list[str]:
    """Return the names of the judges that have compared answers of the runs with those before."""
    key = f"{JUDGED_PREFIX}model"
    return sorted({run.summary[key] for run in runs if run.summary and key in run.summary})


def _mean_text(values: list[float]) -> str:
    return f"{np.mean(values):.3f}"


def source_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return a row for each setting and source of a mixture: means over runs; empty: no mixture.

    The model before training comes first, by the runs of the first setting.
    """
    rows = []
    first = comparison.settings[0].runs
    for name, runs, when in (
        (name_before(first[0]), first, "before"),
        *((setting.name, setting.runs, "after") for setting in comparison.settings),
    ):
        figures = [run.summary[when].get("by_source", {}) for run in runs if run.summary]
        for source in figures[0] if figures else {}:
            row = {"setting": name, "source": source}
            row["held-out pairs"] = str(figures[0][source]["num_pairs"])
            for key in (PREFERENCE, *NOTED):
                values = [of_run[source][key] for of_run in figures if key in of_run[source]]
                if values:
                    row[key] = _mean_text(values)
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in columns} for row in rows]


def _standing_text(verdict: Verdict, number: int) -> str:
    standing = verdict.qualities[number]
    if number == verdict.winner:
        return "winner"
    if standing.worse_in:
        return f"worse {' and '.join(standing.worse_in)}"
    text = "not separated" if number in (*verdict.unbeaten, verdict.leader) else "beaten"
    if number in (ties := tied(verdict)):
        text = ("highest, " if len(ties) == 1 else "tied for the highest, ") + text
    return text + "".join(f", {name} in doubt" for name in standing.doubtful_in)


def _run_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the table of runs: figures and cost."""
    rows = []
    for run in runs:
        row = {"run": run.folder.name, "seed": run.seeds_text, "state": run.state}
        if run.summary:
            after, train = run.summary["after"], run.summary["train"]
            row |= brief(after)
            if "preference_share" in train:
                row["preference share"] = f"{train['preference_share']:.3f}"
            row["wall time (s)"] = f"{run.seconds:.1f}"
            row["tokens"] = f"{train['tokens_per_second'] * train['wall_seconds']:.0f}"
            row["peak memory (GB)"] = f"{train['peak_memory_bytes'] / 1e9:.2f}"
            row["GPU-hours"] = "0" if train["device"] == "cpu" else f"{run.seconds / 3600:.3f}"
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in columns} for row in rows]
