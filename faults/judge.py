"""What a fault came to. What is not one of the first two endings is the third.

survived
    The run ended as finished, exit code 0, and its weights, its metrics and its held-out figures
    are those of a run that nothing happened to: bit for bit.
refused
    The exit code is the documented one, stderr is the one line that says what was expected to be
    said, there is no final model, and `status.json` says failed or stopped; where a refusal is
    about a folder that held a run already, nothing in it has changed.
silent
    All else: other weights, a traceback, work thrown away that a checkpoint held, a hang, a refusal
    for another reason, a fault that could not be made to happen.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from faults.processes import Done
from orpo_lab.records.run_folder import LOCK


class Ending(StrEnum):
    """How an injection may end."""

    SURVIVED = "survived"
    REFUSED = "refused"
    SILENT = "silent"


@dataclass(frozen=True)
class Outcome:
    """How an injection ended, and for a silent failure what was seen."""

    ending: Ending
    detail: str = ""


def silent(detail: str) -> Outcome:
    """Return a failure."""
    return Outcome(Ending.SILENT, detail)


def survived(
    done: Done, run: Path, reference: Path, *, apart_from_step: int | None = None
) -> Outcome:
    """Judge a run that should have come through.

    Args:
        done: how its last process ended.
        run: its folder.
        reference: the folder of the same run unharmed.
        apart_from_step: whose line of metrics may differ.
    """
    if done.code != 0:
        return silent(f"exit code {_code(done)}: {_end(done.stderr)}")
    if "Traceback" in done.stderr:
        return silent(f"a traceback: {_end(done.stderr)}")
    came_to, expected = (state(folder, apart_from_step) for folder in (run, reference))
    different = [name for name, value in came_to.items() if value != expected[name]]
    if different:
        return silent(f"not as the unharmed run: {', '.join(different)}")
    return Outcome(Ending.SURVIVED)


def told(done: Done, says: str, code: int = 1) -> Outcome:
    """Judge what a run that was refused or stopped has told.

    Args:
        done: how it ended.
        says: what its one line is to say, a regular expression.
        code: the exit code to expect.
    """
    if done.code != code:
        return silent(f"exit code {_code(done)} instead of {code}: {_end(done.stderr)}")
    lines = done.stderr.strip().splitlines()
    if len(lines) != 1 or not re.match("error: |stopped", lines[0]):
        return silent(f"stderr is not one line of the lab's: {_end(done.stderr)}")
    if not re.search(says, lines[0]):
        return silent(f"it says something else than /{says}/: {lines[0]}")
    return Outcome(Ending.REFUSED)


def refused(
    done: Done,
    run: Path,
    says: str,
    *,
    code: int = 1,
    untouched: dict[str, str] | None = None,
    states: tuple[str, ...] = ("failed", "stopped"),
) -> Outcome:
    """Judge what a run that was refused or stopped has told, and left.

    Args:
        done: how it ended.
        run: its folder, which need not exist.
        says: what its one line is to say, a regular expression.
        code: the exit code to expect.
        untouched: `contents` of the folder before, where it held a run already.
        states: what `status.json` may say.
    """
    outcome = told(done, says, code)
    if outcome.ending != Ending.REFUSED:
        return outcome
    if untouched is not None:
        now = contents(run)
        changed = sorted(name for name in now | untouched if now.get(name) != untouched.get(name))
        return silent(f"changed: {', '.join(changed)}") if changed else outcome
    if (run / "final").exists():
        return silent("there is a final model")
    if (run / "summary.json").exists():
        return silent("there is a summary")
    if run.exists() and status(run) not in states:
        return silent(f"status.json says {status(run)}")
    return outcome


def newest_sealed(run: Path) -> int | None:
    """Return the step of the newest checkpoint or trained model with a seal; None: none has one."""
    seals = run.glob("checkpoints/*-*/manifest.json")
    return max((int(seal.parent.name.rsplit("-", 1)[1]) for seal in seals), default=None)


def resumed_from(done: Done) -> int | None:
    """Return the step that a run says it goes on from; None: it began anew."""
    said = re.findall(r"^resuming from step (\d+)", done.stdout, flags=re.MULTILINE)
    return int(said[-1]) if said else None


def state(run: Path, apart_from_step: int | None = None) -> dict[str, Any]:
    """Return what a finished run came to, by names for people.

    Raises:
        OSError, ValueError: it did not come to that; the suite's runner reports it as silent.
    """
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {file.name: _digest(file) for file in (run / "final").glob("*.safetensors")}
    return {
        "status": status(run),
        "weights": weights or "none",
        "files of final/": sorted(file.name for file in (run / "final").iterdir()),
        "metrics.jsonl": [line for line in lines if line["step"] != apart_from_step],
        "held-out figures": [summary["before"], summary["after"]],
        "scores": _digest(run / "scores.parquet"),
    }


def status(run: Path) -> str:
    """Return the state that `status.json` tells; `missing` where there is none."""
    if not (run / "status.json").exists():
        return "missing"
    return json.loads((run / "status.json").read_text())["state"]


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file under a folder, but for a lock, which a kill leaves behind."""
    found = (file for file in sorted(folder.rglob("*")) if file.name != LOCK)
    files = (file for file in found if file.is_file())
    return {str(file.relative_to(folder)): _digest(file) for file in files}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _code(done: Done) -> str:
    return "none, it hung" if done.code is None else str(done.code)


def _end(text: str) -> str:
    return f"...{text[-400:]!r}" if len(text) > 400 else repr(text)
