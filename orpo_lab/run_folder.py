"""The files of a run folder: what a run leaves is here (docs/configuration.md lists them)."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from orpo_lab.config import AUTO, Config
from orpo_lab.errors import UserError, one_line
from orpo_lab.identity import contents, flat, identity, kinds, policies, settings
from orpo_lab.masking import mask

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


class RunFolder:
    """A run's folder; every file is written whole and renamed into place, or appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self, config: Config, choices: dict[str, str], overrides: list[str], *, resume: str | None
    ) -> dict[str, Any]:
        """Write what the run is, and that it runs; return the configuration as written.

        Args:
            config: the run's.
            choices: the option chosen in every group.
            overrides: the command line's.
            resume: null, `auto` or the folder, as in the configuration; a sweep's jobs are `auto`.

        Raises:
            UserError: the folder cannot be written to or holds another run, or the run to resume
                had another configuration.
        """
        resolved = mask(dataclasses.asdict(config))
        segment = {
            "config_hash": identity(config),
            "kinds": kinds(config),
            "contents": contents(config),
            "changes": self._changes(config, resolved, resume),
            "overrides": mask(overrides),
        }
        groups = {group: one for group, one in choices.items() if "/" not in group}
        chosen = {"choices": groups, "overrides": mask(overrides)}
        # What changes is on record before anything has changed
        self.write_json("segments.json", [*self.segments(), segment])
        self.write("config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        self.write("choices.yaml", yaml.safe_dump(chosen, sort_keys=False))
        self.set_status("running", config_hash=identity(config))
        return {**resolved, "choices": groups}

    def _changes(
        self, config: Config, resolved: dict[str, Any], resume: str | None
    ) -> dict[str, list[Any]]:
        """Return the values before and now of what a run to be continued has changed."""
        if not self._file("config.yaml").is_file():
            if resume in (None, AUTO):
                return {}
            raise UserError(f"resume={self.path} is not a run folder: no config.yaml in it")
        if resume is None:
            raise UserError(
                f"{self.path} holds a run already; choose another with hydra.run.dir, or go on "
                "with it by resume=auto"
            )
        if not self.segments():
            raise UserError(
                f"{self._file('segments.json')} is missing, and with it what this run was; put it "
                "back, or start a new run"
            )
        before = flat(self.read_yaml("config.yaml")) | self.segments()[-1]["kinds"]
        now = flat(resolved) | kinds(config)
        read = settings(before).keys() | settings(now).keys()
        changes = {
            key: [before.get(key), now.get(key)]
            for key in sorted(read)
            if before.get(key) != now.get(key)
        }
        said = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
        lasting = [key for key in changes if policies()[key].kind == "lasting"]
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
        return changes

    def segments(self) -> list[dict[str, Any]]:
        """Return what `segments.json` says: the starts of this run, the first one included."""
        return self._parse("segments.json", json.loads) or []

    def has_finished(self, config: Config) -> bool:
        """Return whether this very run ended well: there is nothing to go on with."""
        status = self.status()
        return status["state"] == "finished" and status["config_hash"] == identity(config)

    def config_hashes(self) -> set[str]:
        """Return the hashes of the configurations that this run has had."""
        return {one["config_hash"] for one in self.segments()}

    def start_over(self) -> None:
        """Take away what an earlier start left that never came to a checkpoint."""
        self.drop_results()
        self._file("metrics.jsonl").unlink(missing_ok=True)

    def go_on(self, metrics: Path) -> None:
        """Put back `metrics.jsonl` as it was at a checkpoint; later lines are written again."""
        self.drop_results()
        self.write("metrics.jsonl", metrics.read_text(encoding="utf-8"))

    def drop_results(self) -> None:
        """Take away results, which a run that has not finished does not have."""
        for name in ("summary.json", "scores.parquet"):
            self._file(name).unlink(missing_ok=True)
        for name in ("final", "final.part"):
            shutil.rmtree(self._file(name), ignore_errors=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Keep other processes out of this folder; False: one is in it.

        A process that is killed gives it up.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._file(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not self._file(".lock").exists():
                raise UserError(f"{self.path} cannot be written to") from None
            yield False
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be written to: {one_line(error)}") from error
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):  # it has become read-only
                self._file(".lock").unlink(missing_ok=True)
            lock.release()

    def _file(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, text: str) -> None:
        """Write a file whole: a reader sees the old one or the new one."""
        part = self._file(name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        put_in_place(part, self._file(name))

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Return what `config.yaml` or `choices.yaml` says.

        Raises:
            UserError: it is damaged.
        """
        return self._parse(name, yaml.safe_load) or {}

    def _parse(self, name: str, parse: Callable[[str], Any]) -> Any:
        """Return what a file holds; None: there is no such file."""
        if not self._file(name).is_file():
            return None
        try:
            return parse(self._file(name).read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{self._file(name)} is damaged ({one_line(error)[:100]}); put back what it was, "
                "or start a new run"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, secrets masked."""
        self.write(name, json.dumps(mask(value), indent=2) + "\n")

    def set_status(
        self,
        state: str,
        reason: str = "",
        exit_code: int | None = None,
        config_hash: str | None = None,
    ) -> None:
        """Write `status.json`: running, finished, failed or stopped, why, and the exit code.

        Args:
            state: what the run has come to.
            reason: one line, for people.
            exit_code: the process's.
            config_hash: see `identity.identity`; None: as it was.
        """
        status = {"state": state, "reason": reason, "exit_code": exit_code}
        status["config_hash"] = config_hash or self.status().get("config_hash")
        self.write("status.json", json.dumps(status | {"reason": mask(reason)}, indent=2) + "\n")

    def status(self) -> dict[str, Any]:
        """Return `status.json`; the state is missing before there is one, or damaged."""
        none = {"state": "missing", "reason": "", "exit_code": None}
        try:
            return self._parse("status.json", json.loads) or none
        except UserError as error:
            return none | {"state": "damaged", "reason": str(error)}

    def append_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`."""
        with self._file("metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of `metrics.jsonl`."""
        file = self._file("metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a whole file or folder to its name: a reader sees nothing half, also after a crash."""
    for one in [part, *part.rglob("*")]:
        sync(one)
    if part.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)
    sync(path.parent)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key: numbers in a name by their value, so that job 10 comes after job 9."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on."""
    return {name: version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Return the commit of this checkout, marked where files differ from it; None outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" (modified)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
