"""Evaluate a model on the held-out pairs: what the model prefers, and how well it writes.

No figure depends on beta. So figures can be compared across betas and along an annealed run.
"""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from orpo_lab import metrics
from orpo_lab.config.dataset import Dataset
from orpo_lab.data import Data, embedded
from orpo_lab.data.encode import special_tokens
from orpo_lab.engine import head
from orpo_lab.errors import LIKELY_CAUSES, NonFiniteError
from orpo_lab.model.causal import CausalModel, without_adapters

log = logging.getLogger(__name__)

# The largest number of padded tokens in a forward pass without gradients, unless one sequence is
# longer. The number bounds memory, and does not change the figures
TOKENS_PER_FORWARD = 4096
GENERATIONS_PER_BATCH = 64
# Tokens of the n-grams whose repetition is measured (Welleck et al. 2019, arXiv:1908.04319)
REPETITION_NGRAM = 3


@dataclass(frozen=True)
class Generation:
    """The model's greedy answer to one held-out prompt."""

    prompt: str
    chosen: str
    answer: str
    num_tokens: int
    repetition: float
    # Whether the answer is right; None if the answer cannot be checked
    correct: bool | None


@dataclass(frozen=True)
class Scores:
    """log P(y|x) of N held-out pairs: the mean over a completion's tokens (Eq. 3), [N], in nats."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    # Number of tokens of each chosen completion, [N]
    chosen_sizes: Tensor

    def __getitem__(self, indices: list[int]) -> "Scores":
        """Return the scores of the pairs at the given indices."""
        return Scores(
            self.chosen_logps[indices], self.rejected_logps[indices], self.chosen_sizes[indices]
        )


@dataclass(frozen=True)
class Evaluation:
    """The held-out metrics, and the scores and answers that the metrics are computed from."""

    metrics: dict[str, Any]
    scores: Scores
    generations: list[Generation]
    """The answers to the first `dataset.num_generations` prompts."""
    seconds: float
    """The time that the evaluation took."""

    def by_pair(self) -> dict[str, list[Any]]:
        """Return columns with a row for every held-out pair.

        Columns about answers are None for pairs whose prompt was not answered.
        """
        unanswered = [None] * (len(self.scores.chosen_logps) - len(self.generations))
        answers = self.generations
        return {
            "chosen_logp": self.scores.chosen_logps.tolist(),
            "rejected_logp": self.scores.rejected_logps.tolist(),
            "chosen_tokens": [int(size) for size in self.scores.chosen_sizes],
            "correct": [answer.correct for answer in answers] + unanswered,
            "generated_tokens": [answer.num_tokens for answer in answers] + unanswered,
            "repetition": [answer.repetition for answer in answers] + unanswered,
        }

    def save(self, file: Path) -> None:
        """Write the evaluation to a JSON file."""
        scores = {name: value.tolist() for name, value in vars(self.scores).items()}
        parts = {
            "metrics": self.metrics,
            "scores": scores,
            "generations": list(map(asdict, self.generations)),
            "seconds": self.seconds,
        }
        file.write_text(json.dumps(parts, allow_nan=False))

    @classmethod
    def restore(cls, file: Path) -> "Evaluation":
        """Read an evaluation that `save` has written."""
        parts = json.loads(file.read_text())
        scores = {name: torch.tensor(values) for name, values in parts["scores"].items()}
        generations = [Generation(**generation) for generation in parts["generations"]]
        return cls(parts["metrics"], Scores(**scores), generations, parts["seconds"])


def evaluate(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: Dataset,
    *,
    dtype: torch.dtype,
    desc: str,
) -> Evaluation:
    """Measure a model on the held-out pairs.

    Args:
        model: on its device; stays in training or evaluation mode.
        tokenizer: with a pad token.
        data: tokenized pairs.
        config: says how many prompts to answer, and how long an answer may be.
        dtype: precision of the arithmetic, as in training.
        desc: text of the progress bars: before or after.

    Raises:
        NonFiniteError: the log-probability of a completion is not finite.
    """
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    on = next(model.parameters()).device.type
    try:
        with torch.no_grad(), torch.autocast(on, dtype, enabled=dtype != torch.float32):
            scores = score(model, tokenizer, data.held_out, desc)
            _check_finite(scores, desc)
            asked = data.held_out.select(range(min(config.num_generations, len(data.held_out))))
            generations = generate(
                model, tokenizer, asked, config.max_new_tokens, check=data.checkable, desc=desc
            )
    finally:
        model.train(was_training)
    figures = preference_metrics(scores) | generation_metrics(generations)
    if data.checkable:
        figures["by_wording"] = by_wording(data.held_out["wording"][:], scores, generations)
    return Evaluation(figures, scores, generations, time.perf_counter() - start)


def _check_finite(scores: Scores, desc: str) -> None:
    """Refuse scores that are not finite: the last update may have ruined the weights."""
    both = torch.stack([scores.chosen_logps, scores.rejected_logps])
    num = int((~torch.isfinite(both).all(0)).sum())
    if num:
        raise NonFiniteError(
            f"{desc} training, {num} of {both.shape[1]} held-out pairs have log-probabilities that "
            f"are not finite: the model's weights are unusable. {LIKELY_CAUSES}"
        )


def score(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, pairs: datasets.Dataset, desc: str
) -> Scores:
    """Return the log-probabilities of both completions of every pair."""
    base = without_adapters(model)
    logps_of = head.score if head.has_plain_head(base) else head.score_by_logits
    if logps_of is head.score_by_logits:
        log.info(
            "%s does more than an output head with what it predicts from: its pairs are scored one "
            "at a time, and their logits take memory",
            type(base).__name__,
        )
    chosen, rejected = (
        completion_logps(partial(logps_of, base), tokenizer, pairs, side, base.device, desc)
        for side in ("chosen_ids", "rejected_ids")
    )
    sizes = [len(ids) for ids in pairs["chosen_ids"]]
    return Scores(chosen, rejected, torch.tensor(sizes, dtype=torch.float32))


def preference_metrics(scores: Scores) -> dict[str, Any]:
    """Return the figures computed from the scores; docs/reading_curves.md explains each figure."""
    found = {
        metric.name: metric.of_scores(scores) for metric in metrics.HELD_OUT if metric.of_scores
    }
    # Tensors become plain numbers, since JSON has no tensors
    return {
        name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()
    }


def by_wording(
    wordings: list[str], scores: Scores, generations: list[Generation]
) -> dict[str, dict[str, Any]]:
    """Return the metrics of the embedded pairs, separately for free and for terse answers.

    In terse answers the answer is a bare token, and SFT alone separates the pairs. The benefit of
    beta shows in the answers in free wording.
    """
    slices = {}
    for wording in sorted(set(wordings)):
        indices = [index for index, of_pair in enumerate(wordings) if of_pair == wording]
        answered = [generations[index] for index in indices if index < len(generations)]
        slices[wording] = preference_metrics(scores[indices]) | generation_metrics(answered)
    return slices


def completion_logps(
    logps_of: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pairs: datasets.Dataset,
    side: str,
    on: torch.device,
    desc: str,
) -> Tensor:
    """Return log P(y|x), the mean over each completion's tokens (Eq. 3), [N], in nats.

    Args:
        logps_of: `head.score` or `head.score_by_logits`, with its argument `model` bound already.
        tokenizer: with a pad token.
        pairs: N tokenized pairs.
        side: name of the column of the completions.
        on: the model's device.
        desc: text of the progress bar.
    """
    prompts, completions = pairs["prompt_ids"][:], pairs[side][:]
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    logps = torch.zeros(len(pairs), dtype=torch.float32)
    batches = _batches(lengths)
    for batch in tqdm(batches, desc=f"{desc}: score {side[:-4]}", leave=False, disable=None):
        width = max(lengths[i] for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        is_completion = torch.zeros((len(batch), width), dtype=torch.bool)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.tensor(prompts[i] + completions[i])
            mask[row, : lengths[i]] = 1
            is_completion[row, len(prompts[i]) : lengths[i]] = True
        places = is_completion.flatten().nonzero()[:, 0]
        token_logps = logps_of(
            sources=(places - 1).to(on),  # the token at t is predicted at t - 1
            targets=ids.flatten()[places].to(on),
            input_ids=ids.to(on),
            attention_mask=mask.to(on),
        )
        sizes = [len(completions[i]) for i in batch]
        for i, of_completion in zip(batch, token_logps.split(sizes), strict=True):
            logps[i] = of_completion.mean()
    return logps


def _batches(lengths: list[int]) -> list[list[int]]:
    """Group indices of similar length into batches of at most TOKENS_PER_FORWARD padded tokens."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= TOKENS_PER_FORWARD:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def generate(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: datasets.Dataset,
    max_new_tokens: int,
    *,
    check: bool,
    desc: str,
) -> list[Generation]:
    """Answer the prompts of the pairs greedily, up to a token that ends a turn.

    The token with the largest logit is always taken, whatever the model's own generation settings
    say. Of these settings only the tokens that end a turn are used (`turn_ends`).

    Args:
        model: in evaluation mode.
        tokenizer: with a pad token.
        pairs: tokenized pairs.
        max_new_tokens: the largest number of tokens of an answer; a longer answer is cut.
        check: whether the rows of the pairs say which answer is right.
        desc: text of the progress bar.
    """
    base, ends = without_adapters(model), turn_ends(model, tokenizer)
    greedy = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        bos_token_id=tokenizer.bos_token_id,
    )
    generations = []
    starts = range(0, len(pairs), GENERATIONS_PER_BATCH)
    for start in tqdm(starts, desc=f"{desc}: generate", leave=False, disable=None):
        rows = pairs.select(range(start, min(start + GENERATIONS_PER_BATCH, len(pairs)))).to_list()
        width = max(len(row["prompt_ids"]) for row in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            size = len(row["prompt_ids"])
            ids[index, width - size :] = torch.tensor(row["prompt_ids"])
            mask[index, width - size :] = 1
        with _generating_by(base, greedy):
            out = base.generate(
                input_ids=ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=greedy,
            )
        for row, written in zip(rows, out[:, width:].tolist(), strict=True):
            answer = list(itertools.takewhile(lambda token: token not in ends, written))
            text = tokenizer.decode(answer, skip_special_tokens=True)
            generations.append(
                Generation(
                    prompt=row["prompt_text"],
                    chosen=row["chosen_text"],
                    answer=text,
                    num_tokens=len(answer),
                    repetition=repetition(answer),
                    correct=embedded.is_correct(text, row) if check else None,
                )
            )
    return generations


@contextlib.contextmanager
def _generating_by(model: CausalModel, settings: GenerationConfig) -> Iterator[None]:
    """Replace a model's own generation settings inside this context.

    transformers would take settings that ours do not name from the model's own: for example
    repetition_penalty, num_beams, suppress_tokens.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def turn_ends(model: CausalModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all tokens that end an answer.

    One of them is the tokenizer's EOS. Chat models (Gemma, Llama 3, Phi-3) end a turn with other
    tokens. These are the tokens that the model's own generation settings list, and the token that
    the chat template writes behind a turn.
    """
    own = without_adapters(model).generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    ids = {tokenizer.eos_token_id, *listed, _token_behind_a_turn(tokenizer)}
    return sorted(token_id for token_id in ids if token_id is not None and token_id >= 0)


def _token_behind_a_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token that the chat template writes behind an answer.

    None: there is no chat template, no such token, or the template refuses the conversation.
    """
    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return None
    found = special_tokens(tokenizer).match(text.rpartition(answer)[2].lstrip())
    return tokenizer.convert_tokens_to_ids(found.group()) if found and found.group() else None


def repetition(ids: list[int]) -> float:
    """Return the share of a text's n-grams that are repetitions of an earlier n-gram, 0 to 1."""
    size = REPETITION_NGRAM
    ngrams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def generation_metrics(generations: list[Generation]) -> dict[str, Any]:
    """Return the answers' mean length in tokens, repetition and, if checked, exact match."""
    if not generations:
        return {}
    found = {
        metric.name: metric.of_answers(generations)
        for metric in metrics.HELD_OUT
        if metric.of_answers
    }
    return {name: value for name, value in found.items() if value is not None}
