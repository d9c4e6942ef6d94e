"""The rows of a split: which rows are kept, held out or drawn.

Rows are compared with each other (repeats) and with the other split (leaks).
"""

import bisect
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orpo_lab.config.dataset import Faults
from orpo_lab.data.faults import Fault, Tally, keeps
from orpo_lab.data.files import Source
from orpo_lab.data.pairs import Content, Pair
from orpo_lab.data.rows import NO_LABEL, Row, Rows, are_in, beginnings_of, normalize
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# Places of rows among others
Places = npt.NDArray[np.intp]
# Makes the columns with which answers are checked
Checks = Callable[[Any, Pair], dict[str, Any]]

# Without `dataset.num_eval`: NUM_EVAL prompts are held out, but at most 1 / LARGEST_SHARE of all
NUM_EVAL, LARGEST_SHARE = 256, 5


@dataclass
class Split:
    """Rows of one source for one use (training or held out), and the counts of rows left out.

    `num_rows` is the number of `dropped` rows plus the number of rows in the `pool`; once rows are
    drawn, plus the number of drawn `rows`.
    """

    name: str
    source: Source
    policies: Faults
    num_rows: int = 0
    num_not_drawn: int = 0
    # Good rows that wait to be drawn, and those that are drawn
    pool: Rows = field(default_factory=Rows)
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

    def filter(self, suspects: Places, find: Callable[[int], Iterable[Fault]]) -> None:
        """Keep or drop rows of the pool by the faults that `find` yields for their places.

        Args:
            suspects: the places; all other rows are kept.
            find: yields the faults of the row at a place.
        """
        is_kept = np.ones(len(self.pool), bool)
        for at in suspects.tolist():
            despite = self.judge(int(self.pool.column("number")[at]), find(at))
            if despite:
                self.pool.note(at, despite)
            is_kept[at] = despite is not None
        self.pool = self.pool.select(is_kept)

    def read(
        self,
        parse: Callable[[Any, int], list[Pair]],
        find: Callable[[Pair], Iterable[Fault]],
        *,
        columns: Iterable[str] | None = None,
        checks: Checks | None = None,
    ) -> None:
        """Read the rows of the source.

        Args:
            parse: makes pairs from a raw row and its number, or raises a `Fault`.
            find: yields the faults of a pair.
            columns: the columns that a pair is read from, without those of its context. None: no
                column counts as unread (embedded rows, trees).
            checks: makes the columns with which answers are checked from a raw row and its pair.

        Raises:
            UserError: the source cannot be read, or the policy of a fault is `refuse`.
        """
        self.pool = Rows(self._read(parse, find, columns, checks))
        self.unread |= self.source.unread

    def _read(
        self,
        parse: Callable[[Any, int], list[Pair]],
        find: Callable[[Pair], Iterable[Fault]],
        columns: Iterable[str] | None,
        checks: Checks | None,
    ) -> Iterator[Row]:
        named = None if columns is None else {*columns}
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
                    yield Row(number, pair, checks(raw, pair) if checks else {}, despite)

    def drop_leaks(self, held_out: "Split") -> None:
        """Keep or drop rows whose prompt leaks a held-out prompt.

        A prompt leaks a held-out prompt if the two are the same, or if one of them is the beginning
        of the other. A longer conversation quotes an answer to the shorter one.
        """
        suspects, leaked = _find_leaks(self.pool, held_out.pool)
        quoted = [held_out.pool[at] for at in leaked.tolist()]
        exact, normalized = (_Leaks(quoted, form) for form in (str, normalize))

        def find(at: int) -> Iterator[Fault]:
            prompt = self.pool[at].pair.prompt
            if leak := exact.find(prompt):
                detail = f"{leak.how} the prompt of {held_out.source.where(leak.number)}"
                yield Fault("leaked_prompt", detail)
            elif leak := normalized.find(prompt):
                detail = f"{leak.how} nearly the prompt of {held_out.source.where(leak.number)}"
                yield Fault("leaked_prompt_normalized", detail)

        self.filter(suspects, find)

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
        roots, make_pairs = self.pool.roots(), self.pool.make_pairs()
        ranked = np.unique(roots[make_pairs])
        if len(self.pool) and not len(ranked):
            raise UserError(
                f"no prompt of {self.source.name} has a desirable and an undesirable completion, "
                "of which a held-out pair could be made; give pairs with dataset.eval_path or "
                "dataset.eval_split (columns prompt, chosen and rejected)"
            )
        num = num or self._num_by_default(len(ranked))
        self._check_enough(len(ranked), num, "")
        # The rank of each row's root, [N]; a root of which no pair can be made has none
        ranks = np.where(are_in(roots, ranked), np.searchsorted(ranked, roots), len(ranked))
        num_moved = num_good = 0
        unfit = Tally()
        while num_good < num and num_moved < len(ranked):
            upto = min(num_moved + num - num_good, len(ranked))
            (block,) = np.nonzero((num_moved <= ranks) & (ranks < upto))
            pairs = paired(self.pool.select(block))
            rows = list(pairs)
            encode(rows)
            pairs.keep(rows)
            spoilt = [self._spoils(row) for row in rows]
            for row, fault in zip(rows, spoilt, strict=True):
                if fault:
                    unfit.add(fault.name, row.number, fault.detail)
            good = pairs.column("prompt")[[fault is None for fault in spoilt]]
            num_good += len(np.unique(ranks[are_in(self.pool.column("prompt"), good)]))
            num_moved = upto
        self._check_enough(
            num_good + len(ranked) - num_moved,
            num,
            f" of {len(ranked)} whose pairs can be used (not {unfit}; {unfit.examples()})",
        )
        if num_moved - num_good > num_good:
            log.warning(
                "WARNING: %s: %d of %d distinct prompts are taken to hold out %d, since the pairs "
                "of the others cannot be used (%s; %s)",
                self.name,
                num_moved,
                len(ranked),
                num_good,
                unfit,
                unfit.examples(),
            )
        is_moved = ranks < num_moved
        held_out = paired(self.pool.select(is_moved))
        self.pool = self.pool.select(~is_moved)
        self.num_rows -= int(is_moved.sum())
        if len(held_out) != is_moved.sum():
            log.info("%d rows with a label make %d held-out pairs", is_moved.sum(), len(held_out))
        return Split("held_out", self.source, self.policies, len(held_out), pool=held_out)

    def make_pairs(self) -> None:
        """Make pairs of single completions: see `paired`; pairs stay as they are.

        Raises:
            UserError: no prompt has completions of both kinds.
        """
        pairs = paired(self.pool)
        if pairs is self.pool:
            return
        num = len(self.pool)
        if not len(pairs):
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
        self.pool = pairs

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
        lower = "set a lower dataset.num_eval, or " if num_prompts > 1 else ""
        raise UserError(
            f"{num_prompts} distinct prompts{kind}{dropped} are too few to hold out {num} and "
            f"train on others; {lower}give dataset.eval_split or dataset.eval_path"
        )

    def _spoils(self, row: Row) -> Fault | None:
        """Return the fault for which a tokenized row is dropped or refused; None: there is none."""
        policies = ((getattr(self.policies, fault.name, "drop"), fault) for fault in row.found)
        return next((fault for policy, fault in policies if policy != "keep"), None)

    def draw(
        self,
        num: int | None,
        encode: Callable[[list[Row]], None],
        *,
        in_drawn_order: bool = False,
    ) -> list[Row]:
        """Draw `num` good rows, the same rows in every run, and return all rows that were judged.

        Rows are judged in a drawn order until there are enough good ones. The rows after that are
        not judged, so the result does not depend on how many rows are tokenized at a time.

        Args:
            num: number of rows to draw; None: all rows.
            encode: tokenizes rows, and writes the faults it finds into the rows.
            in_drawn_order: whether all rows, too, come in the drawn order, so that the first of
                them are those that a smaller number would draw.

        Raises:
            UserError: a judged row has a fault whose policy is `refuse`.
        """
        order = np.arange(len(self.pool))
        if in_drawn_order or (num is not None and num < len(order)):
            order = np.random.default_rng(0).permutation(len(order))
        wanted = len(order) if num is None else num
        judged: list[Row] = []
        while len(judged) < len(order) and len(self.rows) < wanted:
            # As many rows as will give the missing good rows, at the share of good rows so far
            share = len(self.rows) / len(judged) if self.rows else 1.0
            upto = len(judged) + math.ceil((wanted - len(self.rows)) / share)
            block = [self.pool[at] for at in order[len(judged) : upto].tolist()]
            encode(block)
            for row in block:
                judged.append(row)
                despite = self.judge(row.number, row.found)
                if despite is not None:
                    row.kept_despite += despite
                    self.rows.append(row)
                if len(self.rows) == wanted:
                    break
        self.num_not_drawn = len(order) - len(judged)
        self.num_rows -= self.num_not_drawn
        return judged

    def cut(self, num: int) -> None:
        """Keep the first `num` of the drawn rows; the others count as not drawn."""
        num_cut = max(0, len(self.rows) - num)
        del self.rows[num:]
        self.num_not_drawn += num_cut
        self.num_rows -= num_cut

    def report(self) -> dict[str, Any]:
        """Return the counts of rows kept, dropped and not drawn, as in `data_report.json`.

        `num_rows` is `num_kept` plus the number of `dropped` rows.
        """
        despite = Tally()
        for row in self.rows:
            for fault in row.kept_despite:
                despite.add(fault.name, row.number, fault.detail)
        return {
            "numbered": self.source.numbered,
            "num_rows": self.num_rows,
            "num_kept": len(self.rows),
            "dropped": self.dropped.report(self.source.listed),
            "kept": despite.report(self.source.listed),
            "num_not_drawn": self.num_not_drawn,
            "unread_columns": sorted(self.unread),
        }


def drop_repeats(splits: Sequence[Split]) -> None:
    """Keep or drop pairs that repeat another pair, or that contradict another pair.

    Two pairs contradict each other if each prefers the answer that the other rejects. Of pairs that
    repeat each other the first one is kept, in the order of the splits and of their rows.
    """
    if not splits:
        return
    pools = [split.pool for split in splits]
    pairs = np.concatenate([pool.column("pair") for pool in pools])
    swapped = np.concatenate([pool.column("swapped") for pool in pools])
    order = np.argsort(pairs, kind="stable")
    first_with = np.searchsorted(pairs, [pairs, swapped], sorter=order)
    first, other = order[np.minimum(first_with, len(order) - 1)] if len(order) else first_with
    is_repeat = first != np.arange(len(order))
    is_conflict = pairs[other] == swapped
    starts = np.cumsum([0, *map(len, pools)]).tolist()

    def said(at: int, by: Split) -> str:
        """Return the name of the row at a place among all rows."""
        of = bisect.bisect(starts, at) - 1
        number = int(pools[of].column("number")[at - starts[of]])
        source = splits[of].source
        return source.briefly(number) if source is by.source else source.where(number)

    for split, (start, end) in zip(splits, itertools.pairwise(starts), strict=True):

        def find(at: int, split: Split = split, start: int = start) -> Iterator[Fault]:
            if is_conflict[start + at]:
                detail = f"prefers what {said(other[start + at], split)} rejects"
                yield Fault("conflicting_duplicate", detail)
            if is_repeat[start + at]:
                yield Fault("duplicate", f"is {said(first[start + at], split)} once more")

        (suspects,) = np.nonzero((is_conflict | is_repeat)[start:end])
        split.filter(suspects, find)


def paired(rows: Rows) -> Rows:
    """Return rows as pairs, in their order; what is a pair already stays as it is.

    The single completions of a prompt make pairs: the first desirable one and the first that is
    not, and so on. What is left over makes none.
    """
    if not len(rows) or NO_LABEL in rows.column("label"):
        return rows
    by_prompt: dict[bytes, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for at, (asked, label) in enumerate(
        zip(rows.column("asked").tolist(), rows.column("label").tolist(), strict=True)
    ):
        by_prompt[asked][label].append(at)
    return Rows(
        _pair_of(rows[good], rows[bad])
        for bads, goods in by_prompt.values()
        for good, bad in zip(goods, bads, strict=False)
    )


def _pair_of(good: Row, bad: Row) -> Row:
    """Return the pair that a desirable and an undesirable completion of a prompt make."""
    pair = replace(good.pair, rejected=bad.pair.rejected, label=None)
    return Row(good.number, pair, good.checks, good.kept_despite + bad.kept_despite)


def _find_leaks(rows: Rows, held_out: Rows) -> tuple[Places, Places]:
    """Return the places of rows that leak a held-out prompt, and those of the prompts they leak.

    Prompts are compared in the form of `normalize`. What leaks exactly leaks in that form too.
    """
    (begun, owners), (held_begun, held_owners) = rows.begun(), held_out.begun()
    whole, held_whole = rows.column("prompt"), held_out.column("prompt")
    leaks = are_in(whole, held_whole) | are_in(whole, held_begun)
    leaks[owners[are_in(begun, held_whole)]] = True
    leaked = are_in(held_whole, whole) | are_in(held_whole, begun)
    leaked[held_owners[are_in(held_begun, whole)]] = True
    return np.flatnonzero(leaks), np.flatnonzero(leaked)


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
            *begun, whole = beginnings_of(row.pair.prompt, form)
            self._whole[whole] = row.number
            self._begun |= dict.fromkeys(begun, row.number)

    def find(self, prompt: Content) -> _Leak | None:
        """Return how a prompt leaks a held-out prompt; None: it leaks none."""
        *begun, whole = beginnings_of(prompt, self._form)
        if whole in self._whole:
            return _Leak("has", self._whole[whole])
        if whole in self._begun:
            return _Leak("begins", self._begun[whole])
        known = (self._whole[beginning] for beginning in begun if beginning in self._whole)
        number = next(known, None)
        return None if number is None else _Leak("goes on from", number)
