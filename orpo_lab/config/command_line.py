"""The command line: keep text as the user typed it, and let errors name the key to change.

Hydra reads every value by its own grammar. In this grammar `1.10` is a number, `~` and `ü` are not
allowed in a path, and `=` or a comma ends a path. `as_typed` puts quotes around a value if the type
of its key says that the value is text. Values in Hydra's own syntax keep their meaning.
"""

import difflib
import functools
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orpo_lab import config
from orpo_lab.config.checks import closest, meant
from orpo_lab.config.dataset import Files
from orpo_lab.config.mixture import SOURCES
from orpo_lab.config.other_names import ALSO_CALLED
from orpo_lab.config.tracker import BELOW
from orpo_lab.errors import UserError, one_line

TEXT: tuple[Any, ...] = (str, str | None)
TEXTS: tuple[Any, ...] = (list[str], list[str] | None)
# Keys that name a folder, but are not our keys, or are not locations that a run reads
FOLDERS = ("resume", "hydra.run.dir", "hydra.sweep.dir")
NONE_IS_AN_OPTION = ("evaluation", "quantization", "tracker")
# Exceptions of Hydra and its libraries if a configuration cannot be composed; see `explain`
NOT_COMPOSED = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
# A quoted text, or a text between characters that Hydra's grammar reserves
TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,\[\]()'"]+""")


@functools.cache
def text_keys() -> dict[str, bool]:
    """Return the keys whose values are text; True: the value is a list of texts."""
    types = {
        key: field.type
        for key, field in config.all_fields().items()
        if not field.metadata["policy"].is_switch
    }
    found = {key: of in TEXTS for key, of in types.items() if of in (*TEXT, *TEXTS, Files)}
    return found | dict.fromkeys(FOLDERS, False)


def _is_path(key: str) -> bool:
    field = config.all_fields().get(config.known_key(key))
    return key in FOLDERS or (field is not None and bool(field.metadata["policy"].files))


def as_typed(arguments: Sequence[str]) -> list[str]:
    """Return a command line with quotes, so that Hydra reads texts as the user typed them.

    If only one of `train.max_steps` and `train.num_epochs` is given, the other is set to null. A
    key of a dictionary (`dataset.template_kwargs`) gets the `++` without which Hydra refuses it.

    Raises:
        UserError: see `_check`.
    """
    _check(arguments)
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    typed = [
        *_sources(arguments),
        *(_opened(_as_typed(given, is_sweep=is_sweep)) for given in arguments),
    ]
    given = {
        argument.lstrip("+").partition("=")[0]: argument.partition("=")[2] for argument in typed
    }
    for key, other in (
        ("train.num_epochs", "train.max_steps"),
        ("train.max_steps", "train.num_epochs"),
    ):
        if given.get(key, "null") != "null" and other not in given:
            typed.append(f"{other}=null")
    return typed


def _sources(arguments: Sequence[str]) -> list[str]:
    """Return what makes the sources of a mixture known to Hydra, which knows no name of the user's.

    A second mention of a source changes nothing.
    """
    keys = [argument.partition("=")[0] for argument in arguments]
    names = [key.split(".")[2] for key in keys if config.known_key(key) != key]
    made = ",".join(f"{name}:{{}}" for name in dict.fromkeys(names))
    return [f"++{SOURCES}={{{made}}}"] if made else []


def _check(arguments: Sequence[str]) -> None:
    """Refuse arguments that Hydra would misread, or refuse in a message that is hard to understand.

    Raises:
        UserError: an argument sets a group to null, uses the old group `objective`, deletes a key,
            lists trackers that do not go together, or holds bytes that are not text.
    """
    for group in (*config.SCHEMAS, "experiment"):
        if f"{group}=null" in arguments:
            instead = f"write {group}=none" if group in NONE_IS_AN_OPTION else "leave it out"
            raise UserError(f"{group}=null names no option of the group; {instead}")
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] == "objective":
            raise UserError(
                f"{argument}: the group objective is called method now; objective=trl is "
                "method=orpo, objective=paper is method=orpo_paper, and objective.penalty is "
                "method.penalty"
            )
        key = argument.removeprefix("~").partition("=")[0]
        if argument.startswith("~") and key in config.all_fields():
            raise UserError(f"{argument}: no key can be taken away; give it a value, {key}=...")
        _check_list(argument)
        # The library that saves tokenizers refuses such names, but only after training
        if re.search("[\ud800-\udfff]", argument):
            raise UserError(
                f"{argument} holds bytes that are no text in {sys.getfilesystemencoding()}; give "
                "another name, or set LC_ALL=C.UTF-8"
            )


def _check_list(argument: str) -> None:
    """Refuse a list of trackers that Hydra would not compose, or would not name in its refusal."""
    lists = re.match(r"tracker=.*?\[([^\]]*)", argument)
    names = [name.strip(" '\"") for name in lists[1].split(",")] if lists else []
    if "null" in names or any(name.startswith("[") for name in names):
        raise UserError(f"{argument}: give the names of trackers, as in tracker=[wandb,mlflow]")
    if "none" in names and len(names) > 1:
        raise UserError(f"{argument}: none is no tracker beside others; leave it out")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{argument}: {name} is given twice")


def check_below_trackers(overrides: Sequence[str]) -> None:
    """Refuse a key of a tracker that is not chosen; for OmegaConf it is a key below null.

    Args:
        overrides: those of a configuration that cannot be composed for such a key.

    Raises:
        UserError: the first key of a tracker in a list has no tracker.
    """
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if below := re.match(rf"tracker\.({'|'.join(BELOW)})\.", key):
            raise UserError(f"{key} is a key of tracker={below[1]}; choose this tracker too")


def _as_typed(argument: str, *, is_sweep: bool) -> str:
    form = re.fullmatch(rf"({re.escape(SOURCES)}\.\w+\.columns)=(\w+)", argument)
    if form is not None:
        return f"+dataset/columns@{form[1]}={form[2]}"
    given = re.fullmatch(r"(\+{0,2}([\w.]+))=(.*)", argument, flags=re.DOTALL)
    if given is None or config.known_key(given[2]) not in text_keys() or "${" in given[3]:
        return argument
    start, key, value = given.groups()
    if _is_path(key) and value.startswith("~"):
        value = os.path.expanduser(value)
    if _is_list_of_paths(key, value):
        paths = [os.path.expanduser(path.strip()) for path in value[1:-1].split(",")]
        value = f"[{','.join(map(quoted, paths))}]"
    parsed = _parse(f"{key}={value}")
    if text_keys()[config.known_key(key)]:
        return f"{start}={_numbers_quoted(value)}" if parsed else argument
    if _is_one_path(key, value, parsed, is_sweep=is_sweep) or (parsed is None and not is_sweep):
        return f"{start}={quoted(value)}"
    if parsed is None:
        parts = [part if _parse(f"{key}={part}") else quoted(part) for part in value.split(",")]
        return f"{start}={','.join(map(_numbers_quoted, parts))}"
    return f"{start}={_numbers_quoted(value)}"


def _opened(argument: str) -> str:
    """Return an override with `++` if its key is a dictionary, or inside one."""
    key = argument.lstrip("+").partition("=")[0]
    fields = config.all_fields()
    field = fields.get(key) or fields.get(key.rpartition(".")[0])
    is_open = field is not None and field.type == dict[str, Any] and not argument.startswith("~")
    return f"++{argument.lstrip('+')}" if is_open else argument


def _is_list_of_paths(key: str, value: str) -> bool:
    """Return whether a value is a list of paths without quotes, not a path that holds brackets."""
    field = config.all_fields().get(config.known_key(key))
    is_list = re.fullmatch(r"\[[^\[\]'\"]+\]", value) and not os.path.exists(value)
    return bool(is_list) and field is not None and field.type == Files


def _parse(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _is_one_path(key: str, value: str, parsed: Override | None, *, is_sweep: bool) -> bool:
    """Return whether a value is a single path that holds a comma, not a list to sweep over."""
    if not _is_path(key):
        return False
    if parsed is None:
        return not is_sweep or os.path.exists(value)
    choices = parsed.value() if parsed.is_sweep_override() else None
    is_list = isinstance(choices, ChoiceSweep) and choices.simple_form
    return is_list and not re.search("[\"']", value) and (not is_sweep or os.path.exists(value))


def _numbers_quoted(value: str) -> str:
    """Return a value of Hydra's grammar, with quotes around its numbers and booleans."""

    def with_quotes(token: re.Match[str]) -> str:
        text = token[0].strip()
        parsed = _parse(f"key={text}") if text else None
        is_other = parsed is not None and isinstance(parsed.value(), bool | int | float)
        return token[0].replace(text, quoted(text)) if is_other else token[0]

    if re.match(r"(range|interval|glob|tag)\(", value):
        return value
    return TOKEN.sub(with_quotes, value)


def quoted(text: str) -> str:
    """Return a text in Hydra's quotes, in which a backslash has a meaning only before a quote."""
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inner) + "'"


def explain(error: Exception) -> str:
    """Return an error of Hydra or OmegaConf as one line that names the key."""
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    text = re.sub(r"\s*(full_key|object_type|reference_type)[:=].*", "", text)
    text = re.sub(r"\s*To append to your config use \S+", "", text)
    text = re.sub(r"\s*Config search path:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"^In '.*?': ", "", text)
    return one_line(text) + did_you_mean(text)


def did_you_mean(text: str) -> str:
    """Return a sentence that helps with an unknown key or option; empty: there is no such help.

    Args:
        text: the error of Hydra that names the unknown key or option.
    """
    unknown = re.search(r"Could not (?:override|find|load|append to config group) '(.+?)'", text)
    if unknown is None:
        return ""
    options = re.findall(r"^\t(.+)$", text, flags=re.MULTILINE)  # the options that Hydra lists
    if "Could not load" in text:  # an option in a list, of which Hydra lists none
        options = [*config.SCHEMAS.get(unknown[1].partition("/")[0], ())]
    typed = unknown[1].rsplit("/", 1)[-1] if options else unknown[1]
    of_source = typed.replace("dataset.", f"{SOURCES}.NAME.", 1)
    if "MixtureDataset" in text and config.known_key(of_source) in config.all_fields():
        return f". Of a mixture each source has its own, {of_source}"
    if typed in config.all_fields():
        owners = [
            f"{group}={option}"
            for group, options_of in config.SCHEMAS.items()
            for option, schema in options_of.items()
            if typed in config.fields_of(schema, group)
        ]
        return f". {typed} is a key of {' or '.join(owners)}"
    if options:
        return meant(closest(typed, options))
    return suggestion(typed)


def suggestion(typed: str) -> str:
    """Return a sentence with the key that the user probably meant; empty: there is none.

    Tried in this order: another trainer's name, the last part of a key, a similar spelling.
    """
    ours = ALSO_CALLED.get(typed.rsplit(".", 1)[-1])
    if ours is not None:
        return meant(ours.name) + (f" ({ours.note})" if ours.note else "")
    return meant(_closest_key(typed))


def _closest_key(typed: str) -> str | None:
    last = typed.rsplit(".", 1)[-1]
    keys = {key: key.rsplit(".", 1)[-1] for key in config.all_fields()}
    for key, name in keys.items():
        if name == last:
            return key
    if whole := difflib.get_close_matches(typed, keys, n=1):
        return whole[0]
    names = difflib.get_close_matches(last, [*ALSO_CALLED, *keys.values()], n=1)
    by_name = {name: key for key, name in reversed(keys.items())}
    by_name |= {name: ours.name for name, ours in ALSO_CALLED.items()}
    return by_name[names[0]] if names else None


class _Output(io.TextIOWrapper):
    """A stream whose reader may end early, as `head` does; the rest of the output is dropped."""

    def write(self, text: str) -> int:
        """Write a text; characters that the stream cannot encode are written as escapes."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the stream; drop the output if the reader has ended."""
        try:
            super().flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def open_streams() -> None:
    """Let the output and error streams take any text, and replace streams that are closed."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed; the next file to be opened would get its file descriptor
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (stays open to the end)
        elif type(stream) is io.TextIOWrapper and name != "stdin":
            settings: dict[str, Any] = {
                "encoding": stream.encoding,
                "line_buffering": stream.line_buffering,
                "write_through": stream.write_through,
            }
            setattr(sys, name, _Output(stream.detach(), errors="backslashreplace", **settings))
