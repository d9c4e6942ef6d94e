"""The rows of a split: what of them is kept, what they share with each other and with the other
split, and how a part of them is held out or drawn.
"""

import hashlib
import json
import logging
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from orpo_lab.config.dataset import Faults
from orpo_lab.data.faults import Fault, Tally, keeps
from orpo_lab.data.files import Source
from orpo_lab.data.pairs import Content, Pair, text_of
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# What is held out where `dataset.num_eval` does not say: so many, but no more than a fifth
NUM_EVAL, LARGEST_SHARE = 256, 5


@dataclass(eq=False)
class Row:
    """A pair, its row's number in the source, and the faults it was kept in spite of."""

    number: int
    pair: Pair
    # Columns of the embedded rows that say how an answer is checked
    checks: dict[str, Any]
    kept_despite: list[Fault] = field(default_factory=list)
    # Once it is tokenized: its place among all that are, and the faults that only this shows
    place: int | None = None
    found: list[Fault] = field(default_factory=list)

    @cached_property
    def normalized_prompt(self) -> bytes:
        """Digest of what the prompt says, whatever its case, white space and Unicode form."""
        return _digest(normalize(text_of(self.pair.prompt)))

    @cached_property
    def answers(self) -> tuple[bytes, bytes]:
        """Digests of chosen and rejected."""
        return _digest(text_of(self.pair.chosen)), _digest(text_of(self.pair.rejected))

    @cached_property
    def context(self) -> bytes:
        """Digest of the tools and documents beside the messages."""
        return _digest(json.dumps(self.pair.context, sort_keys=True))


def normalize(text: str) -> str:
    """Return a text without what case, white space and Unicode form (NFKC) make of it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _beginnings(prompt: Content, form: Callable[[str], str] = normalize) -> Iterator[bytes]:
    """Yield the digest of every beginning of a conversation in some form, itself included."""
    if isinstance(prompt, str):
        yield _digest(form(prompt))
    else:
        for size in range(1, len(prompt) + 1):
            yield _digest(form(text_of(prompt[:size])))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@dataclass
class Split:
    """Rows of one source with one use, and the count of those left out.

    At any time `num_rows` is the number of `rows` and of those `dropped`.
    """

    name: str
    source: Source
    policies: Faults
    num_rows: int = 0
    num_not_drawn: int = 0
    rows: list[Row] = field(default_factory=list)
    dropped: Tally = field(default_factory=Tally)
    # Columns that hold something which no pair is made of
    unread: set[str] = field(default_factory=set)

    def judge(self, number: int, faults: Iterable[Fault]) -> list[Fault] | None:
        """Return the faults that a row is kept in spite of; None if it is dropped, and counted.

        Raises:
            UserError: the policy on one of them is to refuse.
        """
        kept_despite = []
        for fault in faults:
            if not keeps(fault, self.source.where(number), self.policies):
                self.dropped.add(fault.name, number, fault.detail)
                return None
            kept_despite.append(fault)
        return kept_despite

    def filter(self, find: Callable[[Row], Iterable[Fault]]) -> None:
        """Judge every row by the faults that `find` yields for it."""
        kept = []
        for row in self.rows:
            despite = self.judge(row.number, find(row))
            if despite is not None:
                row.kept_despite += despite
                kept.append(row)
        self.rows = kept

    def read(
        self,
        parse: Callable[[Any, int], list[Pair]],
        find: Callable[[Pair], Iterable[Fault]],
        *,
        columns: Iterable[str] | None = None,
        checks: tuple[str, ...] = (),
    ) -> None:
        """Read the source's rows.

        Args:
            parse: makes pairs of a raw row and its number, or raises its `Fault`.
            find: yields what is wrong with a pair.
            columns: those that a pair is read from, beside those of its context; None where a row
                is no row of a table.
            checks: columns of the raw row to keep beside the pair.

        Raises:
            UserError: the source cannot be read, or the policy on a fault is to refuse.
        """
        named = None if columns is None else {*columns, *checks}
        for number, raw in self.source.rows:
            try:
                if isinstance(raw, Fault):
                    raise raw
                pairs = parse(raw, number)
            except Fault as fault:
                self.num_rows += 1
                self.judge(number, [fault])
                continue
            for pair in pairs:
                if named is not None:
                    held = {name for name, value in raw.items() if value not in (None, "", [])}
                    self.unread |= held - named - pair.context.keys()
                self.num_rows += 1
                despite = self.judge(number, find(pair))
                if despite is not None:
                    extra = {name: raw[name] for name in checks}
                    self.rows.append(Row(number, pair, extra, despite))
        self.unread |= self.source.unread

    def drop_repeats(self) -> None:
        """Judge pairs that contradict another by preferring its rejected answer, and repeats."""
        by_key: dict[tuple[bytes, ...], Row] = {}
        for row in self.rows:
            by_key.setdefault((row.normalized_prompt, row.context, *row.answers), row)

        def find_conflict(row: Row) -> Iterator[Fault]:
            if other := by_key.get((row.normalized_prompt, row.context, *reversed(row.answers))):
                detail = f"prefers what {self.source.unit} {other.number} rejects"
                yield Fault("conflicting_duplicate", detail)

        def find_duplicate(row: Row) -> Iterator[Fault]:
            first = by_key[(row.normalized_prompt, row.context, *row.answers)]
            if first is not row:
                yield Fault("duplicate", f"is {self.source.unit} {first.number} once more")

        self.filter(find_conflict)
        self.filter(find_duplicate)

    def drop_leaks(self, held_out: "Split") -> None:
        """Judge rows whose prompt is that of a row held out, goes on from it or begins it.

        A conversation that goes on from another quotes an answer to it.
        """
        exact, normalized = (_Leaks(held_out.rows, form) for form in (str, normalize))

        def find(row: Row) -> Iterator[Fault]:
            if leak := exact.find(row.pair.prompt):
                detail = f"{leak.how} the prompt of {held_out.source.where(leak.number)}"
                yield Fault("leaked_prompt", detail)
            elif leak := normalized.find(row.pair.prompt):
                detail = f"{leak.how} nearly the prompt of {held_out.source.where(leak.number)}"
                yield Fault("leaked_prompt_normalized", detail)

        self.filter(find)

    def hold_out(self, num: int | None, encode: Callable[[list[Row]], None]) -> "Split":
        """Move the rows of `num` prompts, chosen by hash, to a split of their own and return it.

        Each of these prompts has a good pair; those that have none and come before the last of them
        move too. A prompt that goes on from another's (and quotes an answer to it) goes with that
        one.

        Args:
            num: how many prompts; None: `NUM_EVAL`, or a fifth of few.
            encode: tokenizes rows, and leaves in them what is wrong with them.

        Raises:
            UserError: there are not more prompts than that, or not as many with a good pair.
        """
        by_root = self._by_root()
        ranked = sorted(by_root)
        num = num or self._num_by_default(len(ranked))
        self._check_enough(len(ranked), num, "")
        moved: list[bytes] = []
        num_good = 0
        while num_good < num and len(moved) < len(ranked):
            block = ranked[len(moved) : len(moved) + num - num_good]
            encode([row for root in block for row in by_root[root]])
            num_good += sum(any(map(self._is_good, by_root[root])) for root in block)
            moved += block
        self._check_enough(num_good + len(ranked) - len(moved), num, " whose pairs fit")
        taken = {id(row) for root in moved for row in by_root[root]}
        rows = [row for row in self.rows if id(row) in taken]
        self.rows = [row for row in self.rows if id(row) not in taken]
        self.num_rows -= len(rows)
        return Split("held_out", self.source, self.policies, num_rows=len(rows), rows=rows)

    def _by_root(self) -> dict[bytes, list[Row]]:
        """Return the rows by the first prompt that their conversation goes on from."""
        prompts = {row.normalized_prompt for row in self.rows}
        by_root: dict[bytes, list[Row]] = defaultdict(list)
        for row in self.rows:
            root = next(
                beginning for beginning in _beginnings(row.pair.prompt) if beginning in prompts
            )
            by_root[root].append(row)
        return by_root

    def _num_by_default(self, num_prompts: int) -> int:
        if num_prompts >= NUM_EVAL * LARGEST_SHARE:
            return NUM_EVAL
        num = max(1, num_prompts // LARGEST_SHARE)
        log.info(
            "%s: %d of %d distinct prompts are held out, a fifth of them; dataset.num_eval=... "
            "holds out another number",
            self.name,
            num,
            num_prompts,
        )
        return num

    def _check_enough(self, num_prompts: int, num: int, kind: str) -> None:
        if num_prompts > num:
            return
        dropped = f" ({self.dropped} dropped)" if self.dropped else ""
        raise UserError(
            f"{num_prompts} distinct prompts{kind}{dropped} are too few to hold out {num} and "
            "train on others; lower dataset.num_eval, or give dataset.eval_split or "
            "dataset.eval_path"
        )

    def _is_good(self, row: Row) -> bool:
        return all(getattr(self.policies, fault.name, "drop") == "keep" for fault in row.found)

    def draw(self, num: int | None, encode: Callable[[list[Row]], None]) -> list[Row]:
        """Draw `num` good rows, the same rows in every run, and return all that were looked at.

        Rows are judged in the order drawn until there are enough. Those behind are not drawn: how
        many were tokenized at a time does not show.

        Args:
            num: how many; None: all.
            encode: tokenizes rows, and leaves in them what is wrong with them.

        Raises:
            UserError: the policy on a fault of a row that is drawn is to refuse.
        """
        rows = self.rows
        if num is not None and num < len(rows):
            rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
        wanted = len(rows) if num is None else num
        judged = 0
        self.rows = []
        while judged < len(rows) and len(self.rows) < wanted:
            # As many as are missing, by the share that was good so far
            share = len(self.rows) / judged if self.rows else 1.0
            block = rows[judged : judged + math.ceil((wanted - len(self.rows)) / share)]
            encode(block)
            for row in block:
                judged += 1
                despite = self.judge(row.number, row.found)
                if despite is not None:
                    row.kept_despite += despite
                    self.rows.append(row)
                if len(self.rows) == wanted:
                    break
        self.num_not_drawn = len(rows) - judged
        self.num_rows -= self.num_not_drawn
        return rows[:judged]

    def report(self) -> dict[str, Any]:
        """Return what became of the rows; `num_rows` is `num_kept` and all that was `dropped`."""
        despite = Tally()
        for row in self.rows:
            for fault in row.kept_despite:
                despite.add(fault.name, row.number, fault.detail)
        return {
            "numbered": "lines from 1" if self.source.unit == "line" else "rows from 0",
            "num_rows": self.num_rows,
            "num_kept": len(self.rows),
            "dropped": self.dropped.report(),
            "kept": despite.report(),
            "num_not_drawn": self.num_not_drawn,
            "unread_columns": sorted(self.unread),
        }


class _Leak(NamedTuple):
    """What a prompt has to do with one held out, and that row's number."""

    how: str
    number: int


class _Leaks:
    """Prompts held out, by which those that lead to them or on from them are found."""

    def __init__(self, rows: list[Row], form: Callable[[str], str]) -> None:
        self._form = form
        self._whole: dict[bytes, int] = {}
        self._begun: dict[bytes, int] = {}
        for row in rows:
            *begun, whole = _beginnings(row.pair.prompt, form)
            self._whole[whole] = row.number
            self._begun |= dict.fromkeys(begun, row.number)

    def find(self, prompt: Content) -> _Leak | None:
        """Return what a prompt has to do with one of them; None: nothing."""
        *begun, whole = _beginnings(prompt, self._form)
        if whole in self._whole:
            return _Leak("has", self._whole[whole])
        if whole in self._begun:
            return _Leak("begins", self._begun[whole])
        known = (self._whole[beginning] for beginning in begun if beginning in self._whole)
        number = next(known, None)
        return None if number is None else _Leak("goes on from", number)
