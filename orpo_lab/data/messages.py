"""Make messages of pairs that are strings, for models that have a chat template.

A chat model is asked by its chat template. Strings that are trained as they are would teach the
model to answer without the template. So `dataset.as_messages` makes the prompt a turn of the user's
and each answer a turn of the assistant's, before rows are compared. A pair of messages stays as it
is.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from orpo_lab.config.checks import AUTO
from orpo_lab.config.dataset import TableDataset
from orpo_lab.data.faults import Fault
from orpo_lab.data.forms import is_transcript_text
from orpo_lab.data.pairs import Content, Message, Pair
from orpo_lab.data.splits import Split
from orpo_lab.data.template import is_own
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# All turns of such a prompt would become one turn of the user's
TRANSCRIPT = Fault(
    "wrong_type",
    "the prompt is a transcript in one text: where the answers repeat it, dataset.transcripts=true "
    "dataset.columns.prompt=null reads its turns; dataset.as_messages=false trains on the text",
)


def wrapper(
    config: TableDataset, tokenizer: PreTrainedTokenizerBase, special_tokens: re.Pattern[str]
) -> Callable[[Pair], Pair]:
    """Return the function that makes messages of a pair's strings, or leaves the pair as it is.

    With `dataset.as_messages=auto` strings stay strings in three cases: the model has no chat
    template of its own; no column says where the prompt ends; a prompt holds control tokens, so its
    text is in the model's format already. Where rows may have a system message or earlier turns,
    all strings become messages, since the rows that have them do (`forms`).

    Args:
        config: the source of the pairs.
        tokenizer: the model's tokenizer.
        special_tokens: matches the text of a token that controls the model.

    The function raises a `Fault` if a prompt that would become messages is a transcript.

    Raises:
        UserError: `dataset.as_messages=true`, and strings cannot become messages.
    """
    columns = config.columns
    has_prompt = config.transcripts or columns.prompt is not None
    has_parts = columns.system is not None or columns.history is not None

    def wrap(pair: Pair) -> Pair:
        return _wrapped(pair) if isinstance(pair.prompt, str) else pair

    def wrap_unformatted(pair: Pair) -> Pair:
        if is_transcript_text(pair.prompt):
            raise TRANSCRIPT
        is_formatted = isinstance(pair.prompt, str) and special_tokens.search(pair.prompt)
        return _as_it_is(pair) if is_formatted else wrap(pair)

    match config.as_messages:
        case "true":
            if not is_own(tokenizer):
                raise UserError(
                    "dataset.as_messages=true: the model has no chat template; give one with "
                    "model.chat_template, or set dataset.as_messages=auto"
                )
            if not has_prompt:
                raise UserError(
                    "dataset.as_messages=true: no column says where the prompt ends; name it with "
                    "dataset.columns.prompt, or set dataset.as_messages=auto"
                )
            return wrap
        case "auto" if has_prompt and (is_own(tokenizer) or has_parts):
            return wrap_unformatted
    return _as_it_is


def _wrapped(pair: Pair) -> Pair:
    """Return a pair of strings as messages."""
    chosen, rejected = (_turn("assistant", side) for side in (pair.chosen, pair.rejected))
    return replace(
        pair, prompt=_turn("user", pair.prompt), chosen=chosen, rejected=rejected, wrapped=True
    )


def _turn(role: str, text: Content) -> list[Message]:
    return [{"role": role, "content": text}]


def _as_it_is(pair: Pair) -> Pair:
    """Return a pair unchanged; strings go through no template, which could read their context."""
    return replace(pair, context={}) if isinstance(pair.prompt, str) else pair


def say(splits: list[Split], config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log once how many pairs of strings became messages, and how many stayed strings."""
    pairs = [row.pair for split in splits for row in split.rows]
    num_wrapped = sum(pair.wrapped for pair in pairs)
    num_plain = sum(isinstance(pair.prompt, str) for pair in pairs)
    if num_wrapped:
        log.info(
            "%d pairs are strings, and become messages of the model's chat template "
            "(dataset.as_messages=%s); dataset.as_messages=false trains on the strings as they are",
            num_wrapped,
            config.as_messages,
        )
    if num_plain and is_own(tokenizer):
        log.warning(
            "WARNING: %d pairs are strings and are trained as they are, without the model's chat "
            "template, because %s",
            num_plain,
            _why_plain(config),
        )


def _why_plain(config: TableDataset) -> str:
    if config.as_messages != AUTO:
        return f"of dataset.as_messages={config.as_messages}"
    if config.columns.prompt is None:
        return "no column says where the prompt ends (dataset.columns.prompt)"
    return "their prompts hold control tokens already (dataset.as_messages=true wraps them too)"
