"""A sweep: a folder of run folders, in which every effective configuration runs once.

`launch.py -m` gives jobs to Hydra's launcher, one after the other or several at a time. Each job
calls `Sweep.claim` to get its folder. Jobs with the same effective configuration share a folder,
and a finished run is not run again. So the same command with the same `hydra.sweep.dir` goes on
with a sweep that was stopped, and every job goes on from its newest checkpoint.

All state is in the run folders. `sweep.json` records the code and the data of the runs, how often
the sweep was started, and whether it is a race over seeds (`sweep.race`). A folder that holds files
but no `sweep.json` is refused.
`.orpo_lab_cache/` holds what jobs share, and is deleted when the sweep ends.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from orpo_lab import config
from orpo_lab.config.identity import identity
from orpo_lab.config.tracker import Tracker
from orpo_lab.errors import UserError, one_line
from orpo_lab.metrics import MARGINS, brief
from orpo_lab.records.run_folder import RunFolder, code_hash, natural_order, now

T = TypeVar("T")
# The folder of what jobs share
CACHE = ".orpo_lab_cache"
# Files in a sweep's folder before its first job: our record, and Hydra's record
BEFORE_JOBS = ("sweep.json", "multirun.yaml")


class Sweep:
    """A sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def _record(self) -> RunFolder:
        return RunFolder(self.folder)

    def begin(self, *, accept_changes: bool) -> None:
        """Write `sweep.json`; in an existing sweep, first check that the same code made it.

        Raises:
            UserError: the folder holds files and no sweep; or other code made the sweep, and
                `accept_changes` is false.
        """
        made_by = self._read()
        if not made_by and {child.name for child in self.folder.glob("*")} - {"sweep.json.part"}:
            raise UserError(
                f"{self.folder} is not empty and holds no sweep of this lab, so nothing is written "
                "to it; choose a new or an empty folder with hydra.sweep.dir"
            )
        code = code_hash()
        if made_by and made_by["code"] != code and not accept_changes:
            raise UserError(
                f"{self.folder} was made by other code than this (orpo_lab has changed since), and "
                "its runs would not compare; start a new sweep, or say accept_changes=true"
            )
        starts = made_by.get("starts", 0) + 1
        new = {"data": {}, "started": now()}
        self._record.write_json("sweep.json", {**new, **made_by, "code": code, "starts": starts})
        shutil.rmtree(self.folder / CACHE, ignore_errors=True)

    def note_race(self, max_seeds: int) -> None:
        """Note that the sweep is a race, in which every later comparison has to count all looks.

        Args:
            max_seeds: the largest number of seeds that the race may give to a setting. A race that
                goes on keeps the largest number that it ever had.
        """
        record = self._read()
        record["max_seeds"] = max(record.get("max_seeds", 0), max_seeds)
        self._record.write_json("sweep.json", record)

    def take_back(self) -> None:
        """Delete the folder of a new sweep that has started no job; keep that of an older sweep."""
        names = {child.name for child in self.folder.iterdir()}
        if self._starts() > 1 or names - {*BEFORE_JOBS, CACHE}:
            return
        shutil.rmtree(self.folder / CACHE, ignore_errors=True)
        for name in BEFORE_JOBS:
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def _read(self) -> dict[str, Any]:
        """Return the content of `sweep.json`; empty: there is no such file of ours."""
        record = self._record.read_json("sweep.json")
        is_ours = isinstance(record, dict) and {"code", "data"} <= record.keys()
        return record if is_ours else {}

    def started(self) -> str:
        """Return the time of the sweep's first start, in ISO 8601."""
        return self._read().get("started") or now()

    @contextlib.contextmanager
    def claim(self, loaded: config.Config, folder: Path) -> Iterator[RunFolder | None]:
        """Inside this context, hold the run folder of a job, and yield this folder.

        None is yielded if there is nothing to run.

        Args:
            loaded: the job's configuration.
            folder: the folder that Hydra has made for the job.
        """
        config_hash = identity(loaded)
        with contextlib.ExitStack() as stack:
            with FileLock(self.folder / CACHE / "claims.lock"):
                place = self._folder_of(config_hash) or _without_another_run(folder)
                is_free = self._wants_running(place) and stack.enter_context(place.held())
                if is_free:
                    place.set_status("running", config_hash=config_hash, sweep_start=self._starts())
            if place.path != folder:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if not is_free:
                print(f"{place.path}: {place.status()['state']} already, not run again")
                yield None
                return
            try:
                yield place
            except BaseException as error:
                if place.status()["state"] == "running":  # the run did not record its own failure
                    reason = one_line(f"{type(error).__name__}: {error}")
                    place.set_status("failed", reason, exit_code=1)
                raise

    def _folder_of(self, config_hash: str) -> RunFolder | None:
        """Return the run folder of a configuration in this sweep; None: there is no such folder."""
        same = (job for job in self.jobs() if job.status().get("config_hash") == config_hash)
        return next(same, None)

    def _wants_running(self, place: RunFolder) -> bool:
        """Return whether a run is not complete, and was not tried in this start of the sweep.

        A run that has finished without some of its results is not complete.
        Starts are counted, not dated: clocks of machines differ, and copies of files have new
        dates.
        """
        status = place.status()
        if status["state"] in ("missing", "running"):
            return True  # the lock of the folder says whether the run is still running
        if status["state"] == "stopped" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return True  # Slurm has stopped this job and put it back into its queue
        return not place.is_complete() and status["sweep_start"] != self._starts()

    def _starts(self) -> int:
        """Return how often the sweep was started."""
        return self._read().get("starts", 0)

    def check_data(self, key: str, fingerprint: Any, *, accept_changes: bool) -> None:
        """Check that data are the same as in earlier jobs of the sweep.

        Args:
            key: name of the data in `sweep.json`.
            fingerprint: fingerprint of the data now.
            accept_changes: accept changed data.

        Raises:
            UserError: the data have changed, and `accept_changes` is false.
        """
        with FileLock(self.folder / CACHE / "data.lock"):
            record = self._read()
            before = record["data"].get(key)
            if before not in (None, fingerprint) and not accept_changes:
                raise UserError(
                    f"the data are not those that {self.folder} was made with (its files or the "
                    "tokenizer have changed), and its runs would not compare; start a new sweep, "
                    "or say accept_changes=true"
                )
            if before != fingerprint:
                record["data"][key] = fingerprint
                self._record.write_json("sweep.json", record)

    def once(
        self,
        name: str,
        make: Callable[[], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """Return a result that jobs share: the first job makes it, other jobs wait and load it.

        Args:
            name: name of the result in the cache.
            make: makes the result.
            save: writes the result to a path.
            load: reads the result from that path.
        """
        path = self.folder / CACHE / name
        with FileLock(f"{path}.lock"):
            if path.exists():
                return load(path)
            made = make()
            part = path.with_name(f"{name}.part")
            save(made, part)
            os.replace(part, path)
            return made

    def jobs(self) -> list[RunFolder]:
        """Return the folders of the sweep's jobs, including jobs that never began a run."""
        folders = (file.parent for file in self.folder.glob("*/status.json"))
        return [RunFolder(folder) for folder in sorted(folders, key=natural_order)]

    def close(self, tracked_by: Tracker) -> list[str]:
        """Print a table of all jobs, write the comparison, and return the names of failed jobs."""
        from orpo_lab import tracker
        from orpo_lab.compare.evidence import compare
        from orpo_lab.compare.page import table_of_settings, write
        from orpo_lab.compare.read import find_runs
        from orpo_lab.compare.ship import choose
        from orpo_lab.compare.words import verdict_text
        from orpo_lab.tracker import leet

        shutil.rmtree(self.folder / CACHE, ignore_errors=True)
        # submitit's files for its processes hold the overrides as typed, perhaps with secrets
        for pickled in self.folder.glob(".submitit/*/*.pkl"):
            pickled.unlink()
        jobs = [(job, job.status()) for job in self.jobs()]
        if jobs:
            print(f"\n{_table(jobs)}")
        try:
            compared = compare(find_runs([self.folder]), MARGINS)
            write(compared, self.folder)
            verdict = [*verdict_text(compared), *compared.warnings]
            ship = choose(compared)
            print("\n".join(["", *verdict]))
            rows = table_of_settings(compared, ship)
            tracker.publish_comparison(tracked_by, self.folder, verdict, rows)
            print("\n".join(["", *ship.brief(), f"report  {self.folder / 'report.html'}"]))
            if (shown := self.folder / leet.FOLDER).is_dir():
                print(f"curves  wandb leet {shown}")
        except UserError as error:
            print(f"\nno comparison: {error}")
        return [job.path.name for job, status in jobs if status["state"] != "finished"]


def _without_another_run(folder: Path) -> RunFolder:
    """Return the folder for a new job: `folder`, or a new one if `folder` is in use.

    A folder is in use if it holds another run, or files and no run.
    Folder names say only which values are swept. The same sweep may be started again with another
    value that is not swept, and then has the same names.
    """
    place = RunFolder(folder)
    holds_another = place.status()["config_hash"] is not None
    is_foreign = not place.is_empty() and not place.is_ours()
    return RunFolder(fresh_folder(folder) if holds_another or is_foreign else folder)


def _table(jobs: list[tuple[RunFolder, dict[str, Any]]]) -> str:
    width = max(len(job.path.name) for job, _ in jobs)
    lines = []
    for job, status in jobs:
        is_complete = status["state"] == "finished" and not status["missing"]
        figures = _figures(job) if is_complete else status["reason"]
        lines.append(f"{job.path.name:{width}}  {status['state']:8}  {figures}")
    return "\n".join(lines)


def _figures(job: RunFolder) -> str:
    after = json.loads((job.path / "summary.json").read_text())["after"]
    return "  ".join(f"{name} {value}" for name, value in brief(after).items())


def fresh_folder(folder: Path) -> Path:
    """Make and return a new folder; if `folder` exists, its name gets `-2`, `-3` and so on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        fresh = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            fresh.mkdir()
            return fresh
        except FileExistsError:
            number += 1
