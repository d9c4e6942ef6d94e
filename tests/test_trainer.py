"""The loop: numbers that must stop it, and runs that go on where they were."""

import itertools
import json
import logging
import math
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_lab import config, data, memory, optimizer
from orpo_lab.beta_schedule import adapted
from orpo_lab.config.beta_schedule import Adaptive
from orpo_lab.config.method import METHODS
from orpo_lab.engine.shared_prefix import default_budget
from orpo_lab.errors import NonFiniteError, UserError
from orpo_lab.model.weights import check_loaded
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.optimizer.updater import Updater
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.tracker.base import Run, Untracked
from orpo_lab.training import checkpoint, steps, trainer
from orpo_lab.training.checkpoint import Made, Spent
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.finite import FiniteCheck
from orpo_lab.training.loop import Loop, batches
from orpo_lab.training.meter import Meter
from orpo_lab.training.state import State

Load = Callable[..., config.Config]
Launch = Callable[..., subprocess.CompletedProcess[str]]
SMALL = (
    "tracker=none",
    "dataset.num_train=64",
    "dataset.num_eval=8",
    "dataset.num_generations=4",
    "train.batch_size=8",
)


GALORE = "optimizer=galore optimizer.update_proj_gap=3"
PARTS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def fit(
    loaded: config.Config,
    network: Any,
    tokenizer: Any,
    folder: Path,
    start: checkpoint.Checkpoint | None = None,
    log_to: Run | None = None,
    stop: Stop | None = None,
) -> tuple[trainer.TrainStats, RunFolder]:
    place = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    stats = trainer.fit(
        loaded,
        model=network,
        tokenizer=tokenizer,
        data=data.load(loaded.dataset, tokenizer),
        dtype=torch.float32,
        place=place,
        log_to=log_to or Untracked(),
        made=Made("", "", ""),
        start=start,
        stop=stop or Stop(),
    )
    return stats, place


def poison(what: str, network: Any, num_fine: int = 2) -> None:
    """Make numbers non-finite after so many steps, in the forward or the backward pass."""
    calls = {"num": 0}
    last_norm = [module for name, module in network.named_modules() if name.endswith("norm")][-1]

    def forward_hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls["num"] += module.training
        if calls["num"] <= num_fine:
            return output
        if what == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output

    last_norm.register_forward_hook(forward_hook)


@pytest.mark.parametrize(
    ("what", "said"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is")]
)
@pytest.mark.parametrize(
    "overrides",
    [
        "optimizer=lora",
        "optimizer=lora engine=trl",
        "optimizer=adamw",
        GALORE,
        f"{GALORE} optimizer.layerwise=true",
    ],
)
def test_a_non_finite_number_stops_the_run_before_any_weight_takes_it(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    what: str,
    said: str,
    overrides: str,
) -> None:
    loaded = load(*overrides.split(), *SMALL, "train.max_steps=5", "train.logging_steps=1")
    network = build_model(loaded)
    poison(what, network)
    with pytest.raises(NonFiniteError, match=f"step 3: {said}") as stop:
        fit(loaded, network, tokenizer, tmp_path)
    assert "learning_rate" in str(stop.value)
    assert all(torch.isfinite(p).all() for p in network.parameters() if p.is_floating_point())
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1, 2]


@pytest.mark.parametrize("end", ["train.save_steps=4", "train.max_steps=4"])
def test_a_fault_between_logging_steps_is_found_before_a_checkpoint_or_the_end(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    end: str,
) -> None:
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=8", "train.logging_steps=8", end)
    network = build_model(loaded)
    poison("gradient", network)
    with pytest.raises(NonFiniteError, match="step 3: the gradient norm is"):
        fit(loaded, network, tokenizer, tmp_path)
    assert all(torch.isfinite(p).all() for p in network.parameters() if p.is_floating_point())
    assert not list(tmp_path.glob("checkpoints/checkpoint-*"))
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1]


def test_the_loss_of_every_micro_batch_is_looked_at(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    keys = ("engine.tokens_per_microbatch=200", "train.max_steps=1")
    loaded = load("optimizer=lora", *SMALL, *keys)
    network, calls = build_model(loaded), [0]

    def spoil_first(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        return output * math.nan if calls[0] == 1 else output

    last_norm = [module for key, module in network.named_modules() if key.endswith("norm")][-1]
    last_norm.register_forward_hook(spoil_first)
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        fit(loaded, network, tokenizer, tmp_path)
    assert calls[0] > 1


def test_held_out_figures_that_are_not_finite_are_left_out_and_training_goes_on(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    keys = ("train.max_steps=2", "train.eval_steps=1", "train.logging_steps=1")
    loaded = load("optimizer=lora", *SMALL, *keys)
    network = build_model(loaded)
    last_norm = [module for key, module in network.named_modules() if key.endswith("norm")][-1]
    last_norm.register_forward_hook(
        lambda module, args, output: output if module.training else output * math.nan
    )
    stats, place = fit(loaded, network, tokenizer, tmp_path)
    assert stats.steps == 2
    assert ["loss" in line for line in place.metrics()] == [True, False, True, False]
    assert all(math.isfinite(value) for line in place.metrics() for value in line.values())
    assert "step 1: eval_loss is nan" in caplog.text


def test_gradients_that_fp16s_scaler_will_skip_do_not_stop_the_run(load: Load) -> None:
    for is_scaled in (True, False):
        gradient = torch.tensor([math.inf, 1.0])
        check = FiniteCheck(load().train, Meter(Spent()), is_scaled=is_scaled)
        check.look(1, torch.ones(()), gradient.norm(), [gradient])
        with nullcontext() if is_scaled else pytest.raises(NonFiniteError, match="norm is inf"):
            check.check()
        assert gradient.tolist() == ([math.inf, 1.0] if is_scaled else [0.0, 0.0])


def test_a_diverging_run_ends_red_and_leaves_no_model(launch: Launch, tmp_path: Path) -> None:
    done = launch(
        "optimizer=adamw",
        "optimizer.learning_rate=1e30",
        *SMALL,
        "train.max_steps=10",
        "train.max_grad_norm=0",
        "train.warmup_steps=0",
        "hydra.run.dir=run",
        expect=1,
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: step ")
    assert "Likely causes" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "NonFiniteError: step" in status["reason"]
    assert not (tmp_path / "run" / "final").exists()


class Tracked(Untracked):
    """A tracker that keeps what it is told, as the run folder does."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append({"step": step, **metrics})


@pytest.mark.parametrize(
    ("schedule", "length", "betas"),
    [
        ("constant", "train.max_steps=5", [0.3] * 5),
        # Of eight steps an epoch
        ("linear", "train.max_steps=null train.num_epochs=0.6", [0.3, 0.25, 0.2, 0.15, 0.1]),
    ],
)
def test_beta_is_logged_at_every_logging_step(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    schedule: str,
    length: str,
    betas: list[float],
) -> None:
    loaded = load(
        "optimizer=lora",
        *SMALL,
        *length.split(),
        "train.logging_steps=1",
        "beta=0.3",
        "beta_end=0.1",
        f"beta_schedule={schedule}",
    )
    tracked = Tracked()
    stats, place = fit(loaded, build_model(loaded), tokenizer, tmp_path, log_to=tracked)
    assert [line["beta"] for line in place.metrics()] == pytest.approx(betas)
    assert tracked.lines == place.metrics()
    # TRL's rewards are beta times the log-probabilities: the step really used this beta
    for line in place.metrics():
        assert line["rewards/chosen"] == pytest.approx(
            line["beta"] * line["logps/chosen"], rel=1e-4
        )
    assert stats.steps == 5
    assert stats.pairs_per_second * stats.wall_seconds == pytest.approx(5 * 8)
    rows = data.load(loaded.dataset, tokenizer).train
    num_tokens = [sum(map(len, row.values())) for row in rows.select_columns(PARTS)]
    mean = sum(num_tokens) / len(num_tokens)
    assert stats.tokens_per_second / stats.pairs_per_second == pytest.approx(mean)
    assert stats.peak_memory_bytes > 50e6


@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_a_method_that_reads_no_beta_writes_none(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, schedule: str
) -> None:
    common = ("optimizer=lora", *SMALL, "train.max_steps=1")
    loaded = load(*common, "method=sft", f"beta_schedule={schedule}")
    _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    assert [line["step"] for line in place.metrics()] == [1]
    assert "beta" not in place.metrics()[0]


def test_steps_that_are_not_finite_are_skipped_counted_and_capped(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, overrides in {"lora": ["optimizer=lora"], "galore": GALORE.split()}.items():
        loaded = load(
            *overrides,
            *SMALL,
            "train.max_steps=5",
            "train.logging_steps=1",
            "train.on_nonfinite=skip",
        )
        network = build_model(loaded)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        last_norm = [module for key, module in network.named_modules() if key.endswith("norm")][-1]
        calls = {"num": 0}

        def spoil(module: Any, args: Any, output: Any, calls: dict[str, int] = calls) -> Any:
            calls["num"] += module.training
            return output * float("nan") if calls["num"] in (2, 3) else output

        last_norm.register_forward_hook(spoil)
        stats, place = fit(loaded, network, tokenizer, tmp_path / name)
        assert (stats.steps, stats.skipped_steps) == (5, 2)
        lines = place.metrics()
        assert ["loss" in line for line in lines] == [True, False, False, True, True]
        assert ["nll_loss" in line for line in lines] == [True, False, False, True, True]
        assert [line.get("skipped_steps") for line in lines] == [None, 1, 2, None, None]
        after = network.state_dict()
        assert all(
            torch.isfinite(value).all() for value in after.values() if value.is_floating_point()
        )
        assert any(not torch.equal(after[key], before[key]) for key in before)
    assert "step 3: the loss is nan; skipped (2 of 10)" in caplog.text
    assert "nll_loss is nan" not in caplog.text
    capped = load(*GALORE.split(), *SMALL, "train.on_nonfinite=skip", "train.max_skipped_steps=1")
    network = build_model(capped)
    poison("gradient", network)
    with pytest.raises(NonFiniteError, match=r"step 4: .* more than train.max_skipped_steps=1"):
        fit(capped, network, tokenizer, tmp_path / "capped")


def test_a_step_that_is_skipped_for_its_gradient_has_no_share_in_a_mean_either(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    keys = ("train.on_nonfinite=skip", "train.max_steps=4", "train.logging_steps=2")
    loaded = load("optimizer=lora", *SMALL, *keys)
    network = build_model(loaded)
    poison("gradient", network)
    _, place = fit(loaded, network, tokenizer, tmp_path)
    first, second, third = place.metrics()
    assert {"loss", "nll_loss"} <= first.keys() & second.keys()
    assert not {"loss", "nll_loss"} & third.keys(), "although the losses were finite"
    assert third["skipped_steps"] == 2


@pytest.mark.parametrize("optimizer", ["optimizer=adamw", GALORE])
def test_a_skipped_step_moves_nothing(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, optimizer: str
) -> None:
    """Not even by what the moments hold of the steps before it."""
    keys = ("train.on_nonfinite=skip", "train.lr_scheduler_type=constant")
    ends = []
    for num_steps in (1, 3):
        loaded = load(*optimizer.split(), *SMALL, *keys, f"train.max_steps={num_steps}")
        network = build_model(loaded)
        poison("loss", network, num_fine=1)
        stats, _ = fit(loaded, network, tokenizer, tmp_path / str(num_steps))
        assert stats.skipped_steps == num_steps - 1
        ends.append(weights(network))
    assert all(torch.equal(weight, ends[0][name]) for name, weight in ends[1].items())


def test_a_gradient_norm_that_overflows_is_not_clipped_to_nothing(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=3", "train.logging_steps=1")
    network = build_model(loaded)
    last_norm = [module for key, module in network.named_modules() if key.endswith("norm")][-1]

    def explode(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:  # finite gradients, whose squares are not
            output.register_hook(lambda gradient: gradient * 1e25)

    last_norm.register_forward_hook(explode)
    with pytest.raises(NonFiniteError, match="step 1: the gradient norm is inf"):
        fit(loaded, network, tokenizer, tmp_path)


def test_weights_that_an_update_ruined_are_never_saved(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=4", "train.save_steps=1")
    network = build_model(loaded)
    build = optimizer.build

    def build_ruinous(*args: Any, **kwargs: Any) -> Updater:
        built = build(*args, **kwargs)
        weight = built.optimizer.param_groups[0]["params"][0]
        built.optimizer.register_step_post_hook(lambda *_: weight.data[0, 0].fill_(math.inf))
        return built

    monkeypatch.setattr(optimizer, "build", build_ruinous)
    with pytest.raises(NonFiniteError, match="step 1: its update left weights"):
        fit(loaded, network, tokenizer, tmp_path)
    assert not list(tmp_path.glob("checkpoints/checkpoint-*"))


def test_steps_are_counted_from_epochs(load: Load) -> None:
    loaded = load("train.max_steps=null", "train.num_epochs=2", "train.batch_size=8")
    assert steps.count_steps(loaded, 64) == steps.count_steps(loaded, 71) == 16
    part = load("train.max_steps=null", "train.num_epochs=0.6", "train.batch_size=8")
    assert steps.count_steps(part, 64) == 5
    with pytest.raises(UserError, match=r"train.batch_size=8 is above the 7 training pairs"):
        steps.count_steps(loaded, 7)
    rows = ("method=kto", "dataset=unpaired", "dataset.train_path=rows.jsonl")
    with pytest.raises(UserError, match=r"is above the 7 training completions"):
        steps.count_steps(load(*rows, "train.batch_size=8"), 7)


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        (("method=dpo", "beta_schedule=linear"), True),
        (("method=kto", "beta_schedule=cosine"), True),
        (("method=dpo", "beta_schedule=linear", "beta_end=0.05"), False),
        (("method=dpo",), False),
        (("method=cpo", "beta_schedule=linear"), False),
        (("method=sft", "beta_schedule=linear"), False),
        (("beta_schedule=linear",), False),
    ],
)
def test_a_beta_that_ends_where_the_method_learns_nothing_is_warned_of(
    load: Load, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], is_warned: bool
) -> None:
    said = [record.message for record in said_of_length(caplog, load(*SMALL, *overrides))]
    assert any("beta_end=0: method=" in line for line in said) == is_warned


def said_of_length(caplog: pytest.LogCaptureFixture, loaded: config.Config) -> list[Any]:
    """Return what is said of a run on 64 pairs."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    steps.say_length(loaded, 64)
    return caplog.records


@pytest.mark.parametrize(
    ("overrides", "level", "said"),
    [
        ("train.max_steps=12", "INFO", "12 steps are 1.5 epochs of 64 pairs"),
        ("train.num_epochs=10", "INFO", "80 steps are 10 epochs of 64 pairs"),
        ("train.max_steps=104", "WARNING", "104 steps are 13 epochs of 64 pairs, more than the 10"),
    ],
)
def test_how_often_a_run_sees_its_pairs_is_said(
    load: Load, caplog: pytest.LogCaptureFixture, overrides: str, level: str, said: str
) -> None:
    (line,) = said_of_length(caplog, load(*SMALL, overrides))
    assert line.levelname == level
    assert line.getMessage().startswith(said)


def test_a_warm_up_longer_than_the_run_is_a_warning_with_the_rate_that_is_reached(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = ("optimizer=lora", *SMALL, "train.max_steps=3", "train.logging_steps=1")
    loaded = load(*long, "train.warmup_steps=100")
    (said,) = [record for record in said_of_length(caplog, loaded) if record.levelname == "WARNING"]
    text = said.getMessage()
    assert text.startswith("train.warmup_steps=100 is above the 3 steps of this run: ")
    share = float(text.split("ends at ")[1].split()[0])
    _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    rates = [line["learning_rate"] for line in place.metrics()]
    assert rates[-1] == pytest.approx(share * loaded.optimizer.learning_rate)


@pytest.mark.parametrize(
    "overrides",
    [
        "train.warmup_steps=3",
        "train.warmup_steps=0.9",
        "train.warmup_steps=100 train.lr_scheduler_type=constant",
    ],
)
def test_a_warm_up_that_the_run_has_room_for_or_does_not_read_is_no_warning(
    load: Load, caplog: pytest.LogCaptureFixture, overrides: str
) -> None:
    records = said_of_length(caplog, load(*SMALL, "train.max_steps=3", *overrides.split()))
    assert [record.levelname for record in records] == ["INFO"]


def test_pairs_that_fill_no_batch_are_left_out_of_every_epoch(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    keys = ("dataset.num_train=20", "train.max_steps=null", "train.num_epochs=2")
    loaded = load("optimizer=adamw", *SMALL, *keys)
    network = build_model(loaded)
    num_pairs = []

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        num_pairs.append(given["attention_mask"].shape[2])  # see `attention.mask`

    network.register_forward_pre_hook(count, with_kwargs=True)
    stats, _ = fit(loaded, network, tokenizer, tmp_path)
    assert stats.steps == 4
    assert num_pairs == [8] * 4
    whole = datasets.Dataset.from_dict({"x": range(16)})
    assert len(trainer._whole_batches(loaded, whole)) == 16


def test_a_resumed_run_has_settings_of_its_own_and_what_was_spent_before(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    taken: list[float] = []
    build = optimizer.build

    def kept_build(*args: Any, **named: Any) -> Updater:
        built = build(*args, **named)
        made.append(built.optimizer)
        made[-1].register_step_pre_hook(lambda adamw, *_: taken.append(adamw.param_groups[0]["lr"]))
        return built

    monkeypatch.setattr(optimizer, "build", kept_build)
    common = [
        "optimizer=adamw",
        *SMALL,
        "train.max_steps=8",
        "train.lr_scheduler_type=cosine",
        "train.warmup_steps=2",
        "train.num_checkpoints=3",
    ]
    first = load(
        *common, "optimizer.learning_rate=1e-3", "train.logging_steps=1", "train.save_steps=2"
    )
    _, place = fit(first, build_model(first), tokenizer, tmp_path)
    shares = [0, 0.5, *((1 + math.cos(math.pi * step / 6)) / 2 for step in range(6))]
    rates = [line["learning_rate"] for line in place.metrics()]
    assert rates == taken == pytest.approx([1e-3 * share for share in shares])
    taken.clear()
    kept = checkpoint.folders(place)
    assert list(map(checkpoint.step_of, kept)) == [4, 6, 8]

    spent = Spent(wall_seconds=1000.0, peak_memory_bytes=10**15, num_skipped=3)
    start = checkpoint.Checkpoint(kept[0], Made("", "", ""), spent, {})
    changes = ["optimizer.learning_rate=2e-3", "optimizer.weight_decay=0.5"]
    second = load(*common, *changes, "train.logging_steps=4", "train.save_steps=3")
    stats, _ = fit(second, build_model(second), tokenizer, tmp_path, start)
    assert taken == pytest.approx([2e-3 * share for share in shares[4:]])
    lines = place.metrics()[8:]
    assert [line["step"] for line in lines] == [8]
    assert not any("skipped_steps" in line for line in lines), "told before the resume"
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([2e-3 * shares[7]])
    assert [group["weight_decay"] for group in made[-1].param_groups] == [0.5, 0.0]
    assert 1000 < stats.wall_seconds < 1900
    assert (stats.peak_memory_bytes, stats.skipped_steps) == (10**15, 3)
    assert stats.pairs_per_second * stats.wall_seconds == pytest.approx(8 * 8)


def test_lines_of_metrics_are_the_same_wherever_a_run_was_saved_and_resumed(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = ("optimizer=lora", "optimizer.dropout=0.2")
    common = (*model, *SMALL, "train.max_steps=5", "train.logging_steps=3")
    plain = load(*common)
    _, place = fit(plain, build_model(plain), tokenizer, tmp_path / "plain")
    lines = place.metrics()
    assert [line["step"] for line in lines] == [1, 3, 5]
    saving = load(*common, "train.save_steps=2", "train.num_checkpoints=3")
    _, saved = fit(saving, build_model(saving), tokenizer, tmp_path / "saved")
    assert saved.metrics() == lines
    start = checkpoint.Checkpoint(checkpoint.folders(saved)[0], Made("", "", ""), Spent(), {})
    assert start.step == 2
    _, resumed = fit(plain, build_model(plain), tokenizer, tmp_path / "resumed", start)
    assert resumed.metrics() == lines[1:]


def test_a_run_whose_time_is_up_saves_its_step(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=8", "train.logging_steps=8")
    stop = Stop(max_hours=1e-9)
    with pytest.raises(Stopped, match=r"train\.max_hours"):
        fit(loaded, build_model(loaded), tokenizer, tmp_path, stop=stop)
    assert stop.waits, "for what is left to be saved"
    (saved,) = checkpoint.folders(RunFolder(tmp_path))
    assert checkpoint.step_of(saved) == 1
    assert len((saved / checkpoint.METRICS).read_text().splitlines()) == 1


def test_a_checkpoint_without_a_weight_of_the_model_is_refused(
    load: Load, build_model: Any
) -> None:
    network = build_model(load("optimizer=adamw"))
    tied = ["model.embed_tokens.weight", "lm_head.weight"]
    for name in tied:
        check_loaded(network, [name], [])
    for missing, unexpected in ((["model.norm.weight"], []), ([], ["other"]), (tied, [])):
        said = ", ".join(missing or unexpected)
        with pytest.raises(UserError, match=rf"not this model's \({said}\)"):
            check_loaded(network, missing, unexpected)


def test_evaluation_during_training_reports_trls_metrics(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=4", "train.eval_steps=2")
    network, modes = build_model(loaded), []
    norms = [module for name, module in network.named_modules() if name.endswith("norm")]
    norms[-1].register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    _, place = fit(loaded, network, tokenizer, tmp_path)
    # Also after an evaluation a step is taken in training mode, with dropout
    assert set(modes) == {(True, True), (False, False)}
    evaluated = [line for line in place.metrics() if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert {"eval_rewards/margins", "eval_preference_accuracy"} <= evaluated[0].keys()


def test_layerwise_galore_logs_and_clips_the_projected_norm(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    caplog.set_level("INFO")
    common = (GALORE.split()[0], *SMALL, "train.max_steps=3", "train.logging_steps=1")
    norms: dict[str, list[float]] = {}
    clipped: list[float] = []
    step = GaLore.step

    def seen_step(galore: GaLore, *args: Any) -> None:
        step(galore, *args)
        if galore.grad_norm is not None:
            clipped.append(galore.grad_norm.item())

    monkeypatch.setattr(GaLore, "step", seen_step)
    for mode in ("true", "false"):
        loaded = load(*common, f"optimizer.layerwise={mode}")
        stats, place = fit(loaded, build_model(loaded), tokenizer, tmp_path / mode)
        norms[mode] = [line["grad_norm"] for line in place.metrics()]
        assert stats.galore_memory_bytes is not None
    assert norms["true"] == clipped
    # A fifth of the run, and not of an epoch
    assert caplog.text.count("anew every 1 steps") == 2
    # Projection only loses length, and most of the gradient lies in the basis taken from it
    assert 0.5 * norms["false"][0] < norms["true"][0] < norms["false"][0]


# Memory that runs out. There is no GPU to fill here: torch.OutOfMemoryError is raised by hand, the
# other error is the real one of torch's allocator, asked for more than any machine has.


def out_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_cpu_memory() -> None:
    torch.empty(1 << 50)


def run_out(
    network: Any, at: int, of_memory: Callable[[], None], *, training: bool = True
) -> list[int]:
    """Let memory run out in the `at`-th forward pass, in training or not; return a count of all."""
    calls = [0]

    def hook(module: Any, args: Any, output: Any) -> None:
        calls[0] += module.training is training
        if calls[0] == at and module.training is training:
            of_memory()

    norms = [module for name, module in network.named_modules() if name.endswith("norm")]
    norms[-1].register_forward_hook(hook)
    return calls


def weights(network: Any) -> dict[str, torch.Tensor]:
    return {
        name: weight for name, weight in network.state_dict().items() if weight.is_floating_point()
    }


def assert_equal_weights(network: Any, other: Any) -> None:
    for name, weight in weights(network).items():
        assert torch.equal(weight, weights(other)[name]), name


def spent_by(place: RunFolder) -> list[Spent]:
    """What each checkpoint of a run notes as spent, the oldest first."""
    manifests = (
        json.loads((path / "manifest.json").read_text()) for path in checkpoint.folders(place)
    )
    return [Spent(**json.loads(manifest["spent"])) for manifest in manifests]


ROOMY = (
    "train.batch_size=16",
    "engine.tokens_per_microbatch=500",
    "train.logging_steps=1",
    "train.gradient_checkpointing=false",
)


@pytest.mark.parametrize(
    ("of_memory", "overrides", "at"),
    [
        (out_of_cpu_memory, "optimizer=adamw", 2),
        (out_of_gpu_memory, "optimizer=lora optimizer.dropout=0.1", 2),
        # Before it takes a basis, which is from the first micro-batch
        (out_of_gpu_memory, f"{GALORE} optimizer.layerwise=true", 1),
        # Where the batch is read for its margin
        (out_of_gpu_memory, "optimizer=adamw beta_schedule=adaptive", 2),
    ],
)
def test_a_step_without_enough_memory_is_taken_again_with_half_the_budget(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    of_memory: Callable[[], None],
    overrides: str,
    at: int,
) -> None:
    common = (*overrides.split(), *SMALL, *ROOMY, "train.max_steps=3")
    network = build_model(load(*common))
    run_out(network, at, of_memory, training="adaptive" not in overrides)
    stats, place = fit(load(*common), network, tokenizer, tmp_path / "short")
    (line,) = [record.message for record in caplog.records if "out of memory" in record.message]
    assert line.startswith("step 1: out of memory; taken again with engine.tokens_per_microbatch=2")
    assert stats.steps == 3
    # From its first step on it is the run that began with so many tokens, to the bit
    budget = line.split("tokens_per_microbatch=")[1].split()[0]
    began_so = load(*common, f"engine.tokens_per_microbatch={budget}")
    other = build_model(began_so)
    _, expected = fit(began_so, other, tokenizer, tmp_path / "halved")
    assert_equal_weights(network, other)
    assert place.metrics() == expected.metrics()


def test_memory_for_one_pair_at_a_time_is_enough(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    # Of seven pairs one is alone in its row before the others are
    loaded = load("optimizer=adamw", *SMALL, *ROOMY[3:], "train.batch_size=7", "train.max_steps=1")
    rows = data.load(loaded.dataset, tokenizer).train
    longest = max(sum(map(len, row.values())) for row in rows.select_columns(PARTS))
    network = build_model(loaded)

    def hook(module: Any, args: Any, output: Any) -> None:
        if module.training and output.shape[1] > longest:
            out_of_gpu_memory()

    norms = [module for name, module in network.named_modules() if name.endswith("norm")]
    norms[-1].register_forward_hook(hook)
    stats, _ = fit(loaded, network, tokenizer, tmp_path)
    assert stats.steps == 1
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    # From seven in a row to one: each time the rows are half as wide
    assert 2 <= len(said) <= 3


def test_a_basis_that_was_taken_before_memory_ran_out_is_not_taken_again(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("optimizer.layerwise=true", "optimizer.rotate_moments=true", "train.max_steps=1")
    loaded = load(GALORE.split()[0], *SMALL, *ROOMY, *keys)
    network = build_model(loaded)
    calls = run_out(network, 2, out_of_gpu_memory)
    taken, refresh = [], GaLore._refresh

    def counted(self: GaLore, slot: Any, gradient: torch.Tensor) -> None:
        taken.append(slot.index)
        refresh(self, slot, gradient)

    monkeypatch.setattr(GaLore, "_refresh", counted)
    fit(loaded, network, tokenizer, tmp_path)
    assert calls[0] > 3, "the step was taken again, after its first micro-batch"
    assert sorted(taken) == list(range(7 * network.config.num_hidden_layers))


def test_memory_that_runs_out_later_changes_the_packing_and_nothing_else(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=adamw", *SMALL, *ROOMY, "train.max_steps=4")
    results = []
    for at in (0, 4):  # never, and in the second step
        network = build_model(loaded)
        calls = run_out(network, at, out_of_gpu_memory)
        _, place = fit(loaded, network, tokenizer, tmp_path / str(at))
        results.append((calls[0], weights(network), place.metrics()))
    (few, expected, lines), (more, found, others) = results
    assert more > few + 4, "smaller micro-batches, also of the batch that was laid out before"
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5)
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, abs=1e-4)


def test_a_lowered_budget_is_in_the_checkpoint_and_lasts(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=adamw", *SMALL, *ROOMY, "train.max_steps=4", "train.save_steps=2")
    whole = build_model(loaded)
    run_out(whole, 1, out_of_gpu_memory)
    _, place = fit(loaded, whole, tokenizer, tmp_path)
    first, last = spent_by(place)
    assert first.token_budget is not None
    assert first.token_budget < 500
    assert last.token_budget == first.token_budget
    start = checkpoint.Checkpoint(checkpoint.folders(place)[0], Made("", "", ""), first, {})
    resumed = build_model(loaded)
    calls = run_out(resumed, 0, out_of_gpu_memory)
    fit(loaded, resumed, tokenizer, tmp_path, start)
    assert calls[0] > 2 * 2, "two steps of more than two micro-batches"
    assert_equal_weights(whole, resumed)
    assert spent_by(place)[-1].token_budget == first.token_budget


def test_memory_that_runs_out_is_first_answered_by_gradient_checkpointing(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = ("optimizer=lora", *SMALL, *ROOMY, "train.max_steps=1")
    loaded = load(*common, "train.gradient_checkpointing=auto")
    network = build_model(loaded)
    run_out(network, 1, out_of_gpu_memory)
    _, place = fit(loaded, network, tokenizer, tmp_path / "auto")
    (line,) = [record.message for record in caplog.records if "out of memory" in record.message]
    assert line.startswith("step 1: out of memory; taken again with gradient checkpointing")
    assert network.is_gradient_checkpointing
    began_so = load(*common, "train.gradient_checkpointing=true")
    other = build_model(began_so)
    _, expected = fit(began_so, other, tokenizer, tmp_path / "true")
    assert_equal_weights(network, other)
    assert place.metrics() == expected.metrics()


def test_a_measured_budget_is_in_the_checkpoint_and_is_not_measured_again(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's memory is made up, since there is no GPU to ask."""
    keys = ("train.batch_size=16", "train.max_steps=4", "train.save_steps=2")
    loaded = load("optimizer=adamw", *SMALL, *keys)
    asked = []

    def room() -> int:
        asked.append(1)
        return 10**12

    monkeypatch.setattr(memory, "room_bytes", room)
    monkeypatch.setattr(memory, "peak_bytes", lambda: 10**11)
    _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    assert len(asked) == 1
    first, last = spent_by(place)
    assert first.token_budget is not None
    assert first.token_budget > default_budget(loaded.dataset.max_length) / 2
    assert last.token_budget == first.token_budget
    start = checkpoint.Checkpoint(checkpoint.folders(place)[0], Made("", "", ""), first, {})
    fit(loaded, build_model(loaded), tokenizer, tmp_path, start)
    assert len(asked) == 1
    assert spent_by(place)[-1].token_budget == first.token_budget


@pytest.mark.parametrize("engine", ["shared_prefix", "trl"])
def test_where_nothing_is_left_to_halve_the_error_goes_on(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, engine: str
) -> None:
    loaded = load("optimizer=lora", *SMALL, f"engine={engine}", "train.max_steps=2")
    network = build_model(loaded)
    for at in range(1, 9):  # of 8 pairs, down to one to a micro-batch
        run_out(network, at, out_of_gpu_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fit(loaded, network, tokenizer, tmp_path)


def test_an_infinite_loss_in_fp16_leaves_its_gradients_to_the_scaler(load: Load) -> None:
    check = FiniteCheck(load().train, Meter(Spent()), is_scaled=True)
    gradient = torch.ones(2)
    check.look(1, torch.tensor(math.inf), torch.zeros(()), [gradient])
    assert gradient.tolist() == [1.0, 1.0]
    with pytest.raises(NonFiniteError, match="step 1: the loss is inf"):
        check.check()


def test_a_step_that_fp16s_scaling_skips_moves_neither_weights_nor_the_rate() -> None:
    def make() -> tuple[State, torch.Tensor]:
        model = torch.nn.Linear(2, 1, bias=False)
        model.weight.data.zero_()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        devices = OneDevice(torch.device("cpu"), torch.float16)
        updater = Updater(sgd, model)
        return State(model, updater, devices, lambda num_updates: 0.5**num_updates), model.weight

    state, weight = make()
    state.devices.backward(weight.sum())
    assert weight.grad is not None
    scale = weight.grad[0, 0].item()
    assert scale > 1000, "the loss is scaled"
    weight.grad[0, 0] = math.inf
    for gradient, moved, num_updates in ((None, 0.0, 0), (3.0, -3.0, 1), (4.0, -5.0, 2)):
        if gradient is not None:
            scale /= 2 if num_updates == 1 else 1
            weight.grad = torch.full_like(weight, gradient * scale)
        state.devices.unscale(state.updater.optimizer)
        if gradient is not None:
            assert weight.grad.tolist() == [[gradient, gradient]]
        state.set_rate()
        state.update()
        assert weight.tolist() == [[moved, moved]]
        assert state.num_updates == num_updates
    assert state.step == 3

    other, weight = make()
    other.devices.load_state_dict(state.devices.state_dict())
    other.devices.backward(weight.sum())
    assert weight.grad is not None
    assert weight.grad[0, 0].item() == scale


def test_a_gradient_is_left_as_long_as_it_is_without_a_limit() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    updater = Updater(torch.optim.SGD(model.parameters()), model)
    for limit, found in ((0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert updater.clip(limit).item() == 5.0
        assert model.weight.grad[0].tolist() == pytest.approx(found)


def test_each_epoch_has_an_order_of_its_own_and_every_pair_once() -> None:
    columns = {name: [[i] for i in range(8)] for name in PARTS}
    pairs = datasets.Dataset.from_dict(columns)

    def order(num: int, *, seed: int = 5, start: int = 0) -> list[int]:
        taken = itertools.islice(batches(pairs, 2, seed, start), num)
        return [pair["chosen_ids"][0] for batch in taken for pair in batch]

    torch.manual_seed(0)
    whole = order(8)
    # A number is drawn as each epoch begins; dropout's numbers come after it
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.get_rng_state(), state)

    assert sorted(whole[:8]) == sorted(whole[8:]) == list(range(8))
    assert whole[:8] != whole[8:]
    assert order(4, seed=6) != whole[:8]
    assert order(5, start=3) == whole[6:]
    torch.manual_seed(0)
    order(1, start=3)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())


def test_metrics_of_an_interval_are_means_over_its_steps(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    lines = {}
    for interval in (1, 3):
        keys = ("optimizer=lora", *SMALL, "train.max_steps=9", f"train.logging_steps={interval}")
        loaded = load(*keys)
        _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path / str(interval))
        lines[interval] = {line["step"]: line for line in place.metrics()}
    assert list(lines[3]) == [1, 3, 6, 9]
    assert [line["epoch"] for line in lines[3].values()] == [0.125, 0.375, 0.75, 1.125]
    for first, last in ((2, 3), (4, 6), (7, 9)):
        steps = [lines[1][step] for step in range(first, last + 1)]
        for key in ("loss", "nll_loss", "preference_accuracy", "logps/rejected"):
            mean = sum(line[key] for line in steps) / len(steps)
            assert lines[3][last][key] == pytest.approx(mean, rel=1e-5), key


def test_the_last_step_is_evaluated_and_saved_off_the_rhythm_too(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    keys = ("train.max_steps=3", "train.eval_steps=2", "train.save_steps=2")
    loaded = load("optimizer=lora", *SMALL, *keys, "train.num_checkpoints=5")
    _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    assert [line["step"] for line in place.metrics() if "eval_loss" in line] == [2, 3]
    assert list(map(checkpoint.step_of, checkpoint.folders(place))) == [2, 3]


def test_a_fault_is_found_before_an_evaluation(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    keys = ("train.max_steps=8", "train.logging_steps=8", "train.eval_steps=3")
    loaded = load("optimizer=lora", *SMALL, *keys)
    network = build_model(loaded)
    poison("gradient", network)
    with pytest.raises(NonFiniteError, match="step 3: the gradient norm is"):
        fit(loaded, network, tokenizer, tmp_path)
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1]


def test_an_evaluation_leaves_the_steps_after_it_as_they_are(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    ends = []
    for eval_steps in ("null", "1"):
        keys = ("train.max_steps=3", f"train.eval_steps={eval_steps}", "optimizer.dropout=0.2")
        loaded = load("optimizer=lora", *SMALL, *keys)
        network = build_model(loaded)
        fit(loaded, network, tokenizer, tmp_path / eval_steps)
        ends.append(weights(network))
    assert all(torch.equal(value, ends[0][name]) for name, value in ends[1].items())


def test_gradient_checkpointing_computes_the_layers_once_more(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    calls: dict[str, list[int]] = {}
    for asked in ("false", "true"):
        keys = ("train.max_steps=1", f"train.gradient_checkpointing={asked}")
        loaded = load("optimizer=adamw", *SMALL, *keys)
        network = build_model(loaded)
        seen = calls[asked] = []
        network.model.layers[-1].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        fit(loaded, network, tokenizer, tmp_path / asked)
    assert len(calls["true"]) == 2 * len(calls["false"]) > 0


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param("optimizer=qlora optimizer.dropout=0.2", marks=pytest.mark.slow),
        pytest.param(GALORE, marks=pytest.mark.slow),
    ],
)
def test_a_fork_is_the_whole_run_bit_for_bit(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, overrides: str
) -> None:
    """A constant run, saved while another schedule would hold beta, goes on under that schedule."""
    common = (*overrides.split(), *SMALL, "train.max_steps=5", "train.logging_steps=2", "beta=0.4")
    annealed = ("beta_schedule=hold_then_anneal", "beta_schedule.anneal_fraction=0.5", "beta_end=0")
    trunk = load(*common, "train.save_steps=3", "train.num_checkpoints=2")
    _, place = fit(trunk, build_model(trunk), tokenizer, tmp_path / "trunk")
    start = checkpoint.Checkpoint(checkpoint.folders(place)[0], Made("", "", ""), Spent(), {})
    assert start.step == 3
    loaded = load(*common, *annealed)
    fork, whole = build_model(loaded), build_model(loaded)
    torch.manual_seed(99)
    _, forked = fit(loaded, fork, tokenizer, tmp_path / "fork", start)
    _, complete = fit(loaded, whole, tokenizer, tmp_path / "whole")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(fork).items())
    # The line of step 4 is about steps 3 and 4
    assert forked.metrics() == complete.metrics()[2:]
    lines = [(line["step"], line["beta"]) for line in complete.metrics()]
    assert lines == [(1, 0.4), (2, 0.4), (4, 0.2), (5, 0.0)]


@pytest.mark.parametrize(("method", "is_more"), [("orpo", True), ("cpo", True), ("cpo", False)])
def test_an_adaptive_beta_is_that_of_the_batchs_margin_and_nothing_else_changes(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    is_more: bool,
) -> None:
    monkeypatch.setattr(METHODS[method], "more_beta_is_more_preference", is_more)
    model = (f"method={method}", "optimizer=lora", "optimizer.dropout=0", "beta=0.4")
    common = (*model, *SMALL, "train.max_steps=5", "train.logging_steps=1")
    loaded = load(
        *common, "beta_schedule=adaptive", "train.save_steps=2", "train.num_checkpoints=3"
    )
    whole = build_model(loaded)
    _, place = fit(loaded, whole, tokenizer, tmp_path / "whole")
    lines = place.metrics()
    average, expected = None, []
    for line in lines:
        # The step's own metric, without its own beta
        margin = line[loaded.method.margin] / (1 if method == "orpo" else line["beta"])
        schedule, direction = loaded.beta_schedule, -1 if is_more else 1
        assert isinstance(schedule, Adaptive)
        beta, average = adapted(schedule, margin, average, beta=0.4, direction=direction)
        expected.append(beta)
    betas = [line["beta"] for line in lines]
    assert betas == pytest.approx(expected, rel=1e-5)
    assert len(set(betas)) > 3

    resumed = build_model(loaded)
    start = checkpoint.Checkpoint(checkpoint.folders(place)[0], Made("", "", ""), Spent(), {})
    assert start.step == 2
    _, rest = fit(loaded, resumed, tokenizer, tmp_path / "resumed", start)
    assert rest.metrics() == lines[2:]

    # The same betas, given
    monkeypatch.setattr(Loop, "next_beta", lambda loop, pairs: betas[loop.state.step])
    loaded = load(*common)
    given = build_model(loaded)
    fit(loaded, given, tokenizer, tmp_path / "given")
    for other in (resumed, given):
        assert all(
            torch.equal(value, weights(whole)[name]) for name, value in weights(other).items()
        )


def test_a_model_that_is_saved_under_other_names_goes_on_bit_for_bit(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    """Experts of a mixture are one weight in memory, and one each in a file."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "use_cache": False,
    }

    def build() -> Any:
        torch.manual_seed(0)
        architecture = AutoConfig.for_model("qwen2_moe", **sizes)
        return AutoModelForCausalLM.from_config(architecture)

    keys = ("train.max_steps=4", "train.save_steps=2", "train.num_checkpoints=2")
    loaded = load("optimizer=adamw", *SMALL, *keys)
    whole, resumed = build(), build()
    _, place = fit(loaded, whole, tokenizer, tmp_path)
    names = load_file(checkpoint.folders(place)[0] / "model.safetensors").keys()
    assert names - dict(whole.named_parameters()).keys(), "or nothing is shown here"
    start = checkpoint.Checkpoint(checkpoint.folders(place)[0], Made("", "", ""), Spent(), {})
    fit(loaded, resumed, tokenizer, tmp_path, start)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
