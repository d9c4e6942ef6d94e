"""The help: every option of every group, and what keys mean, by the comments in `conf/`."""

import re
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
from orpo_lab.errors import UserError, one_line

USAGE = """usage: {called} [option ...], e.g. {called} optimizer=galore

Options are group=name; -m sweeps over lists (beta=0.1,0.2)."""
MORE = """Meaning of keys:  {called} --help optimizer=galore  (a group, a key: --help train beta)
Values of a run:  {called} --cfg job  (of one group: --cfg job --package optimizer)
What is read:     {called} --info defaults-tree  (Hydra's own flags: --hydra-help)
Your own options: {called} --config-dir FOLDER  (docs/configuration.md)"""
# Where Hydra puts the keys of a file
PACKAGE = re.compile(r"^# @package (\S+)", flags=re.MULTILINE)


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
        UserError: the command line names a folder, a group, an option or a key that does not exist,
            or an option whose file cannot be read.
    """
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if given.config_dir and not Path(given.config_dir).is_dir():
        raise UserError(f"--config-dir={given.config_dir}: there is no such folder")
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
        listed = option[1:-1].split(",") if re.fullmatch(r"\[.*\]", option) else [option]
        return "\n\n".join(_of_option(key, one.strip(), places) for one in listed)
    return _keys_named(key, places)


def _of_option(group: str, option: str, places: Sequence[Path]) -> str:
    options = _options(group, places)
    if option not in options:
        raise UserError(
            f"{group} has no option {option}; there are: {', '.join(options)}"
            + did_you_mean("\n\t".join([f"Could not find '{option}'", *options]))
        )
    head = f"{group}={option}: {_first_comment(options[option])}"
    return "\n".join([head, *map(str, _keys(options[option], group, places).values())])


def _keys_named(name: str, places: Sequence[Path]) -> str:
    """Return a key, or all keys below it; of a key that several options have, the first option's.

    Files that cannot be read are named at the end.

    Raises:
        UserError: there is no such key.
    """
    found = _keys(CONF / "config.yaml", "", places)
    parts, unread = name.split("."), []
    # Also groups inside others, such as dataset/columns
    for group in ("/".join(parts[: number + 1]) for number in range(len(parts))):
        for file in _options(group, places).values():
            try:
                found = _keys(file, group, places) | found
            except UserError as error:
                unread.append(f"  (not read: {error})")
    named = [key for key in found.values() if f"{key.name}.".startswith(f"{name}.")]
    if not named:
        raise UserError(f"there is no key {name}{suggestion(name)}")
    return "\n".join([*map(str, named), *dict.fromkeys(unread)])


def _options(group: str, places: Sequence[Path]) -> dict[str, Path]:
    """Return the files of a group's options by name; empty: there is no such group."""
    files = (file for place in places for file in (place / group).glob("*.yaml"))
    found = {file.stem: file for file in files} if group else {}
    return dict(sorted(found.items()))


def _group(group: str, places: Sequence[Path]) -> str:
    lines = [group]
    for name, file in _options(group, places).items():
        try:
            # Ours can be read: they are not parsed, which takes half a second
            about = _first_comment(file) if file.is_relative_to(CONF) else _checked_comment(file)
        except UserError as error:
            about = f"(not read: {error})"
        lines.append(f"  {name:18} {about}")
    return "\n".join(lines)


def _checked_comment(file: Path) -> str:
    _parsed(file)
    return _first_comment(file)


def _first_comment(file: Path) -> str:
    comments = (line[2:] for line in _text(file).splitlines() if line[:2] == "# ")
    return next((line for line in comments if not line.startswith("@package")), "")


def _text(file: Path) -> str:
    """Return a file's text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def _parsed(file: Path) -> dict[str, Any]:
    """Return a file's values.

    Raises:
        UserError: it cannot be read, or is not YAML with keys.
    """
    try:
        values = yaml.safe_load(_text(file)) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict) or not isinstance(values.get("defaults", []), list):
        raise UserError(f"{file} cannot be read: a file of options holds keys, and a defaults list")
    return values


def _keys(file: Path, group: str, places: Sequence[Path]) -> dict[str, Key]:
    """Return the keys of an option by name, with those of the options that it is made of.

    The options of other groups that a recipe chooses are among them, under the group's name.

    Raises:
        UserError: a file cannot be read.
    """
    values, text = _parsed(file), _text(file)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    package = _package(text, group)
    prefix = f"{package}." if package else ""
    found: dict[str, Key] = {}
    for part in values.get("defaults", []) if group else []:
        below, option = next(iter(part.items())) if isinstance(part, dict) else ("", part)
        if chosen := re.fullmatch(r"override +/(\S+)", below):
            files, value = _options(chosen[1], places), _as_override(option)
            about = _first_comment(files[value]) if value in files else ""
            found[chosen[1]] = Key(chosen[1], value, about)
            continue
        inside = f"{group}/{below.removeprefix('override ').strip()}".rstrip("/")
        if below.startswith("override "):  # in place of an option that came with another
            start = f"{inside.replace('/', '.')}."
            found = {name: key for name, key in found.items() if not name.startswith(start)}
        files = _options(inside, places)
        for name in option if isinstance(option, list) else [option]:
            # A file with the name of one of ours may name itself; a run refuses it
            if name in files and files[name] != file:
                found |= _keys(files[name], inside, places)
    return found | {key.name: key for key in _written(root, prefix, text.splitlines())}


def _package(text: str, group: str) -> str:
    """Return the key below which Hydra puts the keys of a file; empty: they stand at the root."""
    own = group.replace("/", ".")
    header = PACKAGE.search(text)
    if header is None:
        return own
    return header[1].replace("_group_", own).removeprefix("_global_").removeprefix(".")


def _as_override(option: Any) -> str:
    return f"[{','.join(map(str, option))}]" if isinstance(option, list) else f"{option}"


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
