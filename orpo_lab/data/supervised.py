"""Which tokens of an answer of several turns are supervised (`dataset.supervised`).

An answer may hold turns of a tool's or the user's between turns of the assistant's. The model reads
all of them, but may be taught the assistant's alone.
"""

import itertools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Content, Message, num_shared

# Renders messages by the chat template; with ask=True the text ends in the generation prompt
Apply = Callable[..., str]
# Where a part of a text begins and ends, in characters
Span = tuple[int, int]
# A text that no row holds
WORD = "\N{REPLACEMENT CHARACTER}"
NOT_TOLD = Fault(
    "misrendered",
    "the model's chat template renders a turn otherwise once another turn follows, so the turns of "
    "an answer cannot be told apart; set dataset.supervised=completion, or take another template",
)


def spans(prompt: Content, completion: Content, text: str, apply: Apply, which: str) -> list[Span]:
    """Return where the supervised turns of an answer stand in its text.

    A span begins behind the generation prompt of its turn, and ends with the text that ends the
    turn. Neighbouring messages of the assistant's are one turn.

    Args:
        prompt: a string or messages.
        completion: the answer, in the same form.
        text: the answer as it is rendered behind the prompt.
        apply: renders messages.
        which: `dataset.supervised`.

    Raises:
        Fault: the turns cannot be told apart.
    """
    if which == "completion" or isinstance(completion, str) or isinstance(prompt, str):
        return [(0, len(text))]
    turns = _turns(completion)
    if len(turns) == 1:
        return [(0, len(text))]
    whole = apply(prompt + completion)
    behind = len(whole) - len(text)
    found = [
        (_begin(prompt + completion[:first], whole, apply) if first else behind, last)
        for first, last in turns
    ]
    supervised = [
        (begin - behind, _end(prompt, completion, last, (begin, whole), apply) - behind)
        for begin, last in found
    ]
    return supervised[-1:] if which == "last" else supervised


def _turns(completion: list[Message]) -> list[tuple[int, int]]:
    """Return the first message of each turn of the assistant's, and the message behind the turn."""
    numbered = itertools.groupby(
        enumerate(completion), lambda numbered: numbered[1]["role"] == "assistant"
    )
    runs = [[number for number, _ in run] for is_assistant, run in numbered if is_assistant]
    return [(run[0], run[-1] + 1) for run in runs]


def _begin(before: list[Message], whole: str, apply: Apply) -> int:
    """Return where the answer to a conversation begins in the text of a longer one."""
    asked, unasked = apply(before, ask=True), apply(before)
    size = num_shared(asked, whole)
    # A template may leave out the end of its generation prompt before an answer
    if size < len(unasked):
        raise NOT_TOLD
    return size


def _end(
    prompt: list[Message],
    completion: list[Message],
    last: int,
    place: tuple[int, str],
    apply: Apply,
) -> int:
    """Return where a turn ends.

    Args:
        prompt: the messages before the answer.
        completion: the answer.
        last: the message behind the turn.
        place: where the turn begins, and the text of the whole conversation.
        apply: renders messages.
    """
    begin, whole = place
    if last == len(completion):
        return len(whole)
    unfollowed = apply(prompt + completion[:last])
    if whole.startswith(unfollowed):
        return len(unfollowed)
    # The template renders the last turn of a conversation in its own way (Qwen3). So look for the
    # text that ends a turn, before the text of the next message begins
    ending = apply([*prompt, {"role": "assistant", "content": WORD}]).rpartition(WORD)[2]
    other = {**completion[last], "content": WORD}
    altered = apply([*prompt, *completion[:last], other, *completion[last + 1 :]])
    at = whole.rfind(ending, begin, num_shared(whole, altered)) if ending.strip() else -1
    if at < 0:
        raise NOT_TOLD
    return at + len(ending)


def mask(
    prompt: str,
    completion: str,
    supervised: list[Span],
    ids: tuple[list[int], list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[bool]:
    """Return for each token of a completion whether it is supervised.

    A token that holds the end of one turn and the beginning of the next belongs to the next.

    Args:
        prompt: the text of the prompt.
        completion: the text of the completion.
        supervised: what `spans` returns.
        ids: the token ids of both, as `encode.tokenize` returns them.
        tokenizer: the model's tokenizer.
    """
    prompt_ids, completion_ids = ids
    if supervised == [(0, len(completion))]:
        return [True] * len(completion_ids)

    def tokens(text: str) -> Any:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    whole = tokens(prompt + completion)
    has_own_bos = whole[:1] == prompt_ids[:1]
    size = len(prompt_ids) if has_own_bos else len(prompt_ids) - 1

    def place(at: int) -> int:
        if at == len(completion):  # behind an EOS that was added, too
            return len(completion_ids)
        return max(num_shared(tokens(prompt + completion[:at]), whole) - size, 0)

    found = [False] * len(completion_ids)
    for begin, end in supervised:
        first, last = place(begin), place(end)
        found[first:last] = [True] * (last - first)
    return found
