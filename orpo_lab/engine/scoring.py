"""Score the completions of held-out pairs, without gradients: in rows of pairs, or as sequences.

Both ways give the same figures, to rounding. Rows read every prompt once, and have no padding.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from orpo_lab import memory, progress
from orpo_lab.data.encode import MASKS
from orpo_lab.engine import head
from orpo_lab.engine.base import COLUMNS, Pair
from orpo_lab.engine.packing import Collator, by_length, halved, num_supervised, pack, sizes_of
from orpo_lab.engine.shared_prefix import SharedPrefix
from orpo_lab.model.causal import CausalModel, without_adapters

log = logging.getLogger(__name__)

# The largest number of tokens in a forward pass without gradients, padding included, unless one
# pair or one sequence is longer. The number bounds memory, and does not change the figures
TOKENS_PER_FORWARD = 4096
# The same for rows on a CPU, where wider rows are no faster
TOKENS_PER_CPU_ROW = 2048

# Scores N pairs, with a text for the progress bar. Returns log P(y|x) of the chosen and of the
# rejected completions, [N] each: the mean over a completion's tokens (Eq. 3), in nats
Scorer = Callable[[datasets.Dataset, str], tuple[Tensor, Tensor]]


def by_rows(engine: SharedPrefix, pairs: datasets.Dataset, desc: str) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both completions of N pairs; see `sums_by_rows`.

    Returns:
        See `Scorer`.
    """
    chosen, rejected = (sums_by_rows(engine, pairs, desc) / num_supervised(pairs)).mT
    return chosen, rejected


@torch.no_grad()
def sums_by_rows(engine: SharedPrefix, pairs: datasets.Dataset, desc: str) -> Tensor:
    """Return the sums of log-probabilities of chosen and rejected tokens, [N, 2], in nats.

    The pairs are read in packed rows. If memory runs out, all pairs are scored again in rows of
    half the tokens. This is repeated until every row is a single pair. Of several processes each
    scores a part of the pairs, and all return the sums of all pairs.

    Args:
        engine: its model is in evaluation mode.
        pairs: N tokenized pairs.
        desc: text of the progress bar.

    Raises:
        OutOfMemoryError, RuntimeError: a single pair needs too much memory.
    """
    names = [name for name in (*COLUMNS, *MASKS) if name in pairs.column_names]
    plain: list[Pair] = pairs.select_columns(names).to_list()
    sizes = [sizes_of(pair) for pair in plain]
    is_cpu = engine.devices.device.type == "cpu"
    most = TOKENS_PER_CPU_ROW if is_cpu else TOKENS_PER_FORWARD
    collator = replace(engine.collator, budget=most, prompt_is_scored=False)
    mine = engine.devices.deal(list(map(sum, sizes)))
    while True:
        packed = pack([sum(sizes[i]) for i in mine], collator.budget)
        rows = [[mine[i] for i in row] for row in packed]
        try:
            sums = _sums_of_rows(engine, collator, plain, rows, desc)
            break
        except (RuntimeError, MemoryError) as error:
            budget = halved(collator.budget, [[sizes[i] for i in row] for row in rows])
            if budget is None or not memory.ran_out(error):
                raise
        # Only after the except block, since the error's traceback keeps all activations
        log.warning("%s: out of memory; scored again in rows of %d tokens", desc, budget)
        collator.budget = budget
        memory.give_back()
    return engine.devices.total(sums)


def _sums_of_rows(
    engine: SharedPrefix,
    collator: Collator,
    pairs: Sequence[Pair],
    rows: list[list[int]],
    desc: str,
) -> Tensor:
    """Score the rows that `pack` returns; see `sums_by_rows`. The host waits for the device once.

    Returns:
        The sums in the order of the pairs, [N, 2]; zeros for pairs in no row.
    """
    ordered, sums = torch.zeros(len(pairs), 2), []
    with engine.reading():
        for row in progress.counted(rows, f"{desc}: score"):
            laid_out = collator.lay_out([pairs[i] for i in row])
            counts = laid_out["counts"][:, 1:].flatten().tolist()
            micro_batch = engine.devices.place(laid_out)
            sums += [logps.sum() for logps in engine.logps(micro_batch).split(counts)]
    if sums:
        ordered[[i for row in rows for i in row]] = torch.stack(sums).view(-1, 2).to(ordered)
    return ordered


@torch.no_grad()
def by_sequences(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, pairs: datasets.Dataset, desc: str
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both completions of N pairs, each read as one sequence.

    Args:
        model: in evaluation mode; any causal language model.
        tokenizer: with a pad token.
        pairs: N tokenized pairs.
        desc: text of the progress bars.

    Returns:
        See `Scorer`.
    """
    base = without_adapters(model)
    logps_of = head.score if head.has_plain_head(base) else head.score_by_logits
    if logps_of is head.score_by_logits:
        log.info(
            "%s does more than an output head with what it predicts from: its pairs are scored one "
            "at a time, and their logits take memory",
            type(base).__name__,
        )
    pad, prompts = int(tokenizer.pad_token_id), pairs["prompt_ids"][:]
    chosen, rejected = (
        _means_of_sequences(
            logps_of, base, prompts, pairs[f"{side}_ids"][:], pad, f"{desc}: score {side}"
        )
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def _means_of_sequences(
    logps_of: Callable[..., Tensor],
    model: CausalModel,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad_token_id: int,
    desc: str,
) -> Tensor:
    """Score every prompt with its completion, in padded batches; see `by_sequences`.

    Args:
        logps_of: `head.score` or `head.score_by_logits`.
        model: without adapters around it.
        prompts: token ids.
        completions: token ids, one completion for each prompt.
        pad_token_id: fills the batches.
        desc: text of the progress bar.
    """
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    means = torch.zeros(len(prompts), dtype=torch.float32)
    batches = by_length(lengths, TOKENS_PER_FORWARD)
    for batch in progress.counted(batches, desc):
        width = lengths[batch[0]]
        ids = torch.full((len(batch), width), pad_token_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        is_completion = torch.zeros((len(batch), width), dtype=torch.bool)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.tensor(prompts[i] + completions[i])
            mask[row, : lengths[i]] = 1
            is_completion[row, len(prompts[i]) : lengths[i]] = True
        places = is_completion.flatten().nonzero()[:, 0]
        token_logps = logps_of(
            model,
            sources=(places - 1).to(model.device),  # the token at t is predicted at t - 1
            targets=ids.flatten()[places].to(model.device),
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
        )
        sizes = [len(completions[i]) for i in batch]
        for i, of_completion in zip(batch, token_logps.split(sizes), strict=True):
            means[i] = of_completion.mean()
    return means
