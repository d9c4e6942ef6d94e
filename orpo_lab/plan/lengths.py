"""How long the pairs are that a plan counts with: measured, given, or assumed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from orpo_lab.config import Config
from orpo_lab.config.dataset import EmbeddedDataset, FileDataset, expand
from orpo_lab.config.model import local_path
from orpo_lab.errors import UserError, one_line

if TYPE_CHECKING:
    from orpo_lab.data import Data
    from orpo_lab.plan.shapes import Sizes

log = logging.getLogger(__name__)

KEYS = ("prompt", "chosen", "rejected")
# Rows that are tokenized for a plan, and bytes of files that are read for them
NUM_ROWS = 96
MAX_BYTES = 20_000_000


@dataclass(frozen=True)
class Lengths:
    """Pairs whose lengths stand for all pairs of a run."""

    pairs: Sequence["Sizes"]
    """Numbers of tokens of prompt, chosen and rejected completion; the prompt counts once."""
    num_train: int | None
    """Number of training pairs; None: not known."""
    num_held_out: int
    source: str
    """measured, given or assumed, with a reason."""

    def batch(self, size: int) -> list["Sizes"]:
        """Return as many pairs as a step has."""
        return [self.pairs[i % len(self.pairs)] for i in range(size)]

    def widest(self, size: int, budget: int) -> list["Sizes"]:
        """Return the pairs of the widest micro-batch that a step can have: the longest that fit."""
        longest = sorted(self.pairs, key=lambda sizes: -sum(sizes))
        row: list[Sizes] = []
        for i in range(size):
            sizes = longest[i % len(longest)] if i < len(longest) else longest[-1]
            if not row or sum(map(sum, row)) + sum(sizes) <= budget:
                row.append(sizes)
        return row

    @property
    def mean_tokens(self) -> float:
        """The mean number of tokens of a pair."""
        return sum(map(sum, self.pairs)) / len(self.pairs)


def given(text: str, config: Config) -> Lengths:
    """Return the lengths of `--lengths prompt=200,chosen=300,rejected=300,pairs=10000`.

    Raises:
        UserError: a length is missing, unknown, no number or above `dataset.max_length`.
    """
    try:
        values = {key: int(value) for key, _, value in (p.partition("=") for p in text.split(","))}
    except ValueError as error:
        raise UserError(f"--lengths {text}: {one_line(error)}") from error
    if not set(KEYS) <= set(values) <= {*KEYS, "pairs"} or min(values.values()) < 1:
        raise UserError(
            f"--lengths {text}: give prompt=, chosen= and rejected= in tokens, and pairs= if the "
            "number of training pairs is known"
        )
    prompt, chosen, rejected = (values[key] for key in KEYS)
    if prompt + max(chosen, rejected) > config.dataset.max_length:
        raise UserError(
            f"--lengths {text}: prompt and completion are longer than dataset.max_length="
            f"{config.dataset.max_length}, and no pair is; raise it, or give lower lengths"
        )
    num = values.get("pairs", config.dataset.num_train)
    return Lengths([(prompt, chosen, rejected)], num, _num_held_out(config), "given by --lengths")


def assumed(config: Config, why: str) -> Lengths:
    """Return lengths as if every pair were as long as `dataset.max_length` allows."""
    longest = config.dataset.max_length
    prompt = min(config.dataset.max_prompt_length, longest // 2)
    completion = longest - prompt
    return Lengths(
        [(prompt, completion, completion)],
        config.dataset.num_train,
        _num_held_out(config),
        f"assumed: every pair as long as dataset.max_length={longest} allows ({why})",
    )


def _num_held_out(config: Config) -> int:
    from orpo_lab.data.splits import NUM_EVAL

    return config.dataset.num_eval or NUM_EVAL


def of(config: Config, own: PretrainedConfig) -> Lengths:
    """Return the lengths of a run's pairs: measured where the data are at hand and small."""
    files = _files(config)
    if files is None or sum(file.stat().st_size for file in files) > MAX_BYTES:
        why = "the data are not at hand" if files is None else "the data are large"
        return assumed(config, f"{why}; --lengths gives them")
    from orpo_lab import data, progress
    from orpo_lab.model.tokenizer import load_tokenizer

    few = replace(config.dataset, num_train=NUM_ROWS, num_eval=1)
    logger = logging.getLogger("orpo_lab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        tokenizer = load_tokenizer(config.model, own)
        makes_pairs = not config.method.reads_unpaired
        with progress.titled("", is_shared=True):  # which shows no bar
            read = data.load(few, tokenizer, makes_pairs=makes_pairs)
    except UserError as error:
        return assumed(config, f"the data cannot be read: {error}")
    finally:
        logger.setLevel(level)
    found = of_data(read)
    asked, report = config.dataset.num_train, read.report["train"]
    num_pairs = report["num_kept"] + report["num_not_drawn"]
    # Embedded pairs are as many as are asked for
    num_train = min(asked or num_pairs, num_pairs) if files else asked
    return replace(
        found,
        num_train=num_train,
        num_held_out=_num_held_out(config),
        source=f"measured on {len(found.pairs)} pairs",
    )


def of_data(pairs: "Data") -> Lengths:
    """Return the lengths of loaded pairs."""
    columns = (pairs.train[f"{key}_ids"] for key in KEYS)
    sizes = [(len(p), len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
    return Lengths(sizes, len(sizes), len(pairs.held_out), "measured")


def _files(config: Config) -> list[Path] | None:
    """Return the files of a run's training data; None: the data are not in files of this machine.

    The embedded data are in no file.
    """
    match config.dataset:
        case EmbeddedDataset():
            return []
        case FileDataset(train_path=paths):
            listed = paths if isinstance(paths, list) else [paths]
            files = [Path(file) for path in listed for file in expand(str(local_path(path)))]
            if files and all(file.is_file() for file in files):
                return files
    return None


def without_rejected(lengths: Lengths) -> Lengths:
    """Return the lengths for a method that reads no rejected completion.

    Single completions that are rejected are left out, as `data.without_undesirable` does.
    """
    pairs = [(p, c, 0) for p, c, _ in lengths.pairs if c]
    num = lengths.num_train
    if num is not None:
        num = round(num * len(pairs) / len(lengths.pairs))
    return replace(lengths, pairs=pairs, num_train=num)
