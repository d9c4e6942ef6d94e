"""Group runs into settings, and compare the settings."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from orpo_lab.compare.read import Run
from orpo_lab.compare.verdict import (
    Array,
    Interval,
    Measure,
    Quality,
    Verdict,
    decide,
    overoptimised,
)
from orpo_lab.config import identity, known_key
from orpo_lab.config.method import METHODS, Method
from orpo_lab.config.mixture import SOURCES
from orpo_lab.errors import UserError
from orpo_lab.metrics import CHECKED, HELD_OUT, HeldOutMetric, qualities_among
from orpo_lab.records.run_folder import changed_keys

# For the model, the data and the start of a run: the keys that say where these are
PLACES = {
    "model": ("model.path", "model.revision"),
    "dataset": ("dataset.path", "dataset.train_path", "dataset.revision"),
    "start_from": ("start_from",),
}
# The keys that say where the sources of a mixture are
OF_SOURCES = {"dataset": (f"{SOURCES}.*.path", f"{SOURCES}.*.train_path", f"{SOURCES}.*.revision")}
# A warning names settings whose answers are more than this many times as long, or as short, as
# those of the setting that is best in the first quality
MAX_LENGTH_RATIO = 1.25


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seeds alone: their own, and those of the runs they started from."""

    name: str
    values: dict[str, Any]
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        """The own seeds of the setting's runs; of different starts they may have the same."""
        return [run.values["seed"] for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """Settings, and the result of comparing them."""

    runs: list[Run]
    settings: list[Setting]
    accuracy: Measure
    qualities: list[Quality]
    verdict: Verdict
    warnings: list[str]


def group(runs: Sequence[Run]) -> list[Setting]:
    """Group runs into settings: runs that are equal in everything but the seeds.

    A setting is named by the values that differ between settings, without values that the method's
    name implies. Settings are sorted by their method, then by their beta schedule, then by beta. If
    two runs have the same values and the same seeds, their starts' seeds too (two sweeps that
    overlap), only the first run counts.
    """
    read = [told_apart_by(run) for run in runs]
    keys = sorted({key for values in read for key in values})
    # If only some runs have a key, all with one value, another key separates these runs anyway
    differing = [key for key in keys if len({json.dumps(v[key]) for v in read if key in v}) > 1]
    named = {key: _names(runs, read, key) for key in PLACES if key in differing}
    implied = _implied(read) - {"method", *named}
    found: dict[str, Setting] = {}
    ranks: dict[str, Any] = {}
    for number, (run, values) in enumerate(zip(runs, read, strict=True)):
        mine = {key: values[key] for key in differing if key in values}
        shown = mine | {key: names[number] for key, names in named.items()}
        shown = {key: value for key, value in shown.items() if key not in implied}
        name = " ".join(_label(key, value) for key, value in shown.items()) or "all runs"
        # Group by exact values, since names are rounded
        exact = json.dumps(mine)
        setting = found.setdefault(exact, Setting(name, run.values, []))
        method = run.values.get("method", "")
        ranks[exact] = (method, run.values["beta_schedule"], run.values["beta"], _rank(mine))
        if run.seeds not in [other.seeds for other in setting.runs]:
            setting.runs.append(run)
    return [found[exact] for exact in sorted(found, key=ranks.__getitem__)]


def _implied(read: Sequence[dict[str, Any]]) -> set[str]:
    """Return the keys that have one value in all runs of a method, whichever the method is."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for values in read:
        by_method.setdefault(values.get("method", ""), []).append(values)
    return {
        key
        for values in read
        for key in values
        if all(
            len({json.dumps(other.get(key)) for other in of_method}) == 1
            for of_method in by_method.values()
        )
    }


def _rank(values: dict[str, Any]) -> list[tuple[str, bool, float, str]]:
    """Return a sort key from values that differ: numbers sort by size, other values as text."""
    return [
        (key, False, value, "")
        if isinstance(value, int | float)
        else (key, True, 0.0, json.dumps(value))
        for key, value in values.items()
    ]


def told_apart_by(run: Run) -> dict[str, Any]:
    """Return the values by which settings differ: all that identifies a run, without seeds.

    See `identity.told_apart_by`.
    """
    data = run.summary["dataset_fingerprint"] if run.summary else None
    return identity.told_apart_by(run.values, run.contents, data, run.start)


def _names(runs: Sequence[Run], read: Sequence[dict[str, Any]], group: str) -> list[str]:
    """Return a name for every run's model, data or start: for a key of PLACES.

    The name is the option, or the path, or for starts what tells them apart, or path and hash: the
    first that separates exactly the runs that differ.
    """
    hashes = [_digest(values[group]) for values in read]
    choices = [run.choices.get(group, "") for run in runs]
    places = [_place(run, group) for run in runs]
    found = [choices, places]
    if any(isinstance(values[group], dict) for values in read) and group == "start_from":
        found.append(_described([values[group] for values in read], places))
    for names in found:
        if len(set(zip(names, hashes, strict=True))) == len(set(names)) == len(set(hashes)):
            return names
    return [f"{place} ({digest})" for place, digest in zip(places, hashes, strict=True)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]


def _described(starts: Sequence[Any], places: Sequence[str]) -> list[str]:
    """Return a name such as `sft(beta=0.2)` for every start: its method, and what tells it apart.

    Args:
        starts: for each run the settings of its start; or the start's content if there is no record
            of it; None: there is no start.
        places: for each run what a start is called that has no settings.
    """
    known = [start for start in starts if isinstance(start, dict)]
    keys = sorted({key for start in known for key in start} - _implied(known) - {"method"})
    earlier = [start["start_from"] for start in known]
    if "start_from" in keys:
        earlier = _described(earlier, ["run"] * len(earlier))
    names = iter([_named(*both, keys) for both in zip(known, earlier, strict=True)])
    found = []
    for start, place in zip(starts, places, strict=True):
        if isinstance(start, dict):
            found.append(next(names))
        else:
            found.append(place if start is None else f"{place} ({_digest(start)})")
    return found


def _named(start: dict[str, Any], earlier: str, keys: Sequence[str]) -> str:
    """Return a start's method and its values of some keys; `earlier` names what it started from."""
    shown = {key: start[key] for key in keys if key in start}
    # What files held cannot be read
    shown |= {key: _digest(shown[key]) for key in ("dataset", "model") if key in shown}
    if shown.pop("start_from", None) is not None:
        shown = {"start_from": earlier} | shown
    told = " ".join(_label(key, value) for key, value in shown.items())
    return start.get("method", "run") + (f"({told})" if told else "")


def _place(run: Run, group: str) -> str:
    given = [str(run.values[key]) for key in PLACES[group] if run.values.get(key)]
    given += [
        str(value)
        for key, value in sorted(run.values.items())
        if known_key(key) in OF_SOURCES.get(group, ()) and value
    ]
    return "@".join(given) or "null"


def _label(key: str, value: Any) -> str:
    """Return `beta=0.2` for most keys; for a beta schedule its name alone, such as `cosine`.

    The keys of a schedule stand without its name, as in `hold_then_anneal hold_fraction=0.6`.
    """
    if key == "beta_schedule":
        return str(value)
    key = key.removeprefix("beta_schedule.")
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def compare(runs: Sequence[Run], margins: dict[str, float]) -> Comparison:
    """Compare the complete runs among `runs`.

    Args:
        runs: complete and other runs.
        margins: for each quality, how much worse than the best setting's it may be.

    Raises:
        UserError: no run is complete, or the runs were not scored on the same held-out pairs.
    """
    complete = [run for run in runs if run.is_complete]
    if not complete:
        states = ", ".join(f"{run.folder.name}: {run.state}" for run in runs)
        raise UserError(f"no run has finished with scores to compare ({states})")
    return weigh(runs, group(complete), margins)


def weigh(
    runs: Sequence[Run], settings: Sequence[Setting], margins: dict[str, float]
) -> Comparison:
    """Compare settings.

    Args:
        runs: all runs that a report names; those of settings are complete.
        settings: at least one.
        margins: for each quality, how much worse than the best setting's it may be.

    Raises:
        UserError: the runs were not scored on the same held-out pairs.
    """
    complete = [run for run in runs if run.is_complete]
    _check_same_pairs(complete)
    _check_same_right_answers(complete)
    accuracy, qualities = measured(settings, margins)
    return Comparison(
        runs=list(runs),
        settings=list(settings),
        accuracy=accuracy,
        qualities=qualities,
        verdict=decide(accuracy, qualities),
        warnings=[*_changed(complete), *_warnings(settings, accuracy, qualities)],
    )


def measured(
    settings: Sequence[Setting], margins: dict[str, float]
) -> tuple[Measure, list[Quality]]:
    """Return preference accuracy and the qualities of settings.

    If runs come from a race, its looks have their share in the error of every later comparison.

    Args:
        settings: at least one; their runs have scores of the same held-out pairs.
        margins: for each quality, how much worse than the best setting's it may be.
    """
    given = [run.max_seeds for setting in settings for run in setting.runs if run.max_seeds]
    max_seeds = max(given, default=None)
    scores = [_stack(setting, prefers) for setting in settings]
    accuracy = Measure(scores, is_share=True, max_seeds=max_seeds)
    return accuracy, _qualities(settings, margins, max_seeds)


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


def _check_same_right_answers(runs: Sequence[Run]) -> None:
    by_answers: dict[str, Run] = {}
    for run in runs:
        if run.summary and run.summary.get("right_answers"):
            by_answers.setdefault(run.summary["right_answers"], run)
    if len(by_answers) > 1:
        one, other = [str(run.folder) for run in by_answers.values()][:2]
        raise UserError(
            f"the answers of {one} and {other} were checked in different ways (dataset.checker, "
            f"its pattern, or the right answers), so their {CHECKED} cannot be compared; compare "
            "runs of one checker"
        )


def prefers(scores: dict[str, Array]) -> Array:
    """Return for each pair whether the model prefers its chosen completion, 0 or 1, [N].

    Args:
        scores: columns of `scores.parquet`, [N] each.
    """
    return (scores["chosen_logp"] > scores["rejected_logp"]).astype(float)


def of_pairs(metric: HeldOutMetric, scores: dict[str, Array]) -> Array:
    """Return a quality at every pair, or, if it describes answers, at every pair that has it.

    Pairs whose prompt was not answered, or whose answer cannot be checked, have it not.

    Args:
        metric: a metric that has `of_pair`.
        scores: columns of `scores.parquet`, [N] each.
    """
    assert metric.of_pair is not None
    found = metric.of_pair(scores)
    return found[~np.isnan(found)] if metric.of_answers else found


def as_measured(quality: Quality, interval: Interval) -> Interval:
    """Return a quality's interval with the sign in which the quality is measured and reported."""
    low, high = sorted((quality.sign * interval.low, quality.sign * interval.high))
    return Interval(quality.sign * interval.estimate, low, high)


def _stack(setting: Setting, column: Any) -> Array:
    """Return a setting's values for each of its K runs and N pairs, [K, N]."""
    return np.stack([column(run.scores) for run in setting.runs])


def _qualities(
    settings: Sequence[Setting], margins: dict[str, float], max_seeds: int | None
) -> list[Quality]:
    """Return the qualities that all runs have; see `qualities_among`.

    Preference accuracy may not rise at their cost.
    """
    all_scores = [run.scores for setting in settings for run in setting.runs if run.scores]
    present = [
        metric.name
        for metric in HELD_OUT
        if metric.of_pair
        and all(not np.isnan(of_pairs(metric, scores)).all() for scores in all_scores)
    ]
    found = []
    for metric in qualities_among(present):
        of_settings = [
            metric.sign * _stack(setting, partial(of_pairs, metric)) for setting in settings
        ]
        measure = Measure(of_settings, is_share=metric.is_share, max_seeds=max_seeds)
        margin = margins[metric.name]
        found.append(Quality(metric.name, metric.unit, measure, margin, sign=metric.sign))
    return found


def _warnings(
    settings: Sequence[Setting], accuracy: Measure, qualities: Sequence[Quality]
) -> list[str]:
    """Return warnings of over-optimised settings, and of answers of a very different length.

    In an over-optimised setting more preference raises accuracy, but costs quality.
    """
    families: dict[str, list[int]] = {}
    for number, setting in enumerate(settings):
        rest = {k: v for k, v in told_apart_by(setting.runs[0]).items() if k != "beta"}
        families.setdefault(json.dumps(rest, sort_keys=True), []).append(number)
    said = []
    for family in families.values():
        method = METHODS.get(settings[family[0]].values.get("method", ""), Method)
        family.sort(
            key=lambda number: settings[number].values["beta"],
            reverse=not method.more_beta_is_more_preference,
        )
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
        # If no answer of the best setting has a token, the ratio is NaN and no warning follows
        ratio = _length(setting) / (_length(best) or math.nan)
        if ratio > MAX_LENGTH_RATIO or ratio < 1 / MAX_LENGTH_RATIO:
            said.append(
                f"greedy answers of {setting.name} are {ratio:.2f} times as long as those of "
                f"{best.name}, the best in {qualities[0].name}"
            )
    return said


def _changed(runs: Sequence[Run]) -> list[str]:
    """Return warnings of runs whose configuration or code was changed at a resume."""
    changed = []
    for run in runs:
        assert run.summary is not None
        if keys := changed_keys(run.summary):
            changed.append(f"{run.folder.name} was resumed with changes of {', '.join(keys)}")
    return changed


def _length(setting: Setting) -> float:
    """Return the mean number of tokens of a setting's greedy answers; NaN: no answers."""
    answers = np.concatenate([run.scores["generated_tokens"] for run in setting.runs if run.scores])
    given = answers[~np.isnan(answers)]
    return float(given.mean()) if len(given) else math.nan
