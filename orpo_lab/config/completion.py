"""Completion of the command line in a shell, by Hydra: `python launch.py -sc install=bash`."""

from collections.abc import MutableMapping, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

from orpo_lab import config


def flags_and_line(line: str) -> tuple[list[str], str]:
    """Return the flags to start Hydra with, and the line whose last word Hydra is to complete.

    Hydra composes the configuration of all words before the last one to learn which keys there are,
    and completes nothing if a value does not fit. Which keys there are depends on the chosen
    options alone, so the other words are left out. Hydra also reads no flag of the line, and knows
    only some of the ways to type the program's name.

    Args:
        line: what the user has typed up to the cursor.
    """
    words = line.split()
    begun = words.pop() if words and not line[-1].isspace() else ""
    at = next((number for number, word in enumerate(words) if word.endswith(".py")), 0)
    given, _ = get_args_parser().parse_known_args(words[at + 1 :])
    own = given.config_dir
    flags = [f"--config-dir={own}"] if own and Path(own).is_dir() else []
    flags += [f"--config-name={given.config_name}"] if given.config_name else []
    options = [word for word in given.overrides if _chooses(word)]
    return flags, " ".join(["program", *(["-m"] if given.multirun else []), *options, begun])


def _chooses(word: str) -> bool:
    """Return whether a word chooses one option of a group, and does not sweep over several."""
    key, _, option = word.lstrip("+").partition("=")
    return key in (*config.SCHEMAS, "experiment") and "," not in option


def answer(arguments: Sequence[str], environment: MutableMapping[str, str]) -> list[str]:
    """Return the arguments that answer a shell's query, and put the line into the environment.

    Args:
        arguments: the command line; returned unchanged if a shell has no query.
        environment: the process's; `COMP_LINE` holds what the user has typed.
    """
    line = environment.get("COMP_LINE")
    if line is None or not {"-sc", "--shell-completion"} & set(arguments):
        return list(arguments)
    flags, environment["COMP_LINE"] = flags_and_line(line)
    return [*flags, *arguments]
