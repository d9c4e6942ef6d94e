"""Have models answer the prompts: `python -m orpo_lab curate candidates FOLDER --model MODEL`.

Every prompt gets `--num` answers, at temperatures from 0.7 to 0.9. With several models the answers
are shared out among them. What is answered already is not asked again, so the same command goes on
with what an interrupted one has left. The same step with another model or with other settings adds
answers. At the end all pairs of different answers to the same prompt are ready to be compared.
"""

import argparse
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from orpo_lab.curate import ask
from orpo_lab.curate.ask import Answer, Answerer, Failure, Request
from orpo_lab.curate.folder import (
    CANDIDATES,
    Candidate,
    Prompt,
    append,
    candidate_id,
    held,
    read_candidates,
    read_prompts,
)
from orpo_lab.curate.models import check_options, open_model
from orpo_lab.curate.store import Comparison, Store
from orpo_lab.errors import UserError
from orpo_lab.progress import Work

# Without --temperatures those of the answers are spread evenly between these two
TEMPERATURES = (0.7, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step to a parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the curation")
    ask.add_arguments(parser)
    parser.add_argument(
        "--num", type=int, default=2, metavar="N", help="answers a prompt (default: 2)"
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        metavar="T",
        help="of the answers, one after the other (default: spread evenly from 0.7 to 0.9)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens with this probability together (default: 1)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="the largest number of tokens of an answer (default: 512)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Add answers to the folder, and the comparisons of the answers, and print how many.

    Raises:
        UserError: there are no prompts, an argument is out of range, or no request can be answered.
        OSError: the folder cannot be written to.
    """
    _check(options)
    prompts = read_prompts(options.folder)
    with held(options.folder):
        for name in options.model:
            _answer_as(open_model(name, options), prompts, options)
        candidates = read_candidates(options.folder)
        found = compare(candidates)
        Store(options.folder).add_comparisons(found.comparisons)
    print(f"{options.folder / CANDIDATES}: {len(candidates)} answers to {len(prompts)} prompts")
    print(found)


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that are out of range."""
    check_options(options)
    if len({*options.model}) < len(options.model):
        raise UserError("--model names a model twice; --num says how many answers it writes")
    if options.num < len(options.model):
        raise UserError(f"--num {options.num} is less than the {len(options.model)} models")
    if any(not 0 <= one <= 2 for one in options.temperatures or ()):
        raise UserError("--temperatures must lie between 0 and 2")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p:g} must be above 0 and at most 1")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")


@dataclass(frozen=True)
class Slot:
    """A place for an answer: the request, and what is recorded with the answer."""

    prompt_id: str
    number: int
    made_by: dict[str, Any]
    request: Request

    def fill(self, answer: Answer, found: dict[str, Any]) -> Candidate:
        """Return the candidate that an answer makes."""
        return Candidate(
            self.request.id,
            self.prompt_id,
            self.number,
            answer.text,
            answer.finish_reason,
            answer.num_tokens,
            datetime.now(UTC).isoformat(timespec="seconds"),
            self.made_by | found,
        )


def plan(
    prompts: Sequence[Prompt], settings: dict[str, Any], options: argparse.Namespace
) -> list[Slot]:
    """Return the answers that one of the models has to write.

    Args:
        prompts: in their order.
        settings: what says which model this is; its `model` is one of `options.model`.
        options: those of the step.
    """
    num, models = options.num, options.model
    given = options.temperatures or spread(num)
    slots = []
    for prompt in prompts:
        for number in range(models.index(settings["model"]), num, len(models)):
            made_by = settings | {
                "temperature": given[number % len(given)],
                "top_p": options.top_p,
                "max_new_tokens": options.max_new_tokens,
                "seed": seed_of(options.seed, prompt.id, number),
            }
            request = Request(
                candidate_id(prompt.id, number, made_by),
                prompt.messages,
                made_by["temperature"],
                options.top_p,
                options.max_new_tokens,
                made_by["seed"],
            )
            slots.append(Slot(prompt.id, number, made_by, request))
    return slots


def spread(num: int) -> list[float]:
    """Return `num` temperatures, evenly from the lowest to the highest of TEMPERATURES."""
    low, high = TEMPERATURES
    return [round(low + (high - low) * at / max(1, num - 1), 4) for at in range(num)]


def seed_of(seed: int, prompt_id: str, number: int) -> int:
    """Return the seed of one answer, below 2^31 since some endpoints take no larger one."""
    return xxh3_64_intdigest(f"{seed} {prompt_id} {number}".encode()) % 2**31


def _answer_as(model: Answerer, prompts: Sequence[Prompt], options: argparse.Namespace) -> None:
    """Append the answers of one model to the folder, each batch as soon as it is there."""
    path = options.folder / CANDIDATES
    present = read_candidates(options.folder) if path.is_file() else []
    slots = {slot.request.id: slot for slot in plan(prompts, model.settings, options)}
    have = {candidate.id for candidate in present} & slots.keys()
    _check_same_weights(model, [one for one in present if one.id in have])
    failed: Counter[str] = Counter()
    requests = [slot.request for slot in slots.values()]
    with Work(f"{model.name}: answers", len(slots), done=len(have)) as work:
        for batch in model.answer(requests, have):
            answered = [(one, made) for one, made in batch if isinstance(made, Answer)]
            append(path, [slots[one.id].fill(made, model.found) for one, made in answered])
            failed.update(made.reason for _, made in batch if isinstance(made, Failure))
            work.done += len(answered)
    num_new = len(slots) - len(have) - failed.total()
    there = f", {len(have)} were there already" if have else ""
    print(f"{model.name}: {num_new} answers{there}")
    for reason, num in failed.most_common(3):
        print(f"{model.name}: {num} answers failed; the same command tries again: {reason}")


def _check_same_weights(model: Answerer, present: Sequence[Candidate]) -> None:
    """Refuse to go on with another model of the same name.

    Raises:
        UserError: the answers that are there were written by other weights.
    """
    now = model.found.get("weights")
    if any(one.made_by.get("weights") != now for one in present):
        raise UserError(
            f"{model.name} is not the model any more that has answered before (its weights have "
            "changed); give it another name or --seed to add its answers"
        )


@dataclass(frozen=True)
class Compared:
    """Comparisons, and what cannot be compared."""

    comparisons: list[Comparison]
    num_identical: int
    """Answers with the text of an earlier one to the same prompt."""
    num_empty: int
    """Answers without a text."""
    num_cut: int
    """Answers that were cut off at their largest length."""

    def __str__(self) -> str:
        """Return the numbers in words."""
        said = [
            f"{self.num_identical} repeated answers" if self.num_identical else "",
            f"{self.num_empty} empty answers" if self.num_empty else "",
        ]
        left_out = f" (left out: {', '.join(filter(None, said))})" if any(said) else ""
        cut = f"; {self.num_cut} answers end at --max-new-tokens" if self.num_cut else ""
        return f"{len(self.comparisons)} comparisons{left_out}{cut}"


def compare(candidates: Sequence[Candidate]) -> Compared:
    """Return every pair of different answers to the same prompt, with the same id every time.

    Of answers that are the same text the first in the file stands for all. So nobody is asked about
    the same two texts twice, also when answers are added.
    """
    by_prompt: dict[str, dict[str, Candidate]] = defaultdict(dict)
    texts = [candidate.text.strip() for candidate in candidates]
    for candidate, text in zip(candidates, texts, strict=True):
        if text:
            by_prompt[candidate.prompt_id].setdefault(text, candidate)
    num_different = sum(map(len, by_prompt.values()))
    return Compared(
        list(_comparisons(by_prompt.values())),
        num_identical=sum(map(bool, texts)) - num_different,
        num_empty=texts.count(""),
        num_cut=sum(candidate.finish_reason == "length" for candidate in candidates),
    )


def _comparisons(by_prompt: Iterable[dict[str, Candidate]]) -> Iterator[Comparison]:
    for one, other in itertools.chain.from_iterable(
        itertools.combinations(by_text.values(), 2) for by_text in by_prompt
    ):
        # Sorted, since an endpoint may answer in another order the next time
        first, second = sorted([one.id, other.id])
        key = xxh3_64_hexdigest(f"{first} {second}".encode())
        yield Comparison(key, one.prompt_id, first, second)
