"""Where an export goes: a new folder of its own."""

from pathlib import Path

from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder

# Folders of a run whose content is what the run says it is: nothing else may lie there
SEALED = ("final", "checkpoints")


def check_free(target: Path) -> None:
    """Check that an export may be put at a place: there is nothing yet, or an empty folder.

    Raises:
        UserError: there is something; or the place is the working directory, which would be
            replaced under the user's feet; or it is among the results or checkpoints of a run.
    """
    for folder in (target.resolve(), *target.resolve().parents):
        if folder.name in SEALED and RunFolder(folder.parent).is_ours():
            raise UserError(
                f"{target} is in {folder.name}/ of a run, which holds nothing but the run's own "
                "files; choose another folder with --to"
            )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; choose a new folder with --to")
    if target.resolve() == Path.cwd():
        raise UserError(f"{target} is the folder that you are in; choose a new one with --to")
