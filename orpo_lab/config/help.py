"""The help: every option of every group, and what keys mean, by the comments in `conf/`."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser

from orpo_lab import program
from orpo_lab.config.command_line import did_you_mean, suggestion
from orpo_lab.config.folder import CONF
from orpo_lab.errors import UserError

USAGE = """usage: {called} [option ...], e.g. {called} optimizer=galore

Options are group=name; -m sweeps over lists (beta=0.1,0.2)."""
MORE = """Meaning of keys:  {called} --help optimizer=galore  (a group, a key: --help train beta)
Values of a run:  {called} --cfg job  (of one group: --cfg job --package optimizer)
What is read:     {called} --info defaults-tree  (Hydra's own flags: --hydra-help)
Your own options: {called} --config-dir FOLDER  (docs/configuration.md)"""


@dataclass(frozen=True)
class Key:
    """A key of a file of options."""

    name: str
    """The whole key, such as `optimizer.rank`."""
    value: str
    """The value as the file writes it; empty: the key holds further keys."""
    comment: str
    """The comment above the key: its meaning, unit and direction."""

    def __str__(self) -> str:
        width = min(shutil.get_terminal_size().columns, 100)
        lines = textwrap.wrap(self.comment, width - 6, break_long_words=False)
        return "\n".join([f"  {self.name}: {self.value}", *(f"      {line}" for line in lines)])


def help_text(arguments: Sequence[str] = ()) -> str:
    """Return the help: of the groups, options and keys that the command line names, or of all.

    Hydra's own help would load each file twice, and take longer than a second.

    Args:
        arguments: the command line; it may name another folder of options (`--config-dir`).

    Raises:
        UserError: the command line names a group, an option or a key that does not exist.
    """
    given, _ = get_args_parser().parse_known_args(list(arguments))
    places = [CONF, *([Path(given.config_dir)] if given.config_dir else [])]
    if given.overrides:
        return "\n\n".join(_about(word, places) for word in given.overrides)
    # Also groups inside others, such as dataset/columns
    folders = {(place, file.parent) for place in places for file in place.rglob("*.yaml")}
    groups = {folder.relative_to(place).as_posix() for place, folder in folders} - {"."}
    listed = [_group(group, places) for group in sorted(groups)]
    usage, more = (text.format(called=program.command("train")) for text in (USAGE, MORE))
    return "\n\n".join([usage, *listed, more])


def _about(word: str, places: Sequence[Path]) -> str:
    """Return the help of one argument: an option of a group, a group, or a key."""
    key, _, option = word.lstrip("+").partition("=")
    if options := _options(key, places):
        if not option:
            return f"{_group(key, places)}\n\nKeys of one: --help {key}={next(iter(options))}"
        if option not in options:
            raise UserError(
                f"{key} has no option {option}; there are: {', '.join(options)}"
                + did_you_mean("\n\t".join([f"Could not find '{option}'", *options]))
            )
        head = f"{key}={option}: {_first_comment(options[option])}"
        return "\n".join([head, *map(str, _keys(options[option], key, places).values())])
    return "\n".join(map(str, _keys_named(key, places)))


def _keys_named(name: str, places: Sequence[Path]) -> list[Key]:
    """Return a key, or all keys below it; of a key that several options have, the first option's.

    Raises:
        UserError: there is no such key.
    """
    found = _keys(CONF / "config.yaml", "", places)
    group = name.split(".")[0]
    for file in _options(group, places).values():
        found = _keys(file, group, places) | found
    named = [key for key in found.values() if f"{key.name}.".startswith(f"{name}.")]
    if not named:
        raise UserError(f"there is no key {name}{suggestion(name)}")
    return named


def _options(group: str, places: Sequence[Path]) -> dict[str, Path]:
    """Return the files of a group's options by name; empty: there is no such group."""
    files = (file for place in places for file in (place / group).glob("*.yaml"))
    found = {file.stem: file for file in files} if group else {}
    return dict(sorted(found.items()))


def _group(group: str, places: Sequence[Path]) -> str:
    options = _options(group, places).items()
    return "\n".join([group, *(f"  {name:18} {_first_comment(file)}" for name, file in options)])


def _first_comment(file: Path) -> str:
    comments = (line[2:] for line in file.read_text().splitlines() if line[:2] == "# ")
    return next((line for line in comments if not line.startswith("@package")), "")


def _keys(file: Path, group: str, places: Sequence[Path]) -> dict[str, Key]:
    """Return the keys of an option by name, with those of the options that it is made of."""
    text = file.read_text()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    is_global = "# @package _global_" in text
    prefix = f"{group.replace('/', '.')}." if group and not is_global else ""
    found: dict[str, Key] = {}
    for part in (yaml.safe_load(text) or {}).get("defaults", []) if group else []:
        below, option = next(iter(part.items())) if isinstance(part, dict) else ("", part)
        inside = f"{group}/{below}".rstrip("/")
        files = _options(inside, places)
        if option in files:
            found |= _keys(files[option], inside, places)
    return found | {key.name: key for key in _written(root, prefix, text.splitlines())}


def _written(node: Any, prefix: str, lines: Sequence[str]) -> Iterator[Key]:
    """Yield the keys that a file gives, without Hydra's own."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.start_mark.column == 0 and key.value in ("defaults", "hydra"):
            continue
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _written(value, f"{prefix}{key.value}.", lines)
            continue
        at = key.start_mark.line
        begin = at
        while begin and lines[begin - 1].lstrip().startswith("#"):
            begin -= 1
        comment = " ".join(line.strip().removeprefix("# ") for line in lines[begin:at])
        written = lines[at].partition(":")[2].strip()
        yield Key(f"{prefix}{key.value}", written, comment)
