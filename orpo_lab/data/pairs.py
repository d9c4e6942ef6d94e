"""One row of a preference dataset -> prompt, chosen and rejected, as text or as messages.

The prompt is what both sides share. A row can state it (`prompt`), or hold two whole conversations
or texts that begin alike. Where a row says two things about its prompt, what both sides share wins
and the contradiction is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orpo_lab.errors import UserError

Message = dict[str, str]
Content = str | list[Message]


@dataclass(frozen=True)
class Pair:
    """A preference pair; all three are strings, or all three are lists of messages."""

    prompt: Content
    chosen: Content
    rejected: Content
    # The row's own prompt says something else than what both sides share
    contradicted: bool = False
    # Both sides repeat the row's own prompt; it would have been trained twice
    repeated: bool = False


def to_content(value: Any, what: str) -> Content:
    """Return a row's value as a string or as messages with just `role` and `content`.

    Raises:
        UserError: it is neither; `what` names the row and the column in the message.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        name = "null" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"{what} is {name}; it must be a string or a list of messages")
    for message in value:
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise UserError(f"{what} holds a message without a role and a content, both strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def split(prompt: Content | None, chosen: Content, rejected: Content, where: str) -> Pair:
    """Tell a row's prompt from its two completions.

    Raises:
        UserError: one side is a string and the other a list of messages; `where` names the row.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            return Pair(prompt, _answer(chosen), _answer(rejected))
        return _split_text(prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_messages(prompt, chosen, rejected)
    raise UserError(f"{where}: chosen and rejected must both be strings or both lists of messages")


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _split_text(prompt: str | None, chosen: str, rejected: str) -> Pair:
    if prompt is None:
        size = num_shared(chosen, rejected)
        if 0 < size < min(len(chosen), len(rejected)) and chosen[size - 1] == " ":
            size -= 1  # TRL's rule: a space before the first difference belongs to the answers
        return Pair(chosen[:size], chosen[size:], rejected[size:])
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :], repeated=True)
    return Pair(prompt, chosen, rejected)


def _split_messages(prompt: Content | None, chosen: list[Message], rejected: list[Message]) -> Pair:
    if isinstance(prompt, list):
        size = len(prompt)
        if size and chosen[:size] == prompt and rejected[:size] == prompt:
            return Pair(prompt, chosen[size:], rejected[size:], repeated=True)
        if not _begin_alike_with_a_question(chosen, rejected):
            return Pair(prompt, chosen, rejected)
        return replace(_split_messages(None, chosen, rejected), contradicted=True)
    # Identical conversations share everything; their last turn still is the completion
    size = min(num_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if size <= 0:
        asked = [{"role": "user", "content": prompt}] if prompt else []
        return Pair(asked, chosen, rejected)
    shared = chosen[:size]
    said = [message["content"].strip() for message in shared if message["role"] == "user"]
    contradicted = prompt is not None and prompt.strip() not in said
    return Pair(shared, chosen[size:], rejected[size:], contradicted=contradicted)


def _begin_alike_with_a_question(chosen: list[Message], rejected: list[Message]) -> bool:
    """Whether both sides are whole conversations rather than answers."""
    return chosen[:1] == rejected[:1] and bool(chosen) and chosen[0]["role"] != "assistant"


def num_shared(left: Any, right: Any) -> int:
    """Return how many leading items (characters, messages, tokens) two sequences share."""
    size = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        size += 1
    return size
