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

from orpo_lab import config, methods, run
from orpo_lab.config.optimizer import Lora
from orpo_lab.data import Data
from orpo_lab.engine import mismatched, reference
from orpo_lab.engine.attention import VARLEN
from orpo_lab.engine.base import MISMATCHED, REFERENCE
from orpo_lab.errors import UserError
from orpo_lab.methods.base import Batch
from orpo_lab.metrics import PREFERENCE_SHARE
from orpo_lab.model import weights
from orpo_lab.model.adapter import attach
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.sweep.folder import Sweep
from orpo_lab.training.checkpoint import Made
from orpo_lab.training.loop import Loop, add_gradients
from orpo_lab.training.meter import Since
from orpo_lab.training.preference import PreferenceMeter
from orpo_lab.training.state import RandomState
from tests.test_engine_shared_prefix import (
    EXACT,
    assert_same,
    make_loop,
    make_model,
    make_pairs,
    step,
)

Load = Callable[..., config.Config]
Build = Callable[..., Loop]
Pair = dict[str, list[int]]

LENGTHS = ("dataset.max_length=64", "dataset.max_prompt_length=32")
PAIRS = make_pairs(12)
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
    sides = [
        (pair, side) for pair in pairs for side in ("chosen", "rejected") if pair[f"{side}_ids"]
    ]
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
    folder: Path, start: Any, rows: list[dict[str, Any]], factor: float = 0.7, **settings: Any
) -> tuple[tuple[float, dict[str, Tensor]], dict[str, float]]:
    """Return TRL's loss of one micro-batch, its gradients and its metrics.

    TRL takes the reference of a model with adapters from the model that it is made with, and rounds
    adapters on a quantized base to bf16. The rounding is undone.
    """
    trained = {name: p.data.clone() for name, p in start.named_parameters() if p.requires_grad}
    trainer = Stock(
        model=start,
        ref_model=None if hasattr(start, "peft_config") else copy.deepcopy(start),
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
    for name, values in trained.items():
        for adapter in (name, name.replace(".default.", ".ref.")):
            trainer.model.get_parameter(adapter).data = values.clone()
    move(trainer.model, factor)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return (loss.item(), named), metrics


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
    splits = reference.splits_of(loaded)
    data = mismatched.attach(Data(given, given, {}), splits, loaded.dataset.max_length)
    found = reference.compute(loaded, model, tokenizer, data, dtype=torch.float32)
    return reference.attach(data, found).train.to_list()


def figures(loop: Loop) -> dict[str, float]:
    """Return the means of the metrics of a step of all pairs."""
    loop.state.since = since = Since()
    loop.take_step(loop.train.to_list())
    assert since.sums is not None
    return since.named(since.sums.tolist())


ONE_ROW, ROWS = "engine.tokens_per_microbatch=1024", "engine.tokens_per_microbatch=128"


@pytest.mark.parametrize("factor", [0.7, 1.5], ids=["kl", "clamped"])
@pytest.mark.parametrize(
    "overrides",
    [
        (ONE_ROW,),
        (ROWS,),
        (ONE_ROW, "method.desirable_weight=0.4", "method.undesirable_weight=1.7"),
        (ROWS, "train.gradient_checkpointing=true"),
    ],
    ids=["one_row", "rows", "weights", "checkpointing"],
)
def test_loss_and_every_gradient_are_trls(
    build: Build, tmp_path: Path, overrides: tuple[str, ...], factor: float
) -> None:
    start = make_model("llama")
    loop = build(copy.deepcopy(start), PAIRS, *overrides, factor=factor)
    assert (len(loop.engine.micro_batches(loop.train.to_list())) > 1) == (ROWS in overrides)
    ours = step(loop)
    weights = vars(loop.config.method)
    settings = {name: weights[name] for name in ("desirable_weight", "undesirable_weight")}
    rows = in_trls_form(PAIRS, by_row=False)
    theirs, metrics = stock(tmp_path, start, rows, factor, **settings)
    assert (metrics["kl"] > 0.1) == (factor < 1)
    assert_same(ours, theirs, 1e-5)


def test_the_metrics_are_trls(build: Build, tmp_path: Path) -> None:
    start = make_model("llama")
    found = figures(build(copy.deepcopy(start), PAIRS, ROWS))
    _, expected = stock(tmp_path, start, in_trls_form(PAIRS, by_row=False))
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_adapters_are_trls(build: Build, load: Load, tmp_path: Path, checkpointing: str) -> None:
    lora = load("optimizer=lora", "optimizer.dropout=0").optimizer
    assert isinstance(lora, Lora)
    torch.manual_seed(0)
    models = [attach(make_model("llama"), lora)]
    models.append(copy.deepcopy(models[0]))
    keys = f"train.gradient_checkpointing={checkpointing}"
    ours = step(build(models[0], PAIRS, keys, factor=1.0))
    theirs, _ = stock(tmp_path, models[1], in_trls_form(PAIRS, by_row=False), 1.0)
    assert_same(ours, theirs, 1e-5)


def test_a_4_bit_base_is_trls(build: Build, load: Load, build_model: Any, tmp_path: Path) -> None:
    loaded = load("optimizer=qlora", "optimizer.dropout=0")
    models = [build_model(loaded) for _ in range(2)]
    ours = step(build(models[0], PAIRS, "train.gradient_checkpointing=true", factor=1.0))
    theirs, _ = stock(tmp_path, models[1], in_trls_form(PAIRS, by_row=False), 1.0)
    assert_same(ours, theirs, 1e-5)


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("keys", [ONE_ROW, ROWS])
def test_unpaired_rows_are_trls(
    build: Build, tmp_path: Path, implementation: str, keys: str
) -> None:
    pairs = [pair for pair in UNPAIRED if not (pair["chosen_ids"] and pair["rejected_ids"])]
    start = make_model("llama")
    loop = build(copy.deepcopy(start), pairs, keys)
    computing: Any = loop.engine
    computing.attention_implementation = implementation
    ours = step(loop)
    theirs, metrics = stock(tmp_path, start, in_trls_form(pairs, by_row=True))
    assert_same(ours, theirs, 1e-5)
    found = figures(loop)
    for name in ("kl", "rewards/chosen", "rewards/rejected"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-5), name
    assert not {"preference_accuracy", "logp_margin", "rewards/margins"} & found.keys()


@pytest.mark.parametrize("runs_out", [False, True])
def test_the_divergence_is_that_of_a_whole_step_and_computed_once(
    build: Build, runs_out: bool
) -> None:
    """If memory runs out meanwhile, the step is taken again."""
    start = make_model("llama")
    expected = step(build(copy.deepcopy(start), PAIRS, ONE_ROW))
    loop = build(start, PAIRS, ROWS)
    computing: Any = loop.engine
    compute, calls = computing._divergence, []

    def counted(rows: Any) -> Tensor:
        calls.append(len(rows))
        if runs_out and len(calls) == 1:
            raise torch.OutOfMemoryError
        return compute(rows)

    computing._divergence = counted
    assert_same(step(loop), expected, 1e-5)
    assert len(calls) == 1 + runs_out
    assert calls[0] > 1
    assert len(calls) == 1 or calls[1] > calls[0]


def test_the_meter_of_preference_measures_a_step_with_its_own_dropout(
    build: Build, load: Load
) -> None:
    lora = load("optimizer=lora", "optimizer.dropout=0.3").optimizer
    assert isinstance(lora, Lora)
    loop = build(attach(make_model("llama"), lora).train(), PAIRS, factor=1.0)
    random, pairs = RandomState.now(), loop.train.to_list()
    add_gradients(loop.engine, loop.state, pairs, 0.3)
    gradients = [p.grad.flatten() for p in loop.state.model.parameters() if p.grad is not None]
    norm = float(torch.cat(gradients).norm())
    measured = PreferenceMeter(1).measure(loop.engine, loop.state, pairs, 0.3, random)
    assert measured == {"meter/preference_norm": pytest.approx(norm), PREFERENCE_SHARE: 1}


# torch's compiler instantiates autograd functions, of which torch warns (2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("flash_kernel")
def test_compiled_layers_have_one_graph_more_for_the_divergence(build: Build, load: Load) -> None:
    lora = load("optimizer=lora", "optimizer.dropout=0").optimizer
    assert isinstance(lora, Lora)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = []
    for compiled in ("true", "false"):
        torch.manual_seed(0)
        model = attach(make_model("llama"), lora)
        loop = build(model, PAIRS, ROWS, f"engine.compile={compiled}", factor=1.0)
        computing: Any = loop.engine
        computing.attention_implementation = VARLEN
        found.append(step(loop))
    assert_same(found[0], found[1], 1e-5)
    assert counters["stats"]["unique_graphs"] == 2


def by_equation(logps: Tensor, reference: Tensor, has: Tensor, z: float, beta: float) -> float:
    """The loss of a step in plain floats (Eq. 7), with weights of 0.5 and 2."""
    losses = []
    for ratios, present in zip((logps - reference).tolist(), has.tolist(), strict=True):
        for ratio, is_there, weight, sign in zip(ratios, present, (0.5, 2), (1, -1), strict=True):
            if is_there:
                losses.append(weight * (1 - 1 / (1 + math.exp(-beta * sign * (ratio - z)))))
    return sum(losses) / len(losses)


def test_the_shares_of_a_steps_parts_add_up_to_its_equation(load: Load) -> None:
    """A pair, chosen and rejected completions alone; a mean over completions."""
    has = torch.tensor([[True, True], [True, False], [False, True], [True, True], [False, True]])
    counts = torch.cat([torch.zeros(5, 1, dtype=torch.int64), has * torch.tensor([3, 7])], 1)
    draw = torch.Generator().manual_seed(0)
    logps, known = -5 * torch.rand(2, 5, 2, generator=draw, dtype=torch.float64) * has
    weights = "method.desirable_weight=0.5", "method.undesirable_weight=2"
    method = methods.build(load("method=kto", *weights))
    whole = Batch(
        torch.cat([torch.zeros(5, 1), logps], 1),
        counts,
        reference=known,
        num_supervised=method.num_supervised(counts).sum(),
        num_pairs=torch.tensor(5.0),
        divergence=torch.tensor(0.4, dtype=torch.float64),
    )
    parts = [
        replace(whole, logps=whole.logps[some], counts=counts[some], reference=known[some])
        for some in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    shares = [method.losses(part, 0.3).loss for part in parts]
    expected = by_equation(logps, known, has, 0.4, 0.3)
    assert float(sum(shares)) == pytest.approx(expected, rel=1e-12)
    losses = method.losses(whole, 0.3)
    means = {
        name: float(term.sum() / losses.nums.get(name, torch.ones(5)).sum())
        for name, term in losses.terms.items()
    }
    rewards = 0.3 * (logps - known)
    assert means["preference_loss"] == pytest.approx(expected, rel=1e-12)
    assert means["rewards/chosen"] == pytest.approx(float(rewards[:, 0][has[:, 0]].mean()))
    assert means["logps/rejected"] == pytest.approx(float(logps[:, 1][has[:, 1]].mean() / 7))
    margins = (rewards[:, 0] - rewards[:, 1])[has.all(1)]
    assert means["rewards/margins"] == pytest.approx(float(margins.mean()))


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1e3])
def test_the_loss_and_its_gradients_are_finite_at_any_beta(build: Build, beta: float) -> None:
    # A beta of 0 is a step of a schedule that goes on to another beta
    keys = (f"beta={beta}", "beta_schedule=linear", "beta_end=0.1")
    loss, gradients = step(build(make_model("llama"), UNPAIRED, *keys))
    assert 0 <= loss <= 1
    assert (loss == 0.5) == (beta == 0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_a_partner_is_the_pair_before_of_another_prompt() -> None:
    prompts = [[7], [7], [8], [8], [8], [9], [7]]
    assert mismatched.partners(prompts) == [5, 5, 1, 1, 1, 4, 5]


def test_mismatched_completions_are_cut_to_fit_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 6], "rejected_ids": [7]},
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [8, 9], "rejected_ids": []},
    ]
    given = datasets.Dataset.from_list(pairs)
    caplog.set_level("INFO")
    train = mismatched.attach(Data(given, given, {}), ["train"], max_length=6).train
    others = [
        {"chosen_ids": [8, 9], "rejected_ids": []},
        {"chosen_ids": [3, 4], "rejected_ids": [7]},
    ]
    assert train[MISMATCHED][:] == others
    prompts = [{"prompt_ids": pair["prompt_ids"]} for pair in pairs]
    assert mismatched.all_of(train).to_list() == [
        p | o for p, o in zip(prompts, others, strict=True)
    ]
    assert "train: 1 of 2 mismatched pairs are cut to fit" in caplog.messages


def test_pairs_of_a_single_prompt_are_refused() -> None:
    given = datasets.Dataset.from_list([PAIRS[1]] * 3)
    with pytest.raises(UserError, match=r"method=kto .* the train pairs have a single one"):
        mismatched.attach(Data(given, given, {}), ["train"], max_length=64)


NO_LOSS = "train.eval_steps=null"
SMALL = [
    "method=kto",
    "optimizer=lora",
    "dataset.num_train=16",
    "dataset.num_eval=3",
    "dataset.num_generations=0",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.eval_steps=1",
    "tracker=none",
]


def test_a_resumed_run_reads_the_same_reference_and_is_the_same_bit_for_bit(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: Any = {"choices": {}, "overrides": []}
    done = run.train(load(*SMALL), tmp_path / "whole", **keys)
    said = (tmp_path / "whole" / "run.log").read_text()
    assert "reference: computed for 19 pairs in " in said
    assert done.summary["train"]["reference_seconds"] > 0
    with pytest.raises(Stopped):
        run.train(load(*SMALL, "train.max_hours=1e-9"), tmp_path / "half", **keys)
    monkeypatch.setattr(reference, "compute", lambda *_, **__: pytest.fail("computed again"))
    again = run.train(load(*SMALL, "resume=auto"), tmp_path / "half", **keys)
    assert again.summary["train"]["reference_seconds"] > 0, "those of the first start"
    whole, half = (RunFolder(tmp_path / name).metrics() for name in ("whole", "half"))
    timing = ("runtime", "per_second")
    for mine, other in zip(whole, half, strict=True):
        same = {name for name in mine if not any(part in name for part in timing)}
        assert {name: mine[name] for name in same} == {name: other[name] for name in same}
    assert {"kl", "eval_kl"} <= {name for line in whole for name in line}
    assert any(line.get("kl", 0) > 0 or line.get("eval_kl", 0) > 0 for line in whole)


def test_a_single_prompt_is_refused_before_weights_are_loaded(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load_model", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(UserError, match=r"the held_out pairs have a single one .*dataset.num_eval"):
        run.train(load(*SMALL, "dataset.num_eval=1"), tmp_path, choices={}, overrides=[])
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        run.train(load(*SMALL, "dataset.num_eval=1", NO_LOSS), tmp_path, choices={}, overrides=[])


@pytest.mark.parametrize(
    ("first", "held"),
    [("method=sft", None), ("method=dpo", {"train", "held_out"}), (NO_LOSS, {"train"})],
)
def test_a_run_that_goes_on_in_another_way_computes_what_its_checkpoint_lacks(
    load: Load, tmp_path: Path, first: str, held: set[str] | None
) -> None:
    """And nothing more: without a loss of held-out pairs they get no reference."""
    keys: Any = {"choices": {}, "overrides": []}
    with pytest.raises(Stopped):
        run.train(load(*SMALL, first, "train.max_hours=1e-9"), tmp_path, **keys)
    files = list(tmp_path.rglob(reference.FILE))
    assert (reference.load(files[0]).keys() if files else None) == held
    run.train(load(*SMALL, "resume=auto", "accept_changes=true"), tmp_path, **keys)
    assert "eval_kl" in {name for line in RunFolder(tmp_path).metrics() for name in line}


def test_a_sweep_shares_the_reference_of_its_jobs_by_what_it_holds(
    load: Load, tmp_path: Path
) -> None:
    """DPO needs no mismatched completions: neither takes the other's reference."""
    sweep = Sweep(tmp_path)
    sweep.begin(accept_changes=False)
    rows = datasets.Dataset.from_dict(
        {"prompt_ids": [[3], [4]], "chosen_ids": [[5], [6]], "rejected_ids": [[7], [8]]}
    )
    pairs = Data(train=rows, held_out=rows, report={})

    def of(method: str, computed: float, *overrides: str) -> tuple[float, float]:
        found = {split: torch.full((2, 4), computed) for split in ("train", "held_out")}
        made = Made("", "", "")
        held, seconds = run._with_reference(
            load(f"method={method}", *overrides), pairs, lambda _: found, None, made, sweep
        )
        return float(held.train[REFERENCE][0][0]), seconds

    dpo, kto, ipo, again = of("dpo", 1.0), of("kto", 2.0), of("ipo", 3.0), of("kto", 4.0)
    with_loss = of("dpo", 5.0, "train.eval_steps=10")
    assert [value for value, _ in (dpo, kto, ipo, again, with_loss)] == [1, 2, 1, 2, 5]
    assert ipo[1] == dpo[1] > 0, "all that share a reference have its time"


def test_a_line_of_metrics_holds_no_step_of_another_method(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KTO and CPO log as many terms: sums of both would be added without an error."""
    keys: Any = {"choices": {}, "overrides": []}
    few = [*SMALL, NO_LOSS, "train.max_steps=4", "train.logging_steps=4"]
    reasons = iter(["", "", "enough"])
    monkeypatch.setattr(Stop, "reason", lambda _: next(reasons, ""))
    with pytest.raises(Stopped):
        run.train(load(*few), tmp_path, **keys)
    run.train(load(*few, "method=cpo", "resume=auto", "accept_changes=true"), tmp_path, **keys)
    place = RunFolder(tmp_path)
    line = next(line for line in place.metrics() if line["step"] == 4)
    assert line["logps/chosen"] < 0, "a log-probability"
    assert (
        "the metrics of the last 2 steps before step 3 are left out"
        in (tmp_path / "run.log").read_text()
    )
    card = (tmp_path / "final" / "README.md").read_text()
    assert "resumed with changes of" in card
    assert "method" in card.partition("resumed with changes of")[2].partition(";")[0]


def test_a_run_without_a_step_left_takes_no_other_method(load: Load, tmp_path: Path) -> None:
    keys: Any = {"choices": {}, "overrides": []}
    few = [*SMALL, NO_LOSS, "train.save_steps=2", "resume=auto", "accept_changes=true"]
    run.train(load(*few), tmp_path, **keys)
    with pytest.raises(UserError, match=r"method, .*cannot change any more.* 2 steps.*start_"):
        run.train(load(*few, "method=cpo"), tmp_path, **keys)
    again = run.train(load(*few, "dataset.num_eval=2"), tmp_path, **keys)
    assert again.summary["train"]["steps"] == 2, "evaluations may change"
