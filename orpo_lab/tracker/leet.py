"""The folder `leet/` of a sweep, in which `wandb leet` shows all runs of the sweep at once.

`wandb leet` lists the folders `run-<time>-<name>` of one folder, and reads `run-<name>.wandb` in
each. So every job has such a folder, which is named by the job and holds links to its W&B run.
`wandb sync` does not look there. Tried with wandb 0.31.
"""

import glob
import os
import shutil
from pathlib import Path

FOLDER = "leet"


def show(job: Path, logged: Path, run_id: str) -> None:
    """Show a job's W&B run in its sweep; a run of an earlier start of the job is replaced.

    Args:
        job: the run folder, in the sweep's folder.
        logged: the folder of the W&B run, `[offline-]run-<time>-<id>`; of a second start within the
            same second `...-<id>-1`.
        run_id: the id of the W&B run.

    Raises:
        OSError: the links cannot be made.
    """
    place = job.parent / FOLDER
    for old in place.glob(f"run-*_*-{glob.escape(job.name)}"):
        shutil.rmtree(old)
    time = logged.name.partition("run-")[2].partition("-")[0]
    shown = place / f"run-{time}-{job.name}"
    shown.mkdir(parents=True)
    links = {f"run-{job.name}.wandb": f"run-{run_id}.wandb", "files": "files"}
    for name, target in links.items():
        # Relative, so that the sweep's folder may be moved
        (shown / name).symlink_to(os.path.relpath(logged / target, shown))
