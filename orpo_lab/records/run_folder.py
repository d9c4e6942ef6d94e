"""Write and read the files of a run folder (docs/configuration.md lists them).

Only files that this package wrote are ever removed or replaced. A folder that holds other files and
no run is refused before anything is written. A start that is refused, or fails before its first
step, changes nothing of a run in the folder. The results of a finished run stay until new results
are complete.
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from orpo_lab.config import Config
from orpo_lab.config.checks import AUTO
from orpo_lab.config.identity import (
    content_at,
    contents,
    flat,
    identity,
    kinds,
    policy_of,
    settings,
    told_apart_by,
)
from orpo_lab.config.model import local_path
from orpo_lab.errors import UserError, one_line
from orpo_lab.redaction import redact

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "galore-torch",
    "datasets",
    "hydra-core",
    "wandb",
)


# The lock file of the process that works in a folder
LOCK = ".orpo_lab.lock"
# The part of a folder's first record that a killed process may leave
FIRST_RECORD = "status.json.part"
# Names that exist only if a step was taken, or a run has ended
LEFT_BY_TRAINING = ("metrics.jsonl", "checkpoints", "summary.json", "scores.parquet", "final")
# The results of a finished run
RESULTS = ("summary.json", "scores.parquet", "final")
# Keys of `status.json` that keep their values until new ones are given: see `RunFolder.set_status`
LASTING_STATUS = ("config_hash", "sweep_start", "results")

# In this order: disk full, over quota, above a size limit, read-only, no permission (two codes)
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

STATES = ("running", "finished", "failed", "stopped")


class RunFolder:
    """A run's folder. Files are written whole and renamed into place, or appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_begun = False
        """Whether the run of this process has begun to write here; before, nothing may write."""

    def is_empty(self) -> bool:
        """Return whether nothing is here but a lock, or a part of a killed start's first record."""
        if not self.path.exists():
            return True
        return {child.name for child in self.path.iterdir()} <= {LOCK, FIRST_RECORD}

    def is_ours(self) -> bool:
        """Return whether a run has left a record here, in any state."""
        if self.status()["state"] in STATES:
            return True
        try:
            starts = self.segments()
        except UserError:
            return False
        return bool(starts) and all("config_hash" in start for start in starts)

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds files, but no run of ours.

        Raises:
            UserError: the folder is of this kind.
        """
        if not self.is_empty() and not self.is_ours():
            raise UserError(
                f"{self.path} is not empty and holds no run of this lab, so nothing is written to "
                "it; choose a new or an empty folder with hydra.run.dir"
            )

    def is_untrained(self) -> bool:
        """Return whether no start here has come to its first step; then a new run may begin."""
        found = [self.file(name) for name in LEFT_BY_TRAINING]
        return not any(name.is_file() or (name.is_dir() and any(name.iterdir())) for name in found)

    def check(
        self,
        config: Config,
        overrides: list[str],
        *,
        resume: str | None,
        started: str | None = None,
    ) -> dict[str, Any]:
        """Return the record of this start for `begin`, with the changes since the last start.

        Nothing is written. A folder in which no start has come to a step counts as a new folder.

        Args:
            config: the run's configuration.
            overrides: the overrides of the command line.
            resume: null, `auto` or the folder, as in the configuration; `auto` for a sweep's jobs.
            started: when the sweep of a new run was started; None: the run is started now.

        Raises:
            UserError: the folder holds another run or foreign files, or the run to resume had
                another configuration or other code.
        """
        self.refuse_foreign()
        return {
            # The time of the run's first start; the same in the records of all its starts
            "started": self.started() or started or now(),
            # The files at the locations may change later
            "config_hash": identity(config),
            "code": code_hash(),
            "kinds": kinds(config),
            "contents": contents(config),
            # A comparison needs this when the start may be gone
            "start": _record_of(config.start_from),
            "changes": self._changes(config, resume),
            "overrides": redact(overrides),
        }

    def _changes(self, config: Config, resume: str | None) -> dict[str, list[Any]]:
        """Return what was changed in a run to be continued: by key, the values before and now.

        Raises:
            UserError: the run cannot be continued, or not with these changes.
        """
        is_named = resume not in (None, AUTO)
        if is_named and not self.file("config.yaml").is_file():
            raise UserError(f"resume={self.path} is not a run folder: no config.yaml in it")
        self._check_results()
        if self.is_untrained():
            if is_named:
                raise UserError(
                    f"resume={self.path}: no valid checkpoint in it, for no start of it has come "
                    "to a step; begin it anew with resume=auto hydra.run.dir=..."
                )
            return {}
        if resume is None:
            raise UserError(
                f"{self.path} holds a run already; choose another with hydra.run.dir, or go on "
                "with it by resume=auto"
            )
        if not self.segments():
            raise UserError(
                f"{self.file('segments.json')} is missing, and with it what this run was; put it "
                "back, or start a new run"
            )
        return self._changed(config)

    def _check_results(self) -> None:
        """Refuse a folder with results that the run in this folder has not written.

        Raises:
            UserError: there are such results, which the run would have to replace.
        """
        status = self.status()
        if status["state"] not in STATES or status["state"] == "finished" or status["results"]:
            return
        # If the status was lost, the results themselves say which run wrote them
        summary = self.read_json("summary.json")
        if isinstance(summary, dict) and summary.get("config_hash") in self.config_hashes():
            return
        for name in RESULTS:
            if self.file(name).exists():
                raise UserError(
                    f"{self.file(name)} is not of the run in {self.path}, which has not come to "
                    "results; move it elsewhere, or choose another folder with hydra.run.dir"
                )

    def _changed(self, config: Config) -> dict[str, list[Any]]:
        last = self.segments()[-1]
        resolved = redact(dataclasses.asdict(config))
        # If config.yaml is lost, the run goes on, and the file is written again
        before = flat(self.read_yaml("config.yaml")) or flat(resolved)
        before |= last["kinds"]
        now = flat(resolved) | kinds(config)
        read = settings(before).keys() | settings(now).keys()
        changes = {
            key: [before.get(key), now.get(key)]
            for key in sorted(read)
            if before.get(key) != now.get(key)
        }
        said = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
        lasting = [key for key in changes if policy_of(key).kind == "lasting"]
        if lasting:
            raise UserError(
                f"{self.path} holds another run ({said}); no checkpoint fits another "
                f"{', '.join(lasting)}: start a new run"
            )
        made_of, now_of = self.segments()[-1].get("contents", {}), contents(config)
        other = [key for key, content in now_of.items() if made_of.get(key) != content]
        if self.status()["state"] == "finished" and other and not config.accept_changes:
            raise UserError(
                f"{self.path} holds a run that has finished on something else ({', '.join(other)} "
                "has other contents now); start a new run, or say accept_changes=true"
            )
        if changes and not config.accept_changes:
            raise UserError(
                f"{self.path} holds another run ({said}); give the overrides it was started with "
                "(choices.yaml), or accept_changes=true to go on differently and have it recorded"
            )
        code = [last.get("code"), code_hash()]
        if code[0] != code[1]:
            if not config.accept_changes:
                raise UserError(
                    f"the run in {self.path} was made by other code than this (orpo_lab has "
                    "changed since); put back the code it was made by, start a new run, or say "
                    "accept_changes=true to go on with this one and have it recorded"
                )
            changes["code"] = code
        return changes

    def begin(
        self,
        config: Config,
        choices: dict[str, str],
        start: dict[str, Any],
        *,
        metrics: Path | None = None,
    ) -> None:
        """Write the record of this start, the configuration, and the status "running".

        Args:
            config: the run's configuration.
            choices: the option chosen in every group.
            start: the record that `check` has returned.
            metrics: the checkpoint's copy of `metrics.jsonl`, if the run goes on from a checkpoint;
                later lines are written again. None: the run begins with its first step.
        """
        before = [] if self.is_untrained() else self.segments()
        if not before:
            # This is the first file: from now on the folder is known as a run folder. A signal may
            # come directly after the file is written, and must be recorded in the file
            self.has_begun = True
            self.set_status("running", config_hash=start["config_hash"])
        # Record the changes before anything is changed
        self.write_json("segments.json", [*before, start])
        self.has_begun = True
        resolved = redact(dataclasses.asdict(config))
        chosen = {"choices": choices, "overrides": start["overrides"]}
        self.write("config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        self.write("choices.yaml", yaml.safe_dump(chosen, sort_keys=False))
        self.set_status("running", config_hash=start["config_hash"])
        if metrics:
            self.write("metrics.jsonl", metrics.read_text(encoding="utf-8"))
        else:
            self.remove("metrics.jsonl")

    def remove(self, name: str) -> None:
        """Delete one of the run's files, if there is such a file."""
        self.file(name).unlink(missing_ok=True)

    def started(self) -> str | None:
        """Return the time of the run's first start; None: no start has come to a step."""
        if self.is_untrained():
            return None
        return next((segment.get("started") for segment in self.segments()), None)

    def segments(self) -> list[dict[str, Any]]:
        """Return the records in `segments.json` of all starts of this run, the first one first."""
        starts = self.read_json("segments.json")
        return starts if isinstance(starts, list) else []

    def start(self) -> dict[str, Any] | None:
        """Return what `as_start` said of the run that this run started from.

        None: there is no such run, or no record of it.
        """
        last = (self.segments() or [{}])[-1]
        if "start" in last:
            found: dict[str, Any] | None = last["start"]
            return found
        # An earlier version of orpo_lab recorded the start's content alone
        place, held = self.read_yaml("config.yaml").get("start_from"), last.get("contents", {})
        if place is None or content_at("start_from", place) != held.get("start_from"):
            return None
        return _record_of(place)

    def as_start(self) -> dict[str, Any] | None:
        """Return what a run that starts from this one records of it.

        `settings`: what tells this run from others, without its seed. `seeds`: its seed, then those
        of the runs that it started from. None: the record of this run cannot be read.
        """
        try:
            last, summary = self.segments()[-1], self.read_json("summary.json")
            values = flat(self.read_yaml("config.yaml")) | last["kinds"]
            start = self.start()
            fingerprints = summary["dataset_fingerprint"]
            told = told_apart_by(values, last["contents"], fingerprints, start)
            seeds = [values["seed"], *(start["seeds"] if start else [])]
        except (UserError, OSError, LookupError, TypeError):
            return None
        return {"settings": dict(sorted(told.items())), "seeds": seeds}

    def has_finished(self, config: Config) -> bool:
        """Return whether the run of this configuration has finished, and no result is missing."""
        return self.is_complete() and self.status()["config_hash"] == identity(config)

    def has_results(self) -> bool:
        """Return whether there are results here, of the present or an earlier configuration."""
        return any(self.file(name).exists() for name in ("summary.json", "final"))

    def is_complete(self) -> bool:
        """Return whether a run has finished here, and no result is missing."""
        status = self.status()
        return status["state"] == "finished" and not status["missing"]

    def config_hashes(self) -> set[str]:
        """Return the hashes of the configurations that this run has had."""
        return {segment["config_hash"] for segment in self.segments()}

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Inside this context, keep other processes out of this folder.

        Yields True, or False if another process holds the folder. A process that is killed gives
        the folder up.

        Raises:
            UserError: the folder holds files and no run, or cannot be written to.
        """
        self.refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.file(LOCK))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not self.file(LOCK).exists():
                raise UserError(f"{self.path} cannot be written to") from None
            yield False
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be written to: {one_line(error)}") from error
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):  # the folder has become read-only
                self.file(LOCK).unlink(missing_ok=True)
            lock.release()

    def file(self, name: str) -> Path:
        """Return the path of one of the run's files or folders."""
        return self.path / name

    def is_in_trouble(self, error: OSError) -> bool:
        """Return whether an error is a disk error of a file in this folder."""
        if error.errno not in DISK_TROUBLE or error.filename is None:
            return False
        return Path(error.filename).absolute().is_relative_to(self.path.absolute())

    def write(self, name: str, text: str) -> None:
        """Write a file whole: a reader sees the old content or the new content, never a part."""
        part = self.file(name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.file(name)):
            try:
                part.write_text(text, encoding="utf-8")
                put_in_place(part, self.file(name))
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Return the content of `config.yaml` or `choices.yaml`; empty: there is no such file.

        Raises:
            UserError: the file is damaged.
        """
        return self._parse(name, yaml.safe_load) or {}

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file; None: there is no such file.

        Raises:
            UserError: the file is damaged.
        """
        return self._parse(name, json.loads)

    def _parse(self, name: str, parse: Callable[[str], Any]) -> Any:
        """Return the parsed content of a file; None: there is no such file."""
        if not self.file(name).is_file():
            return None
        try:
            return parse(self.file(name).read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.file(name)} is damaged ({one_line(error)[:100]}); put back what it was, "
                "or start a new run"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, with secrets redacted.

        Raises:
            ValueError: the value holds NaN or infinity, which JSON does not have.
        """
        self.write(name, json.dumps(redact(value), indent=2, allow_nan=False) + "\n")

    def set_status(
        self,
        state: str,
        reason: str = "",
        exit_code: int | None = None,
        missing: dict[str, str] | None = None,
        **lasting: Any,
    ) -> None:
        """Write `status.json`.

        Args:
            state: running, finished, failed or stopped.
            reason: one line for people: why the run is in this state.
            exit_code: the exit code of the process.
            missing: the results of a finished run that could not be made, and why.
            lasting: keys that keep their values until new values are given. `config_hash`: see
                `identity.identity`. `sweep_start`: the number of the sweep's start that tried the
                run last. `results`: the `config_hash` of the results that are in the folder or are
                being written.
        """
        before = self.status()
        status = {
            "state": state,
            "reason": reason,
            "exit_code": exit_code,
            "missing": missing or {},
            **{key: lasting.get(key, before[key]) for key in LASTING_STATUS},
        }
        self.write_json("status.json", status)

    def status(self) -> dict[str, Any]:
        """Return the content of `status.json`.

        The state is `missing` if there is no such file of ours, and `damaged` if the file cannot be
        parsed.
        """
        none: dict[str, Any] = {"state": "missing", "reason": "", "exit_code": None, "missing": {}}
        none |= dict.fromkeys(LASTING_STATUS)
        try:
            found = self.read_json("status.json")
        except UserError as error:
            return none | {"state": "damaged", "reason": str(error)}
        if not isinstance(found, dict) or not {"state", "reason", "exit_code"} <= found.keys():
            return none  # a file of another program
        return none | found

    def append_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`.

        Raises:
            ValueError: a figure is not finite.
        """
        file = self.file("metrics.jsonl")
        with naming(file), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of `metrics.jsonl`."""
        file = self.file("metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class ReadOnlyRunFolder(RunFolder):
    """A run's folder in a process that only reads it: the first process of the run writes."""

    def write(self, name: str, text: str) -> None:
        """Write nothing."""

    def append_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write nothing."""

    def remove(self, name: str) -> None:
        """Delete nothing."""


def _record_of(start: str | None) -> dict[str, Any] | None:
    """Return what a run records of its start, the folder of a run; None: there is none to read."""
    return None if start is None else RunFolder(local_path(start)).as_start()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a complete file or folder to its final name.

    Readers never see a part of it, not even after a crash. An old folder of that name is renamed
    first, since a rename cannot replace a folder, and deleted last.
    """
    for entry in [part, *part.rglob("*")]:
        sync(entry)
    aside = path.with_name(f".orpo_lab.{path.name}.old")
    if path.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    os.replace(part, path)
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Inside this context, add the file's name to errors of the operating system.

    An error of a write does not name the file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


def changed_keys(summary: dict[str, Any]) -> list[str]:
    """Return the keys that were changed in a run when it was resumed, in alphabetical order.

    Args:
        summary: the content of the run's `summary.json`.
    """
    return sorted({key for changes in summary.get("changes", []) for key in changes})


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key: numbers in a name sort by value, so that job 10 comes after job 9."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def groups(choices: dict[str, str]) -> dict[str, str]:
    """Return the option chosen in each of our groups, without Hydra's and without inner groups.

    The names of these have a slash in them.
    """
    return {group: choice for group, choice in choices.items() if "/" not in group}


def now() -> str:
    """Return the local time in ISO 8601, to the second and with the UTC offset."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a result depends on; None: not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def code_hash() -> str:
    """Return a hash of all Python files of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def git_commit() -> str | None:
    """Return the commit that holds this code, with a mark if files differ from the commit.

    None: no commit holds the code. The package may be inside another repository without being
    tracked there (in an ignored folder or a virtual environment); that repository does not count. A
    repository that the environment names (GIT_DIR) does not count either. For a package that pip
    has installed from a repository, it is the commit that pip has noted.
    """
    file = Path(__file__)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        is_modified = git("status", "--porcelain", "--", str(file.parents[2]))
        return git("rev-parse", "HEAD") + (" (modified)" if is_modified else "")
    except (OSError, subprocess.CalledProcessError):
        return _installed_commit(file.parents[1])


def _installed_commit(package: Path) -> str | None:
    """Return the commit that pip has installed a package from (PEP 610); None: it has noted none.

    Args:
        package: the folder of this package. Where another copy is installed, the copy's commit does
            not count.
    """
    try:
        installed = distribution(package.name)
    except PackageNotFoundError:
        return None
    if Path(str(installed.locate_file(package.name))) != package:
        return None
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    commit: str | None = origin.get("vcs_info", {}).get("commit_id")
    return commit
