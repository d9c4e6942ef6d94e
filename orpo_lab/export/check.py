"""Does an export answer like its run? Log-probabilities of held-out pairs, and greedy answers.

The network of the run is read by the lab's engine. The export is read from its files by
transformers and peft, as anyone reads it who has not got the lab.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from orpo_lab import engine
from orpo_lab.engine.scoring import by_sequences
from orpo_lab.errors import UserError, one_line
from orpo_lab.evaluate import answer, measuring, score, turn_ends
from orpo_lab.finished import FinishedRun
from orpo_lab.model import quantization
from orpo_lab.model.precision import resolve_device
from orpo_lab.model.source import fetch
from orpo_lab.records.run_folder import RunFolder

# How many held-out pairs are scored, and how many of their prompts are answered
NUM_PAIRS, NUM_ANSWERS = 64, 8


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from its run; docs/export.md has the measurements behind it."""

    logp: float
    """Largest difference of a pair's log P(y|x), a mean over tokens, in nats."""
    kept: float
    """How much of what training changed may be missing, or be there too much, as a share; three
    standard errors (`NUM_ERRORS`) are added."""
    gap: float
    """Where a greedy answer first differs: how far the export may prefer its own token, in nats."""


# By the precision of the weights as shipped or of the run's arithmetic, whichever is coarser
TOLERANCES = {
    torch.float32: Tolerance(logp=0.001, kept=0.01, gap=0.01),
    torch.float16: Tolerance(logp=0.03, kept=0.1, gap=0.1),
    torch.bfloat16: Tolerance(logp=0.06, kept=0.1, gap=0.3),
}
NUM_ERRORS = 3


@dataclass(frozen=True)
class Replies:
    """What a model says to N held-out pairs, and to the prompts of the first M."""

    logps: Tensor
    """log P(y|x) of chosen and rejected completions, [N, 2]: means over tokens, in nats (Eq. 3)."""
    answers: list[list[int]]
    """Token ids of the greedy answers, without the tokens that end them."""


@dataclass(frozen=True)
class Difference:
    """How far the replies of one model are from those of another."""

    largest: float
    """Of the log-probabilities, in nats per token."""
    mean: float
    """Of their absolute differences."""
    kept: float
    """The share of what training changed that the first model has: the slope of its change of
    log-probabilities over that of the second."""
    kept_error: float
    """The standard error of `kept`."""
    num_pairs: int
    num_answers: int
    num_equal: int
    """How many greedy answers are the same, token by token."""
    gap: float = 0.0
    """Where greedy answers first differ: the most that the first model prefers its own token."""

    def faults(self, tolerance: Tolerance) -> list[str]:
        """Return in words what is beyond a tolerance."""
        found = []
        if not self.largest <= tolerance.logp:  # NaN is no number within it
            found.append(
                f"a held-out log-probability differs by {self.largest:.2g} nats per token "
                f"(tolerance {tolerance.logp:g})"
            )
        if abs(self.kept - 1) > tolerance.kept + NUM_ERRORS * self.kept_error:
            found.append(
                f"it has {self.kept:.0%} of what training changed in the log-probabilities "
                f"(tolerance {tolerance.kept:.0%} and {NUM_ERRORS} standard errors of "
                f"{self.kept_error:.1%})"
            )
        if self.gap > tolerance.gap:
            found.append(
                f"{self.num_answers - self.num_equal} of {self.num_answers} greedy answers differ, "
                f"and one is {self.gap:.2g} nats from a tie (tolerance {tolerance.gap:g})"
            )
        return found

    def __str__(self) -> str:
        text = (
            f"largest difference {self.largest:.2g} nats per token (mean {self.mean:.2g}) in the "
            f"log-probabilities of {self.num_pairs} held-out pairs, {self.kept:.1%} of what "
            f"training changed in them, {self.num_equal} of {self.num_answers} greedy answers equal"
        )
        return text + (f" (the others tie within {self.gap:.2g} nats)" if self.gap else "")


def tolerance(*dtypes: torch.dtype) -> Tolerance:
    """Return the widest of the tolerances of some precisions."""
    return max((TOLERANCES[dtype] for dtype in dtypes), key=lambda found: found.logp)


def of_run(network: Any, finished: FinishedRun, dtype: torch.dtype, desc: str) -> Replies:
    """Return the replies of a network of the lab, read by the run's engine.

    Args:
        network: as a run left it.
        finished: the run.
        dtype: precision of the arithmetic.
        desc: text of the progress bars.
    """
    config, tokenizer, pairs = finished.config, finished.tokenizer, chosen_pairs(finished)
    with measuring(network, dtype):
        scorer = engine.scorer(config, model=network, tokenizer=tokenizer, dtype=dtype)
        scores = score(scorer, pairs, desc)
        ends = turn_ends(network, tokenizer, config.dataset.template_kwargs)
        answers = _answers(network, finished, tokenizer, ends)
    return Replies(torch.stack([scores.chosen_logps, scores.rejected_logps], 1), answers)


def of_folder(folder: Path, finished: FinishedRun, like: Replies) -> tuple[Replies, float]:
    """Return the replies of an export, read from its files by transformers and peft.

    Args:
        folder: of the export.
        finished: its run.
        like: the replies that it should have.

    Returns:
        The replies, and `Difference.gap`.

    Raises:
        UserError: the files cannot be read, or miss a weight; or the tokenizer is not the run's.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = finished.tokenizer
    if (tokenizer.get_vocab(), tokenizer.chat_template) != (own.get_vocab(), own.chat_template):
        raise UserError(f"the tokenizer of the export is not that of {finished.folder}")
    model = read(folder, finished)
    ends = _ends(GenerationConfig.from_pretrained(folder))
    with torch.no_grad():
        pairs = chosen_pairs(finished)
        logps = torch.stack(by_sequences(model, tokenizer, pairs, "export"), 1)
        answers = _answers(model, finished, tokenizer, ends)
        prompts = pairs["prompt_ids"][: len(answers)]
        gaps = [
            _gap(model, prompt, written, asked, ends)
            for prompt, written, asked in zip(prompts, answers, like.answers, strict=True)
            if written != asked
        ]
    return Replies(logps, answers), max([0.0, *gaps])


def read(folder: Path, finished: FinishedRun) -> Any:
    """Return the model in the folder of an export, in evaluation mode on its device.

    Adapters are put on the base that they were trained on, quantized as it was. They are read in
    fp32: in 16 bits peft adds what an adapter says to numbers that are rounded already, where
    small changes are lost.
    """
    on: dict[str, Any] = {"device_map": {"": resolve_device()}, "use_safetensors": True}
    if (folder / "config.json").is_file():
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **on)
        if wrong := [name for names in found.values() for name in names]:
            raise UserError(
                f"the export's weights are not its model's ({', '.join(map(str, wrong[:3]))})"
            )
        return model.eval()
    base = finished.origin.base
    asked = quantization.settings(base.quantization, torch.float32)
    if asked is not None:
        on["quantization_config"] = asked
    model = fetch(AutoModelForCausalLM.from_pretrained, base.model, dtype=torch.float32, **on)
    if asked is not None:
        # On some CPUs bitsandbytes computes in bf16 whatever it is asked for
        quantization.prepare(model, torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


def compare(one: Replies, other: Replies, before: Tensor, gap: float = 0.0) -> Difference:
    """Return how far the replies of one model are from those of another.

    Args:
        one: of N pairs.
        other: of the same pairs.
        before: the log-probabilities before training, [N, 2].
        gap: see `Difference.gap`.
    """
    difference = (one.logps - other.logps).double().abs()
    has, had = ((replies.logps - before).double().flatten() for replies in (one, other))
    scale = had.square().sum()
    kept = has @ had / scale
    error = (has - kept * had).square().mean().sqrt() / scale.sqrt()
    if not scale:  # nothing was trained, so nothing can be missing
        kept, error = torch.ones(()), torch.zeros(())
    return Difference(
        largest=difference.max().item(),
        mean=difference.mean().item(),
        kept=kept.item(),
        kept_error=error.item(),
        num_pairs=len(difference),
        num_answers=len(other.answers),
        num_equal=sum(a == b for a, b in zip(one.answers, other.answers, strict=True)),
        gap=gap,
    )


def recorded(finished: FinishedRun, when: str) -> Tensor:
    """Return the log-probabilities before or after training in `scores.parquet`, [N, 2]."""
    file = finished.folder / "scores.parquet"
    try:
        table = pq.read_table(file, filters=[("when", "=", when)], partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read, and the export is compared with what it holds; put it back "
            f"({one_line(error)[:100]})"
        ) from error
    columns = [table[name].to_pylist() for name in ("chosen_logp", "rejected_logp")]
    return torch.tensor(columns).mT[: len(chosen_pairs(finished))]


def check_recorded(own: Replies, finished: FinishedRun) -> None:
    """Check that a run's network, loaded again, is the one that the run has measured.

    Raises:
        UserError: it is another, because a file of the run has changed.
    """
    measured = Replies(recorded(finished, "after"), own.answers)
    found = compare(own, measured, recorded(finished, "before"))
    if faults := found.faults(tolerance(finished.dtype)):
        raise UserError(
            f"the model in {finished.folder}/final is not the one that the run has measured: "
            f"{faults[0]}; its files have changed since (put back what they were), or the run "
            "computed in another precision, on another device"
        )
    samples = RunFolder(finished.folder).read_json("samples.json") or []
    texts = finished.tokenizer.batch_decode(own.answers, skip_special_tokens=True)
    num = sum(text != sample["after"] for text, sample in zip(texts, samples, strict=False))
    if num:
        print(f"{num} of {len(texts)} greedy answers are other than those in samples.json")


def chosen_pairs(finished: FinishedRun) -> datasets.Dataset:
    """Return the first held-out pairs of a run, at most `NUM_PAIRS`."""
    held_out = finished.pairs.held_out
    return held_out.select(range(min(NUM_PAIRS, len(held_out))))


def _answers(
    model: Any, finished: FinishedRun, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> list[list[int]]:
    """Return the greedy answers to the first prompts that the run has answered."""
    asks = finished.config.dataset
    prompts = chosen_pairs(finished)["prompt_ids"][: min(NUM_ANSWERS, asks.num_generations)]
    if not prompts:
        return []
    found = answer(model, tokenizer, dict(enumerate(prompts)), asks.max_new_tokens, ends)
    return [found[number] for number in range(len(prompts))]


def _ends(settings: GenerationConfig) -> list[int]:
    """Return the tokens that end an answer, as the generation settings of an export say."""
    own = settings.eos_token_id
    return own if isinstance(own, list) else [own]


def _gap(
    model: Any, prompt: list[int], written: Sequence[int], asked: Sequence[int], ends: list[int]
) -> float:
    """Return how far a model prefers its own token where two answers part, in nats.

    Args:
        model: the one that has written the first answer.
        prompt: token ids.
        written: its answer.
        asked: the other answer; an answer that is the beginning of the other has ended there.
        ends: the tokens that end an answer.
    """
    pairs = zip(written, asked, strict=False)
    num = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    ids = torch.tensor([[*prompt, *written[:num]]], device=model.device)
    logits = model(input_ids=ids).logits[0, -1].float()
    own, other = (
        logits[[answer[num]] if len(answer) > num else ends].max() for answer in (written, asked)
    )
    return float(own - other)
