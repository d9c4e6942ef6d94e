"""Sealed checkpoints: a manifest, written last, says what a checkpoint holds.

A checkpoint without its manifest is one that nobody finished; one that differs from it is damaged.
Neither is ever continued from. What the folders hold is the business of `training.state`.

The trained model is sealed likewise, before anything is made of it: what comes after the last step
may fail or be stopped, and is made up for by the next start without training again.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from orpo_lab.errors import UserError, one_line
from orpo_lab.records.run_folder import RunFolder, sync, versions

if TYPE_CHECKING:
    from orpo_lab.training.trainer import TrainStats

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# The run's metrics so far; what is beside it in the run folder may have been cut short since
METRICS = "metrics.jsonl"
# What a step changes beside the weights
STATE = "state.pt"
# Folders of the trained model, until its run has finished; after it comes the step
TRAINED = "trained-"


@dataclass(frozen=True)
class Made:
    """What a checkpoint was made from; to be continued, a run must be made from the same."""

    config_hash: str
    """See `identity.identity`."""
    data: str
    """Fingerprints of the training and the held-out pairs."""
    model: str
    """Fingerprint of the weights that training began from."""


@dataclass(frozen=True)
class Spent:
    """What training has cost up to a checkpoint."""

    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    num_skipped: int = 0
    """Steps skipped for a non-finite number."""
    token_budget: int | None = None
    """Tokens of a micro-batch, where memory ran out with those of the configuration."""


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint."""

    path: Path
    made: Made
    spent: Spent
    versions: dict[str, str | None]
    """Of the packages that made it."""

    @property
    def step(self) -> int:
        """The optimizer steps it has taken."""
        return step_of(self.path)

    @property
    def is_trained(self) -> bool:
        """Whether it is the trained model alone, from which no step can be taken."""
        return self.path.name.startswith(TRAINED)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.rsplit("-", 1)[-1])


def folders(place: RunFolder) -> list[Path]:
    """Return a run's checkpoint folders, valid or not, oldest first."""
    return sorted((place.path / "checkpoints").glob("checkpoint-*[0-9]"), key=step_of)


def seal(path: Path, place: RunFolder, made: Made, spent: Spent) -> None:
    """Write a checkpoint's manifest, after all else is on the disk.

    Args:
        path: the checkpoint's folder.
        place: the run it belongs to; its metrics so far are copied.
        made: what it was made from.
        spent: what training has cost.
    """
    shutil.copyfile(place.path / METRICS, path / METRICS)
    files = {name: _digest(path / name) for name in _files(path)}
    for name in files:
        sync(path / name)
    manifest = {
        "step": step_of(path),
        "made": asdict(made),
        # Of a fixed width, so that two runs' checkpoints of a step have the same size
        "spent": json.dumps(asdict(spent), allow_nan=False).ljust(160),
        "versions": versions(),
        "files": files,
    }
    RunFolder(path).write_json(MANIFEST, manifest)


def keep_trained(
    place: RunFolder,
    start: Checkpoint | None,
    save: Callable[[Path], None],
    made: Made,
    stats: "TrainStats",
) -> Path:
    """Save the trained model, sealed, and return its folder.

    Args:
        place: the run it belongs to.
        start: what the run went on from; where that was the trained model, it is kept as it is.
        save: writes the model and its tokenizer to a folder.
        made: what it was made from.
        stats: what training has come to and cost.

    Raises:
        UserError: the disk is full, or not to be written to.
    """
    if start and start.is_trained:
        return start.path
    path = place.path / "checkpoints" / f"{TRAINED}{stats.steps}"
    with written(path):
        save(path)
        spent = Spent(stats.wall_seconds, stats.peak_memory_bytes, stats.skipped_steps)
        seal(path, place, made, spent)
    return path


def trained(place: RunFolder) -> list[Path]:
    """Return the folders of trained models, valid or not, oldest first."""
    return sorted((place.path / "checkpoints").glob(f"{TRAINED}*[0-9]"), key=step_of)


def remove_trained(place: RunFolder) -> None:
    """Delete the trained model of a run that has finished: `final/` has it."""
    for path in trained(place):
        remove(path)


def newest_valid(place: RunFolder, config_hash: str) -> Checkpoint | None:
    """Return the newest checkpoint that is what its manifest says; say why others are not it.

    Args:
        place: the run.
        config_hash: of the run as it is now; a model that was trained to the end of another is
            none to go on from.
    """
    for path in [*reversed(trained(place)), *reversed(folders(place))]:
        try:
            found = _verify(path, place)
            if found.is_trained and found.made.config_hash != config_hash:
                raise UserError("it is the end of the run as it was configured before")
        except UserError as error:
            log.warning("%s rejected: %s", path.name, error)
            continue
        _say_other_versions(found.versions)
        return found
    return None


def _say_other_versions(before: dict[str, str | None]) -> None:
    now = versions()
    other = [
        f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]
    ]
    if other:
        log.warning(
            "the checkpoint was made with other versions (%s): going on is no longer bit for bit "
            "what an uninterrupted run would be",
            ", ".join(other),
        )


def rotate(place: RunFolder, num_checkpoints: int) -> None:
    """Delete what is older than the `num_checkpoints` newest valid checkpoints.

    Only seals are counted here. Whether a checkpoint was damaged since, `newest_valid` finds out.
    """
    sealed = [path for path in folders(place) if (path / MANIFEST).exists()]
    for path in sealed[:-num_checkpoints]:
        remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; if that is cut short, what is left is no checkpoint."""
    if not path.is_dir():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Take away a checkpoint that could not be written, and say so.

    Raises:
        UserError: the disk is full, or not to be written to.
    """
    if path.exists():  # of a run that was killed, or damaged since
        remove(path)
    try:
        yield
    # torch and safetensors have errors of their own for what the operating system says
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"{path} cannot be written ({one_line(error)[:150]}); the run stops, and the "
            "checkpoints before it are intact: make room, then go on with resume="
        ) from error


def _files(path: Path) -> list[str]:
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(str(file.relative_to(path)) for file in found if file.name != MANIFEST)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _verify(path: Path, place: RunFolder) -> Checkpoint:
    """Return a checkpoint that is what its manifest says.

    Raises:
        UserError: the checkpoint differs from its manifest; the text says where.
    """
    if not (path / MANIFEST).exists():
        raise UserError("it was never finished")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        made, spent = Made(**manifest["made"]), Spent(**json.loads(manifest["spent"]))
        found = Checkpoint(path, made, spent, dict(manifest["versions"]))
        step, sealed = manifest["step"], dict(manifest["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"its manifest cannot be read ({one_line(error)[:100]})") from error
    if step != found.step:
        raise UserError(f"it is of step {step}")
    if made.config_hash not in place.config_hashes():
        raise UserError("another run made it")
    if not found.is_trained and STATE not in sealed:
        raise UserError(
            "an earlier version of orpo_lab wrote it, in a form that is not read any more: go on "
            "with that version, or begin a new run"
        )
    present = _files(path)
    for name in sorted(set(present) ^ sealed.keys()):
        raise UserError(f"{name} is {'missing' if name in sealed else 'not of it'}")
    for name in present:
        try:
            is_intact = _digest(path / name) == sealed[name]
        except OSError as error:
            raise UserError(f"{name} cannot be read ({one_line(error)[:100]})") from error
        if not is_intact:
            raise UserError(f"{name} is damaged")
    return found
