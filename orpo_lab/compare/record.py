"""A comparison as data: the content of `report.json`; docs/sweeps.md explains each key."""

from typing import Any

from orpo_lab.compare.evidence import Comparison, as_measured
from orpo_lab.compare.guess import gain, guesses
from orpo_lab.compare.read import Run
from orpo_lab.compare.ship import Ship
from orpo_lab.compare.tasks import task_figures
from orpo_lab.compare.untrained import untrained
from orpo_lab.compare.verdict import CONFIDENCE, Interval
from orpo_lab.compare.words import verdict_text
from orpo_lab.metrics import JUDGED_PREFIX, PREFERENCE

# Raised when a key is renamed, removed or means something else
SCHEMA = 1


def record(comparison: Comparison, ship: Ship) -> dict[str, Any]:
    """Return a comparison, and what to ship, as JSON values; what does not exist is null."""
    return {
        "schema": SCHEMA,
        "confidence": CONFIDENCE,
        "num_pairs": comparison.accuracy.num_pairs,
        "margins": {quality.name: quality.margin for quality in comparison.qualities},
        "ship": _ship(ship),
        "verdict": _verdict(comparison),
        "settings": [_setting(comparison, number) for number in range(len(comparison.settings))],
        "untrained": [
            {
                "name": model.name,
                "settings": [comparison.settings[number].name for number in model.settings],
                "figures": _figures(comparison, model.intervals),
            }
            for model in untrained(comparison)
        ],
        "length_guesses": [
            {
                "settings": [comparison.settings[number].name for number in guess.settings],
                PREFERENCE: guess.interval.as_json(),
            }
            for guess in guesses(comparison)
        ],
        "tasks": [figure.as_json() for figure in task_figures(comparison)],
        "runs": [_run(run) for run in comparison.runs],
        "warnings": comparison.warnings,
    }


def _ship(ship: Ship) -> dict[str, Any]:
    settings = ship.comparison.settings
    above = gain(ship.comparison, ship.number)
    return {
        "setting": ship.setting.name,
        "is_winner": ship.is_winner,
        "not_separated_from": [settings[number].name for number in ship.rivals],
        "reason": ship.reason(),
        "best": _run(ship.best),
        "typical": _run(ship.typical),
        "against_untrained": {
            gain.name: {"said": gain.said, **gain.interval.as_json()} for gain in ship.gains
        },
        "against_length_guess": above and {"said": above.said, **above.interval.as_json()},
        "export": ship.export,
        "repeat": ship.repeat,
        "would_change": ship.would_change(),
        "samples": ship.samples(),
    }


def _verdict(comparison: Comparison) -> dict[str, Any]:
    verdict = comparison.verdict

    def name(number: int | None) -> str | None:
        return None if number is None else comparison.settings[number].name

    return {
        "winner": name(verdict.winner),
        "leader": name(verdict.leader),
        "unbeaten": [name(number) for number in verdict.unbeaten],
        "nearest": name(verdict.nearest),
        "lead": verdict.lead and verdict.lead.as_json(),
        "one_seed": [name(number) for number in verdict.one_seed],
        "seeds_needed": verdict.seeds_needed,
        "pairs_needed": verdict.pairs_needed,
        "sentences": verdict_text(comparison),
    }


def _setting(comparison: Comparison, number: int) -> dict[str, Any]:
    setting, verdict = comparison.settings[number], comparison.verdict
    standing = verdict.qualities[number]
    return {
        "name": setting.name,
        "values": {key: setting.values.get(key) for key in ("method", "beta", "beta_schedule")},
        "seeds": setting.seeds,
        "runs": [str(run.folder) for run in setting.runs],
        "figures": _figures(comparison, [verdict.accuracies[number], *standing.intervals]),
        "worse_in": standing.worse_in,
        "doubtful_in": standing.doubtful_in,
    }


def _figures(comparison: Comparison, intervals: list[Interval]) -> dict[str, Any]:
    """Return preference accuracy and the qualities by name, from their intervals in that order."""
    accuracy, *of_qualities = intervals
    found = {PREFERENCE: accuracy.as_json()}
    for quality, interval in zip(comparison.qualities, of_qualities, strict=True):
        found[quality.name] = as_measured(quality, interval).as_json()
    return found


def _run(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "seed": run.values["seed"],
        "start_seeds": run.seeds[1:],
        "state": run.state,
        "reason": run.reason,
        "figures": run.summary["after"] if run.summary else {},
        "judged": {
            key: value
            for key, value in (run.summary or {}).items()
            if key.startswith(JUDGED_PREFIX)
        },
    }
