"""Rows as the model will see them: the token ids of training, decoded."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

# How many tokens are named on each side of a boundary
NUM_AT_BOUNDARY = 3
# Characters without a picture that are a part of writing: the joiners of many scripts and emoji
JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other, as one text."""

    text: str
    is_special: bool
    """Whether the tokens control the model, such as the token that ends a turn."""
    is_supervised: bool
    """Whether the loss covers the tokens."""


@dataclass(frozen=True)
class Part:
    """The prompt, the chosen or the rejected answer of a row."""

    name: str
    num_tokens: int
    pieces: list[Piece]
    first: list[str]
    """The first tokens of an answer, each with its id; empty for a prompt."""
    last: list[str]
    """The last tokens, each with its id."""


@dataclass(frozen=True)
class Reader:
    """Reads rows of token ids.

    Args:
        tokenizer: the model's tokenizer.
        scores_prompt: whether the loss covers the prompt, but for its first token.
        reads_rejected: whether the loss covers the rejected answer.
    """

    tokenizer: PreTrainedTokenizerBase
    scores_prompt: bool
    reads_rejected: bool

    def read(self, row: dict[str, Any]) -> list[Part]:
        """Return the prompt and the answers of a tokenized row; a single completion has one answer.

        Args:
            row: has `prompt_ids`, `chosen_ids` and `rejected_ids`. If the loss covers only a part
                of an answer, `chosen_mask` and `rejected_mask` say which tokens.
        """
        prompt = row["prompt_ids"]
        # Nothing predicts the first token of a row
        in_loss = [False, *[self.scores_prompt] * (len(prompt) - 1)]
        parts = [self._part("prompt", [], prompt, in_loss)]
        for name, is_read in (("chosen", True), ("rejected", self.reads_rejected)):
            ids = row[f"{name}_ids"]
            mask = row.get(f"{name}_mask") or [True] * len(ids)
            if ids:
                parts.append(self._part(name, prompt, ids, [is_read and kept for kept in mask]))
        return parts

    def _part(self, name: str, before: list[int], ids: list[int], in_loss: list[bool]) -> Part:
        first = [] if name == "prompt" else self._named(ids[:NUM_AT_BOUNDARY])
        pieces = list(self._pieces(before, ids, in_loss))
        return Part(name, len(ids), pieces, first, self._named(ids[-NUM_AT_BOUNDARY:]))

    def _pieces(self, before: list[int], ids: list[int], in_loss: list[bool]) -> Iterator[Piece]:
        special = {*self.tokenizer.all_special_ids}
        kinds = [(token in special, covered) for token, covered in zip(ids, in_loss, strict=True)]
        start = 0
        for (is_special, is_supervised), group in groupby(kinds):
            end = start + len(list(group))
            yield Piece(
                self._text([*before, *ids[:start]], ids[start:end]), is_special, is_supervised
            )
            start = end

    def _text(self, before: list[int], ids: list[int]) -> str:
        """Return the text that tokens add to the text of the tokens before them.

        Some tokenizers leave the space at the beginning of a text out.
        """
        so_far, whole = self._decode(before), self._decode([*before, *ids])
        text = whole[len(so_far) :] if whole.startswith(so_far) else self._decode(ids)
        return visible(text)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _named(self, ids: list[int]) -> list[str]:
        return [f"{visible(repr(self._decode([token])))} {token}" for token in ids]


def visible(text: str) -> str:
    r"""Return a text in which characters that cannot be seen are escapes, such as `\x1b`.

    Line breaks, tabs and spaces stay. So a text can neither command a terminal nor change the order
    of what is around it.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" or char in JOINERS else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    if unicodedata.category(char) == "Zs":
        return char  # a space of another width
    return (
        char.encode("ascii", "backslashreplace").decode() if ord(char) > 127 else repr(char)[1:-1]
    )
