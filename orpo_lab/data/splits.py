"""The rows of a split: what of them is kept, what they share with each other and with the other
split, and how a part of them is held out or drawn.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from orpo_lab.config import Faults
from orpo_lab.data.faults import Fault, Tally, keeps
from orpo_lab.data.files import Source
from orpo_lab.data.pairs import Content, Pair, text_of
from orpo_lab.errors import UserError


@dataclass(eq=False)
class Row:
    """A pair, its row's number in the source, and the faults it was kept in spite of."""

    number: int
    pair: Pair
    # Columns of the embedded rows that say how an answer is checked
    checks: dict[str, Any]
    kept_despite: list[Fault] = field(default_factory=list)

    @cached_property
    def prompt(self) -> bytes:
        """Digest of what the prompt says."""
        return _digest(text_of(self.pair.prompt))

    @cached_property
    def normalized_prompt(self) -> bytes:
        """The same, whatever its case, white space and Unicode form."""
        return _digest(normalize(text_of(self.pair.prompt)))

    @cached_property
    def answers(self) -> tuple[bytes, bytes]:
        """Digests of chosen and rejected."""
        return _digest(text_of(self.pair.chosen)), _digest(text_of(self.pair.rejected))


def normalize(text: str) -> str:
    """Return a text without what case, white space and Unicode form (NFKC) make of it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _beginnings(prompt: Content) -> Iterator[bytes]:
    """Yield the digest of every normalized beginning of a conversation, itself included."""
    if isinstance(prompt, str):
        yield _digest(normalize(prompt))
    else:
        for size in range(1, len(prompt) + 1):
            yield _digest(normalize(text_of(prompt[:size])))


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
        checks: tuple[str, ...] = (),
    ) -> None:
        """Read the source's rows.

        Args:
            parse: makes pairs of a raw row and its number, or raises its `Fault`.
            find: yields what is wrong with a pair.
            checks: columns of the raw row to keep beside the pair.

        Raises:
            UserError: the source cannot be read, or the policy on a fault is to refuse.
        """
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
                self.num_rows += 1
                despite = self.judge(number, find(pair))
                if despite is not None:
                    extra = {name: raw[name] for name in checks}
                    self.rows.append(Row(number, pair, extra, despite))

    def drop_repeats(self) -> None:
        """Judge pairs that contradict another by preferring its rejected answer, and repeats."""
        by_key: dict[tuple[bytes, ...], Row] = {}
        for row in self.rows:
            by_key.setdefault((row.normalized_prompt, *row.answers), row)

        def find_conflict(row: Row) -> Iterator[Fault]:
            if other := by_key.get((row.normalized_prompt, *reversed(row.answers))):
                detail = f"prefers what {self.source.unit} {other.number} rejects"
                yield Fault("conflicting_duplicate", detail)

        def find_duplicate(row: Row) -> Iterator[Fault]:
            first = by_key[(row.normalized_prompt, *row.answers)]
            if first is not row:
                yield Fault("duplicate", f"is {self.source.unit} {first.number} once more")

        self.filter(find_conflict)
        self.filter(find_duplicate)

    def drop_leaks(self, held_out: "Split") -> None:
        """Judge rows whose prompt is also that of a row held out."""
        exact = {row.prompt: row.number for row in held_out.rows}
        normalized = {row.normalized_prompt: row.number for row in held_out.rows}

        def find(row: Row) -> Iterator[Fault]:
            if (number := exact.get(row.prompt)) is not None:
                detail = f"has the prompt of {held_out.source.where(number)}"
                yield Fault("leaked_prompt", detail)
            elif (number := normalized.get(row.normalized_prompt)) is not None:
                detail = f"has nearly the prompt of {held_out.source.where(number)}"
                yield Fault("leaked_prompt_normalized", detail)

        self.filter(find)

    def hold_out(self, num: int) -> "Split":
        """Move the rows of `num` prompts, chosen by hash, to a split of their own and return it.

        A prompt that goes on from another's (and quotes an answer to it) goes with that one.

        Raises:
            UserError: there are not more prompts than that.
        """
        prompts = {row.normalized_prompt for row in self.rows}
        roots = [
            next(one for one in _beginnings(row.pair.prompt) if one in prompts) for row in self.rows
        ]
        ranked = sorted(set(roots))
        if len(ranked) <= num:
            dropped = f" ({self.dropped} dropped)" if self.dropped else ""
            raise UserError(
                f"{len(ranked)} distinct prompts{dropped} are too few to hold out "
                f"dataset.num_eval={num}; lower it, or give dataset.eval_split or dataset.eval_path"
            )
        sides: tuple[list[Row], list[Row]] = ([], [])
        for row, root in zip(self.rows, roots, strict=True):
            sides[root < ranked[num]].append(row)
        self.rows, moved = sides
        self.num_rows -= len(moved)
        return Split("held_out", self.source, self.policies, num_rows=len(moved), rows=moved)

    def draw(self, num: int | None) -> None:
        """Leave `num` rows drawn over all of them, the same ones in every run; None: all."""
        if num is None or num >= len(self.rows):
            return
        self.num_not_drawn = len(self.rows) - num
        self.num_rows -= self.num_not_drawn
        self.rows = [
            self.rows[at] for at in np.random.default_rng(0).permutation(len(self.rows))[:num]
        ]

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
        }
