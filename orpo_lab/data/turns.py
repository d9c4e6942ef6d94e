"""One turn of a conversation, in any of the spellings in which people publish turns.

A turn becomes a message with `role`, `content` (a string) and the keys that a chat template reads.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from orpo_lab.data.faults import Fault, quote

# ShareGPT's names of those who speak, and those of chat templates
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}
# ShareGPT's speaker of a turn that holds the calls of tools, as JSON
CALLER = "function_call"
# The names of chat templates for those who speak
ROLES = ("system", "developer", "user", "assistant", "tool")
# Those who speak in published turns, in small letters or in others
_KNOWN = {*SPEAKERS, *ROLES, CALLER}
# How turns look that are written into a text: as JSON, or as Python prints them
_BEGINNING = r"\s*\[?\s*\{\s*"
_AS_JSON = re.compile(_BEGINNING + '"(?:role|content|from|value)"')
_AS_PYTHON = re.compile(
    _BEGINNING + r"(?=.*'(?:role|from)':)'(?:role|content|from|value)':.*\}\s*\]?\s*", re.DOTALL
)
# How keys and columns begin that hold what is no text
MEDIA = ("image", "audio", "video")


def to_message(value: Any, name: str) -> dict[str, Any]:
    """Return a turn as a message without the keys that hold null or an empty list.

    Tables fill in such keys (`tool_calls: null`) where other messages have a value.

    Args:
        value: a turn with `role` and `content`, or with ShareGPT's `from` and `value`. The content
            may be a list of text parts.
        name: the column's name, for the message of a fault.

    Raises:
        Fault: the turn has no role, a content that is not text, or nothing but a role.
    """
    if not isinstance(value, Mapping):
        raise Fault("wrong_type", f"{name} holds a message without a role that is a string")
    message: dict[str, Any] = {
        key: item for key, item in value.items() if item is not None and item != []
    }
    if "role" not in message:
        named = {"from": "role", "value": "content"}
        message = {named.get(key, key): item for key, item in message.items()}
    role = message.get("role")
    if not isinstance(role, str):
        raise Fault("wrong_type", f"{name} holds a message without a role that is a string")
    speaker = role.lower()
    if speaker in _KNOWN:
        role = speaker
    message["role"] = SPEAKERS.get(role, role)
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], name)
    if "content" in message and not isinstance(message["content"], str):
        raise Fault("wrong_type", f"{name} holds a message without a content that is a string")
    if message.keys() <= {"role"}:
        raise Fault("wrong_type", f"{name} holds a message without a content that is a string")
    return _calling(message, name) if role == CALLER else message


def written_out(text: str, name: str) -> Any:
    """Return the turns that a text holds as JSON, or None where the text is a text.

    Args:
        text: a cell of a table.
        name: the column's name, for the message of a fault.

    Raises:
        Fault: the text is turns as Python prints them, with single quotes: pandas writes a list
            into a `.csv` in this way.
    """
    if _AS_PYTHON.fullmatch(text):
        detail = f"{name} holds messages as Python prints them; write the column as JSON"
        raise Fault("wrong_type", f"{detail}, or the file as .jsonl or .parquet")
    if not _AS_JSON.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    turns = value if isinstance(value, list) else [value]
    return value if all(map(_is_turn, turns)) else None


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    keys = ("role", "content") if "role" in value else ("from", "value")
    return all(isinstance(value.get(key), str) for key in keys) and value[keys[0]] in _KNOWN


def _joined(parts: list[Any], name: str) -> str:
    """Return a list of text parts as one text; chat templates put nothing between parts either.

    Raises:
        Fault: a part is not text, such as an image.
    """
    for part in parts:
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        kind = _kind(part) if isinstance(part, Mapping) else type(part).__name__
        if not is_text or kind != "text":
            raise Fault("wrong_type", f"{name} holds a part of type {quote(kind)}, not text")
    return "".join(part["text"] for part in parts)


def _kind(part: Mapping[str, Any]) -> str:
    """Return the type of a part; a picture, sound or film beside a text makes it no text."""
    media = (key for key, item in part.items() if key.startswith(MEDIA) and item)
    return str(next(media, part.get("type", "text")))


def _calling(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Return ShareGPT's turn of calls as an assistant's message with `tool_calls`.

    Raises:
        Fault: the content is neither a call nor a list of calls, as JSON.
    """
    try:
        given = json.loads(message.get("content", ""))
    except (ValueError, RecursionError):
        given = None
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Fault("wrong_type", f"{name} holds a {CALLER} that is no call with a name, as JSON")
    rest = {key: item for key, item in message.items() if key != "content"}
    made = [{"type": "function", "function": call} for call in calls]
    return {**rest, "role": "assistant", "tool_calls": made}
