"""Sealed checkpoints: a manifest, written last, lists what a checkpoint holds.

A checkpoint without a manifest is unfinished. A checkpoint that differs from its manifest is
damaged. No run continues from either. The content of a checkpoint is written by `training.state`.

The trained model is sealed in the same way, before any result is made from the model. What follows
the last step may fail or be stopped. Then the next start makes the missing results, without
training again.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from orpo_lab.errors import UserError, one_line
from orpo_lab.records.run_folder import RunFolder, versions
from orpo_lab.training.files import EARLIER_HASH, HASH, HASHES, Files, hash_of, names
from orpo_lab.training.files import link as make_link

if TYPE_CHECKING:
    from orpo_lab.training.trainer import TrainStats

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# A checkpoint has a copy of the run's metrics so far, since the run's own file may be cut later
METRICS = "metrics.jsonl"
# The file of all that a step changes, except the weights
STATE = "state.pt"
# These begin the names of folders; the step follows.
CHECKPOINT = "checkpoint-"
# Of a checkpoint from which other jobs of a sweep begin, see `sweep.forks`
FORK = "fork-"
# Of the trained model; this folder exists until the run has finished
TRAINED = "trained-"


@dataclass(frozen=True)
class Made:
    """What a checkpoint was made from; only a run made from the same can continue from it."""

    config_hash: str
    """See `identity.identity`."""
    data: str
    """Fingerprints of the training and the held-out pairs."""
    model: str
    """Fingerprint of the weights that training began from."""


@dataclass(frozen=True)
class Spent:
    """The cost of training up to a checkpoint."""

    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    num_skipped: int = 0
    """Number of steps that were skipped because a number was not finite."""
    token_budget: int | None = None
    """The lowered token budget, after memory ran out. None: the configuration's is in use."""
    num_shared: int = 0
    """Number of steps that another run has taken: this run began from its fork. Their time and
    memory are counted there."""
    reference_seconds: float = 0.0
    """Time in which the reference was computed; `wall_seconds` is without it."""


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint."""

    path: Path
    made: Made
    spent: Spent
    versions: dict[str, str | None]
    """Versions of the packages that wrote the checkpoint, by their names."""

    @property
    def step(self) -> int:
        """The number of optimizer steps that were taken before this checkpoint."""
        return step_of(self.path)

    @property
    def is_trained(self) -> bool:
        """Whether this is the trained model, which has weights alone: it can take no step."""
        return self.path.name.startswith(TRAINED)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.rsplit("-", 1)[-1])


def folder(place: RunFolder, kind: str, step: int) -> Path:
    """Return the folder of a run's checkpoint after a step; `kind` is a name's beginning."""
    return place.path / "checkpoints" / f"{kind}{step}"


def folders(place: RunFolder) -> list[Path]:
    """Return a run's checkpoint folders, valid or not, oldest first."""
    return _folders(place, CHECKPOINT)


def forks(place: RunFolder) -> list[Path]:
    """Return the folders of a run's forks, valid or not, oldest first."""
    return _folders(place, FORK)


def trained(place: RunFolder) -> list[Path]:
    """Return the folders of trained models, valid or not, oldest first."""
    return _folders(place, TRAINED)


def _folders(place: RunFolder, kind: str) -> list[Path]:
    return sorted((place.path / "checkpoints").glob(f"{kind}*[0-9]"), key=step_of)


def last_step(place: RunFolder) -> int:
    """Return the last step of which a run has a sealed checkpoint, valid or not; 0: it has none."""
    found = [*folders(place), *forks(place), *trained(place)]
    return max((step_of(path) for path in found if is_sealed(path)), default=0)


def is_sealed(path: Path) -> bool:
    """Return whether a checkpoint is finished; its run may still be writing it where it is not."""
    return (path / MANIFEST).exists()


def seal(files: Files, place: RunFolder, made: Made, spent: Spent) -> None:
    """Write a checkpoint's manifest, after all its other files are on the disk.

    Args:
        files: the files of the checkpoint.
        place: the folder of its run; the run's metrics so far are copied into the checkpoint.
        made: what the checkpoint was made from.
        spent: the cost of training so far.
    """
    shutil.copyfile(place.path / METRICS, files.folder / METRICS)
    manifest = {
        "step": step_of(files.folder),
        "made": asdict(made),
        "spent": _padded(spent),
        "versions": versions(),
        "hash": HASH,
        "files": files.hashes(),
    }
    RunFolder(files.folder).write_json(MANIFEST, manifest)


def _padded(spent: Spent) -> str:
    """Return JSON of a fixed width, so that checkpoints of the same step have the same size."""
    return json.dumps(asdict(spent), allow_nan=False).ljust(224)


def keep_trained(
    place: RunFolder,
    start: Checkpoint | None,
    save: Callable[[Files], None],
    made: Made,
    stats: "TrainStats",
) -> Path:
    """Save and seal the trained model, and return its folder.

    Args:
        place: the run folder.
        start: the checkpoint that the run continued from, if any. If `start` is the trained model
            already, the folder is kept as it is.
        save: writes the model and its tokenizer to the files of a checkpoint.
        made: what the model was made from.
        stats: the number of steps, and the cost of training.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    if start and start.is_trained:
        return start.path
    path = folder(place, TRAINED, stats.steps)
    with written(path) as files:
        save(files)
        spent = Spent(
            stats.wall_seconds,
            stats.peak_memory_bytes,
            stats.skipped_steps,
            num_shared=stats.shared_steps,
            reference_seconds=stats.reference_seconds,
        )
        seal(files, place, made, spent)
    return path


def remove_trained(place: RunFolder) -> None:
    """Delete the trained model of a run that has finished; `final/` holds the model then."""
    for path in trained(place):
        remove(path)


def newest_valid(place: RunFolder, config_hash: str) -> Checkpoint | None:
    """Return the newest valid checkpoint of a run, and log why newer ones are rejected.

    A trained model comes before all other checkpoints.

    Args:
        place: the run folder.
        config_hash: identity of the run as it is configured now. A trained model of another
            identity is rejected.
    """
    checkpoints = sorted([*forks(place), *folders(place)], key=step_of)
    for path in [*reversed(trained(place)), *reversed(checkpoints)]:
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


def link(path: Path, copy: Path, **changes: Any) -> None:
    """Make a copy of a sealed checkpoint, with links to its files, which nobody changes.

    Args:
        path: the sealed checkpoint.
        copy: the folder of the copy.
        changes: new values of keys of the manifest, which is written last.

    Raises:
        UserError: the copy cannot be written.
    """
    with written(copy):
        for name in names(path):
            if name != MANIFEST:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                make_link(path / name, copy / name)
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        RunFolder(copy).write_json(MANIFEST, manifest | changes)


def valid_fork(path: Path, owner: RunFolder, made: Made) -> Checkpoint:
    """Return a fork from which another run may begin.

    Args:
        path: the folder of the fork.
        owner: the folder of the run that made the fork.
        made: what the run that begins is made from.

    Raises:
        UserError: the fork is damaged, or was made from something else.
    """
    found = _verify(path, owner)
    if (found.made.data, found.made.model) != (made.data, made.model):
        raise UserError("it was made from other weights or pairs")
    return found


def adopt(fork: Checkpoint, place: RunFolder, made: Made) -> Checkpoint:
    """Let a run begin from a fork of another run, as if it had taken the fork's steps itself.

    Args:
        fork: the fork.
        place: the folder of the run that begins; gets a copy of the fork, and the lines of metrics
            so far.
        made: what the run that begins is made from.

    Raises:
        UserError: the copy cannot be written.
    """
    spent = replace(fork.spent, wall_seconds=0.0, peak_memory_bytes=0, num_shared=fork.step)
    copy = folder(place, FORK, fork.step)
    link(fork.path, copy, made=asdict(made), spent=_padded(spent))
    place.write(METRICS, (copy / METRICS).read_text(encoding="utf-8"))
    return Checkpoint(copy, made, spent, fork.versions)


def rotate(place: RunFolder, num_checkpoints: int) -> None:
    """Delete all sealed checkpoints except the `num_checkpoints` newest ones.

    Files are not verified here. `newest_valid` finds out whether a sealed checkpoint is damaged.
    """
    sealed = [path for path in folders(place) if is_sealed(path)]
    for path in sealed[:-num_checkpoints]:
        remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first: what an interruption leaves is not valid."""
    if not path.is_dir():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Files]:
    """Delete an older folder `path`; inside the context a checkpoint is written to `path`.

    Yields the checkpoint's files. A checkpoint that cannot be written is deleted.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    if path.exists():  # left by a run that was killed, or damaged
        remove(path)
    try:
        yield Files(path)
    # torch and safetensors raise errors of their own for errors of the operating system
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"{path} cannot be written ({one_line(error)[:150]}); the run stops, and the "
            "checkpoints before it are intact: make room, then go on with resume="
        ) from error


def _verify(path: Path, place: RunFolder) -> Checkpoint:
    """Return the checkpoint in a folder, after comparing all its files with its manifest.

    Raises:
        UserError: the checkpoint is unfinished, damaged, of another run, or of an earlier version
            of orpo_lab; the text says which.
    """
    if not is_sealed(path):
        raise UserError("it was never finished")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        made, spent = Made(**manifest["made"]), Spent(**json.loads(manifest["spent"]))
        found = Checkpoint(path, made, spent, dict(manifest["versions"]))
        step, sealed = manifest["step"], dict(manifest["files"])
        new_hash = HASHES[manifest.get("hash", EARLIER_HASH)]
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
    present = [name for name in names(path) if name != MANIFEST]
    for name in sorted(set(present) ^ sealed.keys()):
        raise UserError(f"{name} is {'missing' if name in sealed else 'not of it'}")
    for name in present:
        try:
            is_intact = hash_of(path / name, new_hash) == sealed[name]
        except OSError as error:
            raise UserError(f"{name} cannot be read ({one_line(error)[:100]})") from error
        if not is_intact:
            raise UserError(f"{name} is damaged")
    return found
