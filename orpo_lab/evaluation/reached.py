"""What a model has reached on tasks of lm-evaluation-harness, and the files that keep it.

`harness/before.json` and `harness/after.json` of a run folder hold a `Reached` for each task that
was asked for. Torch is not imported here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo_lab.metrics import Better, harness_name
from orpo_lab.records.run_folder import RunFolder

# The files of both times, in a run folder
FILES = {when: f"harness/{when}.json" for when in ("before", "after")}


@dataclass(frozen=True)
class Reached:
    """What a model has reached on one task, group or tag of the harness."""

    key: str
    """A hash of all that the figures depend on; see `harness.Tasks.key`."""
    figures: dict[str, float]
    """By name, see `metrics.harness_name`: figures, their standard errors, numbers of documents."""
    better: dict[str, Better]
    """Whether a figure is better higher or lower, by its name."""
    documents: list[dict[str, Any]]
    """Of every document of every task, once for each filter: `task`, `filter`, `document` (its
    number), `hash` (of its content), `prompt`, `target`, `answers` and `scores` by metric."""
    seconds: float
    asked: str | None = None
    """A hash of how the task was asked, whatever the model; see `harness.Tasks.asked_as`. None: an
    earlier version of orpo_lab has written this, and kept no such hash."""

    def scores(self) -> dict[str, dict[str, float]]:
        """Return the scores of documents: by the figure's name, then by the document's hash."""
        found: dict[str, dict[str, float]] = {}
        for row in self.documents:
            for metric, score in row["scores"].items():
                name = harness_name(row["task"], metric, row["filter"])
                found.setdefault(name, {})[f"{row['document']} {row['hash']}"] = score
        return found

    @property
    def way(self) -> tuple[str | None, frozenset[tuple[str, int, str]]]:
        """How the task was asked, and of which documents: the same figures may be compared.

        Of an earlier version's results the documents alone are known. Two such results are
        compared where the documents are the same, as the earlier version did; such a result and
        one with a hash are not.
        """
        rows = self.documents
        return self.asked, frozenset((row["task"], row["document"], row["hash"]) for row in rows)


# By the name of the task that was asked for
AllReached = Mapping[str, Reached]


def seconds_of(reached: AllReached) -> float:
    """Return the time that all tasks took."""
    return sum(one.seconds for one in reached.values())


def figures_of(reached: AllReached) -> dict[str, float]:
    """Return the figures of all tasks."""
    return {name: value for one in reached.values() for name, value in one.figures.items()}


def save(reached: AllReached, file: Path) -> None:
    """Write what was reached to a JSON file."""
    file.write_text(json.dumps(_as_json(reached), allow_nan=False))


def restore(file: Path) -> dict[str, Reached]:
    """Read what `save` has written."""
    return _from_json(json.loads(file.read_text()))


def keep(place: RunFolder, when: str, reached: AllReached) -> None:
    """Write what was reached to the run folder; nothing reached: delete what lies there."""
    if reached:
        place.write_json(FILES[when], _as_json(reached))
    else:
        place.remove(FILES[when])


def kept(place: RunFolder, when: str) -> dict[str, Reached]:
    """Return what `keep` has written to the run folder; empty: nothing.

    Raises:
        UserError: the file is damaged.
    """
    return _from_json(place.read_json(FILES[when]) or {})


def _as_json(reached: AllReached) -> dict[str, Any]:
    return {name: asdict(one) for name, one in reached.items()}


def _from_json(found: dict[str, Any]) -> dict[str, Reached]:
    return {name: Reached(**one) for name, one in found.items()}
