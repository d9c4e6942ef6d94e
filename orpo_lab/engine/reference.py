"""The reference of DPO and its relatives: log-probabilities of the model before training.

They are computed once, before the first step, from the model that the run starts from. So no second
model is ever in memory. Jobs of a sweep share them, and checkpoints hold them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from orpo_lab import methods
from orpo_lab.config import Config
from orpo_lab.config.identity import start_of
from orpo_lab.data import Data
from orpo_lab.engine import mismatched, scoring, shared_prefix
from orpo_lab.engine.base import MISMATCHED, REFERENCE
from orpo_lab.engine.shared_prefix import SharedPrefix
from orpo_lab.errors import NonFiniteError
from orpo_lab.model.causal import CausalModel
from orpo_lab.training import tensors
from orpo_lab.training.files import Files
from orpo_lab.training.sharded import devices_of

FILE = "reference.pt"

# For each split the sums of log-probabilities of chosen and rejected tokens, [N, 2], in nats. Where
# the pairs have mismatched completions, the sums of these follow, [N, 4]
References = dict[str, Tensor]


def splits_of(config: Config) -> tuple[str, ...]:
    """Return the fields of `Data` whose loss a run computes; these pairs need a reference.

    The evaluations before and after training read no reference.
    """
    return ("train", "held_out") if config.train.eval_steps else ("train",)


def name_of(config: Config) -> str:
    """Return a name of a run's references that is the same for the jobs of a sweep that share them.

    The method needs a reference.
    """
    parts = ["reference", *splits_of(config)]
    if methods.build(config).needs_divergence:
        parts.append("mismatched")
    return "-".join([*parts, start_of(config)])


def compute(
    config: Config,
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    dtype: torch.dtype,
) -> References:
    """Return the log-probabilities under the model as it is now, without dropout.

    Args:
        config: the run's configuration; `splits_of` says which pairs are read.
        model: on its device, with adapters if it has any; stays in training or evaluation mode.
        tokenizer: with a pad token.
        data: tokenized pairs.
        dtype: precision of the arithmetic, as in training.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    devices, was_training = devices_of(model, dtype).readers, model.training
    engine = shared_prefix.build(config, model=model, tokenizer=tokenizer, devices=devices)
    model.eval()
    try:
        found = {
            split: _sums(engine, getattr(data, split), f"reference, {split}")
            for split in splits_of(config)
        }
    finally:
        model.train(was_training)
    if not all(torch.isfinite(sums).all() for sums in found.values()):
        raise NonFiniteError(
            "log-probabilities of the model before training are not finite, and "
            "the method needs them as its reference: the weights are damaged, or model.dtype is "
            "too narrow for them"
        )
    return found


def _sums(engine: SharedPrefix, pairs: datasets.Dataset, desc: str) -> Tensor:
    sums = scoring.sums_by_rows(engine, pairs, desc)
    if MISMATCHED not in pairs.column_names:
        return sums
    others = scoring.sums_by_rows(engine, mismatched.all_of(pairs), f"{desc}, mismatched")
    return torch.cat([sums, others], 1)


def attach(data: Data, references: References) -> Data:
    """Return the pairs with the column REFERENCE, in all splits that have references."""

    def joined(split: str, sums: Tensor) -> datasets.Dataset:
        pairs: Any = getattr(data, split)
        return pairs.add_column(REFERENCE, sums.tolist())

    return replace(data, **{split: joined(split, sums) for split, sums in references.items()})


def save(data: Data, files: Files) -> None:
    """Write the references that the pairs have, if any, to the files of a checkpoint."""
    references = {
        split: torch.tensor(pairs[REFERENCE][:])
        for split, pairs in (("train", data.train), ("held_out", data.held_out))
        if REFERENCE in pairs.column_names
    }
    if references:
        tensors.save(references, files, FILE)


def kept(folder: Path, config: Config, data: Data) -> References | None:
    """Return the references in a checkpoint; None: the checkpoint lacks some that the run needs.

    The settings may have changed since: the checkpoint's method had no reference or read no
    mismatched completions, or its run computed no loss of held-out pairs.

    Args:
        folder: of the checkpoint, whose pairs are those of `data`.
        config: the run's configuration.
        data: tokenized pairs, with the column MISMATCHED if the method needs this column.
    """
    if not (folder / FILE).is_file():
        return None
    found, num_sums = load(folder / FILE), 4 if MISMATCHED in data.train.column_names else 2
    needed = splits_of(config)
    has_all = all(split in found and found[split].shape[1] >= num_sums for split in needed)
    return {split: found[split] for split in needed} if has_all else None


def load(file: Path) -> References:
    """Read what `save` has written."""
    found: References = torch.load(file, map_location="cpu", weights_only=True)
    return found
