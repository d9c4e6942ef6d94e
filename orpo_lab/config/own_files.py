"""Errors in a file of options, such as a recipe of the user's own: which line, what to write."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from orpo_lab import config
from orpo_lab.config.command_line import did_you_mean


def explain(error: OmegaConfBaseException, file: Path) -> str:
    """Return an error of a file as one line that names the file and the line of the key.

    Args:
        error: raised when the file's values were put into the configuration.
        file: the YAML file.
    """
    key, text = str(error.full_key), file.read_text()
    if key == "experiment":
        return f"{file}:1: a recipe begins with the line `# @package _global_`"
    if not key:  # where a group is given a value, OmegaConf does not say which
        key = next((name for name in config.SCHEMAS if _is_value(name, text)), "")
        return (
            f"{file}:{line_of(key, text)}: {key} is a group, not a value; choose an option by "
            f"`defaults: [override /{key}: NAME, _self_]`"
        )
    where = f"{file}:{line_of(key, text)}"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        hint = did_you_mean(f"Could not override '{key}'")
        return f"{where}: there is no key {key} in this configuration{hint}"
    return f"{where}: {key}: {str(error).splitlines()[0]}"


def line_of(key: str, text: str) -> int:
    """Return the number of the line in which a file of options gives a key; 1: no line does.

    Args:
        key: the whole key, such as `optimizer.rank`. A file of a group may leave out the first
            part, since Hydra puts its values under the group.
        text: the content of the YAML file.
    """
    parts = key.split(".")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = (_line_below(root, parts[start:]) for start in range(len(parts)))
    return next((line for line in lines if line), 1)


def _is_value(key: str, text: str) -> bool:
    return isinstance(yaml.safe_load(text).get(key), str)


def _line_below(node: Any, parts: list[str]) -> int | None:
    line = None
    for part in parts:
        below = {key.value: (key, value) for key, value in _children(node)}
        if part not in below:
            return None
        key, node = below[part]
        line = key.start_mark.line + 1
    return line


def _children(node: Any) -> list[Any]:
    return node.value if isinstance(node, yaml.MappingNode) else []
