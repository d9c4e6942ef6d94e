"""Held-out figures against formulas written out token by token."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from orpo_lab import config, data, engine, run
from orpo_lab import evaluate as evaluation
from orpo_lab.data import embedded
from orpo_lab.engine import head, scoring, shared_prefix
from orpo_lab.errors import NonFiniteError
from orpo_lab.evaluate import (
    REPETITION_NGRAM,
    Evaluation,
    Generation,
    Scores,
    evaluate,
    generate,
    preference_metrics,
    repetition,
    score,
    turn_ends,
)
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.sweep.folder import CACHE, Sweep
from tests.test_engine_shared_prefix import ARCHITECTURES, make_model, make_pairs

Load = Callable[..., config.Config]

# Token ids that end an answer of a random model
ENDS = [*range(3, 15)]
SMOLLM2 = Path("~/.cache/orpo-lab-assets/smollm2-135m").expanduser()

# What a model's own settings may hold that would choose other tokens than the largest logit
MEDDLING: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "num_beams": 3,
    "min_new_tokens": 5,
    "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [8, 9],
    "forced_eos_token_id": 2,
    "bad_words_ids": [[10], [11]],
    "do_sample": True,
    "temperature": 2.0,
    "max_length": 3,
}

# Models beyond those that the default engine trains; the last one does more than an output head
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "opt": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 48}),
    "mamba": ("mamba", {"state_size": 4}),
    "modernbert": ("modernbert-decoder", {"local_attention": 8}),
}


EACH_ENGINE = pytest.mark.parametrize("which", ["shared_prefix", "trl"])


@pytest.fixture
def score_as(load: Load, tokenizer: Any) -> Callable[..., Scores]:
    """Score pairs as one of the engines reads them."""

    def score_as(
        which: str, network: Any, pairs: datasets.Dataset, dtype: torch.dtype = torch.float32
    ) -> Scores:
        loaded = load(f"engine={which}")
        scorer = engine.scorer(loaded, model=network, tokenizer=tokenizer, dtype=dtype)
        return score(scorer, pairs, "test")

    return score_as


@pytest.fixture
def pairs(load: Load, tokenizer: Any) -> data.Data:
    return data.load(load("dataset.num_train=4", "dataset.num_eval=24").dataset, tokenizer)


def one_by_one(network: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Return each completion token's log-probability, one sequence at a time, unpadded."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = network(input_ids=ids).logits.double().log_softmax(-1)[0]
    return [logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


@EACH_ENGINE
def test_preference_metrics_equal_their_formulas(
    load: Load, build_model: Any, score_as: Any, pairs: data.Data, which: str
) -> None:
    network = build_model(load("optimizer=lora")).eval()
    metrics = preference_metrics(score_as(which, network, pairs.held_out))
    sides = [
        [one_by_one(network, row["prompt_ids"], row[side]) for row in pairs.held_out]
        for side in ("chosen_ids", "rejected_ids")
    ]
    chosen, rejected = ([sum(logps) / len(logps) for logps in side] for side in sides)
    num = len(pairs.held_out)

    def log_odds(logp: float) -> float:
        return logp - math.log(-math.expm1(logp))

    tokens = [logp for logps in sides[0] for logp in logps]
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


@pytest.fixture
def unlike(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Make a random model of any architecture here."""
    monkeypatch.setattr("tests.test_engine_shared_prefix.ARCHITECTURES", ARCHITECTURES | OTHERS)
    return lambda name: make_model(name).eval()


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, which) for name in ARCHITECTURES for which in ("shared_prefix", "trl")),
        *((name, "trl") for name in OTHERS),
    ],
)
def test_scores_of_every_architecture_are_those_of_its_logits(
    unlike: Callable[[str], Any], score_as: Any, name: str, which: str
) -> None:
    network = unlike(name)
    pairs = datasets.Dataset.from_list(make_pairs(5))
    before = network.config._attn_implementation
    scores = score_as(which, network, pairs)
    assert network.config._attn_implementation == before
    for side, found in (("chosen", scores.chosen_logps), ("rejected", scores.rejected_logps)):
        expected = [one_by_one(network, row["prompt_ids"], row[f"{side}_ids"]) for row in pairs]
        means = [sum(logps) / len(logps) for logps in expected]
        assert found.tolist() == pytest.approx(means, abs=2e-5)
    assert head.has_plain_head(network) == (name != "modernbert")


def test_rows_hold_each_prompt_once_and_sequences_are_those_of_trls_engine(
    score_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_PER_FORWARD", 60)
    monkeypatch.setattr(scoring, "TOKENS_PER_CPU_ROW", 60)
    network, plain = make_model("llama").eval(), make_pairs(9)
    pairs = datasets.Dataset.from_list(plain)
    read: list[tuple[int, int]] = []
    network.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: read.append(tuple(inputs[0].shape))
    )
    score_as("shared_prefix", network, pairs)
    sizes = [sum(len(ids) for ids in pair.values()) for pair in plain]
    assert sum(tokens for _, tokens in read) == sum(sizes)
    assert {num for num, _ in read} == {1}
    assert max(tokens for _, tokens in read) <= 60
    num_rows = len(read)
    assert 1 < num_rows < 9
    read.clear()
    score_as("trl", network, pairs)
    # Two readings of the probe come first
    assert sum(num for num, _ in read[2:]) == 18
    assert max(num * tokens for num, tokens in read) <= 60


def test_rows_in_bf16_are_as_close_to_fp32_as_sequences(score_as: Any) -> None:
    network = make_model("llama").eval()
    pairs = datasets.Dataset.from_list(make_pairs(60))
    errors = {}
    for which in ("shared_prefix", "trl"):
        exact = score_as(which, network, pairs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = score_as(which, network, pairs, torch.bfloat16)
        errors[which] = float((rounded.rejected_logps - exact.rejected_logps).abs().mean())
    assert 1e-4 < errors["shared_prefix"] < 1.2 * errors["trl"]


def test_pairs_are_scored_in_smaller_rows_when_memory_runs_out(
    score_as: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is raised by hand: no test can fill a GPU."""
    network, pairs = make_model("llama").eval(), datasets.Dataset.from_list(make_pairs(9))
    expected = score_as("shared_prefix", network, pairs)
    widest = max(sum(len(ids) for ids in pair.values()) for pair in make_pairs(9))
    room = widest
    read = shared_prefix.scored_logps

    def read_or_run_out(model: Any, row: dict[str, Any], *others: Any) -> torch.Tensor:
        if row["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(model, row, *others)

    monkeypatch.setattr(shared_prefix, "scored_logps", read_or_run_out)
    found = score_as("shared_prefix", network, pairs)
    assert torch.allclose(found.chosen_logps, expected.chosen_logps, atol=1e-5)
    assert torch.allclose(found.rejected_logps, expected.rejected_logps, atol=1e-5)
    assert "test: out of memory; scored again in rows of" in caplog.text
    room = widest - 1
    with pytest.raises(torch.OutOfMemoryError):
        score_as("shared_prefix", network, pairs)
    monkeypatch.setattr(shared_prefix, "scored_logps", broken)
    caplog.clear()
    with pytest.raises(RuntimeError, match="something else"):
        score_as("shared_prefix", network, pairs)
    assert "out of memory" not in caplog.text


def broken(*_: Any) -> torch.Tensor:
    raise RuntimeError("something else")


def test_engines_of_a_sweep_do_not_share_the_untrained_models_evaluation(
    load: Load, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path)
    (sweep.folder / CACHE).mkdir()
    made: list[str] = []
    pairs: Any = SimpleNamespace(length_guess=None)

    def measure(desc: str) -> Evaluation:
        made.append(desc)
        return Evaluation({}, Scores(*[torch.zeros(1)] * 3), [], 0.0)

    for overrides in (("beta=0.1",), ("beta=0.2",), ("engine=trl",), ("engine=trl", "seed=1")):
        run._measure_before(load(*overrides), measure, pairs, sweep)
    assert made == ["before"] * 2


def test_jobs_that_share_an_evaluation_have_their_own_guesses_by_length(
    load: Load, tmp_path: Path
) -> None:
    """Of the same rows, methods read other training pairs, which fix the rule of the guess."""
    sweep = Sweep(tmp_path)
    (sweep.folder / CACHE).mkdir()

    def before(method: str, guesses: list[float] | None) -> tuple[Any, Any]:
        array = None if guesses is None else np.array(guesses)
        pairs: Any = SimpleNamespace(length_guess=array)

        def measure(desc: str) -> Evaluation:
            return Evaluation({}, Scores(*[torch.zeros(2)] * 3), [], 0.0).guessed(array)

        found = run._measure_before(load(f"method={method}"), measure, pairs, sweep)
        return found.length_guess, found.metrics.get("length_guess_accuracy")

    assert before("kto", [1, 0.5]) == ([1, 0.5], 0.75)
    assert before("sft", None) == (None, None)
    assert before("dpo", [0, 0.5]) == ([0, 0.5], 0.25)


class Largest(TorchDispatchMode):
    """Keeps the most numbers that a tensor has had."""

    numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


@EACH_ENGINE
@pytest.mark.parametrize("optimizer", ["lora", "adamw"])
def test_scoring_never_holds_the_logits_of_a_batch(
    load: Load,
    build_model: Any,
    score_as: Any,
    optimizer: str,
    which: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "CHUNK", 8)
    network = build_model(load(f"optimizer={optimizer}")).eval()
    base = network.get_base_model() if optimizer == "lora" else network
    base.resize_token_embeddings(20_000)
    row = {"prompt_ids": [3, 4, 5], "chosen_ids": list(range(6, 26)), "rejected_ids": [7, 8]}
    pairs = datasets.Dataset.from_list([row] * 16)
    with Largest() as largest:
        score_as(which, network, pairs)
    weight = base.get_output_embeddings().weight
    # A probe of one sequence and chunks of 8 rows; the logits of a batch would be 16 times 23 rows
    assert largest.numbers <= max(weight.numel(), len(head.PROBE) * len(weight))


def by_argmax(network: Any, prompt: list[int], ends: list[int], max_new_tokens: int) -> list[int]:
    """Answer a prompt in the plainest way, one token at a time and without a cache."""
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


def assert_answers(
    answers: list[Generation], rows: Any, network: Any, tokenizer: Any, ends: list[int], size: int
) -> None:
    for row, answered in zip(rows, answers, strict=True):
        expected = by_argmax(network, row["prompt_ids"], ends, size)
        assert answered.answer == tokenizer.decode(expected, skip_special_tokens=True)
        assert answered.num_tokens == len(expected)
        assert answered.repetition == repetition(expected)


@pytest.mark.parametrize("optimizer", ["lora", "adamw"])
def test_answers_are_plainly_greedy_whatever_the_models_own_settings(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data, optimizer: str, tmp_path: Path
) -> None:
    network = build_model(load(f"optimizer={optimizer}")).eval()
    base = network.get_base_model() if optimizer != "adamw" else network
    # The full stop of the answers in words; others are short, and go on to their EOS
    said = by_argmax(network, pairs.held_out[0]["prompt_ids"], [tokenizer.eos_token_id], 12)
    answer_ends = said[-1]
    base.generation_config = GenerationConfig(**MEDDLING, eos_token_id=[answer_ends, 2])
    base.generation_config.save_pretrained(tmp_path / "before")
    answers = generate(
        network, tokenizer, pairs.held_out, 12, check=embedded.is_correct, desc="test"
    )
    ends = [tokenizer.eos_token_id, answer_ends]
    assert turn_ends(network, tokenizer) == sorted({*ends, 2})
    assert_answers(answers, pairs.held_out, network, tokenizer, ends, 12)
    sizes = [answer.num_tokens for answer in answers]
    assert max(sizes) - min(sizes) > REPETITION_NGRAM
    base.generation_config.save_pretrained(tmp_path / "after")
    files = [tmp_path / when / "generation_config.json" for when in ("before", "after")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow
def test_smollm2_answers_as_a_plain_argmax_loop_does(
    assets: Path, load: Load, pairs: data.Data
) -> None:
    if not SMOLLM2.is_dir():
        pytest.skip("SmolLM2 is not on this machine: python ../shared/assets/get_smollm2.py")
    loaded = load("model=local", f"model.path={SMOLLM2}", "model.dtype=fp32", "optimizer=lora")
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    network = load_model(loaded, tokenizer, torch.float32).eval()
    (full_stop,) = tokenizer(".", add_special_tokens=False)["input_ids"]
    network.generation_config = GenerationConfig(
        repetition_penalty=1.3, eos_token_id=[tokenizer.eos_token_id, full_stop]
    )
    asked = ["What is the capital of France?", "Write three words about the sea."]
    rows = []
    for text in asked:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        rows.append({"prompt_ids": ids, "prompt_text": text, "chosen_text": "", "asked": ""})
    answers = generate(network, tokenizer, datasets.Dataset.from_list(rows), 24, desc="test")
    ends = [tokenizer.eos_token_id, full_stop]
    assert_answers(answers, rows, network, tokenizer, ends, 24)
    assert answers[0].num_tokens > 3


TEMPLATES = {
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}": "<|im_end|>",
    "{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}": "<|im_end|>",
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": None,
    "{{ messages[0].content }}": None,
    "{{ raise_exception('no') }}": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_token_that_a_template_ends_a_turn_with_ends_an_answer(
    build_model: Any, load: Load, tokenizer: Any, template: str
) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.chat_template = template
    network = build_model(load("optimizer=lora"))
    network.get_base_model().generation_config.eos_token_id = None
    ends = own.convert_ids_to_tokens(turn_ends(network, own))
    assert set(ends) == {own.eos_token, TEMPLATES[template]} - {None}


def test_a_right_answer_is_an_exact_match(tokenizer: Any, pairs: data.Data) -> None:
    right = {tuple(row["prompt_ids"]): row["chosen_ids"] for row in pairs.held_out}

    class Oracle:
        """Answers every prompt with its chosen completion."""

        device = torch.device("cpu")
        generation_config = GenerationConfig()

        def forward(self, input_ids: torch.Tensor) -> Any:
            """Take no cache."""

        def generate(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
        ) -> SimpleNamespace:
            rows = zip(input_ids, attention_mask.bool(), strict=True)
            answers = [right[tuple(ids[is_token].tolist())] for ids, is_token in rows]
            width = max(map(len, answers))
            padded = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in answers]
            sequences = torch.cat([input_ids, torch.tensor(padded)], dim=1)
            return SimpleNamespace(sequences=sequences, past_key_values=None)

    oracle: Any = Oracle()
    answers = generate(
        oracle, tokenizer, pairs.held_out, 30, check=embedded.is_correct, desc="test"
    )
    assert all(answer.correct for answer in answers)
    unchecked = generate(oracle, tokenizer, pairs.held_out, 30, desc="test")
    assert all(answer.correct is None for answer in unchecked)


def test_an_answer_that_was_cut_is_wrong_whatever_it_says_so_far(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data, caplog: Any
) -> None:
    network = build_model(load("optimizer=lora")).eval()
    judged = {
        num: generate(network, tokenizer, pairs.held_out, num, check=lambda *_: True, desc="test")
        for num in (1, 30)
    }
    assert {(one.is_cut, one.correct, one.judged) for one in judged[1]} == {
        (True, False, "wrong: cut at max_new_tokens")
    }
    assert {(one.is_cut, one.correct, one.judged) for one in judged[30]} == {(False, True, "right")}
    found = {num: evaluation.generation_metrics(answers) for num, answers in judged.items()}
    assert [(one["exact_match"], one["cut_answers"]) for one in found.values()] == [(0, 1), (1, 0)]
    with caplog.at_level("WARNING", "orpo_lab"):
        evaluation._say_cut(judged[30], "before")
        assert not caplog.messages
        evaluation._say_cut(judged[1], "before")
    num = len(pairs.held_out)
    assert f"{num} of {num} answers that are checked were cut" in caplog.text
    unchecked = generate(network, tokenizer, pairs.held_out, 1, desc="test")
    assert {one.correct for one in unchecked} == {None}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Prompts of unlike lengths, and tokens that end random models' answers here and there."""
    monkeypatch.setattr(evaluation, "turn_ends", lambda *_: ENDS)
    lengths = [5, 2, 9, 1, 12, 7, 3, 11, 4, 8, 6, 10]
    return [
        {
            "prompt_ids": [(7 * i + 3 * n) % 90 + 3 for n in range(length)],
            "prompt_text": str(i),
            "chosen_text": "",
            "asked": "",
        }
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("leaving", [1e-9, 0.25])
@pytest.mark.parametrize(
    "name",
    [
        # One model with full attention and one with sliding windows are quick, the others are not
        pytest.param(name, marks=[] if name in ("llama", "mistral_sliding") else [pytest.mark.slow])
        for name in ARCHITECTURES
    ],
)
def test_answers_of_a_batch_that_some_leave_are_those_of_one_by_one(
    tokenizer: Any, asked: list[dict[str, Any]], name: str, leaving: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(evaluation, "LEAVING", leaving)
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 150)
    # Beyond their settings, softcapped scores are not what sdpa computes
    network = make_model(name, **({"attn_implementation": "eager"} if name == "gemma2" else {}))
    network.eval()
    rows = datasets.Dataset.from_list(asked)
    answers = generate(network, tokenizer, rows, 10, desc="test")
    assert [answer.prompt for answer in answers] == [row["prompt_text"] for row in asked]
    assert_answers(answers, asked, network, tokenizer, ENDS, 10)
    sizes = [answer.num_tokens for answer in answers]
    assert min(sizes) < 10


def test_no_token_is_computed_behind_an_answers_end(
    tokenizer: Any, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LEAVING", 1e-9)
    network = make_model("llama").eval()
    read: list[int] = []
    network.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0].numel())
    )
    rows = datasets.Dataset.from_list(asked)
    answers = generate(network, tokenizer, rows, 10, desc="test")
    prompts = [len(row["prompt_ids"]) for row in asked]
    # The last token that is written, an end or the tenth token, is not read again
    written = [min(answer.num_tokens + 1, 10) - 1 for answer in answers]
    assert sum(read) == len(prompts) * max(prompts) + sum(written)
    assert len(set(written)) > 2


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_with_a_cache_of_its_own_kind_answers_too(
    unlike: Callable[[str], Any], tokenizer: Any, asked: list[dict[str, Any]], name: str
) -> None:
    network = unlike(name)
    same = [row | {"prompt_ids": (row["prompt_ids"] * 5)[:5]} for row in asked]
    answers = generate(network, tokenizer, datasets.Dataset.from_list(same), 10, desc="test")
    assert_answers(answers, same, network, tokenizer, ENDS, 10)


def test_evaluation_leaves_the_mode_and_the_random_state_alone(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    loaded = load("dataset.num_generations=5")
    network = build_model(loaded).train()
    state = torch.get_rng_state()
    found = evaluate(network, tokenizer, pairs, loaded, dtype=torch.float32, desc="test")
    assert network.training
    assert torch.equal(state, torch.get_rng_state())
    assert found.metrics["num_generations"] == 5
    assert {"generated_tokens", "repetition", "exact_match"} <= found.metrics.keys()
    assert [answer.prompt for answer in found.generations] == pairs.held_out["prompt_text"][:5]
    halves = found.metrics["by_wording"]
    assert halves["free"]["num_pairs"] == halves["terse"]["num_pairs"] == 12
    mean = sum(half["logp_margin"] for half in halves.values()) / 2
    assert mean == pytest.approx(found.metrics["logp_margin"], abs=1e-6)
    # Free and terse alternate
    for name, answers in (("free", found.generations[::2]), ("terse", found.generations[1::2])):
        assert halves[name]["num_generations"] == len(answers)
        tokens = sum(answer.num_tokens for answer in answers)
        assert halves[name]["generated_tokens"] == tokens / len(answers)


@EACH_ENGINE
def test_the_arithmetic_is_that_of_training(
    load: Load, build_model: Any, tokenizer: Any, score_as: Any, pairs: data.Data, which: str
) -> None:
    loaded = load(
        "dataset.num_generations=0", "optimizer=lora", "model.dtype=fp32", f"engine={which}"
    )
    network = build_model(loaded).eval()
    found = evaluate(network, tokenizer, pairs, loaded, dtype=torch.bfloat16, desc="test")
    assert not network.training
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score_as(which, network, pairs.held_out, torch.bfloat16)
    assert torch.equal(found.scores.chosen_logps, rounded.chosen_logps)
    exact = score_as(which, network, pairs.held_out)
    assert not torch.equal(found.scores.chosen_logps, exact.chosen_logps)


def test_a_pair_that_is_as_likely_either_way_is_not_preferred() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    metrics = preference_metrics(Scores(chosen, rejected, torch.tensor([2.0, 3.0, 4.0])))
    assert metrics["preference_accuracy"] == pytest.approx(1 / 3)


def test_repetition_counts_what_was_said_before() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 12) == pytest.approx(0.9)
    assert repetition([1, 2]) == 0


def test_no_generations_are_no_figures(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data
) -> None:
    loaded = load("dataset.num_generations=0", "optimizer=lora")
    found = evaluate(
        build_model(loaded), tokenizer, pairs, loaded, dtype=torch.float32, desc="test"
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
        evaluate(network, tokenizer, pairs, loaded, dtype=torch.float32, desc="after")


def test_an_evaluation_is_restored_as_it_was_saved(
    load: Load, build_model: Any, tokenizer: Any, pairs: data.Data, tmp_path: Path
) -> None:
    for asked, answered in ((4, 4), (50, 24)):
        loaded = load("optimizer=lora", f"dataset.num_generations={asked}")
        network = build_model(loaded)
        evaluation = evaluate(network, tokenizer, pairs, loaded, dtype=torch.float32, desc="before")
        evaluation.save(tmp_path / "file")
        other = Evaluation.restore(tmp_path / "file")
        assert other.metrics == evaluation.metrics
        assert other.generations == evaluation.generations
        assert other.by_pair() == evaluation.by_pair()
        correct = [bool(generation.correct) for generation in evaluation.generations]
        assert other.by_pair()["correct"] == correct + [None] * (24 - answered)
