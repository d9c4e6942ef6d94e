"""Compare runs: `python -m orpo_lab.compare FOLDER... [--out FOLDER]`.

A FOLDER is a run folder or a sweep's. Writes `report.html` (one file that opens offline) and
`report.md`, with a verdict over held-out pairs and seeds (see `orpo_lab.verdict`), and prints the
verdict. Reads run folders and nothing else; torch is not imported.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
import yaml

from orpo_lab import identity, plot
from orpo_lab.errors import UserError, one_line
from orpo_lab.metrics import HELD_OUT, MARGINS, PREFERENCE, HeldOutMetric, brief, qualities_among
from orpo_lab.run_folder import RunFolder, natural_order
from orpo_lab.verdict import (
    CONFIDENCE,
    Array,
    Interval,
    Measure,
    Quality,
    Verdict,
    decide,
    overoptimised,
)

# Answers that are so many times as long, or as short, as the best setting's are warned of
MAX_LENGTH_RATIO = 1.25


@dataclass(frozen=True)
class Run:
    """One run folder, as read."""

    folder: Path
    values: dict[str, Any]
    """The configuration, flat, and the kind of what was chosen in every group."""
    contents: dict[str, str]
    """What lay at its locations when it was started last; see `identity.contents`."""
    choices: dict[str, str]
    """The options chosen, under the names that people gave."""
    state: str
    reason: str
    summary: dict[str, Any] | None
    metrics: list[dict[str, float]]
    scores: dict[str, Array] | None
    """Columns of `scores.parquet` after training; NaN where there is none."""

    @property
    def is_complete(self) -> bool:
        """Whether it finished and left what a comparison needs."""
        return self.state == "finished" and self.summary is not None and self.scores is not None


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone."""

    name: str
    values: dict[str, Any]
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        """The seeds it was trained with."""
        return [run.values["seed"] for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """Settings and what the evidence says about them."""

    runs: list[Run]
    settings: list[Setting]
    accuracy: Measure
    qualities: list[Quality]
    verdict: Verdict
    warnings: list[str]


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the run folders among `folders` and directly in them.

    Raises:
        UserError: a folder is no run folder and holds none, or a file in one cannot be read.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        inside = (
            [folder]
            if _is_run(folder)
            else sorted(filter(_is_run, _children(folder)), key=natural_order)
        )
        if not inside:
            raise UserError(f"{folder} is not a run folder, and no run folder is in it")
        for one in inside:
            found.setdefault(one.resolve(), read_run(one))
    return list(found.values())


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: a file in it cannot be read.
    """
    place = RunFolder(folder)
    try:
        choices = place.read_yaml("choices.yaml")["choices"]
        started = (place.segments() or [{}])[-1]
        values = identity.flat(place.read_yaml("config.yaml")) | started.get("kinds", choices)
        status = place.status()
        has_summary = (folder / "summary.json").is_file()
        return Run(
            folder=folder,
            values=values,
            # An earlier version kept no contents
            contents=started.get("contents") or {"model.path": str(values.get("model.path"))},
            choices=choices,
            state=status["state"],
            reason=status["reason"],
            summary=json.loads((folder / "summary.json").read_text()) if has_summary else None,
            metrics=place.metrics(),
            scores=_read_scores(folder / "scores.parquet"),
        )
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder} cannot be read as a run folder: {type(error).__name__}: {one_line(error)}"
        ) from error


def _read_scores(file: Path) -> dict[str, Array] | None:
    if not file.is_file():
        return None
    table = pq.read_table(file, filters=[("when", "=", "after")]).drop_columns(["pair", "when"])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return {name: np.array(column, dtype=np.float64) for name, column in columns.items()}


def group(runs: Sequence[Run]) -> list[Setting]:
    """Group runs by everything but the seed, named by what differs; betas in rising order.

    Of two runs with the same seed and values (two sweeps that overlap) the first one counts.
    """
    read = [_told_apart_by(run) for run in runs]
    keys = sorted({key for values in read for key in values})
    # A key that only some have, all with one value, comes with another that tells them apart
    differing = [key for key in keys if len({json.dumps(v[key]) for v in read if key in v}) > 1]
    named = {key: _names(runs, read, key) for key in ("model", "dataset") if key in differing}
    found: dict[str, Setting] = {}
    ranks: dict[str, Any] = {}
    for number, (run, values) in enumerate(zip(runs, read, strict=True)):
        mine = {key: values[key] for key in differing if key in values}
        shown = mine | {key: names[number] for key, names in named.items()}
        name = " ".join(_label(key, value) for key, value in shown.items()) or "all runs"
        # By exact values: names are rounded
        exact = json.dumps(mine)
        setting = found.setdefault(exact, Setting(name, run.values, []))
        ranks[exact] = (run.values["beta_schedule"], run.values["beta"], _rank(mine))
        if run.values["seed"] not in setting.seeds:
            setting.runs.append(run)
    return [found[exact] for exact in sorted(found, key=ranks.__getitem__)]


def _rank(values: dict[str, Any]) -> list[tuple[str, bool, float, str]]:
    """Return what orders settings by what differs: numbers by their size, the rest as text."""
    return [
        (key, False, value, "")
        if isinstance(value, int | float)
        else (key, True, 0.0, json.dumps(value))
        for key, value in values.items()
    ]


def _told_apart_by(run: Run) -> dict[str, Any]:
    """Return what tells settings apart: all that identifies a run but its seed.

    Models are told apart by what lies at their place, data by the fingerprint of their pairs.
    """
    told = identity.settings(run.values)
    told.pop("seed")
    data = run.summary["dataset_fingerprint"] if run.summary else None
    model = [one for key, one in sorted(run.contents.items()) if key.startswith("model.")]
    return told | {"model": model, "dataset": data}


def _names(runs: Sequence[Run], read: Sequence[dict[str, Any]], group: str) -> list[str]:
    """Return what to call every run's model or data: the option, its place, or place and hash."""
    hashes = [hashlib.sha256(json.dumps(values[group]).encode()).hexdigest()[:6] for values in read]
    choices = [run.choices.get(group, "") for run in runs]
    places = [_place(run, group) for run in runs]
    for names in (choices, places):
        if len(set(zip(names, hashes, strict=True))) == len(set(names)) == len(set(hashes)):
            return names
    return [f"{place} ({one})" for place, one in zip(places, hashes, strict=True)]


def _place(run: Run, group: str) -> str:
    keys = [f"{group}.{name}" for name in ("path", "train_path", "revision")]
    return "@".join(str(run.values[key]) for key in keys if run.values.get(key))


def _label(key: str, value: Any) -> str:
    """Return `beta=0.2`, `cosine`: a schedule's name says what it is."""
    if key == "beta_schedule":
        return str(value)
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def compare(runs: Sequence[Run], margins: dict[str, float]) -> Comparison:
    """Compare the complete runs among `runs`.

    Raises:
        UserError: none is complete, or they were not scored on the same held-out pairs.
    """
    complete = [run for run in runs if run.is_complete]
    if not complete:
        states = ", ".join(f"{run.folder.name}: {run.state}" for run in runs)
        raise UserError(f"no run has finished with scores to compare ({states})")
    _check_same_pairs(complete)
    settings = group(complete)
    accuracy = Measure(
        [
            _stack(one, lambda s: (s["chosen_logp"] > s["rejected_logp"]).astype(float))
            for one in settings
        ],
        is_share=True,
    )
    qualities = _qualities(settings, margins)
    return Comparison(
        runs=list(runs),
        settings=settings,
        accuracy=accuracy,
        qualities=qualities,
        verdict=decide(accuracy, qualities),
        warnings=[*_changed(complete), *_warnings(settings, accuracy, qualities)],
    )


def _check_same_pairs(runs: Sequence[Run]) -> None:
    by_pairs: dict[tuple[str, int], Run] = {}
    for run in runs:
        assert run.summary is not None
        num_answered = run.summary["after"].get("num_generations", 0)
        by_pairs.setdefault((run.summary["dataset_fingerprint"]["held_out"], num_answered), run)
    if len(by_pairs) > 1:
        one, other = [str(run.folder) for run in by_pairs.values()][:2]
        raise UserError(
            f"{one} and {other} were scored on different held-out pairs, or answered different "
            "numbers of them, so their figures cannot be compared; compare runs of one dataset, "
            "max_length, num_eval, num_generations and tokenizer"
        )


def _stack(setting: Setting, column: Any) -> Array:
    """Return a setting's per-pair values, [K, N]."""
    return np.stack([column(run.scores) for run in setting.runs])


def _qualities(settings: Sequence[Setting], margins: dict[str, float]) -> list[Quality]:
    """Return what preference accuracy may not be bought with, measured at every pair."""

    def values(metric: HeldOutMetric, scores: dict[str, Array]) -> Array:
        assert metric.of_pair is not None
        found = metric.of_pair(scores)
        return found[~np.isnan(scores["generated_tokens"])] if metric.of_answers else found

    all_scores = [run.scores for setting in settings for run in setting.runs if run.scores]
    present = [
        metric.name
        for metric in HELD_OUT
        if metric.of_pair and all(not np.isnan(values(metric, one)).all() for one in all_scores)
    ]
    found = []
    for metric in qualities_among(present):
        of_settings = [
            metric.sign * _stack(setting, partial(values, metric)) for setting in settings
        ]
        measure = Measure(of_settings, is_share=metric.is_share)
        margin = margins[metric.name]
        found.append(Quality(metric.name, metric.unit, measure, margin, sign=metric.sign))
    return found


def _warnings(
    settings: Sequence[Setting], accuracy: Measure, qualities: Sequence[Quality]
) -> list[str]:
    """Say where a higher beta still raises accuracy and costs quality, and where length changes."""
    families: dict[str, list[int]] = {}
    for number, setting in enumerate(settings):
        rest = {k: v for k, v in _told_apart_by(setting.runs[0]).items() if k != "beta"}
        families.setdefault(json.dumps(rest, sort_keys=True), []).append(number)
    said = []
    for family in families.values():
        family.sort(key=lambda number: settings[number].values["beta"])
        for quality in qualities:
            first = overoptimised(family, accuracy, quality)
            if first is not None:
                said.append(
                    f"{settings[first].name} looks over-optimised: preference accuracy still "
                    f"rises there, while {quality.name} goes to "
                    f"{quality.sign * quality.measure.value(first):.3f}, beyond interval and margin"
                )
    best = settings[int(qualities[0].measure.means.argmax())]
    for setting in settings:
        # Where no answer has a token there is nothing to compare
        ratio = _length(setting) / (_length(best) or math.nan)
        if ratio > MAX_LENGTH_RATIO or ratio < 1 / MAX_LENGTH_RATIO:
            said.append(
                f"greedy answers of {setting.name} are {ratio:.2f} times as long as those of "
                f"{best.name}, the best in {qualities[0].name}"
            )
    return said


def _changed(runs: Sequence[Run]) -> list[str]:
    """Say which runs were not trained throughout by the configuration they are listed under."""
    changed = []
    for run in runs:
        assert run.summary is not None
        keys = sorted({key for start in run.summary.get("changes", []) for key in start})
        if keys:
            changed.append(f"{run.folder.name} was resumed with changes of {', '.join(keys)}")
    return changed


def _length(setting: Setting) -> float:
    """Return the mean tokens of a setting's greedy answers; NaN where there are none."""
    answers = np.concatenate([run.scores["generated_tokens"] for run in setting.runs if run.scores])
    given = answers[~np.isnan(answers)]
    return float(given.mean()) if len(given) else math.nan


def verdict_text(comparison: Comparison) -> list[str]:
    """Return the verdict as sentences."""
    verdict, settings = comparison.verdict, comparison.settings
    leader = settings[verdict.leader].name
    reached = f"preference accuracy {_interval(verdict.accuracies[verdict.leader])}"
    out = [
        f"{setting.name} ({', '.join(one.worse_in)})"
        for setting, one in zip(settings, verdict.qualities, strict=True)
        if one.worse_in
    ]
    lines = []
    if len(settings) == 1:
        lines.append(f"One setting, nothing to compare: {reached}.")
    elif all(len(settings[number].runs) == 1 for number in (verdict.leader, *verdict.unbeaten)):
        lines.append(
            f"One seed cannot separate these: {_highest(comparison)} the highest preference "
            f"accuracy ({verdict.accuracies[verdict.leader].estimate:.3f}), and another seed might "
            "tell otherwise. "
            "Train every setting with at least two seeds, better three (seed=1,2,3)."
        )
    elif verdict.winner is not None:
        lines.append(f"The winner is {leader}: {reached}.")
        if verdict.nearest is not None and verdict.lead is not None:
            lines.append(
                "It is shown to be above every other setting of good quality; the nearest, "
                f"{settings[verdict.nearest].name}, by {_points(verdict.lead)}."
            )
    else:
        lines += _undecided(comparison, leader, reached)
    if out:
        lines.append(f"Out for their quality: {'; '.join(out)}.")
    return lines


def _tied(verdict: Verdict) -> list[int]:
    """Return the settings of good quality with the leader's very preference accuracy."""
    highest = verdict.accuracies[verdict.leader].estimate
    standings = zip(verdict.accuracies, verdict.qualities, strict=True)
    return [
        number
        for number, (one, quality) in enumerate(standings)
        if one.estimate == highest and not quality.worse_in
    ]


def _highest(comparison: Comparison) -> str:
    names = [comparison.settings[number].name for number in _tied(comparison.verdict)]
    if len(names) == 1:
        return f"{names[0]} has"
    return f"{', '.join(names[:-1])} and {names[-1]} tie for"


def _undecided(comparison: Comparison, leader: str, reached: str) -> list[str]:
    verdict = comparison.verdict
    lines = []
    doubtful = verdict.qualities[verdict.leader].doubtful_in
    if doubtful:
        lines.append(
            f"The evidence names no winner: {leader} leads with {reached}, but its "
            f"{' and '.join(doubtful)} may be worse than the margin allows."
        )
    one_seed = [comparison.settings[number].name for number in verdict.one_seed]
    names = [comparison.settings[number].name for number in verdict.unbeaten]
    rest = ", ".join(name for name in names if name not in one_seed)
    if leader in one_seed:
        lines.append(f"The evidence names no winner: {leader} leads with {reached}, on one seed.")
    elif rest and verdict.lead is not None and verdict.lead.estimate == 0:
        lines.append(
            f"The evidence separates nothing: {_highest(comparison)} the highest {reached}. More "
            "held-out pairs or seeds may tell them apart."
        )
    elif rest and verdict.lead is not None:
        lines.append(
            f"The evidence does not separate {leader} ({reached}) from {rest}. The smallest "
            f"gap is {_points(verdict.lead)}. {_needed(verdict)}"
        )
    elif not doubtful:
        lines.append(f"The evidence names no winner: {leader} leads with {reached}.")
    if one_seed:
        lines.append(
            "With one seed a setting can neither win nor be beaten; train with more, or leave out: "
            f"{', '.join(one_seed)}."
        )
    return lines


def _needed(verdict: Verdict) -> str:
    if verdict.seeds_needed is None:
        return "If it is real, it is too small to show with 50 seeds: take them as equal."
    text = f"If it is real, about {verdict.seeds_needed} seeds a setting would show it"
    if verdict.pairs_needed is None:
        return f"{text}; more held-out pairs alone would not."
    return f"{text}, or about {verdict.pairs_needed} held-out pairs with as many seeds as now."


def _interval(one: Interval) -> str:
    if math.isnan(one.low):
        return f"{one.estimate:.3f}"
    return f"{one.estimate:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _points(one: Interval) -> str:
    return f"{100 * one.estimate:.1f} points [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def write(comparison: Comparison, folder: Path) -> None:
    """Write `report.html`, `report.md` and the pictures of the latter, `report/*.png`."""
    pictures = plot.comparison(comparison)
    (folder / "report").mkdir(parents=True, exist_ok=True)
    for name, (_, png) in pictures.items():
        (folder / "report" / f"{name}.png").write_bytes(png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orpo_lab"),
        autoescape=jinja2.select_autoescape(("html.jinja",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context = {
        "verdict": verdict_text(comparison),
        "warnings": comparison.warnings,
        "margins": _margins(comparison),
        "confidence": round(100 * CONFIDENCE),
        "num_pairs": comparison.accuracy.num_pairs,
        "settings": setting_rows(comparison),
        "runs": _run_rows(comparison.runs),
        "failed": [run for run in comparison.runs if not run.is_complete],
        "pictures": {
            name: {"caption": caption, "data": base64.b64encode(png).decode()}
            for name, (caption, png) in pictures.items()
        },
    }
    place = RunFolder(folder)
    for name in ("report.html", "report.md"):
        place.write(name, environment.get_template(f"{name}.jinja").render(context))


def _margins(comparison: Comparison) -> str:
    return " and ".join(
        f"{one.margin:g}{one.unit and ' ' + one.unit} of {one.name}" for one in comparison.qualities
    )


def setting_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return the table of settings."""
    verdict = comparison.verdict
    rows = []
    for number, (setting, standing) in enumerate(
        zip(comparison.settings, verdict.qualities, strict=True)
    ):
        row = {"setting": setting.name, "seeds": str(len(setting.runs))}
        row[PREFERENCE] = _interval(verdict.accuracies[number])
        for quality, interval in zip(comparison.qualities, standing.intervals, strict=True):
            ends = sorted((quality.sign * interval.low, quality.sign * interval.high))
            row[quality.name] = _interval(Interval(quality.sign * interval.estimate, *ends))
        for key in (metric.name for metric in HELD_OUT if metric.is_noted):
            values = [
                run.summary["after"][key]
                for run in setting.runs
                if run.summary and key in run.summary["after"]
            ]
            if values and key not in row:
                row[key] = f"{np.mean(values):.3f}"
        row["verdict"] = _standing_text(verdict, number)
        rows.append(row)
    return rows


def _standing_text(verdict: Verdict, number: int) -> str:
    standing = verdict.qualities[number]
    if number == verdict.winner:
        return "winner"
    if standing.worse_in:
        return f"worse {' and '.join(standing.worse_in)}"
    text = "not separated" if number in (*verdict.unbeaten, verdict.leader) else "beaten"
    if number in (tied := _tied(verdict)):
        text = ("highest, " if len(tied) == 1 else "tied for the highest, ") + text
    return text + "".join(f", {name} in doubt" for name in standing.doubtful_in)


def _run_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the table of runs: figures and cost."""
    rows = []
    for run in runs:
        row = {"run": run.folder.name, "seed": str(run.values["seed"]), "state": run.state}
        if run.summary:
            after, train = run.summary["after"], run.summary["train"]
            row |= brief(after)
            seconds = train["wall_seconds"] + sum(run.summary["evaluation_seconds"].values())
            row["wall time (s)"] = f"{seconds:.1f}"
            row["tokens"] = f"{train['tokens_per_second'] * train['wall_seconds']:.0f}"
            row["peak memory (GB)"] = f"{train['peak_memory_bytes'] / 1e9:.2f}"
            row["GPU-hours"] = "0" if train["device"] == "cpu" else f"{seconds / 3600:.3f}"
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in columns} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; bad input ends in one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m orpo_lab.compare",
        description="Compare runs, over held-out pairs and seeds.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="run or sweep folders"
    )
    parser.add_argument(
        "--out", type=Path, help="where report.html and report.md go (default: the first FOLDER)"
    )
    for name, margin in MARGINS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}-margin",
            type=float,
            default=margin,
            metavar="X",
            help=f"how much worse {name} may be than the best setting's (default: {margin})",
        )
    options = parser.parse_args(arguments)
    margins = {name: getattr(options, f"{name}_margin") for name in MARGINS}
    out = options.out or options.folders[0]
    try:
        comparison = compare(find_runs(options.folders), margins)
        write(comparison, out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {out} cannot be written to: {one_line(error)}; choose another with --out")
    print(
        "\n".join(
            [*verdict_text(comparison), *comparison.warnings, "", f"report  {out / 'report.html'}"]
        )
    )


if __name__ == "__main__":
    main()
