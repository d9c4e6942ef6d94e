"""The right answers of held-out rows, and the check of greedy answers against them.

The right answer of a row is its column `dataset.columns.right_answer`, or its chosen answer. If
`dataset.checker` reads nothing from it, no greedy answer to that prompt can be checked: such rows
are counted. A greedy answer from which it reads nothing is wrong.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import datasets

from orpo_lab.config.dataset import Columns, Dataset, EmbeddedDataset, TableDataset
from orpo_lab.config.identity import hash_of
from orpo_lab.config.mixture import MixtureDataset
from orpo_lab.data import embedded
from orpo_lab.data.checkers import MAX_SECONDS, Read, reader
from orpo_lab.data.faults import Tally, quote
from orpo_lab.data.mixture import SOURCE
from orpo_lab.data.pairs import Pair
from orpo_lab.data.splits import Checks, Split
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# Whether a greedy answer to the prompt of a held-out row is right; None: it cannot be checked
Check = Callable[[str, Mapping[str, Any]], bool | None]

# The column with what a checker reads from a row's right answer
RIGHT_ANSWER = "right_answer"


def build(dataset: Dataset) -> Check:
    """Return the check of greedy answers that a data set asks for."""
    match dataset:
        case EmbeddedDataset():
            return embedded.is_correct
        case MixtureDataset():
            checks = {name: build(dataset.of(name)) for name in dataset.sources}
            return lambda answer, row: checks[row[SOURCE]](answer, row)
        case TableDataset(checker=str(checker), checker_pattern=pattern):
            return partial(_is_right, reader(checker, pattern))
    return unchecked


def unchecked(answer: str, row: Mapping[str, Any]) -> None:
    """Say that no answer can be checked."""


def maker(dataset: TableDataset) -> Checks | None:
    """Return the function that makes the column RIGHT_ANSWER; None: no answer is checked.

    The function raises a `UserError` if `dataset.checker_pattern` takes too long.
    """
    if dataset.checker is None:
        return None
    read = reader(dataset.checker, dataset.checker_pattern)

    def make(row: Any, pair: Pair) -> dict[str, Any]:
        text = text_of(row, pair, dataset.columns)
        try:
            return {RIGHT_ANSWER: read(text)}
        except TimeoutError as error:
            raise UserError(
                f"dataset.checker_pattern={dataset.checker_pattern} takes more than "
                f"{MAX_SECONDS:g} s to search '{quote(text)}' of {len(text)} characters; write it "
                "without repeats inside repeats, such as (a+)+"
            ) from error

    return make


def report(split: Split, kept: datasets.Dataset, dataset: TableDataset) -> dict[str, Any]:
    """Return what a report says of the right answers of held-out pairs.

    Args:
        split: the held-out rows.
        kept: their tokenized pairs, in the same order.
        dataset: the data set; it has a checker.

    Raises:
        UserError: no answer can be checked.
    """
    read = kept[RIGHT_ANSWER][:]
    unread = Tally()
    for row, found in zip(split.rows, read, strict=True):
        if found is None:
            unread.add("not_checkable", row.number)
    num = len(read) - unread.num("not_checkable")
    if not num:
        column = dataset.columns.right_answer
        what = f"value of column '{column}'" if column else "chosen answer"
        raise UserError(
            f"dataset.checker={dataset.checker} can check none of {len(read)} held-out prompts: it "
            f"reads nothing from any {what}; name the column of right answers with "
            "dataset.columns.right_answer=..., or take another checker or pattern (docs/data.md)"
        )
    return {"num_checkable": num, **unread.report(split.source.listed)}


def check_answered(held_out: datasets.Dataset, num_generations: int) -> None:
    """Refuse held-out pairs of which only those can be checked that are not answered.

    Raises:
        UserError: they are such pairs.
    """
    if RIGHT_ANSWER not in held_out.column_names or not num_generations:
        return
    read = held_out[RIGHT_ANSWER][:]
    first = next(at for at, found in enumerate(read) if found is not None)
    if first >= num_generations:
        raise UserError(
            f"dataset.num_generations={num_generations}: none of the held-out prompts that are "
            f"answered can be checked; the first that can is number {first + 1} of {len(read)}, "
            "so raise it"
        )


def fingerprint(dataset: Dataset, held_out: datasets.Dataset) -> dict[str, str]:
    """Return the key `right_answers` of a report: a hash of how the held-out answers are checked.

    Only figures of runs with the same hash can be compared. Empty: there is no checker.
    """
    if RIGHT_ANSWER not in held_out.column_names:
        return {}
    alone = [dataset]
    if isinstance(dataset, MixtureDataset):
        alone = [dataset.of(name) for name in dataset.sources]
    how = [(one.checker, one.checker_pattern) for one in alone if isinstance(one, TableDataset)]
    return {"right_answers": hash_of([how, held_out[RIGHT_ANSWER][:]])}


def _is_right(read: Read, answer: str, row: Mapping[str, Any]) -> bool | None:
    if row[RIGHT_ANSWER] is None:
        return None
    try:
        return read(answer) == row[RIGHT_ANSWER]
    except TimeoutError:
        log.warning(
            "warning: dataset.checker_pattern searches an answer of %d characters for more than "
            "%g s, so the answer counts as wrong",
            len(answer),
            MAX_SECONDS,
        )
        return False


def text_of(row: Mapping[str, Any], pair: Pair, columns: Columns) -> str:
    """Return the text of a row's right answer; empty: there is none.

    It is the column `columns.right_answer`, if that is named, and otherwise the last message of the
    chosen answer.
    """
    match row.get(columns.right_answer) if columns.right_answer else pair.chosen:
        case str(text) | [*_, {"content": str(text)}]:
            return text
        case int() | float() as number:
            return str(number)
    return ""
