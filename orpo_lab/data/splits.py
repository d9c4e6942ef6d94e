"""The rows of a split: which rows are kept, held out or drawn.

Rows are compared with each other (repeats) and with the other split (leaks).
"""

import hashlib
import json
import logging
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from orpo_lab.config.dataset import Faults
from orpo_lab.data.faults import Fault, Tally, keeps
from orpo_lab.data.files import Source
from orpo_lab.data.pairs import Content, Pair, text_of
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# Without `dataset.num_eval`: NUM_EVAL prompts are held out, but at most 1 / LARGEST_SHARE of all
NUM_EVAL, LARGEST_SHARE = 256, 5


@dataclass(eq=False)
class Row:
    """A pair, the number of its row in the source, and the faults despite which it is kept."""

    number: int
    pair: Pair
    # Columns of the embedded rows with which an answer is checked
    checks: dict[str, Any]
    kept_despite: list[Fault] = field(default_factory=list)
    # After tokenizing: the place of the row among all tokenized rows, and the faults found then
    place: int | None = None
    found: list[Fault] = field(default_factory=list)

    @cached_property
    def normalized_prompt(self) -> bytes:
        """Digest of the prompt's text in the form of `normalize`."""
        return _digest(normalize(text_of(self.pair.prompt)))

    @cached_property
    def answers(self) -> tuple[bytes, bytes]:
        """Digests of the chosen and the rejected answer; of an answer that is not there, nothing.

        So a single completion that is desirable in one row and not in another is a contradiction.
        """
        chosen, rejected = _digest(text_of(self.pair.chosen)), _digest(text_of(self.pair.rejected))
        match self.pair.label:
            case None:
                return chosen, rejected
            case True:
                return chosen, b""
        return b"", rejected

    @cached_property
    def context(self) -> bytes:
        """Digest of the tools and documents beside the messages."""
        return _digest(json.dumps(self.pair.context, sort_keys=True))


def normalize(text: str) -> str:
    """Return a text without differences in case, white space and Unicode form (NFKC)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _beginnings(prompt: Content, form: Callable[[str], str] = normalize) -> Iterator[bytes]:
    """Yield the digest of every beginning of a conversation, shortest first, the whole one last.

    A beginning is the first messages of the conversation. A string has only itself.

    Args:
        prompt: the conversation.
        form: applied to each text before its digest is computed.
    """
    if isinstance(prompt, str):
        yield _digest(form(prompt))
    else:
        for size in range(1, len(prompt) + 1):
            yield _digest(form(text_of(prompt[:size])))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@dataclass
class Split:
    """Rows of one source for one use (training or held out), and the counts of rows left out.

    At any time `num_rows` is the number of kept `rows` plus the number of `dropped` rows.
    """

    name: str
    source: Source
    policies: Faults
    num_rows: int = 0
    num_not_drawn: int = 0
    rows: list[Row] = field(default_factory=list)
    dropped: Tally = field(default_factory=Tally)
    # Columns that the source does not read, or that hold a value which a row's pair does not use
    unread: set[str] = field(default_factory=set)

    def judge(self, number: int, faults: Iterable[Fault]) -> list[Fault] | None:
        """Return the faults despite which a row is kept; None: the row is dropped, and counted.

        Raises:
            UserError: the policy of one of the faults is `refuse`.
        """
        kept_despite = []
        for fault in faults:
            if not keeps(fault, self.source.where(number), self.policies):
                self.dropped.add(fault.name, number, fault.detail)
                return None
            kept_despite.append(fault)
        return kept_despite

    def filter(self, find: Callable[[Row], Iterable[Fault]]) -> None:
        """Keep or drop every row by the faults that `find` yields for the row."""
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
        """Read the rows of the source.

        Args:
            parse: makes pairs from a raw row and its number, or raises a `Fault`.
            find: yields the faults of a pair.
            columns: the columns that a pair is read from, without those of its context. None: no
                column counts as unread (embedded rows, trees).
            checks: columns of the raw row to keep together with the pair.

        Raises:
            UserError: the source cannot be read, or the policy of a fault is `refuse`.
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
        """Keep or drop pairs that repeat another pair, or that contradict another pair.

        Two pairs contradict each other if each prefers the answer that the other rejects.
        """
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
        """Keep or drop rows whose prompt leaks a held-out prompt.

        A prompt leaks a held-out prompt if the two are the same, or if one of them is the beginning
        of the other. A longer conversation quotes an answer to the shorter one.
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
        """Move the rows of `num` prompts, chosen by hash, to a new split, and return that split.

        Only prompts with a good pair count. Prompts without a good pair that come earlier in the
        order of hashes move too. A longer conversation, which goes on from another prompt and
        quotes an answer to it, moves together with that prompt.

        Single completions are held out as pairs: see `paired`.

        Args:
            num: number of prompts; None: `NUM_EVAL`, or a fifth if there are few prompts.
            encode: tokenizes rows, and writes the faults it finds into the rows.

        Raises:
            UserError: there are too few prompts, or too few prompts with a good pair.
        """
        by_root = self._by_root()
        pairs = {root: paired(rows) for root, rows in by_root.items()}
        ranked = sorted(root for root in by_root if pairs[root])
        if by_root and not ranked:
            raise UserError(
                f"no prompt of {self.source.name} has a desirable and an undesirable completion, "
                "of which a held-out pair could be made; give pairs with dataset.eval_path or "
                "dataset.eval_split (columns prompt, chosen and rejected)"
            )
        num = num or self._num_by_default(len(ranked))
        self._check_enough(len(ranked), num, "")
        moved: list[bytes] = []
        num_good = 0
        while num_good < num and len(moved) < len(ranked):
            block = ranked[len(moved) : len(moved) + num - num_good]
            encode([row for root in block for row in pairs[root]])
            num_good += sum(any(map(self._is_good, pairs[root])) for root in block)
            moved += block
        self._check_enough(num_good + len(ranked) - len(moved), num, " whose pairs fit")
        taken = {id(row) for root in moved for row in by_root[root]}
        rows = [row for row in self.rows if id(row) in taken]
        self.rows = [row for row in self.rows if id(row) not in taken]
        self.num_rows -= len(rows)
        held_out = paired(rows)
        split = Split("held_out", self.source, self.policies, len(held_out), rows=held_out)
        if held_out != rows:
            log.info("%d rows with a label make %d held-out pairs", len(rows), len(held_out))
        return split

    def make_pairs(self) -> None:
        """Make pairs of single completions: see `paired`; pairs stay as they are.

        Raises:
            UserError: no prompt has completions of both kinds.
        """
        pairs = paired(self.rows)
        if pairs is self.rows:
            return
        num = len(self.rows)
        if not pairs:
            raise UserError(
                f"no {self.name} prompt of {self.source.name} has a desirable and an undesirable "
                "completion, of which a pair could be made; use method=kto or method=sft, which "
                "learn from single completions"
            )
        log.info(
            "%s: %d completions with a label make %d pairs, since the method needs pairs; %d have "
            "no counterpart and are not used (method=kto learns from all of them)",
            self.name,
            num,
            len(pairs),
            num - 2 * len(pairs),
        )
        self.num_rows += len(pairs) - num
        self.rows = pairs

    def _by_root(self) -> dict[bytes, list[Row]]:
        """Return the rows by their root: the shortest prompt that begins their conversation."""
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
        """Draw `num` good rows, the same rows in every run, and return all rows that were judged.

        Rows are judged in a drawn order until there are enough good ones. The rows after that are
        not judged, so the result does not depend on how many rows are tokenized at a time.

        Args:
            num: number of rows to draw; None: all rows.
            encode: tokenizes rows, and writes the faults it finds into the rows.

        Raises:
            UserError: a judged row has a fault whose policy is `refuse`.
        """
        rows = self.rows
        if num is not None and num < len(rows):
            rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
        wanted = len(rows) if num is None else num
        judged = 0
        self.rows = []
        while judged < len(rows) and len(self.rows) < wanted:
            # As many rows as will give the missing good rows, at the share of good rows so far
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
        """Return the counts of rows kept, dropped and not drawn, as in `data_report.json`.

        `num_rows` is `num_kept` plus the number of `dropped` rows.
        """
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


def paired(rows: list[Row]) -> list[Row]:
    """Return rows as pairs, in their order; what is a pair already stays as it is.

    The single completions of a prompt make pairs: the first desirable one and the first that is
    not, and so on. What is left over makes none.
    """
    by_prompt: dict[str, dict[bool, list[Row]]] = defaultdict(lambda: {True: [], False: []})
    for row in rows:
        if row.pair.label is None:
            return rows
        key = json.dumps([row.pair.prompt, row.pair.context], sort_keys=True)
        by_prompt[key][row.pair.label].append(row)
    return [
        Row(
            good.number,
            replace(good.pair, rejected=bad.pair.rejected, label=None),
            good.checks,
            good.kept_despite + bad.kept_despite,
        )
        for of_prompt in by_prompt.values()
        for good, bad in zip(of_prompt[True], of_prompt[False], strict=False)
    ]


class _Leak(NamedTuple):
    """How a prompt leaks a held-out prompt, and the number of the held-out row."""

    how: str
    number: int


class _Leaks:
    """Held-out prompts, in some form; finds whether another prompt leaks one of them."""

    def __init__(self, rows: list[Row], form: Callable[[str], str]) -> None:
        self._form = form
        self._whole: dict[bytes, int] = {}
        self._begun: dict[bytes, int] = {}
        for row in rows:
            *begun, whole = _beginnings(row.pair.prompt, form)
            self._whole[whole] = row.number
            self._begun |= dict.fromkeys(begun, row.number)

    def find(self, prompt: Content) -> _Leak | None:
        """Return how a prompt leaks a held-out prompt; None: it leaks none."""
        *begun, whole = _beginnings(prompt, self._form)
        if whole in self._whole:
            return _Leak("has", self._whole[whole])
        if whole in self._begun:
            return _Leak("begins", self._begun[whole])
        known = (self._whole[beginning] for beginning in begun if beginning in self._whole)
        number = next(known, None)
        return None if number is None else _Leak("goes on from", number)
