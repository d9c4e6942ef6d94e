"""A row of any kind of columns -> pairs.

`dataset.columns` says which kind of row a source holds, and by which names: see the classes in
`config.dataset`. A `Reader` makes pairs of such rows.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from orpo_lab.config.dataset import (
    Columns,
    LabelledColumns,
    PairColumns,
    RankedColumns,
    TableDataset,
    WinnerColumns,
)
from orpo_lab.data.faults import Fault, quote
from orpo_lab.data.pairs import (
    CONTEXT,
    Content,
    Message,
    Pair,
    answer,
    check_size,
    split,
    to_content,
)
from orpo_lab.data.ranks import Answers, choose, not_compared
from orpo_lab.data.recognise import SYSTEM, TELLING, recognise

# The beginning of a turn of a transcript, and its speaker (Bai et al. 2022, arXiv:2204.05862). The
# first turn may lack the empty line before it, as in copies of such data
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

# What a label may be; the words are those of CSV files, in any case. Tables in which a label is
# missing hold the others as 1.0 and 0.0
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class Names(NamedTuple):
    """Names of the columns that rows are read from."""

    # A table that lacks one of these is refused
    needed: tuple[str, ...]
    # All that pairs are made of; a row may lack the others
    read: tuple[str, ...]

    def seen(self, present: Iterable[str]) -> list[str]:
        """Return the columns of a table that have to be looked at, also if no pair is made of them.

        These are the columns of the names, those of a pair's context, and those whose meaning is so
        well known that a row is not trained on as if they were not there.
        """
        return [name for name in present if name in (*self.read, *CONTEXT, *TELLING)]


def names_of(columns: Columns, *, of_pairs: bool = False) -> Names:
    """Return the names of the columns that rows are read from.

    Args:
        columns: the map of columns.
        of_pairs: whether the rows are held-out rows, which hold pairs where training rows hold
            single completions.
    """
    own: tuple[str, ...]
    match columns:
        case LabelledColumns() if not of_pairs:
            own = (columns.completion, columns.label)
        case PairColumns():
            own = (columns.chosen, columns.rejected)
        case RankedColumns():
            own = (columns.answers, *(() if columns.text else (columns.score,)))
        case WinnerColumns():
            own = (columns.first, columns.second, columns.winner)
        case _:
            raise TypeError(f"no kind of rows: {columns!r}")
    # Only held-out rows need the answer that greedy answers are compared with
    right_answer = columns.right_answer if of_pairs else None
    needed = tuple(dict.fromkeys((columns.prompt, *own, right_answer)))
    optional = (columns.system, columns.input, columns.history, columns.right_answer)
    return Names(_given(needed), _given((*needed, *optional)))


def _given(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(name for name in names if name is not None)


class Reader:
    """Makes pairs from the rows of a table, and counts the answers that stand in no pair.

    Args:
        dataset: says which columns hold what.
        of_pairs: whether the rows are held-out rows; see `names_of`.
    """

    def __init__(self, dataset: TableDataset, *, of_pairs: bool = False) -> None:
        self.names = names_of(dataset.columns, of_pairs=of_pairs)
        self._dataset = dataset
        self._of_pairs = of_pairs
        self._answers = Answers()

    def pairs(self, row: Any, number: int) -> list[Pair]:
        """Return the pairs of a row.

        Args:
            row: the raw value of the row.
            number: the number of the row, for the report of answers that are left out.

        Raises:
            Fault: the row gives no pair.
        """
        try:
            return self._read(row, number)
        except Fault as fault:
            if fault.name not in ("missing_column", "wrong_type") or not isinstance(row, Mapping):
                raise
            raise Fault(fault.name, fault.detail + recognise(row, self.names.read)) from fault

    def _read(self, row: Any, number: int) -> list[Pair]:
        columns = self._dataset.columns
        match columns:
            case LabelledColumns() if not self._of_pairs:
                return [from_label(row, columns)]
            case PairColumns() if self._dataset.transcripts:
                return [from_transcripts(row, columns)]
            case PairColumns():
                return [to_pair(row, columns)]
            case WinnerColumns():
                return [from_winner(row, columns)]
            case RankedColumns():
                pairs, num, left_out = from_ranked(row, columns, self._dataset.transcripts)
                self._answers.add(number, num, left_out)
                if not pairs:
                    raise Fault("no_preference", "no answer has a better score than another one")
                return pairs
        raise TypeError(f"no kind of rows: {columns!r}")

    def report(self) -> dict[str, Any]:
        """Return what the report of a split says of several answers; empty: rows hold no such."""
        if not isinstance(self._dataset.columns, RankedColumns):
            return {}
        return {"answers": self._answers.report("answers")}


def to_pair(row: Any, columns: PairColumns) -> Pair:
    """Return the pair that a row holds in its columns.

    Raises:
        Fault: a column is missing or holds neither a string nor messages, or `pair_of` raises.
    """
    prompt = to_prompt(row, columns)
    if columns.chosen == columns.rejected:
        chosen, rejected = _both(row, columns.chosen)
    else:
        chosen, rejected = (
            to_content(value_of(row, getattr(columns, key), key), getattr(columns, key))
            for key in ("chosen", "rejected")
        )
    return pair_of(row, columns, prompt, chosen, rejected)


def _both(row: Any, name: str) -> tuple[Content, Content]:
    """Return both answers of a column that holds a list of two, the better one first."""
    listed = value_of(row, name, "chosen")
    if not (isinstance(listed, list) and len(listed) == 2):
        detail = f"{name} is no list of two answers, which it must be as chosen and rejected"
        raise Fault("wrong_type", detail)
    return to_content(listed[0], name), to_content(listed[1], name)


def from_label(row: Any, columns: LabelledColumns) -> Pair:
    """Return the single completion that a row holds, with its label.

    Raises:
        Fault: the label is neither true nor false, or a fault of `to_pair`.
    """
    given = value_of(row, columns.label, "label")
    label = LABELS.get(str(given).lower()) if isinstance(given, int | float | str) else None
    if label is None:
        said = "null" if given is None else quote(str(given))
        raise Fault("wrong_type", f"{columns.label} is {said}; it must be true or false, or 1 or 0")
    completion = to_content(value_of(row, columns.completion, "completion"), columns.completion)
    prompt = to_prompt(row, columns)
    return replace(pair_of(row, columns, prompt, completion, completion), label=label)


def from_transcripts(row: Any, columns: PairColumns) -> Pair:
    """Return the pair of two transcripts; the prompt is all turns before the last assistant turn.

    Raises:
        Fault: a column is missing, not a string or too large, the turns do not alternate from
            Human's on, the last turn is not the assistant's, or the two transcripts differ before
            their last turn.
    """
    chosen, rejected = (
        to_messages(value_of(row, name, key), name)
        for key, name in (("chosen", columns.chosen), ("rejected", columns.rejected))
    )
    if chosen[:-1] != rejected[:-1]:
        raise Fault("differing_prompts", "chosen and rejected differ before their last turn")
    return pair_of(row, columns, chosen[:-1], chosen[-1:], rejected[-1:])


def to_prompt(row: Any, columns: Columns) -> Content | None:
    """Return what a row asks, without its system message and its earlier turns; None: see `split`.

    Raises:
        Fault: the prompt's column is missing or holds neither a string nor messages, or a text
            follows a prompt that is no string.
    """
    if columns.prompt is None:
        return None
    prompt = to_content(value_of(row, columns.prompt, "prompt"), columns.prompt)
    following = _text(row, columns.input)
    if not following:
        return prompt
    if not isinstance(prompt, str):
        detail = f"{columns.input} follows a prompt of messages; only a text can be followed"
        raise Fault("wrong_type", detail)
    # As LLaMA-Factory joins them
    return "\n".join(filter(None, (prompt, following)))


def pair_of(
    row: Mapping[str, Any],
    columns: Columns,
    prompt: Content | None,
    chosen: Content,
    rejected: Content,
) -> Pair:
    """Return the pair of two answers to a row's prompt.

    The row's system message and earlier turns are put before the prompt. Then prompt and answers
    are messages, also where the row holds strings.

    Raises:
        Fault: the row is too large or nested too deeply, the tools or documents are not lists of
            objects, the system message or the earlier turns have no place, or `split` raises.
    """
    check_size([prompt, chosen, rejected])
    before, pair = _before(row, columns), split(prompt, chosen, rejected)
    if before and prompt is None and isinstance(pair.prompt, str):
        detail = "a system message or earlier turns stand beside texts without a prompt; name its"
        raise Fault("wrong_type", f"{detail} column with dataset.columns.prompt=...")
    pair = _after(before, pair)
    ignored = _ignored(row, columns, pair.prompt)
    given = {name: _to_objects(row[name], name) for name in CONTEXT if row.get(name)}
    # A list without objects is as good as none; some templates announce tools for such a list
    context = {name: objects for name, objects in given.items() if objects}
    check_size([context])
    return replace(pair, context=context, ignored=ignored)


def _before(row: Mapping[str, Any], columns: Columns) -> list[Message]:
    """Return the row's system message and earlier turns.

    Raises:
        Fault: the system message is no string, or the earlier turns are no list of pairs.
    """
    said = _text(row, columns.system)
    before: list[Message] = [{"role": "system", "content": said}] if said else []
    turns = row.get(columns.history) if columns.history else None
    for turn in turns if isinstance(turns, list) else filter(None, [turns]):
        match turn:
            case [str(asked), str(answered)]:
                before += [{"role": "user", "content": asked}, *answer(answered)]
            case _:
                detail = f"{columns.history} is no list of [question, answer]"
                raise Fault("wrong_type", detail)
    check_size([before])
    return before


def _text(row: Mapping[str, Any], name: str | None) -> str:
    """Return the text in a column that a row may lack; empty: there is none."""
    value = row.get(name) if name else None
    if not isinstance(value, str | None):
        raise Fault("wrong_type", f"{name} is of type {type(value).__name__}; it must be a string")
    return value if value and not value.isspace() else ""


def _after(before: list[Message], pair: Pair) -> Pair:
    """Return a pair whose prompt goes on from earlier messages."""
    if not before:
        return pair
    if isinstance(pair.prompt, str):
        if not pair.prompt.strip():
            raise Fault("empty_prompt", "the prompt is empty but for what stands before it")
        asked = {"role": "user", "content": pair.prompt}
        chosen, rejected = answer(str(pair.chosen)), answer(str(pair.rejected))
        return replace(pair, prompt=[*before, asked], chosen=chosen, rejected=rejected)
    if not pair.prompt or pair.prompt[0]["role"] not in ("system", "developer"):
        return replace(pair, prompt=before + pair.prompt)
    own = pair.prompt[0].get("content", "")
    if [message["content"].strip() for message in before] != [own.strip()]:
        raise Fault(
            "wrong_type",
            "the prompt has a system message of its own beside what the row's column of system "
            "messages or of earlier turns says",
        )
    return pair


def _ignored(row: Mapping[str, Any], columns: Columns, prompt: Content) -> str:
    """Return a column with a well-known meaning that the pair does not use; empty: there is none.

    A system message that stands in the prompt too is used.
    """
    for name in TELLING:
        value = row.get(name)
        # Tables write a missing value as NaN, which is not itself
        if value in (None, "", [], {}) or value != value or name in names_of(columns).read:
            continue
        if not (name in SYSTEM and isinstance(value, str) and _says(prompt, value.strip())):
            return name
    return ""


def _says(prompt: Content, system: str) -> bool:
    """Return whether a prompt has a system message, or is a text that begins with that."""
    if isinstance(prompt, str):
        return prompt.lstrip().startswith(system)
    return any(
        message["role"] in ("system", "developer") and message.get("content", "").strip() == system
        for message in prompt
    )


def from_winner(row: Any, columns: WinnerColumns) -> Pair:
    """Return the pair of two answers, of which a column says which one is better.

    Raises:
        Fault: neither answer is better (`no_preference`), the column says what the configuration
            does not name, or a fault of `to_pair`.
    """
    prompt = to_prompt(row, columns)
    first, second = (
        to_content(value_of(row, name, key), name)
        for key, name in (("first", columns.first), ("second", columns.second))
    )
    said = _word(value_of(row, columns.winner, "winner"))
    names = {
        **dict.fromkeys(map(str.lower, columns.first_wins), (first, second)),
        **dict.fromkeys(map(str.lower, columns.second_wins), (second, first)),
        **dict.fromkeys(map(str.lower, columns.ties), None),
    }
    if said not in names:
        raise Fault(
            "wrong_type",
            f"{columns.winner} is {quote(said)}, which is none of {', '.join(names)}; name it in "
            "dataset.columns.first_wins, second_wins or ties",
        )
    sides = names[said]
    if sides is None:
        raise Fault("no_preference", f"{columns.winner} is {quote(said)}")
    return pair_of(row, columns, prompt, *sides)


def _word(value: Any) -> str:
    """Return what a column of winners says in the form in which the configuration names it.

    A table in which a number is missing holds the others as 1.0 and 2.0.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "null" if value is None else str(value).strip().lower()


def from_ranked(
    row: Any, columns: RankedColumns, transcripts: bool
) -> tuple[list[Pair], int, list[str]]:
    """Return the pairs of several answers by `columns.pairing`.

    Returns:
        The pairs; the number of answers; and for each answer in no pair, why.

    Raises:
        Fault: the answers are not a list, a score is no number, or a fault of `to_pair`.
    """
    prompt = _asked(to_prompt(row, columns), str(columns.prompt), transcripts)
    answers = _answers_of(row, columns)
    sign = -1 if columns.better == "higher" else 1
    ranked = [(sign * score, said) for said, score in answers if score is not None]
    chosen = choose([rank for rank, _ in ranked], columns.pairing, columns.least_difference)
    pairs = [
        pair_of(row, columns, prompt, ranked[better][1], ranked[worse][1])
        for better, worse in chosen
    ]
    left_out = ["unranked"] * (len(answers) - len(ranked)) + not_compared(len(ranked), chosen)
    return pairs, len(answers), left_out


def _answers_of(row: Any, columns: RankedColumns) -> list[tuple[Content, float | None]]:
    """Return every answer of a row with its score; None: the answer has no score."""
    name = columns.answers
    listed = value_of(row, name, "answers")
    said: Iterable[tuple[Any, Any]]
    if columns.text is None:
        scores = value_of(row, columns.score, "score")
        if not (isinstance(listed, list) and isinstance(scores, list)):
            raise Fault("wrong_type", f"{name} and {columns.score} must be lists")
        if len(listed) != len(scores):
            detail = f"{name} has {len(listed)} answers, and {columns.score} {len(scores)} scores"
            raise Fault("wrong_type", detail)
        said = zip(listed, scores, strict=True)
    else:
        if not (isinstance(listed, list) and all(isinstance(item, Mapping) for item in listed)):
            raise Fault("wrong_type", f"{name} is no list of objects with an answer and its score")
        said = ((item.get(columns.text), item.get(columns.score)) for item in listed)
    return [(to_content(text, name), _score(score, columns.score)) for text, score in said]


def _score(value: Any, name: str) -> float | None:
    """Return a score; None: there is none. Tables write a missing number as NaN.

    Raises:
        Fault: the value is no finite number.
    """
    try:
        score = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.inf
    if isinstance(value, bool | str) or math.isinf(score):
        raise Fault("wrong_type", f"{name} is {quote(str(value))}; it must be a number")
    return None if math.isnan(score) else score


def _asked(prompt: Content | None, name: str, is_transcript: bool) -> Content | None:
    """Return a prompt; a transcript that ends where the assistant has the turn becomes messages.

    Raises:
        Fault: see `to_messages`; the assistant has said something already; or the prompt is a
            transcript that is not said to be one.
    """
    if not is_transcript:
        if is_transcript_text(prompt):
            detail = f"{name} is a transcript; dataset.transcripts=true reads its turns"
            raise Fault("wrong_type", detail)
        return prompt
    *asked, last = to_messages(prompt, name)
    if last["content"]:
        raise Fault("prefilled_answer", f"{name} does not end in an empty turn of the assistant")
    return asked


def is_transcript_text(prompt: Content | None) -> bool:
    """Return whether a prompt is a text that begins as a transcript does.

    Without the empty line before its first turn a text is a transcript if a second turn follows.
    """
    if not isinstance(prompt, str) or not _TURN.match(prompt):
        return False
    return prompt.lstrip(" ").startswith("\n\n") or len(_TURN.findall(prompt)) > 1


def value_of(row: Any, name: str, key: str) -> Any:
    """Return the value of a row in a column.

    Args:
        row: the row.
        name: the name of the column.
        key: the key of `dataset.columns` that names the column, for the message of a fault.

    Raises:
        Fault: the row is no object, or lacks the column.
    """
    if not isinstance(row, Mapping):
        raise Fault("wrong_type", f"holds {quote(json.dumps(row))}, not an object with columns")
    if name not in row:
        null = ", or null where there is none" if key == "prompt" else ""
        present = ", ".join(quote(column) for column in sorted(row)[:20])
        raise Fault(
            "missing_column",
            f"lacks column '{name}' (it has {present or 'none'}); "
            f"name the right one with dataset.columns.{key}=...{null}",
        )
    return row[name]


def _to_objects(value: Any, name: str) -> list[Any]:
    """Return the tools or documents of a row as a list of objects.

    The value may be a list, or JSON in a string, as in TRL's data sets.

    Raises:
        Fault: the value is not a list of objects.
    """
    try:
        listed = json.loads(value) if isinstance(value, str) else value
        found = [json.loads(message) if isinstance(message, str) else message for message in listed]
    except (TypeError, ValueError, RecursionError):
        found = [None]
    if not all(isinstance(message, dict) for message in found):
        raise Fault("wrong_type", f"{name} is no list of objects, which a chat template needs")
    return found


def to_messages(text: Any, name: str) -> list[Message]:
    """Return the turns of a transcript as messages; the last one is the assistant's.

    Raises:
        Fault: the value is no string or too large, or its turns do not alternate from Human's on
            to the assistant's.
    """
    if not isinstance(to_content(text, name), str):
        raise Fault("wrong_type", f"{name} holds messages; with dataset.transcripts it is one text")
    check_size([text])
    before, *turns = _TURN.split(text)
    roles = [_SPEAKERS[speaker] for speaker in turns[::2]]
    if before.strip() or roles != [("user", "assistant")[turn % 2] for turn in range(len(roles))]:
        raise Fault("turns_not_alternating", f"{name}: its turns do not alternate from Human's on")
    if roles[-1:] != ["assistant"]:
        raise Fault("no_answer", f"{name} does not end in an assistant turn")
    return [
        {"role": role, "content": said.strip()}
        for role, said in zip(roles, turns[1::2], strict=True)
    ]
