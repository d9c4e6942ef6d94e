"""Held-out figures against formulas written out token by token."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_lab import config, data
from orpo_lab.errors import NonFiniteError
from orpo_lab.evaluate import Evaluation, evaluate, generate, preference_metrics, repetition, score

Load = Callable[..., config.Config]


@pytest.fixture
def pairs(load: Load, tokenizer: Any) -> data.Data:
    return data.load(load("dataset.num_train=4", "dataset.num_eval=24").dataset, tokenizer)


def one_by_one(network: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Return each completion token's log-probability, one sequence at a time, unpadded."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = network(input_ids=ids).logits.double().log_softmax(-1)[0]
    return [logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


def test_preference_metrics_equal_their_formulas(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    network = build_model(load("optimizer=lora")).eval()
    with torch.no_grad():
        metrics = preference_metrics(score(network, tokenizer, pairs.held_out, "test"))
    sides = [
        [one_by_one(network, row["prompt_ids"], row[side]) for row in pairs.held_out]
        for side in ("chosen_ids", "rejected_ids")
    ]
    chosen, rejected = ([sum(one) / len(one) for one in side] for side in sides)
    num = len(pairs.held_out)

    def log_odds(logp: float) -> float:
        return logp - math.log(-math.expm1(logp))

    tokens = [logp for one in sides[0] for logp in one]
    expected = {
        "num_pairs": num,
        "preference_accuracy": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / num,
        "logp_margin": sum(chosen) / num - sum(rejected) / num,
        "log_odds": sum(map(log_odds, chosen)) / num - sum(map(log_odds, rejected)) / num,
        "chosen_logp": sum(chosen) / num,
        "rejected_logp": sum(rejected) / num,
        "chosen_nll": -sum(tokens) / len(tokens),
        "chosen_perplexity": math.exp(-sum(tokens) / len(tokens)),
    }
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_batched_greedy_answers_equal_one_by_one(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    network = build_model(load("optimizer=lora")).eval()
    together = generate(network, tokenizer, pairs.held_out, 12, check=True, desc="test")
    for row, answered in zip(pairs.held_out, together, strict=True):
        ids = list(row["prompt_ids"])
        while len(ids) < len(row["prompt_ids"]) + 12 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        text = tokenizer.decode(ids[len(row["prompt_ids"]) :], skip_special_tokens=True)
        assert answered.answer == text


def test_a_right_answer_is_an_exact_match(tokenizer: Any, pairs: data.Data) -> None:
    class Oracle:
        """Answers every prompt with its chosen completion."""

        def parameters(self) -> Any:
            return iter([torch.zeros(1)])

        def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            answers = [row["chosen_ids"] for row in pairs.held_out]
            width = max(map(len, answers))
            padded = [one + [tokenizer.pad_token_id] * (width - len(one)) for one in answers]
            return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    answers = generate(Oracle(), tokenizer, pairs.held_out, 30, check=True, desc="test")
    assert all(one.correct for one in answers)
    unchecked = generate(Oracle(), tokenizer, pairs.held_out, 30, check=False, desc="test")
    assert all(one.correct is None for one in unchecked)


def test_evaluation_leaves_the_mode_and_the_random_state_alone(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    loaded = load("dataset.num_generations=2")
    network = build_model(loaded).train()
    state = torch.get_rng_state()
    found = evaluate(network, tokenizer, pairs, loaded.dataset, dtype=torch.float32, desc="test")
    assert network.training
    assert torch.equal(state, torch.get_rng_state())
    assert found.metrics["num_generations"] == 2
    assert {"generated_tokens", "repetition", "exact_match"} <= found.metrics.keys()
    halves = found.metrics["by_wording"]
    assert halves["free"]["num_pairs"] == halves["terse"]["num_pairs"] == 12
    mean = sum(half["logp_margin"] for half in halves.values()) / 2
    assert mean == pytest.approx(found.metrics["logp_margin"], abs=1e-6)


def test_repetition_counts_what_was_said_before() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 12) == pytest.approx(0.9)
    assert repetition([1, 2]) == 0


def test_no_generations_are_no_figures(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    loaded = load("dataset.num_generations=0", "optimizer=lora")
    found = evaluate(
        build_model(loaded), tokenizer, pairs, loaded.dataset, dtype=torch.float32, desc="test"
    )
    assert "repetition" not in found.metrics
    assert not found.generations


def test_a_model_that_gives_nan_is_refused(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    loaded = load("optimizer=lora")
    network = build_model(loaded)
    with torch.no_grad():
        next(network.parameters())[:] = math.nan
    with pytest.raises(NonFiniteError, match="after training, 24 of 24 held-out pairs"):
        evaluate(network, tokenizer, pairs, loaded.dataset, dtype=torch.float32, desc="after")


def test_an_evaluation_is_restored_as_it_was_saved(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data, tmp_path: Path
) -> None:
    loaded = load("optimizer=lora", "dataset.num_generations=4")
    one = evaluate(
        build_model(loaded), tokenizer, pairs, loaded.dataset, dtype=torch.float32, desc="before"
    )
    one.save(tmp_path / "file")
    other = Evaluation.restore(tmp_path / "file")
    assert other.metrics == one.metrics
    assert other.generations == one.generations
    assert other.by_pair() == one.by_pair()
    assert len(other.by_pair()["correct"]) == 24
