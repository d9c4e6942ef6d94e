"""`python -m orpo_lab COMMAND ...`: all commands except running, which `launch.py` does."""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from orpo_lab.config.command_line import open_streams
from orpo_lab.curate.command import STEPS
from orpo_lab.errors import UserError, one_line

# For each command the module with its `add_arguments` and `run`, or a table of further commands,
# and what the command does. A module is imported only when its command is called.
COMMANDS: Mapping[str, tuple[str | Mapping[str, tuple[str, str]], str]] = {
    "compare": ("orpo_lab.compare.command", "compare runs, over held-out pairs and seeds"),
    "curate": (STEPS, "make a preference data set: prompts, answers, votes, pairs"),
    "dial": ("orpo_lab.dial.command", "mix two runs, and see which betas a mixture predicts"),
    "preview": ("orpo_lab.preview.command", "look at preference data before training"),
    "search": ("orpo_lab.sweep.search", "search beta and other keys with Optuna"),
    "workspace": ("orpo_lab.tracker.workspace", "save a W&B workspace that compares runs"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, like all error messages of this package."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line, and exit with code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can put right gives one line and exit code 1."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _run("python -m orpo_lab", COMMANDS, given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run(
    program: str,
    commands: Mapping[str, tuple[str | Mapping[str, tuple[str, str]], str]],
    arguments: Sequence[str],
) -> None:
    """Run the command of a table that the first argument names.

    Args:
        program: what is typed in front of the command.
        commands: the table, as `COMMANDS`.
        arguments: the command and its arguments.

    Raises:
        UserError: the table has no such command, or the command raises it.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        what = "COMMAND" if commands is COMMANDS else "STEP"
        print(f"usage: {program} {what} ...\n")
        print("\n".join(f"  {command:10} {about}" for command, (_, about) in commands.items()))
        return
    if name not in commands:
        raise UserError(f"{name} is no command; there are: {', '.join(commands)}")
    module, about = commands[name]
    if not isinstance(module, str):
        try:
            return _run(f"{program} {name}", module, rest)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("orpo_lab"):
                raise
            hint = f'pip install -e ".[{name}]"'
            raise UserError(f"{error.name} is not installed: {hint}") from error
    command = importlib.import_module(module)
    parser = Parser(prog=f"{program} {name}", description=f"{about.capitalize()}.")
    command.add_arguments(parser)
    command.run(parser.parse_intermixed_args(rest))


if __name__ == "__main__":
    open_streams()
    main()
