"""All commands of the lab: `orpo-lab COMMAND ...`, or `python -m orpo_lab COMMAND ...`.

The commands that run experiments hand their arguments to Hydra, as `launch.py` does.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from orpo_lab import __version__, program
from orpo_lab.config.command_line import open_streams
from orpo_lab.curate.command import STEPS
from orpo_lab.errors import UserError, one_line
from orpo_lab.stop import Stopped

# For each command the module with its `add_arguments` and `run`, or a table of further commands,
# and what the command does. A module is imported only when its command is called.
COMMANDS: Mapping[str, tuple[str | Mapping[str, tuple[str, str]], str]] = {
    "compare": ("orpo_lab.compare.command", "compare runs, over held-out pairs and seeds"),
    "curate": (STEPS, "make a preference data set: prompts, answers, votes, pairs"),
    "dial": ("orpo_lab.dial.command", "mix two runs, and see which betas a mixture predicts"),
    "evaluate": ("orpo_lab.evaluation.command", "judge a finished run by lm-evaluation-harness"),
    "export": ("orpo_lab.export.command", "take the model of a run, checked against the run"),
    "plan": ("orpo_lab.plan.command", "say whether a run fits, and how long it takes"),
    "preview": ("orpo_lab.preview.command", "look at preference data before training"),
    "search": ("orpo_lab.sweep.search", "search beta and other keys with Optuna"),
    "winrate": ("orpo_lab.judge.command", "have a judge compare the answers of runs"),
    "workspace": ("orpo_lab.tracker.workspace", "save a W&B workspace that compares runs"),
}
# The same for the commands whose arguments are Hydra's: flags for Hydra, and what the command does
RUNNING: Mapping[str, tuple[Sequence[str], str]] = {
    "train": ((), "train a model, evaluated before and after"),
    "sweep": (("--multirun",), "train with every value of a list (beta=0.1,0.2), and compare"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, like all error messages of this package."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line, and exit with code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def start() -> None:
    """Run the command of the command line: what the program `orpo-lab` does."""
    open_streams()
    main()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can put right gives one line and exit code 1."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _dispatch(given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
    except Stopped as error:
        print(f"stopped by {error.reason}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: there is no such command, or the command raises it.
    """
    match arguments:
        case ["--version", *_]:
            print(f"{program.PROGRAM} {__version__}")
        case ["-sc" | "--shell-completion", *_]:
            _complete(arguments)
        case [name, *rest] if name in RUNNING:
            _launch([*RUNNING[name][0], *rest])
        case _:
            _run("", COMMANDS, arguments)


def _launch(arguments: Sequence[str]) -> None:
    """Run experiments as `launch.py` does; Hydra reads its arguments from `sys.argv`."""
    from orpo_lab import launch

    sys.argv[1:] = arguments
    launch.main()


def _complete(arguments: Sequence[str]) -> None:
    """Complete a line in a shell: a command's name here, the options of a run by Hydra.

    Hydra's scripts for shells ask with the whole line in COMP_LINE. Without it, a script is asked
    for (`-sc install=bash`).
    """
    given = re.match(r"\s*(\S+\s+)(\S*)(\s*)(.*)", os.environ.get("COMP_LINE", ""))
    called, name, space, rest = given.groups() if given else ("", "", "", "")
    if given and not space:
        print(*(each for each in (*RUNNING, *COMMANDS) if each.startswith(name)))
    elif not given or name in RUNNING:
        os.environ["COMP_LINE"] = called + rest
        _launch(arguments)


def _run(
    parent: str,
    commands: Mapping[str, tuple[str | Mapping[str, tuple[str, str]], str]],
    arguments: Sequence[str],
) -> None:
    """Run the command of a table that the first argument names.

    Args:
        parent: the command whose steps the table lists; empty: the table is `COMMANDS`.
        commands: the table, as `COMMANDS`.
        arguments: the command and its arguments.

    Raises:
        UserError: the table has no such command, or the command raises it.
    """
    known = commands if parent else {**RUNNING, **commands}
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {program.command(f'{parent} STEP' if parent else 'COMMAND')} ...\n")
        print("\n".join(f"  {command:10} {about}" for command, (_, about) in known.items()))
        return
    if name not in commands:
        raise UserError(f"{name} is no command; there are: {', '.join(known)}")
    full_name = f"{parent} {name}".strip()
    module, about = commands[name]
    if not isinstance(module, str):
        try:
            return _run(full_name, module, rest)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("orpo_lab"):
                raise
            how = program.install(name)
            raise UserError(f"{error.name} is not installed: {how}") from error
    command = importlib.import_module(module)
    parser = Parser(prog=program.command(full_name), description=f"{about.capitalize()}.")
    command.add_arguments(parser)
    command.run(parser.parse_intermixed_args(rest))


if __name__ == "__main__":
    start()
