"""Read the lists in a JSON file item by item, so that memory holds one item at a time.

Items are read by Python's own reader of JSON, so they are what `json.loads` makes of the whole
text: also halves of surrogate pairs, NaN and whole numbers of any length, which `ijson` changes or
refuses. (Its memory also grows with the square of the depth of what it reads.)
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

# How many characters are read at a time
BLOCK = 2**16
# This near to the end of what is read so far an error, or the end of a number, is not sure yet
MARGIN = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class NotJsonError(ValueError):
    """A text is no JSON."""


def items(file: TextIO) -> Iterator[tuple[str | None, Any]]:
    """Yield the items of the list that a file holds, or of all lists in the object that it holds.

    Yields:
        The key of the list in the object, or None if the file is one list; and an item.

    Raises:
        NotJsonError: the text is no JSON, with the line and the character where that shows.
        RecursionError: an item is nested too deeply.
    """
    text = _Text(file)
    match text.peek():
        case "[":
            yield from ((None, item) for item in _listed(text))
        case "{":
            for _ in _separated(text, "{", "}"):
                if text.peek() != '"':
                    raise text.error("Expecting property name enclosed in double quotes")
                key = text.value()
                text.take(":")
                if text.peek() == "[":
                    yield from ((key, item) for item in _listed(text))
                else:
                    text.value()
        case _:
            text.value()
    if text.peek():
        raise text.error("Extra data")


def _listed(text: "_Text") -> Iterator[Any]:
    for _ in _separated(text, "[", "]"):
        yield text.value()


def _separated(text: "_Text", opening: str, closing: str) -> Iterator[None]:
    """Yield before each entry of a list or an object, whose value the caller then reads."""
    text.take(opening)
    if text.peek() == closing:
        text.take(closing)
        return
    while True:
        yield
        if text.peek() == closing:
            text.take(closing)
            return
        text.take(",")


class _Text:
    """The text of a file, of which only what is being read is held."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._held = ""
        self._at = 0
        self._is_whole = False
        # What is read and no longer held
        self._num_lines = self._num_characters = 0

    def peek(self) -> str:
        """Return the next character that is no white space; empty: the text ends."""
        while True:
            found = _SPACE.match(self._held, self._at)
            assert found  # white space may be empty
            self._at = found.end()
            if self._at < len(self._held) or self._is_whole:
                return self._held[self._at : self._at + 1]
            self._read_on(BLOCK)

    def take(self, expected: str) -> None:
        """Go behind the next character, which must be the expected one."""
        if self.peek() != expected:
            raise self.error(f"Expecting '{expected}' delimiter")
        self._at += 1

    def value(self) -> Any:
        """Return the next value, and go behind it."""
        self.peek()
        size = BLOCK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                if self._is_whole or self._is_sure(error):
                    raise self.error(error.msg, error.pos) from None
            else:
                # A number may go on in the next block, and an exponent may follow
                if end < len(self._held) - MARGIN or self._is_whole:
                    self._at = end
                    return value
            self._read_on(size)
            size *= 2

    def _is_sure(self, error: json.JSONDecodeError) -> bool:
        """Return whether an error stays, whatever follows what is read so far."""
        is_open = error.msg.startswith("Unterminated string")
        return not is_open and error.pos < len(self._held) - MARGIN

    def _read_on(self, size: int) -> None:
        read = self._file.read(size)
        self._is_whole = not read
        self._num_lines += self._held.count("\n", 0, self._at)
        self._num_characters += self._at
        self._held, self._at = self._held[self._at :] + read, 0

    def error(self, said: str, at: int | None = None) -> NotJsonError:
        """Return an error at a place of what is held; None: at the next character."""
        at = self._at if at is None else at
        line = self._num_lines + self._held.count("\n", 0, at) + 1
        return NotJsonError(f"{said}: line {line}, character {self._num_characters + at}")
