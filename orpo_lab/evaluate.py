"""Evaluate a model on the held-out pairs: what the model prefers, and how well it writes.

No figure depends on beta. So figures can be compared across betas and along an annealed run.
"""

import contextlib
import inspect
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from orpo_lab import engine, metrics, progress
from orpo_lab.config import Config
from orpo_lab.data import Data, length_bias, right_answers, template
from orpo_lab.data.embedded import WORDING
from orpo_lab.data.encode import special_tokens
from orpo_lab.data.mixture import SOURCE
from orpo_lab.data.right_answers import Check
from orpo_lab.engine.packing import by_length, num_supervised
from orpo_lab.engine.scoring import Scorer
from orpo_lab.errors import LIKELY_CAUSES, NonFiniteError
from orpo_lab.model.causal import CausalModel, without_adapters
from orpo_lab.training.devices import gathered
from orpo_lab.training.sharded import devices_of

log = logging.getLogger(__name__)

# The largest number of tokens of a batch of answers, with prompts and padding. The number bounds
# the memory of keys and values, and does not change the answers
TOKENS_PER_BATCH = 8192
# The share of a batch's answers that must have ended before they leave the batch
LEAVING = 0.25
# Tokens of the n-grams whose repetition is measured (Welleck et al. 2019, arXiv:1908.04319)
REPETITION_NGRAM = 3

# Chooses the next token of each answer of a batch, [B], given the numbers of the prompts, how many
# tokens the answers have so far, and the logits [B, V]
Choose = Callable[[list[int], int, Tensor], Tensor]


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
    # The prompt without the chat template
    asked: str = ""
    # Whether the answer was cut at `dataset.max_new_tokens`; None: an earlier version made it
    is_cut: bool | None = None

    @property
    def judged(self) -> str:
        """What checking the answer came to, in words."""
        if self.correct is None:
            return "not checked"
        if self.correct:
            return "right"
        return "wrong: cut at max_new_tokens" if self.is_cut else "wrong"


@dataclass(frozen=True)
class Scores:
    """log P(y|x) of N held-out pairs: the mean over a completion's tokens (Eq. 3), [N], in nats."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    # Number of supervised tokens of each chosen completion, [N]
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
    length_guess: list[float] | None = None
    """Whether a guess by length alone is right at each pair: 1, 0, or 0.5 for a tie. None: there is
    no training pair to fix the rule of the guess on."""

    def by_pair(self) -> dict[str, list[Any]]:
        """Return columns with a row for every held-out pair.

        Columns about answers are None for pairs whose prompt was not answered.
        """
        unanswered = [None] * (len(self.scores.chosen_logps) - len(self.generations))
        answers = self.generations
        return {
            "chosen_logp": self.scores.chosen_logps.tolist(),
            "rejected_logp": self.scores.rejected_logps.tolist(),
            "length_guess": self.length_guess or [None] * len(self.scores.chosen_logps),
            "chosen_tokens": [int(size) for size in self.scores.chosen_sizes],
            "correct": [answer.correct for answer in answers] + unanswered,
            "generated_tokens": [answer.num_tokens for answer in answers] + unanswered,
            "repetition": [answer.repetition for answer in answers] + unanswered,
        }

    def guessed(self, guesses: length_bias.Array | None) -> "Evaluation":
        """Return the evaluation with the guesses by length of a run's own data.

        No model changes the guesses. The training pairs do, which depend on the method.

        Args:
            guesses: see `Data.length_guess`.
        """
        own = {name: value for name, value in self.metrics.items() if name != metrics.LENGTH_GUESS}
        listed = None if guesses is None else guesses.tolist()
        return replace(self, metrics=own | guess_metrics(guesses), length_guess=listed)

    def joined(self, figures: dict[str, float], seconds: float) -> "Evaluation":
        """Return the evaluation with more figures of the same model, and the time they took."""
        return replace(self, metrics=self.metrics | figures, seconds=self.seconds + seconds)

    def save(self, file: Path) -> None:
        """Write the evaluation to a JSON file."""
        scores = {name: value.tolist() for name, value in vars(self.scores).items()}
        parts = {
            "metrics": self.metrics,
            "scores": scores,
            "generations": list(map(asdict, self.generations)),
            "seconds": self.seconds,
            "length_guess": self.length_guess,
        }
        file.write_text(json.dumps(parts, allow_nan=False))

    @classmethod
    def restore(cls, file: Path) -> "Evaluation":
        """Read an evaluation that `save` has written."""
        parts = json.loads(file.read_text())
        scores = {name: torch.tensor(values) for name, values in parts["scores"].items()}
        generations = [Generation(**generation) for generation in parts["generations"]]
        # An earlier version of orpo_lab kept no guesses
        guesses = parts.get("length_guess")
        return cls(parts["metrics"], Scores(**scores), generations, parts["seconds"], guesses)


def evaluate(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: Config,
    *,
    dtype: torch.dtype,
    desc: str,
) -> Evaluation:
    """Measure a model on the held-out pairs.

    Args:
        model: on its device; stays in training or evaluation mode.
        tokenizer: with a pad token.
        data: tokenized pairs.
        config: says how pairs are read, how many prompts to answer, and how long an answer may be.
        dtype: precision of the arithmetic, as in training.
        desc: text of the progress bars: before or after.

    Raises:
        NonFiniteError: the log-probability of a completion is not finite.
    """
    start, asks = time.perf_counter(), config.dataset
    with measuring(model, dtype):
        scorer = engine.scorer(config, model=model, tokenizer=tokenizer, dtype=dtype)
        scores = score(scorer, data.held_out, desc)
        _check_finite(scores, desc)
        asked = data.held_out.select(range(min(asks.num_generations, len(data.held_out))))
        generations = generate(
            model,
            tokenizer,
            asked,
            asks.max_new_tokens,
            template_kwargs=asks.template_kwargs,
            check=right_answers.build(asks),
            desc=desc,
        )
    figures = preference_metrics(scores) | generation_metrics(generations)
    for part in (WORDING, SOURCE):
        if part in data.held_out.column_names:
            figures[f"by_{part}"] = by_part(data.held_out[part][:], scores, generations)
    _say_cut(generations, desc)
    seconds = time.perf_counter() - start
    return Evaluation(figures, scores, generations, seconds).guessed(data.length_guess)


@contextlib.contextmanager
def measuring(model: CausalModel, dtype: torch.dtype) -> Iterator[None]:
    """Inside this context, a model is in evaluation mode, and computes without gradients.

    Args:
        model: on its device.
        dtype: precision of the arithmetic.
    """
    was_training = model.training
    model.eval()
    on = next(model.parameters()).device.type
    try:
        with torch.no_grad(), torch.autocast(on, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        model.train(was_training)


def _say_cut(generations: list[Generation], desc: str) -> None:
    """Warn if answers that could be checked were cut."""
    checked = [one for one in generations if one.correct is not None]
    num_cut = sum(bool(one.is_cut) for one in checked)
    if num_cut:
        log.warning(
            "warning: %s training, %d of %d answers that are checked were cut at "
            "dataset.max_new_tokens, and count as wrong; a larger number lets them end",
            desc,
            num_cut,
            len(checked),
        )


def _check_finite(scores: Scores, desc: str) -> None:
    """Refuse scores that are not finite: the last update may have ruined the weights."""
    both = torch.stack([scores.chosen_logps, scores.rejected_logps])
    num = int((~torch.isfinite(both).all(0)).sum())
    if num:
        raise NonFiniteError(
            f"{desc} training, {num} of {both.shape[1]} held-out pairs have log-probabilities that "
            f"are not finite: the model's weights are unusable. {LIKELY_CAUSES}"
        )


def score(scorer: Scorer, pairs: datasets.Dataset, desc: str) -> Scores:
    """Return the log-probabilities of both completions of every pair, by one of the scorers."""
    chosen, rejected = scorer(pairs, desc)
    return Scores(chosen, rejected, num_supervised(pairs)[:, 0].float())


def preference_metrics(scores: Scores) -> dict[str, Any]:
    """Return the figures computed from the scores; docs/reading_curves.md explains each figure."""
    found = {
        metric.name: metric.of_scores(scores) for metric in metrics.HELD_OUT if metric.of_scores
    }
    # Tensors become plain numbers, since JSON has no tensors
    return {
        name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()
    }


def guess_metrics(guesses: length_bias.Array | None) -> dict[str, Any]:
    """Return the figures of a guess by length alone, which no model changes.

    Args:
        guesses: whether the guess is right at each held-out pair, [N]; None: there is no guess.
    """
    if guesses is None:
        return {}
    return {m.name: m.of_guesses(guesses) for m in metrics.HELD_OUT if m.of_guesses}


def by_part(
    parts: list[str], scores: Scores, generations: list[Generation]
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each part of the pairs apart: wordings, or sources of a mixture.

    Of the embedded pairs with a terse wording the answer is a bare token, and SFT alone separates
    the pairs. The benefit of beta shows in the answers in free wording.

    Args:
        parts: the name of the part that each pair belongs to.
        scores: of all pairs.
        generations: the answers to the first prompts.
    """
    slices = {}
    for part in sorted(set(parts)):
        indices = [index for index, of_pair in enumerate(parts) if of_pair == part]
        answered = [generations[index] for index in indices if index < len(generations)]
        slices[part] = preference_metrics(scores[indices]) | generation_metrics(answered)
    return slices


def generate(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: datasets.Dataset,
    max_new_tokens: int,
    *,
    template_kwargs: Mapping[str, Any] = template.NO_KWARGS,
    check: Check = right_answers.unchecked,
    desc: str,
) -> list[Generation]:
    """Answer the prompts of the pairs greedily, up to a token that ends a turn.

    The token with the largest logit is always taken, whatever the model's own generation settings
    say. Of these settings only the tokens that end a turn are used (`turn_ends`).

    Args:
        model: in evaluation mode. Of several processes each answers a part of the prompts, and all
            return all answers.
        tokenizer: with a pad token.
        pairs: tokenized pairs.
        max_new_tokens: the largest number of tokens of an answer; a longer answer is cut.
        template_kwargs: `dataset.template_kwargs`.
        check: says whether an answer is right. An answer that was cut has not come to its end, so
            it is wrong whatever its text says so far.
        desc: text of the progress bar.
    """
    rows = pairs.to_list()
    prompts = [row["prompt_ids"] for row in rows]
    ends = turn_ends(model, tokenizer, template_kwargs)
    answers: dict[int, list[int]] = {}
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    mine = devices_of(model, torch.float32).readers.deal(lengths)
    batches = by_length([lengths[i] for i in mine], TOKENS_PER_BATCH)
    with progress.Work(f"{desc}: answer", len(mine)) as work:
        for batch in batches:
            asked = {mine[i]: prompts[mine[i]] for i in batch}
            answers |= answer(model, tokenizer, asked, max_new_tokens, ends)
            work.done += len(batch)
    for of_process in gathered(answers):
        answers |= of_process
    generations = []
    for i, row in enumerate(rows):
        text = tokenizer.decode(answers[i], skip_special_tokens=True)
        is_cut, is_right = len(answers[i]) == max_new_tokens, check(text, row)
        generations.append(
            Generation(
                prompt=row["prompt_text"],
                chosen=row["chosen_text"],
                answer=text,
                num_tokens=len(answers[i]),
                repetition=repetition(answers[i]),
                correct=is_right and not is_cut,
                is_cut=is_cut,
                asked=row["asked"],
            )
        )
    return generations


def answer(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    ends: list[int],
    choose: Choose | None = None,
) -> dict[int, list[int]]:
    """Return the answers to one batch of prompts, without the tokens that end them.

    Answers that have ended leave the batch whenever they are LEAVING of it, and the others go on.

    Args:
        model: in evaluation mode.
        tokenizer: with a pad token.
        prompts: token ids, by the number of the prompt.
        max_new_tokens: the largest number of tokens of an answer.
        ends: the tokens that end an answer (`turn_ends`).
        choose: chooses the next token of each answer; None: the token with the largest logit.
    """
    greedy = {
        "do_sample": False,
        "use_cache": True,
        "return_dict_in_generate": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": ends,
        "bos_token_id": tokenizer.bos_token_id,
    }
    base = without_adapters(model)
    ids, mask = _padded(list(prompts.values()), greedy["pad_token_id"], base.device)
    numbers, width = torch.tensor(list(prompts), device=base.device), ids.shape[1]
    answers: dict[int, list[int]] = {}
    cached: dict[str, Any] = {}
    while len(numbers):
        num_read = ids.shape[1]
        settings = GenerationConfig(**greedy, max_new_tokens=width + max_new_tokens - num_read)
        with _generating_by(base, settings):
            out = base.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=[_Chosen(choose, numbers.tolist(), width)] if choose else [],
                stopping_criteria=[_EnoughHaveEnded(num_read, ends)],
                **cached,
            )
        ids = out.sequences
        has_ended = _have_ended(ids[:, num_read:], ends) | (ids.shape[1] == width + max_new_tokens)
        ended = zip(numbers[has_ended].tolist(), ids[has_ended, width:].tolist(), strict=True)
        for number, written in ended:
            answers[number] = list(itertools.takewhile(lambda token: token not in ends, written))
        staying = (~has_ended).nonzero()[:, 0]
        numbers, ids = numbers[staying], ids[staying]
        mask = torch.cat([mask[staying], torch.ones_like(ids[:, num_read:])], 1)
        cached = _cache_of(base, out, staying)
    return answers


def _padded(prompts: list[list[int]], pad: int, on: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of a batch of prompts, padded on the left, [B, T] each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=on)
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=on)
    return ids, (torch.arange(width, device=on) >= padding[:, None]).long()


def _have_ended(ids: Tensor, ends: list[int]) -> Tensor:
    """Return for each row whether it holds a token that ends an answer, [B]."""
    return torch.isin(ids, torch.tensor(ends, device=ids.device)).any(1)


class _Chosen(LogitsProcessor):
    """Leaves each row only the token that `choose` has chosen.

    Args:
        choose: see `Choose`.
        numbers: the number of each row's prompt.
        width: the number of tokens of each row before its answer.
    """

    def __init__(self, choose: Choose, numbers: list[int], width: int) -> None:
        self.choose, self.numbers, self.width = choose, numbers, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits that are -inf but for the chosen token's, [B, V]."""
        chosen = self.choose(self.numbers, input_ids.shape[1] - self.width, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _EnoughHaveEnded(StoppingCriteria):
    """Ends a call of `generate` when LEAVING of its answers have ended.

    Args:
        num_read: the number of tokens of each row before the call.
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, num_read: int, ends: list[int]) -> None:
        self.num_read, self.ends = num_read, ends

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Return for each row whether its call ends, [B]: all rows or none."""
        has_ended = _have_ended(input_ids[:, self.num_read :], self.ends)
        return (has_ended.float().mean() >= LEAVING).expand(len(has_ended))


def _cache_of(model: Any, out: Any, staying: Tensor) -> dict[str, Any]:
    """Return the argument of `generate` with which the staying rows need not be read again.

    Empty: the model has a cache of its own kind, and reads all tokens again.
    """
    cache = out.past_key_values
    takes = "past_key_values" in inspect.signature(model.forward).parameters
    if type(cache) is not DynamicCache or not takes:
        return {}
    cache.reorder_cache(staying)
    return {"past_key_values": cache}


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


def turn_ends(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] = template.NO_KWARGS,
) -> list[int]:
    """Return the ids of all tokens that end an answer.

    One of them is the tokenizer's EOS. Chat models (Gemma, Llama 3, Phi-3) end a turn with other
    tokens. These are the tokens that the model's own generation settings list, and the token that
    the chat template writes behind a turn.
    """
    own = without_adapters(model).generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    ids = {tokenizer.eos_token_id, *listed, _token_behind_a_turn(tokenizer, template_kwargs)}
    return sorted(token_id for token_id in ids if token_id is not None and token_id >= 0)


def _token_behind_a_turn(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> int | None:
    """Return the id of the special token that the chat template writes behind an answer.

    None: there is no chat template, no such token, or the template refuses the conversation.
    """
    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = template.apply(tokenizer, turns, template_kwargs)
    except template.REFUSALS:
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
