"""What users type to call the lab, for usage lines and for the commands that messages propose.

The lab has three doors: the installed program `orpo-lab`, `python -m orpo_lab`, and `launch.py` of
a clone. A message proposes the door through which the user came.
"""

import sys
from pathlib import Path

PROGRAM = "orpo-lab"
MODULE = "python -m orpo_lab"
SCRIPT = "python launch.py"

_PACKAGE = Path(__file__).parent
IS_CLONE = (_PACKAGE.parent / "launch.py").is_file()


def called() -> str:
    """Return the door that started this process.

    A notebook and a job's process of a launcher came through none: then the main door is returned,
    which is `launch.py` in a clone and `orpo-lab` elsewhere.
    """
    started = Path(sys.argv[0])
    if started.stem == PROGRAM:
        return PROGRAM
    if started == _PACKAGE / "__main__.py":
        return MODULE
    return SCRIPT if IS_CLONE else PROGRAM


def command(name: str) -> str:
    """Return what a user types for a command of the lab, without the command's arguments.

    Args:
        name: the command, with its step if it has steps: `train`, `compare`, `curate votes`.
    """
    door = called()
    if door == SCRIPT:
        return SCRIPT if name == "train" else f"{MODULE} {name}"
    return f"{door} {name}"


def install(extra: str) -> str:
    """Return what a user types to install the packages of an extra."""
    return f'pip install -e ".[{extra}]"' if IS_CLONE else f'pip install "{PROGRAM}[{extra}]"'
