"""Keys of `dataset`: which preference pairs are used, and what happens to rows with a fault."""

import glob
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from orpo_lab.config.checks import SWITCH, at_least, check, one_of
from orpo_lab.config.policy import free, location, setting, switch
from orpo_lab.errors import one_line

ALL_FILES = "**/*"
# A path, a pattern, or a list of these; OmegaConf has no type for a text or a list (2.3.1)
Files = Any
# Which of several ranked answers make pairs
PAIRINGS = ("best_worst", "adjacent", "all")
# Without a checker, or without greedy answers, no run reads how answers are checked
UNCHECKED = {"dataset.checker": None, "dataset.num_generations": 0}
# How greedy answers are checked (`data.checkers`)
CHECKERS = ("exact", "last_number", "choice", "regex")
# Faults despite which a row can be trained on; other faults leave no prompt with two answers
KEEPABLE_FAULTS = (
    "nul_character",
    "ignored_column",
    "contradicting_prompt",
    "unknown_role",
    "other_turn_in_answer",
    "special_token_text",
    "unrendered_text",
    "duplicate",
    "conflicting_duplicate",
    "leaked_prompt",
    "leaked_prompt_normalized",
)


def expand(path: str) -> list[str]:
    """Return the files that a path stands for, by name: those that fit it if it is a pattern.

    A file or folder that there is, is no pattern, whatever its name.
    """
    if Path(path).exists() or not set("*?[") & set(path):
        return [path]
    folder = next(parent for parent in Path(path).parents if parent.exists())
    pattern = glob.escape(str(folder)) / Path(path).relative_to(folder)
    return sorted(glob.glob(str(pattern), recursive=True))


def check_files(**values: Files) -> None:
    """Raise a `ValueError` if a value is neither a path nor a list of paths; None passes."""
    for key, value in values.items():
        key = key.replace("__", ".")
        paths = value if isinstance(value, list) else [value]
        check(
            value is None or (bool(paths) and all(isinstance(path, str) for path in paths)),
            f"{key}={value} must be a path, or a list of paths such as [a.jsonl,b.jsonl]",
        )


def check_checker(checker: str | None, pattern: str | None) -> None:
    """Raise a `ValueError` if there is no such checker, or its pattern cannot be used."""
    if checker is not None:
        one_of(CHECKERS, dataset__checker=checker)
    check(
        checker == "regex" or pattern is None,
        f"dataset.checker_pattern={pattern} is read by dataset.checker=regex alone, and "
        f"dataset.checker={checker}; set the one or leave out the other",
    )
    check(
        checker != "regex" or pattern is not None,
        "dataset.checker=regex needs a pattern with one group that holds the answer, such as "
        "'dataset.checker_pattern=Answer: ([a-z]+)'",
    )
    if pattern is None:
        return
    import regex

    try:
        num_groups = regex.compile(pattern).groups
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(
            f"dataset.checker_pattern={pattern} is no regular expression: {one_line(error)}"
        ) from error
    check(
        num_groups == 1,
        f"dataset.checker_pattern={pattern} has {num_groups} groups; one must hold the answer, and "
        "parentheses that hold none are written (?:...)",
    )


@dataclass(kw_only=True)
class Faults:
    """What happens to a row with a fault: refuse, drop or keep (see docs/data.md)."""

    invalid_json: str = setting()
    invalid_utf8: str = setting()
    missing_column: str = setting()
    wrong_type: str = setting()
    oversized_row: str = setting()
    lone_surrogate: str = setting()
    nul_character: str = setting()
    empty_prompt: str = setting()
    empty_completion: str = setting()
    chosen_equals_rejected: str = setting()
    chosen_equals_rejected_after_cut: str = setting()
    differing_prompts: str = setting()
    ignored_column: str = setting(
        unread_under={"dataset.faults.ignored_column": "refuse"}, factory=lambda: "refuse"
    )
    contradicting_prompt: str = setting()
    turns_not_alternating: str = setting()
    unknown_role: str = setting()
    no_answer: str = setting()
    prefilled_answer: str = setting()
    other_turn_in_answer: str = setting()
    special_token_text: str = setting()
    template_error: str = setting()
    misrendered: str = setting()
    unrendered_text: str = setting()
    duplicate: str = setting()
    conflicting_duplicate: str = setting()
    leaked_prompt: str = setting()
    leaked_prompt_normalized: str = setting()

    def __post_init__(self) -> None:
        for field in fields(self):
            policies = ("refuse", "drop", "keep")[: 3 if field.name in KEEPABLE_FAULTS else 2]
            one_of(policies, **{f"dataset__faults__{field.name}": getattr(self, field.name)})


@dataclass(kw_only=True)
class Dataset:
    """Base class of all sources of preference pairs; never used itself."""

    max_length: int = setting()
    max_prompt_length: int = setting()
    overlong: str = setting()
    num_train: int | None = setting()
    num_eval: int | None = setting()
    num_generations: int = setting()
    max_new_tokens: int = setting(unread_under={"dataset.num_generations": 0})
    num_proc: int | None = free()
    template_kwargs: dict[str, Any] = setting()
    # Runs that were made before there was this key supervised the whole completion
    supervised: str = setting(unread_under={"dataset.supervised": "completion"})
    faults: Faults = setting()

    @property
    def unit(self) -> str:
        """What training rows are."""
        return "pairs"

    def __post_init__(self) -> None:
        at_least(2, dataset__max_length=self.max_length)
        at_least(
            1,
            dataset__max_prompt_length=self.max_prompt_length,
            dataset__num_train=self.num_train,
            dataset__num_eval=self.num_eval,
            dataset__max_new_tokens=self.max_new_tokens,
            dataset__num_proc=self.num_proc,
        )
        at_least(0, dataset__num_generations=self.num_generations)
        one_of(("drop", "cut_prompt", "cut_completion"), dataset__overlong=self.overlong)
        one_of(("completion", "assistant", "last"), dataset__supervised=self.supervised)
        check(
            self.max_prompt_length < self.max_length,
            f"dataset.max_prompt_length={self.max_prompt_length} must be below "
            f"dataset.max_length={self.max_length}, or no completion fits behind such a prompt",
        )


@dataclass(kw_only=True)
class EmbeddedDataset(Dataset):
    """Pairs that `orpo_lab.data.embedded` generates."""


def _optional(key: str) -> Any:
    """Return the field of a column that a row may lack; null: no such column is read.

    Where the key is null, no run reads it. So a run that was made before there was the key is the
    same run.
    """
    return setting(unread_under={f"dataset.columns.{key}": None}, factory=lambda: None)


@dataclass(kw_only=True)
class Columns:
    """Base class of the kinds of rows: where the prompt stands; never used itself."""

    unit: ClassVar[str] = "pairs"
    """What a row gives."""

    prompt: str | None = setting()
    system: str | None = _optional("system")
    input: str | None = _optional("input")
    history: str | None = _optional("history")
    right_answer: str | None = _optional("right_answer")


@dataclass(kw_only=True)
class PairColumns(Columns):
    """A row holds a chosen and a rejected answer; with a null prompt both begin alike."""

    chosen: str = setting()
    rejected: str = setting()


@dataclass(kw_only=True)
class LabelledColumns(PairColumns):
    """A row holds one answer and its label; the columns of pairs are read from held-out rows."""

    unit: ClassVar[str] = "completions"

    completion: str = setting()
    label: str = setting()

    def __post_init__(self) -> None:
        check(
            self.prompt is not None,
            "dataset.columns.prompt=null: rows with a label need a column with their prompt",
        )


@dataclass(kw_only=True)
class RankedColumns(Columns):
    """A row holds several answers, each with a score or a rank; a rule makes pairs of them."""

    answers: str = setting()
    text: str | None = setting()
    score: str = setting()
    better: str = setting()
    pairing: str = setting()
    least_difference: float = setting()

    def __post_init__(self) -> None:
        check(
            self.prompt is not None,
            "dataset.columns.prompt=null: rows with several answers need a column with a prompt",
        )
        one_of(("higher", "lower"), dataset__columns__better=self.better)
        one_of((*PAIRINGS, "margin"), dataset__columns__pairing=self.pairing)
        check(
            0 < self.least_difference < math.inf,
            f"dataset.columns.least_difference={self.least_difference} must be above 0, since "
            "answers with the same score make no pair",
        )


@dataclass(kw_only=True)
class WinnerColumns(Columns):
    """A row holds two answers, and a column that says which of them is better."""

    first: str = setting()
    second: str = setting()
    winner: str = setting()
    first_wins: list[str] = setting()
    second_wins: list[str] = setting()
    ties: list[str] = setting()

    def __post_init__(self) -> None:
        said = [value.lower() for value in (*self.first_wins, *self.second_wins, *self.ties)]
        for value in said:
            check(
                said.count(value) == 1,
                f"dataset.columns.first_wins, second_wins and ties name {value} "
                f"{said.count(value)} times; a value means one thing",
            )


# The kinds of rows; no other kind before it has all the keys of a kind: see `columns_of`
COLUMNS: dict[str, type[Columns]] = {
    "pairs": PairColumns,
    "labelled": LabelledColumns,
    "ranked": RankedColumns,
    "winner": WinnerColumns,
}


def columns_of(keys: Collection[str]) -> type[Columns]:
    """Return the kind of rows that a recorded map of columns is of, by its keys.

    Raises:
        KeyError: there is no such kind.
    """
    for kind in COLUMNS.values():
        if {*keys} <= {field.name for field in fields(kind)}:
            return kind
    raise KeyError(f"no kind of rows has the columns {', '.join(keys)}")


@dataclass(kw_only=True)
class TableDataset(Dataset):
    """Base class of sources whose rows hold pairs in columns; never used itself."""

    columns: Columns = setting()
    transcripts: bool = setting()
    # Runs that were made before there was this key trained on strings as they are
    as_messages: str = switch(unread_under={"dataset.as_messages": "false"})
    # Runs that were made before there were these keys checked no answer
    checker: str | None = setting(unread_under=UNCHECKED)
    checker_pattern: str | None = setting(unread_under=UNCHECKED)

    @property
    def unit(self) -> str:
        """What training rows are: pairs, or completions with a label."""
        return self.columns.unit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_messages = self.as_messages.lower()
        one_of(SWITCH, dataset__as_messages=self.as_messages)
        check_checker(self.checker, self.checker_pattern)
        if not self.transcripts:
            return
        check(
            isinstance(self.columns, RankedColumns) or type(self.columns) is PairColumns,
            "dataset.transcripts=true reads pairs of transcripts, or the prompt of several "
            "answers, and these rows hold none; leave it false",
        )
        check(
            isinstance(self.columns, RankedColumns) or self.columns.prompt is None,
            "dataset.transcripts=true reads the prompt out of the transcripts: "
            "set dataset.columns.prompt=null",
        )


@dataclass(kw_only=True)
class HubDataset(TableDataset):
    """A dataset of the Hugging Face hub, or a local folder with the layout of such a dataset."""

    path: str = location(ALL_FILES)
    revision: str | None = location()
    train_split: str = setting()
    eval_split: str | None = setting()


@dataclass(kw_only=True)
class FileDataset(TableDataset):
    """One or several files of rows; a suffix says the format."""

    train_path: Files = location(ALL_FILES)
    eval_path: Files = location(ALL_FILES)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(dataset__train_path=self.train_path, dataset__eval_path=self.eval_path)


@dataclass(kw_only=True)
class OasstDataset(Dataset):
    """OpenAssistant's conversation trees; people have ranked the replies."""

    train_path: Files = location(ALL_FILES)
    eval_path: Files = location(ALL_FILES)
    languages: list[str] | None = setting()
    max_depth: int | None = setting()
    pairing: str = setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(dataset__train_path=self.train_path, dataset__eval_path=self.eval_path)
        at_least(1, dataset__max_depth=self.max_depth)
        one_of(PAIRINGS, dataset__pairing=self.pairing)
