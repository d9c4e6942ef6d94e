"""One source of pairs while it is loaded: its two splits, from rows to token ids."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from orpo_lab.config.dataset import Dataset, OasstDataset, TableDataset
from orpo_lab.config.mixture import said_of
from orpo_lab.data import embedded, messages, right_answers, sources
from orpo_lab.data.encode import FOUND, MASKS, Encoder, special_tokens
from orpo_lab.data.files import ROWS_PER_BATCH, Source
from orpo_lab.data.forms import Reader, to_pair
from orpo_lab.data.pairs import find_faults
from orpo_lab.data.splits import Split
from orpo_lab.data.trees import Trees
from orpo_lab.data.warn import (
    warn_of_lengths,
    warn_of_losses,
    warn_of_unread,
    warn_of_unused_ending,
)
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

Name = Literal["train", "held_out"]
# Pairs as token ids, and their report
Drawn = tuple[datasets.Dataset, dict[str, Any]]
# Gets the name of a split, and all its rows that were tokenized, also those dropped then
Watch = Callable[[Name, datasets.Dataset], None]


class Part:
    """A data set, or one source of a mixture.

    Args:
        name: the name of the source; None: the data set is no mixture.
        config: the data set; of a source, what it would be on its own.
        tokenizer: the model's tokenizer.
        watch: see `data.load`.

    Raises:
        UserError: the source cannot be read, or a row has a fault that `config.faults` refuses.
    """

    train: Split
    held_out: Split | None = None
    """The held-out rows; None: none are given, and `hold_out` has not been called."""

    def __init__(
        self,
        name: str | None,
        config: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        watch: Watch | None = None,
    ) -> None:
        self.name = name or ""
        self.config = config
        self._tokenizer = tokenizer
        self._watch = watch
        self._tokens = special_tokens(tokenizer)
        self._find = partial(
            find_faults,
            special_tokens=self._tokens,
            other_turns=config.supervised == "completion",
        )
        # What the report of a split says in addition to `Split.report`
        self._about: dict[Name, dict[str, Any]] = {"train": {}, "held_out": {}}
        with self._said():
            train, held_out = sources.read(config)
            self.train = self._read("train", train)
            if held_out:
                self.held_out = self._read("held_out", held_out)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Inside this context, let errors name the keys of this source."""
        try:
            yield
        except UserError as error:
            if not self.name:
                raise
            raise UserError(f"{self.name}: {said_of(self.name, str(error))}") from error

    def _read(self, name: Name, source: Source) -> Split:
        """Return the rows of a split, each with its pair."""
        split = Split(self._said_name(name), source, self.config.faults)
        match self.config:
            case OasstDataset():
                trees = Trees(self.config)
                split.read(trees.pairs, self._find)
                self._about[name] = {"replies": trees.report()}
            case TableDataset():
                reader = Reader(self.config, of_pairs=name == "held_out")
                wrap = messages.wrapper(self.config, self._tokenizer, self._tokens)
                split.read(
                    lambda raw, number: list(map(wrap, reader.pairs(raw, number))),
                    self._find,
                    columns=reader.names.read,
                    checks=right_answers.maker(self.config),
                )
                warn_of_unread(split)
                self._about[name] = reader.report()
            case _:
                columns = sources.EMBEDDED_COLUMNS
                split.read(
                    lambda raw, _: [to_pair(raw, columns)],
                    self._find,
                    checks=lambda raw, _: {name: raw[name] for name in embedded.CHECKS},
                )
        return split

    def hold_out(self, encoder: Encoder) -> Split:
        """Return the held-out rows, which training rows then neither are nor leak."""
        with self._said():
            if self.held_out:
                self.train.drop_leaks(self.held_out)
            else:
                _check_any_left(self.train, self.train.pool)
                self.held_out = self.train.hold_out(self.config.num_eval, encoder.encode)
                self.held_out.name = self._said_name("held_out")
        return self.held_out

    def make_pairs(self) -> None:
        """Make pairs of single completions; see `Split.make_pairs`."""
        with self._said():
            self.train.make_pairs()

    def draw(self, name: Name, num: int | None, encoder: Encoder) -> Drawn:
        """Return `num` good pairs of a split as token ids, and their report; None: all."""
        self.judge(name, num, encoder)
        return self.encoded(name, encoder)

    def judge(
        self, name: Name, num: int | None, encoder: Encoder, *, in_drawn_order: bool = False
    ) -> None:
        """Draw `num` good pairs of a split; see `Split.draw`."""
        split = self._split(name)
        with self._said():
            _check_any_left(split, split.pool)
            judged = encoder.encoded(split.draw(num, encoder.encode, in_drawn_order=in_drawn_order))
            if self._watch:
                self._watch(name, judged)
            warn_of_lengths(split, judged, self.config)
            warn_of_losses(split)
            _check_any_left(split, split.rows)

    def encoded(self, name: Name, encoder: Encoder) -> Drawn:
        """Return the pairs that were drawn as token ids, and their report."""
        split = self._split(name)
        kept = encoder.encoded(split.rows)
        warn_of_unused_ending(split, kept)
        report = split.report() | {
            "num_cut": sum(kept["cut"][:]),
            "num_repeated_prompts": sum(row.pair.repeated for row in split.rows),
            "num_as_messages": sum(row.pair.wrapped for row in split.rows),
            "fingerprint": fingerprint(kept),
        }
        labels = [row.pair.label for row in split.rows]
        if None not in labels:
            report["num_desirable"] = sum(map(bool, labels))
        if name == "held_out" and isinstance(self.config, TableDataset) and self.config.checker:
            with self._said():
                report |= right_answers.report(split, kept, self.config)
        _say(split, report)
        return kept.remove_columns([*FOUND, "faults", "cut"]), report | self._about[name]

    def say_messages(self) -> None:
        """Log once how many strings became messages; see `messages.say`."""
        if isinstance(self.config, TableDataset):
            messages.say([self.train, self._split("held_out")], self.config, self._tokenizer)

    def _said_name(self, name: Name) -> str:
        return f"{self.name} {name}" if self.name else name

    def _split(self, name: Name) -> Split:
        split = self.train if name == "train" else self.held_out
        assert split is not None
        return split


def _check_any_left(split: Split, left: Sized) -> None:
    if left:
        return
    raise UserError(
        f"no {split.name} pair is left of {split.num_rows} ({split.dropped}) in "
        f"{split.source.name}; {split.dropped.examples()}; see docs/data.md for what drops a pair"
    )


def fingerprint(kept: datasets.Dataset) -> str:
    """Return the SHA-256 of the token ids, and masks, of all pairs, in their order."""
    digest = hashlib.sha256()
    masks = [name for name in MASKS if name in kept.column_names]
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", *masks]
    for batch in kept.select_columns(columns).iter(ROWS_PER_BATCH):
        for values in zip(*batch.values(), strict=True):
            digest.update(json.dumps(dict(zip(columns, values, strict=True))).encode())
    return digest.hexdigest()


def _say(split: Split, report: dict[str, Any]) -> None:
    said = [f"{entry['num']} dropped ({fault})" for fault, entry in report["dropped"].items()]
    said += [f"{entry['num']} kept in spite of {fault}" for fault, entry in report["kept"].items()]
    for key, what in (
        ("num_cut", "cut to fit"),
        ("num_repeated_prompts", "repeat their prompt in both answers (removed)"),
        ("num_not_drawn", "not drawn"),
        ("num_checkable", "whose answer can be checked"),
    ):
        if report.get(key):
            said.append(f"{report[key]} {what}")
    what = "pairs"
    if "num_desirable" in report:
        what = f"completions ({report['num_desirable']} desirable)"
    log.info("%s", ", ".join([f"{split.name}: {report['num_kept']} {what}", *said]))
