"""The folder of a curation: prompts, candidates and votes; nothing else holds its state.

    prompts.jsonl       one prompt a line
    candidates.jsonl    one answer a line, with the settings that it was made with
    votes.sqlite        comparisons, who is asked, and votes (orpo_lab/curate/store.py)
    votes.key           the secret behind the annotators' links (orpo_lab/curate/links.py)
    pairs.jsonl         what is kept of the votes, for dataset=file
    card.md             the data card: counts, agreement, licences

Lines are appended and sent to the disk one by one, so a step that was interrupted goes on with the
line after the last whole one.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from xxhash import xxh3_64_hexdigest

from orpo_lab import program
from orpo_lab.errors import UserError, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    # Its room imports transformers, which takes seconds
    from orpo_lab.data.pairs import Message

PROMPTS = "prompts.jsonl"
CANDIDATES = "candidates.jsonl"
VOTES = "votes.sqlite"
PAIRS = "pairs.jsonl"
CARD = "card.md"
# How many bytes of a file's end are read at a time, to find the end of the last whole line
_BLOCK = 2**16
# What the values of a line must be
_TYPES = {"id": str, "prompt_id": str, "text": str, "messages": list, "made_by": dict}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and where it comes from."""

    id: str
    messages: "list[Message]"
    source: str
    row: int
    licence: str | None = None


@dataclass(frozen=True)
class Candidate:
    """An answer to a prompt, and the settings that made the answer.

    `made_by` holds everything that is needed to make the answer again (model, revision,
    temperature, top_p, seed, ...), and no secret.
    """

    id: str
    prompt_id: str
    number: int
    text: str
    finish_reason: str
    num_tokens: int | None
    created: str
    made_by: dict[str, Any] = field(default_factory=dict)


def prompt_id(messages: "list[Message]") -> str:
    """Return the id of a prompt: the same for the same messages."""
    return xxh3_64_hexdigest(json.dumps(messages, sort_keys=True).encode())


def candidate_id(prompt_id: str, number: int, made_by: dict[str, Any]) -> str:
    """Return the id of a candidate: the same for the same prompt, settings and number."""
    return xxh3_64_hexdigest(json.dumps([prompt_id, number, made_by], sort_keys=True).encode())


def read_prompts(folder: Path) -> list[Prompt]:
    """Return the prompts of a curation.

    Raises:
        UserError: there are none yet.
    """
    return _read(folder / PROMPTS, Prompt, "curate prompts")


def read_candidates(folder: Path) -> list[Candidate]:
    """Return the candidates of a curation.

    Raises:
        UserError: there are none yet.
    """
    return _read(folder / CANDIDATES, Candidate, "curate candidates")


def append(path: Path, items: "Sequence[DataclassInstance]") -> None:
    """Append items to a file of lines, and wait until the disk has them.

    A last line without an end, which an interrupted step has left, is removed first.
    """
    with path.open("ab+") as file:
        _cut_to_whole_lines(file)
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def storable(text: str) -> str:
    """Return a text with a question mark for each half of a surrogate pair.

    JSON may hold such a half, which is no character: no file and no database takes it.
    """
    return text.encode(errors="replace").decode()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside this context, no other step appends to the files of the folder, which is made.

    Raises:
        UserError: another process works on the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process works on {folder}; wait for its end") from error
    try:
        yield
    finally:
        lock.release()


def _cut_to_whole_lines(file: BinaryIO) -> None:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)


def read_lines(path: Path, kind: type[Item]) -> list[Item]:
    """Return the whole lines of a file as items; a last line without an end is passed over.

    Raises:
        UserError: a line is damaged.
    """
    items = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            items.append(kind(**_checked(json.loads(line))))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}, cannot be read: {one_line(error)}") from error
    return items


def _read(path: Path, kind: type[Item], step: str) -> list[Item]:
    if not path.is_file():
        raise UserError(f"{path} is missing; `{program.command(step)}` makes it")
    return read_lines(path, kind)


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line, if its values are what they must be.

    Raises:
        TypeError: a value is something else.
    """
    for name, kind in _TYPES.items():
        if name in line and not isinstance(line[name], kind):
            raise TypeError(f"{name} is {type(line[name]).__name__}, and must be {kind.__name__}")
    return line
