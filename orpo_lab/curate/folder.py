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

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64_hexdigest

from orpo_lab.errors import UserError

if TYPE_CHECKING:
    # Its room imports transformers, which takes seconds
    from orpo_lab.data.pairs import Message

PROMPTS = "prompts.jsonl"
CANDIDATES = "candidates.jsonl"
VOTES = "votes.sqlite"
PAIRS = "pairs.jsonl"
CARD = "card.md"


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
    return [Prompt(**line) for line in _read(folder / PROMPTS, "curate prompts")]


def read_candidates(folder: Path) -> list[Candidate]:
    """Return the candidates of a curation.

    Raises:
        UserError: there are none yet.
    """
    return [Candidate(**line) for line in _read(folder / CANDIDATES, "curate candidates")]


def append(path: Path, items: list[Prompt] | list[Candidate]) -> None:
    """Append items to a file of lines, and wait until the disk has them.

    A last line without an end, which an interrupted step has left, is removed first.
    """
    with path.open("ab+") as file:
        _cut_to_whole_lines(file)
        for item in items:
            file.write(json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_to_whole_lines(file: Any) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def _read(path: Path, step: str) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing; `python -m orpo_lab {step}` makes it")
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)
