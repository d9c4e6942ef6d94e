"""`python -m orpo_lab COMMAND ...`: all commands except running, which `launch.py` does."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from orpo_lab.errors import UserError, one_line

# For each command the module with its `add_arguments` and `run`, and what the command does. A
# module is imported only when its command is called.
COMMANDS = {
    "compare": ("orpo_lab.compare.command", "compare runs, over held-out pairs and seeds"),
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
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m orpo_lab COMMAND ...\n")
        print("\n".join(f"  {command:10} {about}" for command, (_, about) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        sys.exit(f"error: {name} is no command; there are: {', '.join(COMMANDS)}")
    module, about = COMMANDS[name]
    command = importlib.import_module(module)
    parser = Parser(prog=f"python -m orpo_lab {name}", description=f"{about.capitalize()}.")
    command.add_arguments(parser)
    options = parser.parse_intermixed_args(rest)
    try:
        command.run(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
