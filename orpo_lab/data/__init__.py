"""Preference data: rows -> pairs -> token ids, with every fault counted and reported.

A row passes through `sources` and `files` (raw rows), `forms` or `trees` (prompt, chosen and
rejected, as in `pairs`), `messages` (strings of a chat model become messages), `rows` and `splits`
(repeated rows and held-out rows), `render` (the chat template, applied by `template`) and `encode`
(token ids). `part` leads the rows of one source through these, and `mixture` says how much each
source of a mixture gives. `right_answers` says which greedy answers are right, by one of the
`checkers`. Anything wrong with a row is a `Fault`; `dataset.faults` says what happens to the row.
`warn` logs what is not a fault of a row, but may not be what the user expects.
"""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from orpo_lab.config.dataset import Dataset
from orpo_lab.config.mixture import MixtureDataset
from orpo_lab.data import length_bias, mixture, right_answers, template
from orpo_lab.data.encode import Encoder
from orpo_lab.data.mixture import SOURCE
from orpo_lab.data.part import Drawn, Part, Watch, fingerprint
from orpo_lab.data.splits import NUM_EVAL, drop_repeats
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Tokenized pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, and texts to read.

    Held-out rows also have the columns with which answers are checked; see `right_answers`.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]

    @cached_property
    def length_guess(self) -> length_bias.Array | None:
        """Whether a guess by length alone is right at each held-out pair, [N].

        See `length_bias.guess`. It is computed once, since every evaluation asks for it.
        """
        return length_bias.guess(self.train, self.held_out)

    def save(self, folder: Path) -> None:
        """Write the pairs and their report to a folder."""
        self.train.save_to_disk(folder / "train")
        self.held_out.save_to_disk(folder / "held_out")
        (folder / "data.json").write_text(json.dumps({"report": self.report}))

    @classmethod
    def restore(cls, folder: Path) -> "Data":
        """Read what `save` has written."""
        train, held_out = (
            datasets.load_from_disk(str(folder / name)) for name in ("train", "held_out")
        )
        return cls(train, held_out, json.loads((folder / "data.json").read_text())["report"])


def load(
    config: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    today: date | None = None,
    makes_pairs: bool = False,
    watch: Watch | None = None,
    num_idle: int = 1,
) -> Data:
    """Read, check and tokenize the training pairs and the held-out pairs.

    Args:
        config: the source of the rows, and what happens to rows with a fault.
        tokenizer: the model's tokenizer.
        today: the date for chat templates that ask for a date; None: the date of the clock.
        makes_pairs: whether single completions with a label are made into pairs, for a method that
            needs pairs.
        watch: called for each split with what `encode_row` returned for the rows that were judged;
            of a mixture, for each split of each source.
        num_idle: the number of cores that have nothing else to do; see `Encoder`.

    Raises:
        UserError: the source cannot be read, a row has a fault that `config.faults` refuses, no
            pair is left, or the model's chat template does not do what the configuration asks for.
    """
    template.check_kwargs(tokenizer, config.template_kwargs)
    encoder = Encoder(config, tokenizer, today or date.today(), num_idle=num_idle)
    named: dict[str | None, Dataset] = {None: config}
    if isinstance(config, MixtureDataset):
        named = {name: config.of(name) for name in config.sources}
    parts = [Part(name, part, tokenizer, watch) for name, part in named.items()]
    drop_repeats([part.train for part in parts])
    drop_repeats([part.held_out for part in parts if part.held_out])
    held_out = [part.hold_out(encoder) for part in parts]
    for of_train, of_held_out in itertools.permutations(range(len(parts)), 2):
        parts[of_train].train.drop_leaks(held_out[of_held_out])
    if makes_pairs or isinstance(config, MixtureDataset):
        for part in parts:
            part.make_pairs()
    if isinstance(config, MixtureDataset):
        # Pairs that were made of single completions may be pairs of another source
        drop_repeats([part.train for part in parts])
        train, train_report = _mix_train(config, parts, encoder)
    else:
        train, train_report = parts[0].draw("train", config.num_train, encoder)
    drawn = [part.draw("held_out", part.config.num_eval or NUM_EVAL, encoder) for part in parts]
    held_out_pairs, held_out_report = drawn[0]
    if isinstance(config, MixtureDataset):
        held_out_pairs, held_out_report = _mix(parts, drawn)
    for part in parts:
        part.say_messages()
    right_answers.check_answered(held_out_pairs, config.num_generations)
    held_out_report |= right_answers.fingerprint(config, held_out_pairs)
    return Data(train, held_out_pairs, {"train": train_report, "held_out": held_out_report})


def _mix_train(config: MixtureDataset, parts: Sequence[Part], encoder: Encoder) -> Drawn:
    """Return the training pairs of a mixture, each source by its share or count, and the report."""
    shares = mixture.Shares(config)
    for part in parts:
        part.judge("train", shares.to_judge(part.name), encoder, in_drawn_order=True)
    nums = shares.to_take({part.name: len(part.train.rows) for part in parts})
    drawn = []
    for part in parts:
        part.train.cut(nums[part.name])
        pairs, report = part.encoded("train", encoder)
        # A source that may repeat its pairs goes over them again, in the same order
        again = np.resize(np.arange(len(pairs)), nums[part.name])
        drawn.append((pairs.select(again), report | {"num_repeats": len(again) - len(pairs)}))
    return _mix(parts, drawn)


def _mix(parts: Sequence[Part], drawn: Sequence[Drawn]) -> Drawn:
    """Return the pairs of all sources, mixed evenly, and their report with that of each source."""
    named = [
        pairs.add_column(SOURCE, [part.name] * len(pairs))
        for part, (pairs, _) in zip(parts, drawn, strict=True)
    ]
    order = mixture.interleave(list(map(len, named)))
    mixed = datasets.concatenate_datasets(named).select(order)
    reports = {part.name: report for part, (_, report) in zip(parts, drawn, strict=True)}
    return mixed, mixture.add_up(reports) | {"fingerprint": fingerprint(mixed)}


def without_undesirable(data: Data) -> Data:
    """Return the data without training rows that have no chosen completion, and log their number.

    A method that learns from chosen completions alone has no use for such rows.
    """
    indices = [at for at, ids in enumerate(data.train["chosen_ids"]) if ids]
    num = len(data.train) - len(indices)
    if not num:
        return data
    if not indices:
        raise UserError("no training row has a desirable completion, and method=sft needs some")
    log.info("train: %d undesirable completions are not trained on", num)
    return replace(data, train=data.train.select(indices))
