"""`method=kto` against TRL's KTOTrainer, which is fed our token ids, and against its equation."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from trl import KTOConfig, KTOTrainer

from orpo_lab import config, methods
from orpo_lab.config.optimizer import Lora
from orpo_lab.data import Data
from orpo_lab.engine import mismatched, reference
from orpo_lab.engine.base import MISMATCHED, REFERENCE
from orpo_lab.errors import UserError
from orpo_lab.methods.base import Batch
from orpo_lab.model.adapter import attach
from orpo_lab.training.loop import Loop
from tests.test_engine_shared_prefix import assert_same, make_loop, make_model, make_pairs, step

Load = Callable[..., config.Config]
Build = Callable[..., Loop]
Pair = dict[str, list[int]]

LENGTHS = ("dataset.max_length=64", "dataset.max_prompt_length=32")
PAIRS = make_pairs(6)
# Rows with a label: completions on one side alone, and a pair among them
UNPAIRED = [
    pair | ({} if side == "both" else {side: []})
    for pair, side in zip(
        make_pairs(7, seed=3),
        ["chosen_ids", "rejected_ids", "rejected_ids", "both", "chosen_ids", "chosen_ids", "both"],
        strict=True,
    )
]


class Stock(KTOTrainer):
    """TRL's trainer, for rows that are tokenized already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **settings: Any) -> Any:
        return dataset


def in_trls_form(pairs: list[Pair], *, by_row: bool) -> list[dict[str, Any]]:
    """Return examples of single completions; TRL mismatches each with the example before.

    Args:
        pairs: token ids.
        by_row: whether the examples are in the order of the rows, each with one completion. False:
            all chosen completions come first.
    """
    sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected") if pair[side + "_ids"]]
    if not by_row:
        sides.sort(key=lambda each: each[1] == "rejected")
    completions = [pair[f"{side}_ids"] for pair, side in sides]
    return [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": pair[f"{side}_ids"],
            "KL_completion_ids": completions[at - 1],
            "label": side == "chosen",
        }
        for at, (pair, side) in enumerate(sides)
    ]


def stock(
    folder: Path, model: Any, start: Any, rows: list[dict[str, Any]], **settings: Any
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Return TRL's loss of one micro-batch, its gradients and its metrics."""
    trainer = Stock(
        model=model,
        ref_model=start,
        args=KTOConfig(
            output_dir=str(folder / "trl"),
            max_length=None,
            per_device_train_batch_size=len(rows),
            gradient_checkpointing=False,
            disable_dropout=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **{"beta": 0.3, **settings},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), named, metrics


@functools.cache
def _tokenizer() -> Any:
    from orpo_lab.model.source import load_config
    from orpo_lab.model.tokenizer import load_tokenizer
    from tests.conftest import compose_config

    tiny = config.load(compose_config()).model
    return load_tokenizer(tiny, load_config(tiny))


def move(model: Any, factor: float = 0.7) -> None:
    """Train a model, in a way: with a factor below 1 random tokens become more likely to it."""
    torch.manual_seed(5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            p.add_(0.05 * torch.randn_like(p))
            if name.endswith("model.norm.weight"):
                p.mul_(factor)


@pytest.fixture
def build(load: Load, tokenizer: Any, tmp_path: Path) -> Build:
    """Make loops whose pairs have the reference of the model as it is now, and then move it."""

    def make(model: Any, pairs: list[Pair], *overrides: str, factor: float = 0.7) -> Loop:
        overrides = ("method=kto", *overrides)
        rows = with_reference(load(*LENGTHS, *overrides), model, tokenizer, pairs)
        move(model, factor)
        return make_loop(load, tmp_path, tokenizer, model, rows, *overrides)

    return make


def with_reference(loaded: config.Config, model: Any, tokenizer: Any, pairs: list[Pair]) -> Any:
    given = datasets.Dataset.from_list(pairs)
    data = mismatched.attach(Data(given, given, {}, checkable=False), loaded.dataset.max_length)
    found = reference.compute(loaded, model, tokenizer, data, dtype=torch.float32)
    return reference.attach(data, found).train.to_list()


def figures(loop: Loop) -> dict[str, float]:
    """Return the means of the metrics of a step of all pairs."""
    loop.take_step(loop.train.to_list())
    return loop.means.named(loop.means.take().tolist())


@pytest.mark.parametrize("factor", [0.7, 1.5], ids=["kl", "clamped"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("engine.tokens_per_microbatch=128",),
        ("method.desirable_weight=0.4", "method.undesirable_weight=1.7"),
        ("train.gradient_checkpointing=true",),
    ],
    ids=["one_row", "rows", "weights", "checkpointing"],
)
def test_loss_and_every_gradient_are_trls(
    build: Build, tmp_path: Path, overrides: tuple[str, ...], factor: float
) -> None:
    start = make_model("llama")
    loop = build(copy.deepcopy(start), PAIRS, *overrides, factor=factor)
    ours = step(loop)
    model = copy.deepcopy(start)
    move(model, factor)
    weights = vars(loop.config.method)
    settings = {name: weights[name] for name in ("desirable_weight", "undesirable_weight")}
    rows = in_trls_form(PAIRS, by_row=False)
    *theirs, metrics = stock(tmp_path, model, start, rows, **settings)
    assert (metrics["kl"] > 0.1) == (factor < 1)
    assert_same(ours, tuple(theirs), 1e-5)
