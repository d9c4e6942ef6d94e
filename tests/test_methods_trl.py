"""Every method against TRL's own trainer: the loss, the reference and every gradient."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from orpo_lab import data, methods
from orpo_lab.config.method import METHODS
from orpo_lab.config.optimizer import Lora
from orpo_lab.data import Data
from orpo_lab.engine import mismatched, reference
from orpo_lab.engine.base import REFERENCE
from orpo_lab.engine.trl import TrlTrainer
from orpo_lab.errors import NonFiniteError
from orpo_lab.model.adapter import attach
from orpo_lab.training.loop import Loop, rows
from tests.test_engine_shared_prefix import (
    SIDES,
    Load,
    Pair,
    assert_same,
    make_loop,
    make_model,
    make_pairs,
    step,
)

Make = Callable[[], Any]
MakeLoop = Callable[..., Loop]

BETA = 0.3  # of `make_loop`
SMOOTHING = 0.1
SMOOTHED = f"method.label_smoothing={SMOOTHING}"


class OnTokens(DPOTrainer):
    """TRL's trainer, for pairs that are tokenized already: their columns have TRL's names."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *rest: Any) -> datasets.Dataset:
        return dataset


class CpoOnTokens(CPOTrainer):
    """TRL's trainer, for pairs that are tokenized already."""

    tokenize_row = TrlTrainer.tokenize_row


@dataclass(frozen=True)
class Case:
    """A method of ours, and the trainer of TRL that computes the same."""

    ours: tuple[str, ...]
    trainer: Any
    settings: Any
    """The trainer's configuration; called with what all trainers share."""


def dpo(*loss_types: str, **settings: Any) -> dict[str, Any]:
    made = partial(DPOConfig, beta=BETA, loss_type=list(loss_types), **settings)
    return {"trainer": OnTokens, "settings": made}


def cpo(loss_type: str, **settings: Any) -> dict[str, Any]:
    made = partial(CPOConfig, beta=BETA, loss_type=loss_type, **settings)
    return {"trainer": CpoOnTokens, "settings": made}


CASES = {
    "dpo": Case(("method=dpo",), **dpo("sigmoid")),
    # TRL has two terms of conservative DPO apart: L(m) as sigmoid, and, with e for the smoothing,
    # ((1 - e) L(m) - e L(-m)) / (1 - 2e) as robust
    "dpo smoothed": Case(
        ("method=dpo", SMOOTHED),
        **dpo(
            "sigmoid",
            "robust",
            loss_weights=[2 * (1 - SMOOTHING), -(1 - 2 * SMOOTHING)],
            label_smoothing=SMOOTHING,
        ),
    ),
    "ipo": Case(("method=ipo",), **dpo("ipo")),
    "cpo": Case(("method=cpo",), **cpo("sigmoid", cpo_alpha=1.0)),
    "cpo smoothed": Case(
        ("method=cpo", SMOOTHED, "method.sft_weight=0.7"),
        **cpo("sigmoid", cpo_alpha=0.7, label_smoothing=SMOOTHING),
    ),
    "simpo": Case(("method=simpo",), **cpo("simpo", cpo_alpha=0.0, simpo_gamma=0.5)),
    "simpo with sft": Case(
        ("method=simpo", "method.sft_weight=0.4", "method.gamma=1.2"),
        **cpo("simpo", cpo_alpha=0.4, simpo_gamma=1.2),
    ),
    "sft": Case(("method=sft",), SFTTrainer, partial(SFTConfig, completion_only_loss=True)),
    "sft with prompts": Case(
        ("method=sft", "method.nll_scope=prompt_and_completion"),
        SFTTrainer,
        partial(SFTConfig, completion_only_loss=False),
    ),
    "sft of dpo": Case(("method=sft",), **dpo("sft")),
}
WITH_REFERENCE = ["dpo", "dpo smoothed", "ipo"]


@dataclass(frozen=True)
class Base:
    """What is trained on which pairs."""

    make: Make
    """Makes the same model anew."""
    pairs: list[Any]
    limit: float = 1e-5
    """The largest error of a gradient relative to its own size; relative to the model's largest
    gradient it is always 1e-5."""


def rows_for(trainer: Any, pairs: list[Pair]) -> datasets.Dataset:
    """The pairs as columns that a trainer takes."""
    if trainer is not SFTTrainer:
        return datasets.Dataset.from_list(pairs)
    rows = [
        {
            "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "completion_mask": [0] * len(pair["prompt_ids"]) + [1] * len(pair["chosen_ids"]),
        }
        for pair in pairs
    ]
    return datasets.Dataset.from_list(rows)


def stock(case: Case, base: Base, tokenizer: Any, folder: Path, **keys: Any) -> Any:
    """TRL's trainer of a model; TRL itself puts the adapters on, as in its documentation."""
    model = base.make()
    others: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        others = {"peft_config": model.peft_config["default"]}
        model = model.unload()
    elif case.trainer is OnTokens and not keys:
        others = {"ref_model": base.make()}
    return case.trainer(
        model=model,
        args=case.settings(
            output_dir=str(folder),
            max_length=128,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            **keys,
        ),
        train_dataset=rows_for(case.trainer, base.pairs),
        processing_class=tokenizer,
        **others,
    )


def step_of(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of all pairs in one micro-batch of TRL."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad for name, p in named if p.grad is not None}


def train_a_little(model: Any) -> None:
    """Move the trained weights away from the reference, as some steps would."""
    numbers = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=numbers)


def copy_trained(source: Any, target: Any) -> None:
    """Give a model of TRL the trained weights, in fp32: TRL narrows adapters of a 4-bit base."""
    for name, p in source.named_parameters():
        if p.requires_grad:
            target.get_parameter(name).data = p.data.clone()


@pytest.fixture
def bases(load: Load, build_model: Any, tokenizer: Any) -> dict[str, Base]:
    """The kinds of models that are trained."""
    lora, qlora = (
        load(
            f"optimizer={name}", "optimizer.dropout=0", "dataset.num_train=7", "dataset.num_eval=1"
        )
        for name in ("lora", "qlora")
    )
    adapters = lora.optimizer
    assert isinstance(adapters, Lora)
    pairs, known = make_pairs(7), data.load(qlora.dataset, tokenizer).train
    return {
        "full": Base(partial(make_model, "llama"), pairs),
        "lora": Base(lambda: attach(make_model("llama"), adapters), pairs),
        # A trained model's small gradients are sums of large numbers that cancel. In fp32 both
        # steps compute them with an error of some 2e-5 of their size
        "nf4": Base(partial(build_model, qlora), rows(known, range(7)), limit=1e-4),
    }


@pytest.fixture
def ours(load: Load, tokenizer: Any, tmp_path: Path) -> MakeLoop:
    """Make loops whose pairs have the model as it is now for their reference."""

    def make(model: Any, pairs: list[Pair], *overrides: str) -> Loop:
        loop = make_loop(load, tmp_path, tokenizer, model, pairs, *overrides)
        method = methods.build(loop.config)
        if method.needs_reference:
            both = Data(loop.train, loop.held_out, report={})
            if method.needs_divergence:
                splits = reference.splits_of(loop.config)
                both = mismatched.attach(both, splits, loop.config.dataset.max_length)
            found = reference.compute(loop.config, model, tokenizer, both, dtype=torch.float32)
            loop.train = reference.attach(both, found).train
        return loop

    return make


def check(
    case: Case, base: Base, ours: MakeLoop, tokenizer: Any, folder: Path, *overrides: str
) -> None:
    """Check a step of ours, packed in one row and in several, against TRL's on the same pairs."""
    model, trainer = base.make(), stock(case, base, tokenizer, folder)
    loop = ours(model, base.pairs, *case.ours, *overrides)
    train_a_little(model)
    copy_trained(model, trainer.model)
    theirs = step_of(trainer)
    for budget, num_rows in ((4096, 1), (40, 3)):
        engine: Any = loop.engine
        engine.collator.budget = budget
        assert len(engine.micro_batches(base.pairs)) >= num_rows
        found = step(loop)
        assert_same(found, theirs, 1e-5, smallest=1.0)
        assert_same(found, theirs, base.limit)
        model.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_trls(
    name: str, bases: dict[str, Base], ours: MakeLoop, tokenizer: Any, tmp_path: Path
) -> None:
    check(CASES[name], bases["full"], ours, tokenizer, tmp_path)


CHECKPOINTING = "train.gradient_checkpointing=true"
QUICK = [("dpo", "nf4"), ("ipo", "lora"), ("simpo with sft", "nf4"), ("sft", "lora")]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        pytest.param(name, base, marks=() if (name, base) in QUICK else pytest.mark.slow)
        for name, base in itertools.product(CASES, ["full", "lora", "nf4"])
    ],
)
def test_adapters_a_4_bit_base_and_gradient_checkpointing_are_trls(
    name: str, base: str, bases: dict[str, Base], ours: MakeLoop, tokenizer: Any, tmp_path: Path
) -> None:
    check(CASES[name], bases[base], ours, tokenizer, tmp_path, CHECKPOINTING)


@pytest.mark.parametrize("kind", ["full", "lora", "nf4"])
def test_the_reference_is_trls(
    kind: str, bases: dict[str, Base], ours: MakeLoop, tokenizer: Any, tmp_path: Path
) -> None:
    base = bases[kind]
    trainer = stock(CASES["dpo"], base, tokenizer, tmp_path, precompute_ref_log_probs=True)
    model = base.make()
    loop = ours(model, base.pairs, "method=dpo")
    found = torch.tensor(loop.train[REFERENCE][:])
    theirs = [trainer.train_dataset[f"ref_{side}_logps"][:] for side in SIDES]
    expected = torch.tensor(theirs).T
    assert found.shape == expected.shape == (7, 2)
    assert torch.allclose(found, expected, rtol=1e-5)

    train_a_little(model)
    copy_trained(model, trainer.model)
    stepped, expected_step = step(loop), step_of(trainer)
    assert_same(stepped, expected_step, 1e-5, smallest=1.0)
    assert_same(stepped, expected_step, base.limit)


@pytest.mark.parametrize(("method", "loss"), [("dpo", math.log(2)), ("ipo", (1 / (2 * BETA)) ** 2)])
def test_at_the_start_policy_and_reference_are_the_same(
    method: str, loss: float, ours: MakeLoop
) -> None:
    loop = ours(make_model("llama"), make_pairs(7), f"method={method}")
    assert step(loop)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beta", [0, 1e-6, 1e3])
def test_any_beta_gives_a_finite_step(method: str, beta: float, ours: MakeLoop) -> None:
    least = METHODS[method].least_beta
    model = make_model("llama")
    loop = ours(model, make_pairs(7), f"method={method}")
    train_a_little(model)
    loop.config.beta = max(beta, least)
    loss, gradients = step(loop)
    assert math.isfinite(loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_reference_is_without_dropout_and_leaves_the_model_in_training(
    load: Load, ours: MakeLoop
) -> None:
    pairs, adapters = make_pairs(4), load("optimizer=lora", "optimizer.dropout=0.5").optimizer
    assert isinstance(adapters, Lora)
    model = attach(make_model("llama"), adapters)
    train_a_little(model)
    found = [ours(model, pairs, "method=dpo").train[REFERENCE][:] for _ in range(2)]
    assert found[0] == found[1]
    assert model.training


def test_a_reference_that_is_not_finite_is_refused(ours: MakeLoop, tokenizer: Any) -> None:
    model = make_model("llama")
    loop = ours(model, make_pairs(2), "method=sft")
    model.lm_head.weight.data[5, 0] = math.nan
    both = Data(loop.train, loop.held_out, report={})
    given: Any = (loop.config, model, tokenizer, both)
    with pytest.raises(NonFiniteError, match="the model before training are not finite"):
        reference.compute(*given, dtype=torch.float32)
