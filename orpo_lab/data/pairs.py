"""A preference pair: prompt, chosen and rejected, as text or as messages; and its faults.

The prompt is what both sides share. A row can state its prompt (`prompt`), or hold two whole
conversations or texts that begin alike. If a stated prompt differs from what two whole
conversations share, the shared messages are used and the contradiction is counted.

`forms` reads rows. What is wrong with a row is a `Fault`. If the row gives no pair, `split` and
`forms` raise the fault. If the row gives a pair, `find_faults` yields its faults.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orpo_lab.data.faults import Fault, quote
from orpo_lab.data.recognise import SYSTEM
from orpo_lab.data.turns import ROLES, to_message, written_out

# Has a `role`, mostly a `content`, and other keys that a chat template may read (tool_calls, ...)
Message = dict[str, Any]
Content = str | list[Message]

# The largest size of a row: longer than any context, and takes about a second to tokenize
MAX_CHARACTERS = 2**20
# The deepest nesting of a row's values; schemas of tools nest about ten levels
MAX_DEPTH = 50
# Columns that chat templates read in addition to the messages; the names are those of transformers
CONTEXT = ("tools", "documents")

_SURROGATE = re.compile("[\ud800-\udfff]")
# Two characters of one word; scripts without spaces (from U+2E80 on) do not say where a word ends
_INSIDE_A_WORD = re.compile("[^\\W\u2e80-\U0010ffff]{2}")
# NeMo's data sets (HelpSteer2) write several turns as one text, with this control token before each
_TURN_IN_TEXT = re.compile("<extra_id_1>")


@dataclass(frozen=True)
class Pair:
    """A preference pair: three strings, or three lists of messages.

    A single completion with a label stands on both sides until it is tokenized.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    # Of a single completion: whether it is desirable
    label: bool | None = None
    # What the chat template reads in addition to the messages, by the names in CONTEXT
    context: dict[str, Any] = field(default_factory=dict)
    # Whether the row's own prompt differs from what both sides share
    contradicted: bool = False
    # Whether both sides repeated the row's own prompt, which would have been trained twice
    repeated: bool = False
    # Whether the messages were strings in the row; see `data.messages`
    wrapped: bool = False
    # A column of the row that no pair is made of, and whose meaning is well known; empty: none
    ignored: str = ""


def check_size(contents: list[Any]) -> None:
    """Refuse values of a row that are too large or nested too deeply.

    Raises:
        Fault: they are.
    """
    size = sum(map(len, _texts(contents)))
    if size > MAX_CHARACTERS:
        raise Fault("oversized_row", f"holds {size} characters, more than {MAX_CHARACTERS}")


def to_content(value: Any, name: str) -> Content:
    """Return a row's value as a string or as messages; a single message is a list of one.

    A table of strings, such as a `.csv`, holds messages as JSON; see `turns.written_out`.

    Args:
        value: the value of the row in one column.
        name: the column's name, for the message of a fault.

    Raises:
        Fault: the value is neither a string nor a list of messages, or `turns.written_out` raises.
    """
    if isinstance(value, str):
        value = written_out(value, name) or value
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return [to_message(value, name)]
    if not isinstance(value, list):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise Fault("wrong_type", f"{name} is {kind}; it must be a string or a list of messages")
    return [to_message(item, name) for item in value]


def split(prompt: Content | None, chosen: Content, rejected: Content) -> Pair:
    """Split a row into prompt and two completions.

    Raises:
        Fault: one side is a string and the other a list of messages; or the row states no prompt,
            and the two sides are the same text, or are texts that do not begin alike.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            return Pair(prompt, answer(chosen), answer(rejected))
        return _split_text(prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_messages(prompt, chosen, rejected)
    raise Fault("wrong_type", "chosen and rejected must both be strings or both lists of messages")


def answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _split_text(prompt: str | None, chosen: str, rejected: str) -> Pair:
    if prompt is None:
        if chosen == rejected:
            raise Fault("chosen_equals_rejected", "chosen and rejected are the same text")
        size = num_shared(chosen, rejected)
        if not size and chosen and rejected:
            raise Fault("differing_prompts", "chosen and rejected do not begin alike")
        if 0 < size < min(len(chosen), len(rejected)) and chosen[size - 1] == " ":
            size -= 1  # TRL's rule: a space before the first difference belongs to the answers
        return Pair(chosen[:size], chosen[size:], rejected[size:])
    if prompt and _is_repeated(prompt, chosen) and _is_repeated(prompt, rejected):
        return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :], repeated=True)
    return Pair(prompt, chosen, rejected)


def _is_repeated(prompt: str, side: str) -> bool:
    """Return whether a side begins with the whole prompt, and the prompt does not end in a word."""
    return side.startswith(prompt) and not _INSIDE_A_WORD.match(side, len(prompt) - 1)


def _split_messages(prompt: Content | None, chosen: list[Message], rejected: list[Message]) -> Pair:
    if isinstance(prompt, list):
        for start in range(len(prompt)):
            ending, size = prompt[start:], len(prompt) - start
            if chosen[:size] == ending and rejected[:size] == ending:
                return Pair(prompt, chosen[size:], rejected[size:], repeated=True)
        if not _begin_alike_with_a_question(chosen, rejected):
            return Pair(prompt, chosen, rejected)
        return replace(_split_messages(None, chosen, rejected), contradicted=True)
    # Identical conversations share all messages; their last turn is still the completion
    size = max(0, min(num_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    shared = chosen[:size]
    said = [message.get("content", "").strip() for message in shared if message["role"] == "user"]
    contradicted = prompt is not None and prompt.strip() not in said
    # Answers may begin with the same turns, such as a call and its result
    are_answers = contradicted and not _begin_alike_with_a_question(chosen, rejected)
    if not shared or (prompt and are_answers):
        asked = [{"role": "user", "content": prompt}] if prompt else []
        return Pair(asked, chosen, rejected)
    return Pair(shared, chosen[size:], rejected[size:], contradicted=contradicted)


def _begin_alike_with_a_question(chosen: list[Message], rejected: list[Message]) -> bool:
    """Return whether both sides are whole conversations, not answers."""
    return chosen[:1] == rejected[:1] and bool(chosen) and chosen[0]["role"] != "assistant"


def find_faults(
    pair: Pair, special_tokens: re.Pattern[str], *, other_turns: bool = True
) -> Iterator[Fault]:
    """Yield the faults of a pair that show before tokenizing, the worst fault first.

    The caller drops a row at the first fault that cannot be kept. So a check may rely on the checks
    above it.

    Args:
        pair: a pair that a `Reader` or `Trees.pairs` returned.
        special_tokens: matches the text of a token that controls the model.
        other_turns: whether turns of others than the assistant's are learnt in an answer.
    """
    contents = (pair.prompt, pair.chosen, pair.rejected)
    parts = list(_texts([*contents, pair.context]))
    if any(not text.isascii() and _SURROGATE.search(text) for text in parts):
        yield Fault("lone_surrogate", "holds half of a surrogate pair, which is no character")
    if not (_is_visible(pair.chosen) and _is_visible(pair.rejected)):
        yield Fault("empty_completion", "an answer is empty")
    if pair.chosen == pair.rejected and pair.label is None:
        yield Fault("chosen_equals_rejected", "chosen and rejected are the same")
    if unknown := next((role for role in map(_unknown_role, contents) if role is not None), None):
        yield Fault("unknown_role", f"has role {quote(unknown)}; known are {', '.join(ROLES)}")
    if not all(_is_by_assistant(side, 0) for side in (pair.chosen, pair.rejected)):
        yield Fault("differing_prompts", "chosen and rejected answer different prompts")
    if not all(_is_by_assistant(side, -1) for side in (pair.chosen, pair.rejected)):
        yield Fault("no_answer", "chosen or rejected does not end in an assistant's message")
    if _is_prefilled(pair):
        yield Fault(
            "prefilled_answer",
            "the prompt ends in an assistant's turn, which a chat template closes before the "
            "answer; put that turn at the beginning of both answers",
        )
    if not _is_visible(pair.prompt):
        yield Fault("empty_prompt", "the prompt is empty")
    if any("\0" in text for text in parts):
        yield Fault("nul_character", "holds a NUL character")
    patterns = (special_tokens, _TURN_IN_TEXT)
    found = (pattern.search(part) for pattern in patterns for part in parts)
    if control := next(filter(None, found), None):
        yield Fault("special_token_text", f"holds the control token {quote(control[0])} as text")
    turn = _other_turn(pair.chosen) or _other_turn(pair.rejected)
    if turn and other_turns:
        yield Fault("other_turn_in_answer", f"an answer holds a turn of the {turn}'s, as a target")
    if pair.ignored:
        yield Fault("ignored_column", _how_to_read(pair.ignored))
    if pair.contradicted:
        yield Fault("contradicting_prompt", "the prompt column is not what the conversations share")


def _how_to_read(column: str) -> str:
    """Return what an ignored column says, and how a run reads it."""
    if column in SYSTEM:
        said, read = "holds a system message", f"dataset.columns.system={column} reads it"
    else:
        said = "says which answer is better"
        read = "dataset=arena and dataset=helpsteer read such columns (docs/data.md)"
    return (
        f"column '{column}' {said}, and is not read: {read}, "
        "dataset.faults.ignored_column=keep trains without it"
    )


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield every text inside a prompt or completion, also roles and keys: templates print them.

    Raises:
        Fault: the value is nested more than MAX_DEPTH levels deep.
    """
    if depth > MAX_DEPTH:
        raise Fault("wrong_type", f"is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, depth + 1)


def text_of(content: Content) -> str:
    """Return the text of a prompt or completion; keys but role and content are added as JSON."""
    if isinstance(content, str):
        return content
    return "\n".join(text for message in content for text in _said(message))


def in_words(prompt: Content) -> str:
    """Return a conversation without a chat template: every message after the role of its author."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {text_of([message])}" for message in prompt)


def _said(message: Message) -> list[str]:
    others = {key: item for key, item in message.items() if key not in ("role", "content")}
    said = [message["content"]] if "content" in message else []
    return [*said, json.dumps(others, sort_keys=True)] if others else said


def _is_visible(content: Content) -> bool:
    return any(part.isprintable() and not part.isspace() for part in text_of(content))


def _is_by_assistant(completion: Content, turn: int) -> bool:
    return isinstance(completion, str) or completion[turn]["role"] == "assistant"


def _is_prefilled(pair: Pair) -> bool:
    return isinstance(pair.prompt, list) and bool(pair.prompt) and _is_by_assistant(pair.prompt, -1)


def _other_turn(completion: Content) -> str | None:
    """Return the role of a turn in a completion that is not the assistant's; None: no such turn."""
    if isinstance(completion, str):
        return None
    return next((message["role"] for message in completion if message["role"] != "assistant"), None)


def _unknown_role(content: Content) -> str | None:
    if isinstance(content, str):
        return None
    return next((message["role"] for message in content if message["role"] not in ROLES), None)


def num_shared(left: Any, right: Any) -> int:
    """Return how many leading items (characters, messages, tokens) two sequences share."""
    size = 0
    for left_item, right_item in zip(left, right, strict=False):
        if left_item != right_item:
            break
        size += 1
    return size
