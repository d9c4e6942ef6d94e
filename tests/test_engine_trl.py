"""`engine=trl` through our runner against a stock `ORPOTrainer` fed the raw rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from orpo_lab import config, data, engine
from orpo_lab.config.dataset import FileDataset
from orpo_lab.config.engine import SharedPrefixEngine
from orpo_lab.data import embedded
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop
from orpo_lab.tracker.base import Untracked
from orpo_lab.training import loop, trainer
from orpo_lab.training.checkpoint import Made
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.state import State

Load = Callable[..., config.Config]
ROWS = embedded.pairs("train", num=80, seed=3)
PLAIN = [
    {
        "prompt": row["prompt"][0]["content"] + " ",
        "chosen": row["chosen"][0]["content"],
        "rejected": row["rejected"][0]["content"],
    }
    for row in ROWS
]
IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in ROWS]
CONVERSATIONS = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]


class Spy(TrainerCallback):
    """Keeps every gradient of every optimizer step, as the optimizer is about to see it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.steps.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def stock(
    loaded: config.Config,
    rows: list[dict[str, Any]],
    network: Any,
    tokenizer: Any,
    folder: Path,
    **keys: Any,
) -> tuple[list[float], Spy]:
    """Train as TRL's documentation does it: raw rows, TRL's defaults where the lab has none."""
    spy = Spy()
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=loaded.optimizer.learning_rate,
        weight_decay=0.0,
    )
    theirs = ORPOTrainer(
        model=network,
        args=ORPOConfig(
            output_dir=str(folder),
            beta=loaded.beta,
            max_length=loaded.dataset.max_length,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=loaded.train.batch_size // 4,
            max_steps=loaded.train.max_steps,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            seed=loaded.seed,
            dataloader_drop_last=True,
            disable_tqdm=True,
            **keys,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[spy],
    )
    theirs.train()
    return [line["loss"] for line in theirs.state.log_history if "loss" in line], spy


def ours(
    loaded: config.Config,
    rows: list[dict[str, Any]],
    network: Any,
    tokenizer: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[float], Spy]:
    """Train through `data.load` and `trainer.fit`, as `run.train` does."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert isinstance(loaded.dataset, FileDataset)
    # What is held out does not matter here
    loaded.dataset.train_path = loaded.dataset.eval_path = str(file)
    loaded.dataset.faults.leaked_prompt = "keep"
    if "prompt" not in rows[0]:
        loaded.dataset.columns.prompt = None
    pairs = data.load(loaded.dataset, tokenizer)
    assert len(pairs.train) == len(rows)
    spy = Spy()
    update = State.update

    def seen_update(state: State) -> None:
        spy.on_pre_optimizer_step(None, None, None, model=state.model)
        update(state)

    monkeypatch.setattr(State, "update", seen_update)
    place = fit(loaded, network, tokenizer, pairs, folder)
    return [line["loss"] for line in place.metrics() if "loss" in line], spy


def fit(
    loaded: config.Config, network: Any, tokenizer: Any, pairs: data.Data, folder: Path
) -> RunFolder:
    """Train in fp32, and return the run folder."""
    place = RunFolder(folder)
    trainer.fit(
        loaded,
        model=network,
        tokenizer=tokenizer,
        data=pairs,
        dtype=torch.float32,
        place=place,
        log_to=Untracked(),
        made=Made("", "", ""),
        start=None,
        stop=Stop(),
    )
    return place


@pytest.mark.parametrize(
    ("rows", "num_steps", "batch_size"),
    [(PLAIN, 3, 4), (CONVERSATIONS, 10, 4), (IMPLICIT, 3, 4), (CONVERSATIONS, 2, 8)],
    ids=["plain", "conversations", "implicit", "accumulated"],
)
def test_loss_and_every_gradient_equal_a_stock_trainer_bit_for_bit(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    num_steps: int,
    batch_size: int,
) -> None:
    loaded = load(
        "dataset=jsonl",
        "dataset.train_path=given",
        "dataset.as_messages=false",
        "dataset.max_length=128",
        "dataset.max_prompt_length=96",
        "optimizer=adamw",
        "optimizer.learning_rate=1e-3",
        f"train.max_steps={num_steps}",
        f"train.batch_size={batch_size}",
        "train.logging_steps=1",
        "engine=trl",
        "engine.micro_batch_size=4",
        "tracker=none",
        "beta=0.3",
    )
    our_losses, our_spy = ours(loaded, rows, build_model(loaded), tokenizer, tmp_path, monkeypatch)
    their_losses, their_spy = stock(loaded, rows, build_model(loaded), tokenizer, tmp_path / "trl")

    assert len(our_losses) == len(their_losses) == num_steps
    assert our_losses == their_losses
    for mine, reference in zip(our_spy.steps, their_spy.steps, strict=True):
        assert mine.keys() == reference.keys()
        assert len(mine) > 40
        assert all(torch.equal(mine[name], reference[name]) for name in mine)


def test_dropout_is_drawn_as_a_stock_trainer_draws_it(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load(
        "dataset=jsonl",
        "dataset.train_path=given",
        "dataset.max_length=128",
        "dataset.max_prompt_length=96",
        "optimizer=lora",
        "optimizer.dropout=0.3",
        "seed=7",
        "train.max_steps=1",
        "train.batch_size=8",
        "engine=trl",
        "engine.micro_batch_size=4",
        "tracker=none",
    )
    networks = [build_model(loaded) for _ in range(2)]
    torch.manual_seed(5)
    other = torch.get_rng_state()
    our_losses, our_spy = ours(loaded, CONVERSATIONS, networks[0], tokenizer, tmp_path, monkeypatch)
    torch.set_rng_state(other)
    folder = tmp_path / "trl"
    their_losses, their_spy = stock(
        loaded, CONVERSATIONS, networks[1], tokenizer, folder, disable_dropout=False
    )
    assert our_losses == their_losses
    (mine,), (reference,) = our_spy.steps, their_spy.steps
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in mine)


@pytest.mark.parametrize(
    "engine_keys",
    [
        ["engine=trl", "engine.micro_batch_size=8"],
        # Several micro-batches
        ["engine=shared_prefix", "engine.tokens_per_microbatch=256"],
    ],
    ids=["trl", "shared_prefix"],
)
def test_an_evaluation_during_training_is_that_of_a_stock_trainer(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, engine_keys: list[str]
) -> None:
    for name, some in (("train", CONVERSATIONS[:16]), ("eval", CONVERSATIONS[16:32])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    loaded = load(
        "dataset=jsonl",
        f"dataset.train_path={tmp_path}/train.jsonl",
        f"dataset.eval_path={tmp_path}/eval.jsonl",
        "dataset.max_length=128",
        "dataset.max_prompt_length=96",
        "dataset.faults.leaked_prompt=keep",
        "optimizer=adamw",
        "train.max_steps=1",  # of a warm-up, which begins with a rate of 0
        "train.eval_steps=1",
        "train.batch_size=8",
        "beta=0.3",
        *engine_keys,
    )
    pairs = data.load(loaded.dataset, tokenizer)
    assert len(pairs.held_out) == 16
    network = build_model(loaded)
    *_, ours = fit(loaded, network, tokenizer, pairs, tmp_path).metrics()

    rows = datasets.Dataset.from_list(CONVERSATIONS[16:32])
    theirs = ORPOTrainer(
        model=build_model(loaded),
        args=ORPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.3,
            max_length=128,
            per_device_eval_batch_size=8,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    expected = theirs.evaluate() | theirs.state.log_history[-1]
    ignored = ["runtime", "per_second", "epoch", "step", "preparation"]
    if isinstance(loaded.engine, SharedPrefixEngine):
        ignored.append("logits/")
    names = {name for name in expected if not any(part in name for part in ignored)}
    assert len(names) >= 10
    for name in names:
        assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_adapter_dropout_is_applied_in_training_and_not_in_evaluation(
    load: Load, build_model: Any, tokenizer: Any
) -> None:
    def losses(dropout: float, *, training: bool) -> set[float]:
        loaded = load(
            f"optimizer.dropout={dropout}",
            "dataset.num_train=16",
            "dataset.num_eval=4",
            "train.batch_size=4",
            "engine=trl",
            "engine.micro_batch_size=4",
        )
        network = build_model(loaded)
        for name, p in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(p, 0.05)
        pairs = data.load(loaded.dataset, tokenizer)
        devices = OneDevice(torch.device("cpu"), torch.float32)
        trls = engine.build(loaded, model=network, tokenizer=tokenizer, devices=devices)
        (batch,) = trls.micro_batches(loop.rows(pairs.train, range(4)))
        network.train(training)
        return {trls.score(batch, loaded.beta).loss.item() for _ in range(3)}

    assert len(losses(0.3, training=True)) == 3
    assert len(losses(0.3, training=False)) == 1
    assert len(losses(0.0, training=True)) == 1


def test_preference_accuracy_does_not_vanish_at_beta_zero(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load(
        "beta=0",
        "engine=trl",
        "dataset.num_train=32",
        "dataset.num_eval=4",
        "train.max_steps=2",
        "tracker=none",
        "train.logging_steps=1",
    )
    pairs = data.load(loaded.dataset, tokenizer)
    place = fit(loaded, build_model(loaded), tokenizer, pairs, tmp_path)
    for line in place.metrics():
        assert line["rewards/accuracies"] == 0  # TRL's
        assert line["preference_accuracy"] > 0.1
        assert line["logp_margin"] == pytest.approx(
            line["logps/chosen"] - line["logps/rejected"], abs=1e-5
        )
        assert line["odds_ratio_loss"] == -line["log_odds_ratio"] > 0


def test_beta_is_that_of_the_step(load: Load, build_model: Any, tokenizer: Any) -> None:
    """L = L_SFT + beta L_OR (Eq. 6), at any beta and after another one."""
    loaded = load("engine=trl", "optimizer=adamw")
    devices = OneDevice(torch.device("cpu"), torch.float32)
    built = engine.build(loaded, model=build_model(loaded), tokenizer=tokenizer, devices=devices)
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9, 8, 8]}
    (micro_batch,) = built.micro_batches([pair])
    for beta in (0.0, 0.7, 0.2):
        score = built.score(micro_batch, beta)
        found = dict(zip(score.sums.names, score.sums.values.tolist(), strict=True))
        expected = found["nll_loss"] + beta * found["odds_ratio_loss"]
        assert score.loss.item() == pytest.approx(expected, rel=1e-5)
        assert found["rewards/chosen"] == pytest.approx(beta * found["logps/chosen"])


def test_a_pair_that_is_as_likely_either_way_is_not_preferred(
    load: Load, build_model: Any, tokenizer: Any
) -> None:
    loaded = load("engine=trl", "optimizer=adamw")
    devices = OneDevice(torch.device("cpu"), torch.float32)
    built = engine.build(loaded, model=build_model(loaded), tokenizer=tokenizer, devices=devices)
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [8, 9]}
    (micro_batch,) = built.micro_batches([pair])
    sums = built.score(micro_batch, beta=0.1).sums
    found = dict(zip(sums.names, sums.values.tolist(), strict=True))
    assert found["logp_margin"] == found["preference_accuracy"] == 0


def test_trl_is_imported_for_its_trainer_and_its_kernel_only() -> None:
    root = Path(engine.__file__).parents[1]
    using = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if any(
            line.strip().startswith(("import trl", "from trl"))
            for line in file.read_text().splitlines()
        )
    }
    assert using == {"engine/trl.py", "engine/head.py"}
