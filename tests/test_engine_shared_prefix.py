"""`engine=shared_prefix` against TRL's step and against the objective's formula."""

import copy
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_lab import config, engine
from orpo_lab.config.optimizer import Lora
from orpo_lab.engine import attention, head, packing, shared_prefix
from orpo_lab.errors import UserError
from orpo_lab.methods.base import Batch
from orpo_lab.model.adapter import attach
from orpo_lab.model.causal import without_adapters
from orpo_lab.optimizer.updater import Updater
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop
from orpo_lab.tracker.base import Untracked
from orpo_lab.training.checkpoint import Spent
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.finite import FiniteCheck
from orpo_lab.training.lines import Lines
from orpo_lab.training.loop import Loop, add_gradients, batches
from orpo_lab.training.meter import Meter
from orpo_lab.training.state import State

Load = Callable[..., config.Config]
Build = Callable[..., Any]
Pair = dict[str, list[int]]

TRL = ("engine=trl",)
SIDES = ("chosen", "rejected")
# The attention functions whose backward pass a CPU can compute, the second with `flash_kernel`
EXACT = (attention.BY_PAIR, attention.VARLEN)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    # Its layers never tell the attention function of their window
    "qwen2_moe_sliding": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
}


def make_model(name: str, **settings: Any) -> Any:
    """A tiny model with random weights large enough for attention to matter."""
    kind, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    architecture = transformers.AutoConfig.for_model(kind, **{**SIZES, **own, **settings})
    model = transformers.AutoModelForCausalLM.from_config(architecture)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.2)
    model.config.use_cache = False
    return model


def make_pairs(num: int, seed: int = 0) -> list[Pair]:
    """Random token ids; of several pairs, the first is as short as can be."""
    numbers = random.Random(seed)

    def ids(size: int) -> list[int]:
        return [numbers.randrange(3, VOCABULARY) for _ in range(size)]

    shortest = [{"prompt_ids": ids(1), "chosen_ids": ids(1), "rejected_ids": ids(1)}]
    others = [
        {
            "prompt_ids": ids(numbers.randint(1, 14)),
            "chosen_ids": ids(numbers.randint(1, 12)),
            "rejected_ids": ids(numbers.randint(1, 12)),
        }
        for _ in range(num)
    ]
    return (shortest + others)[:num] if num > 1 else others


def with_masks(pairs: list[Pair]) -> list[Pair]:
    """Leave some tokens of each completion unsupervised, at its beginning, inside or at its end."""
    numbers, masked = random.Random(1), []
    for pair in pairs:
        masks: dict[str, Any] = {}
        for side in SIDES:
            mask = [numbers.random() < 0.5 for _ in pair[f"{side}_ids"]]
            mask[numbers.randrange(len(mask))] = True
            masks[f"{side}_mask"] = mask
        masked.append({**pair, **masks})
    return masked


def make_loop(
    load: Load,
    folder: Path,
    tokenizer: Any,
    model: Any,
    pairs: list[Pair],
    *overrides: str,
    dtype: torch.dtype = torch.float32,
    devices: OneDevice | None = None,
) -> Loop:
    """Return a loop of one step, which takes all pairs; others are held out."""
    loaded = load(
        "optimizer=adamw",
        "beta=0.3",
        "dataset.max_length=64",
        "dataset.max_prompt_length=32",
        f"train.batch_size={len(pairs)}",
        "train.max_steps=1",
        "train.max_grad_norm=0",
        *overrides,
    )
    devices = devices or OneDevice(torch.device("cpu"), dtype)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if loaded.train.gradient_checkpointing == "true":
        model.activation_checkpointing_enable()
    return Loop(
        config=loaded,
        state=State(model, Updater(sgd, model), devices, lambda num_updates: 1.0),
        engine=engine.build(loaded, model=model, tokenizer=tokenizer, devices=devices),
        finite=FiniteCheck(loaded.train, Meter(Spent()), is_scaled=False),
        lines=Lines(RunFolder(folder), Untracked(), 0, 1),
        train=datasets.Dataset.from_list(pairs),
        held_out=datasets.Dataset.from_list(make_pairs(max(1, len(pairs) - 1), seed=99)),
        num_steps=1,
        save=lambda kinds: None,
        stop=Stop(),
    )


@pytest.fixture
def build(load: Load, tokenizer: Any, tmp_path: Path) -> Build:
    """Make loops of the test's own models."""

    def make(model: Any, pairs: list[Pair], *overrides: str, **options: Any) -> Loop:
        if TRL[0] in overrides:
            overrides = (*overrides, f"engine.micro_batch_size={len(pairs)}")
        return make_loop(load, tmp_path, tokenizer, model, pairs, *overrides, **options)

    return make


def step(loop: Loop) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of a step of all pairs."""
    (pairs,) = itertools.islice(batches(loop.train, len(loop.train), 0, 0), 1)
    loss, _ = add_gradients(loop.engine, loop.state, pairs, loop.config.beta)
    named = loop.state.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(
    ours: tuple[float, dict[str, Tensor]],
    theirs: tuple[float, dict[str, Tensor]],
    limit: float,
    smallest: float = 1e-5,
) -> None:
    """Compare losses, and every gradient relative to its size.

    A gradient below the share `smallest` of the largest gradient is compared relative to that
    share: where a gradient is zero but for rounding, its own size is no measure.
    """
    assert ours[0] == pytest.approx(theirs[0], rel=limit)
    assert ours[1].keys() == theirs[1].keys()
    assert len(ours[1]) > 10
    least = smallest * max(reference.abs().max() for reference in theirs[1].values())
    for name, reference in theirs[1].items():
        error = (ours[1][name] - reference).abs().max() / max(reference.abs().max(), least)
        assert error < limit, (name, float(error))


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_every_gradient_are_trls(build: Build, name: str) -> None:
    pairs = make_pairs(6)
    # Softcapped scores are beyond sdpa; our engine finds that out by itself
    model = make_model(name, **({"attn_implementation": "eager"} if name == "gemma2" else {}))
    theirs = step(build(copy.deepcopy(model), pairs, *TRL))
    for implementation in EXACT[:1] if name == "gemma2" else EXACT:
        built = build(copy.deepcopy(model), pairs)
        built.engine.attention_implementation = implementation
        assert_same(step(built), theirs, 1e-5)


@pytest.mark.parametrize("num", range(1, 9))
def test_any_number_of_pairs_is_trls(build: Build, num: int) -> None:
    pairs = make_pairs(num, seed=num)
    model = make_model("llama")
    assert_same(step(build(copy.deepcopy(model), pairs)), step(build(model, pairs, *TRL)), 1e-5)


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing_and_adapters_are_trls(
    build: Build, load: Load, name: str, adapted: bool
) -> None:
    pairs = make_pairs(5)
    model = make_model(name)
    if adapted:
        lora = load("optimizer=lora", "optimizer.dropout=0").optimizer
        assert isinstance(lora, Lora)
        model = attach(model, lora)
        for parameter_name, p in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(p, 0, 0.1)
    theirs = step(build(copy.deepcopy(model), pairs, *TRL))
    for implementation in EXACT:
        built = build(copy.deepcopy(model), pairs, "train.gradient_checkpointing=true")
        built.engine.attention_implementation = implementation
        calls: list[int] = []
        last_layer = without_adapters(built.state.model).model.layers[-1]
        last_layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        assert_same(step(built), theirs, 1e-5)
        assert len(calls) == 2, "and once more going backward"


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_4_bit_base_is_trls(
    build: Build, load: Load, build_model: Any, checkpointing: str
) -> None:
    loaded = load("optimizer=qlora", "optimizer.dropout=0")
    pairs = make_pairs(5)
    networks = [build_model(loaded) for _ in range(2)]
    for network in networks:
        torch.manual_seed(1)
        for name, p in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    ours = step(build(networks[0], pairs, f"train.gradient_checkpointing={checkpointing}"))
    assert_same(ours, step(build(networks[1], pairs, *TRL)), 1e-5)


@pytest.mark.usefixtures("flash_kernel")
def test_in_bf16_it_is_as_close_to_fp32_as_trl_is(build: Build) -> None:
    pairs = make_pairs(6)
    model = make_model("llama")
    exact = step(build(copy.deepcopy(model), pairs, *TRL))
    theirs = step(build(copy.deepcopy(model), pairs, *TRL, dtype=torch.bfloat16))

    def error(of: tuple[float, dict[str, Tensor]]) -> float:
        squares = [(of[1][name] - value).square().sum() for name, value in exact[1].items()]
        norms = [value.square().sum() for value in exact[1].values()]
        return float((torch.stack(squares).sum() / torch.stack(norms).sum()).sqrt())

    assert 1e-3 < error(theirs) < 0.05
    for implementation in EXACT:
        built = build(copy.deepcopy(model), pairs, dtype=torch.bfloat16)
        built.engine.attention_implementation = implementation
        assert 1e-4 < error(step(built)) < 1.2 * error(theirs)


def reference_loss(model: Any, pairs: list[Pair], beta: float, objective: str) -> Tensor:
    """The objective from plain sequences, as docs/method.md writes it down."""
    nll: dict[str, list[Tensor]] = {"tokens": [], "sequences": [], "prompt": []}
    odds = []
    for pair in pairs:
        size = len(pair["prompt_ids"])
        means = []
        for side in SIDES:
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[:, 0]
            said = logps[size - 1 :]
            if f"{side}_mask" in pair:
                said = said[torch.tensor(pair[f"{side}_mask"])]
            means.append(said.mean())
            if side == "chosen":
                nll["prompt"] += [-logps[: size - 1], -said]
                nll["tokens"] += [-said]
                nll["sequences"] += [-means[0]]
        odds += [torch.log(p.exp() / (1 - p.exp())) for p in means]
    log_odds = torch.stack(odds[::2]) - torch.stack(odds[1::2])
    sft, penalty = {
        "method=orpo": (torch.cat(nll["prompt"]).mean(), -log_odds.sigmoid().log()),
        "method=orpo_paper": (torch.stack(nll["sequences"]).mean(), -log_odds.sigmoid().log()),
        "method=orpo_paper method.penalty=log_odds": (
            torch.stack(nll["sequences"]).mean(),
            -log_odds,
        ),
        "method=orpo method.penalty=log_odds": (torch.cat(nll["prompt"]).mean(), -log_odds),
        "method=orpo_paper method.nll_mean=tokens": (
            torch.cat(nll["tokens"]).mean(),
            -log_odds.sigmoid().log(),
        ),
    }[objective]
    return sft + beta * penalty.mean()


@pytest.mark.parametrize(
    "objective",
    [
        "method=orpo",
        "method=orpo_paper",
        "method=orpo method.penalty=log_odds",
        "method=orpo_paper method.penalty=log_odds",
        "method=orpo_paper method.nll_mean=tokens",
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_objective_is_its_formula(build: Build, objective: str, masked: bool) -> None:
    pairs = with_masks(make_pairs(6)) if masked else make_pairs(6)
    model = make_model("llama").double()
    loss = reference_loss(model, pairs, 0.3, objective)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = step(build(model, pairs, *objective.split(), dtype=torch.float64))
    assert_same(ours, (loss.item(), gradients), 1e-6)


@pytest.mark.parametrize("method", ["dpo", "sft", "simpo"])
def test_other_methods_learn_from_supervised_tokens_alone(build: Build, method: str) -> None:
    """In fp32, from plain sequences: the sums that a method gets, and so its every gradient."""
    pairs = with_masks(make_pairs(6))
    counts = torch.tensor([[0, sum(p["chosen_mask"]), sum(p["rejected_mask"])] for p in pairs])
    if method == "dpo":
        pairs = [{**pair, "reference": [-9, -7]} for pair in pairs]
    model = make_model("llama")
    built = build(model, pairs, f"method={method}", "beta=0.3")
    if method == "sft":
        counts[:, 2] = 0
    sums = []
    for pair in pairs:
        both = [torch.zeros(())]
        for side in SIDES:
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0]
            both.append(logps[torch.tensor(pair[f"{side}_mask"])].sum())
        sums.append(torch.stack(both))
    batch = Batch(
        torch.stack(sums),
        counts,
        reference=torch.tensor([[-9.0, -7.0]]).repeat(len(pairs), 1),
        num_supervised=built.engine.method.num_supervised(counts).sum(),
        num_pairs=torch.tensor(float(len(pairs))),
    )
    loss = built.engine.method.losses(batch, 0.3).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert_same(step(built), (loss.item(), gradients), 1e-5)


@pytest.mark.parametrize("method", ["orpo", "orpo_paper"])
def test_any_token_budget_gives_the_same_step(build: Build, method: str) -> None:
    pairs = make_pairs(12)
    model = make_model("llama")
    whole = step(build(copy.deepcopy(model), pairs, f"method={method}"))
    seen = set()
    for budget in (1, 40, 60, 150, 4096):
        built = build(copy.deepcopy(model), pairs, f"method={method}")
        built.engine.collator.budget = budget
        seen.add(len(built.engine.micro_batches(pairs)))
        assert_same(step(built), whole, 1e-5)
    assert len(seen) == 5
    assert {1, 12} <= seen


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention as its own documentation defines it: compiled, it is for GPUs."""
    for_models = "transformers.integrations.flex_attention"
    monkeypatch.setattr(f"{for_models}.WrappedFlexAttention.__call__", lambda self: flex_attention)


def logps(built: Any, pairs: list[Pair]) -> dict[str, Tensor]:
    """Log-probabilities of the first pair's tokens by the part they are of, and of the others'."""
    (micro_batch,) = built.engine.collator(pairs)
    implementation, model = built.engine.attention_implementation, built.state.model
    with torch.no_grad(), built.engine.reading():
        scored = shared_prefix.scored_logps(model, micro_batch, implementation, model.config)
    sums = micro_batch["sums"]
    first = {name: scored[sums == part] for part, name in enumerate(("prompt", *SIDES))}
    return first | {"others": scored[sums >= 3]}


@pytest.mark.usefixtures("plain_flex", "flash_kernel")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(
            ["llama", "mistral_sliding", "gemma2", "phi"], [attention.BY_PAIR, attention.FLEX]
        ),
        ("llama", attention.VARLEN),
        ("mistral_sliding", attention.VARLEN),
    ],
)
def test_rejected_never_sees_chosen_and_pairs_never_see_each_other(
    build: Build, name: str, implementation: str
) -> None:
    pairs = [pair for pair in make_pairs(4) if len(pair["chosen_ids"]) > 1]
    # The order they are packed in
    pairs.sort(key=lambda pair: -sum(packing.sizes_of(pair)))
    changed = copy.deepcopy(pairs)
    changed[0]["chosen_ids"] = [(i + 1) % VOCABULARY for i in pairs[0]["chosen_ids"]]
    built = build(make_model(name), pairs)
    built.engine.attention_implementation = implementation
    before, after = logps(built, pairs), logps(built, changed)
    assert torch.equal(before["rejected"], after["rejected"])
    assert torch.equal(before["others"], after["others"])
    assert not torch.isclose(before["chosen"], after["chosen"]).all()


@pytest.mark.usefixtures("plain_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "qwen2_sliding", "gemma2", "phi3"])
def test_flex_attention_reads_a_row_as_it_is_read_by_pair(build: Build, name: str) -> None:
    pairs = make_pairs(5)
    pairs += [
        pair | {f"{side}_ids": []} for pair, side in zip(make_pairs(2, 1), SIDES, strict=True)
    ]
    built = build(make_model(name), pairs)
    by_pair = logps(built, pairs)
    built.engine.attention_implementation = attention.FLEX
    built.engine.collator.multiple = attention.BLOCK
    flex = logps(built, pairs)
    for part, value in by_pair.items():
        assert torch.allclose(value, flex[part], atol=2e-5), part


@pytest.mark.usefixtures("plain_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [6, 7, 8])
def test_flex_attention_sees_as_far_as_the_longest_sequence_is(build: Build, window: int) -> None:
    """Which has 8 tokens, is a rejected one, and not of the pair with the most tokens."""
    pairs = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 10], "rejected_ids": [11, 12, 13, 14]},
        {"prompt_ids": [9, 10], "chosen_ids": [11], "rejected_ids": [12, 13, 14, 15, 16, 17]},
    ]
    built = build(make_model("mistral_sliding", sliding_window=window), pairs)
    by_pair = logps(built, pairs)
    built.engine.attention_implementation = attention.FLEX
    flex = logps(built, pairs)
    for part, value in by_pair.items():
        assert torch.allclose(value, flex[part], atol=2e-5), part


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("scope", ["completion", "prompt_and_completion"])
def test_sft_does_not_read_the_rejected_completion(build: Build, scope: str) -> None:
    pairs, model = make_pairs(6), make_model("mistral_sliding")
    others = [{**pair, "rejected_ids": [5] * (9 - i)} for i, pair in enumerate(pairs)]
    method = ("method=sft", f"method.nll_scope={scope}")
    steps = {}
    for implementation, given in itertools.product(EXACT, (pairs, others)):
        built = build(copy.deepcopy(model), given, *method)
        built.engine.attention_implementation = implementation
        read = sum(map(packing.tokens_of, built.engine.micro_batches(given)))
        assert read == sum(len(pair["prompt_ids"] + pair["chosen_ids"]) for pair in pairs)
        steps[implementation, given is pairs] = step(built)
    for implementation in EXACT:
        loss, gradients = steps[implementation, True]
        assert loss == steps[implementation, False][0]
        same = steps[implementation, False][1]
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert_same(steps[attention.VARLEN, True], steps[attention.BY_PAIR, True], 1e-5)


@pytest.mark.usefixtures("plain_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_reads_pairs_without_a_rejected_completion(build: Build) -> None:
    pairs = [{**pair, "rejected_ids": []} for pair in make_pairs(5)]
    built = build(make_model("mistral_sliding"), pairs, "method=sft")
    by_pair = logps(built, pairs)
    built.engine.attention_implementation = attention.FLEX
    built.engine.collator.multiple = attention.BLOCK
    flex = logps(built, pairs)
    assert len(flex["rejected"]) == 0
    for part in ("chosen", "others"):
        assert torch.allclose(by_pair[part], flex[part], atol=2e-5), part


def test_it_logs_trls_metrics_and_evaluates_as_trl_does(build: Build) -> None:
    pairs = make_pairs(12)
    model = make_model("llama")
    lines = {}
    # A step of ours, and an evaluation, of several micro-batches
    for which, engine_keys in {"ours": ("engine.tokens_per_microbatch=128",), "trl": TRL}.items():
        built = build(copy.deepcopy(model), pairs, "train.eval_steps=1", *engine_keys)
        built.run()
        lines[which] = built.lines.place.metrics()[-2:]
    for ours, theirs in zip(lines["ours"], lines["trl"], strict=True):
        timing = {key for key in theirs if "runtime" in key or "per_second" in key}
        expected = {key for key in theirs if "logits/" not in key} - timing
        assert len(expected) > 12
        assert expected == ours.keys() - timing
        for key in expected:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


def test_a_budget_is_lowered_and_never_raised(build: Build) -> None:
    built = build(make_model("llama"), make_pairs(2), "engine.tokens_per_microbatch=200")
    for asked, found in ((None, 200), (500, 200), (150, 150)):
        built.engine.token_budget = asked
        assert built.engine.token_budget == asked
        assert built.engine.collator.budget == found


def test_totals_are_averaged_over_processes(build: Build) -> None:
    """The mean of two processes' totals, where the other process has no pairs, is a half."""

    class WithAnIdleOne(OneDevice):
        def average(self, tensor: Tensor) -> Tensor:
            return tensor / 2

    pairs, model = make_pairs(3), make_model("llama")
    devices = WithAnIdleOne(torch.device("cpu"), torch.float32)
    alone, _ = step(build(copy.deepcopy(model), pairs))
    together, _ = step(build(model, pairs, devices=devices))
    assert together == pytest.approx(2 * alone)


def test_by_default_two_of_the_longest_sequences_fit_a_micro_batch() -> None:
    assert shared_prefix.default_budget(1000) == 2000
    assert shared_prefix.default_budget(100) == shared_prefix.MIN_BUDGET


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.size = max(self.size, made.numel())
        return made


def test_logits_of_a_step_never_exist_at_once(build: Build) -> None:
    pairs = make_pairs(24)
    vocabulary = 20_000
    built = build(make_model("llama", vocab_size=vocabulary), pairs)
    num_scored = sum(int(batch["counts"].sum()) for batch in built.engine.micro_batches(pairs))
    assert num_scored > 1.5 * head.CHUNK
    with Largest() as largest:
        _, sums = add_gradients(built.engine, built.state, pairs, 0.3)
    assert head.CHUNK * vocabulary <= largest.size < num_scored * vocabulary
    assert not any(some.values.requires_grad for some in sums), "nor what they come from"


class Synchronisations(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers handed to Python, shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.name() for name in self.WAITS):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("implementation", EXACT)
def test_a_step_does_not_wait_for_the_device(
    build: Build, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    lists = []

    def tolist(self: Tensor) -> Any:
        lists.append(self)
        return self.numpy().tolist()

    built = build(make_model("llama"), make_pairs(6))
    built.engine.attention_implementation = implementation
    monkeypatch.setattr(Tensor, "tolist", tolist)
    with Synchronisations() as synchronisations:
        norm, rate = built.take_step(make_pairs(6))
        # The sizes of parts, which BY_PAIR reads, are on the host
        assert not any(each.is_floating_point() for each in lists)
        assert (lists == []) == (implementation == attention.VARLEN)
        built.finite.check()
        built.write_line(norm, rate)
    assert synchronisations.seen == []
    on_device = [each for each in lists if each.is_floating_point()]
    assert [len(each) for each in on_device] == [3, 2 + 2 * 12]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", {"n_head": 4}, "takes no position_ids"),
    "alibi": (
        "falcon",
        {"alibi": True, "new_decoder_architecture": False},
        "biased by distance in the row",
    ),
    "mamba": ("mamba", {}, "takes no position_ids"),
    "recurrent": ("recurrent_gemma", {"head_dim": 8, "lru_width": 32}, "carries a state"),
    "router": (
        "mixtral",
        {"num_local_experts": 2, "output_router_logits": True},
        "includes that of a router",
    ),
    "both_ways": (
        "gemma3_text",
        {"head_dim": 8, "use_bidirectional_attention": True},
        "looks ahead",
    ),
    "not_causal": ("llama", {"is_causal": False}, "looks ahead"),
    "sinks": (
        "gpt_oss",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
        "compute s_aux",
    ),
    "chunks": (
        "llama4_text",
        {"num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 8},
        "layers of chunked_attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_read_a_row_otherwise_is_refused(load: Load, name: str) -> None:
    kind, own, reason = REFUSED[name]
    architecture = transformers.AutoConfig.for_model(kind, **{**SIZES, **own})
    model = transformers.AutoModelForCausalLM.from_config(architecture)
    with pytest.raises(UserError, match=rf"engine=shared_prefix cannot .*({reason}).*trl"):
        engine.check(load(), model, torch.float32)
    engine.check(load("engine=trl"), model, torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_that_reads_a_row_as_its_sequences_passes(load: Load, name: str) -> None:
    model = make_model(name)
    before = model.config._attn_implementation
    engine.check(load(), model, torch.float32)
    engine.check(load(), model, torch.bfloat16)
    assert model.config._attn_implementation == before
    assert model.training


def test_a_model_with_more_than_an_output_head_is_refused(load: Load) -> None:
    architecture = transformers.AutoConfig.for_model("modernbert-decoder", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(architecture)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.2)
    with pytest.raises(UserError, match=r"differ by .* nats a token on average; use engine=trl"):
        engine.check(load(), model, torch.float32)


def test_the_model_has_its_own_attention_again_after_a_step(build: Build) -> None:
    built = build(make_model("llama", attn_implementation="eager"), make_pairs(2))
    step(built)
    assert built.state.model.config._attn_implementation == "eager"


def test_attention_sinks_are_refused(build: Build) -> None:
    pairs = make_pairs(2)
    model = make_model("llama")
    built = build(model, pairs)
    model.set_attn_implementation(attention.BY_PAIR)
    (micro_batch,) = built.engine.collator(pairs)
    told = attention.mask(attention.BY_PAIR, micro_batch, model.config)
    with pytest.raises(UserError, match="cannot compute s_aux"):
        model(input_ids=micro_batch["input_ids"], attention_mask=told, s_aux=torch.zeros(4))


PROCESSES = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from orpo_lab import config
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.training import devices
from tests import test_engine_shared_prefix as tests
from tests.conftest import compose_config

folder, num = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
load = lambda *overrides: config.load(compose_config(*overrides))
tiny = load().model
built = tests.make_loop(
    load, folder / str(rank), load_tokenizer(tiny, load_config(tiny)),
    tests.make_model("llama"), tests.make_pairs(8)[rank::num],
    devices=devices.of(torch.device("cpu"), torch.float32),
)
loss, gradients = tests.step(built)
averaged = {name: built.state.devices.average(g) for name, g in gradients.items()}
loss = built.state.devices.average(torch.tensor(loss))
if rank == 0:
    torch.save({"loss": loss, **averaged}, folder / f"{num}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for num in (1, 2):
        done = subprocess.run(
            [*torchrun, f"--nproc-per-node={num}", str(script), str(tmp_path), str(num)],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    alone, together = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for name, value in alone.items():
        assert (value - together[name]).abs().max() / value.abs().max() < 1e-5, name


@pytest.mark.parametrize(("asked", "passes"), [("int8", True), ("nf4", False)])
def test_the_trial_pair_may_differ_by_the_rounding_of_8_bits_where_layers_have_8(
    load: Load, build_model: Any, monkeypatch: pytest.MonkeyPatch, asked: str, passes: bool
) -> None:
    """In fp32, by what an int8 base was seen to differ by on a GPU: 0.015 nats a token."""
    loaded = load(f"quantization={asked}")
    model = build_model(loaded)
    engine.check(loaded, model, torch.float32)
    monkeypatch.setattr(shared_prefix, "_apart", lambda *_: 0.015)
    if passes:
        engine.check(loaded, model, torch.float32)
    else:
        with pytest.raises(UserError, match=r"differ by 0\.015 nats a token"):
            engine.check(loaded, model, torch.float32)


def test_a_model_is_tried_on_ordinary_tokens_where_it_has_them() -> None:
    small, large = make_model("llama"), make_model("llama")
    large.resize_token_embeddings(2 * shared_prefix.ORDINARY + 1)
    assert shared_prefix._probe(small) == [*shared_prefix.PROBE]
    assert min(map(min, shared_prefix._probe(large))) > shared_prefix.ORDINARY
    shared_prefix.check(large, torch.float32)
