"""The loop: numbers that must stop it, and runs that go on where they were."""

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orpo_lab import config, data, trainer
from orpo_lab.errors import NonFiniteError, UserError
from orpo_lab.run_folder import RunFolder
from orpo_lab.tracker import Untracked

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


def fit(
    loaded: config.Config, network: Any, tokenizer: Any, folder: Path
) -> tuple[trainer.TrainStats, RunFolder]:
    place = RunFolder(folder)
    stats = trainer.fit(
        loaded,
        model=network,
        tokenizer=tokenizer,
        data=data.load(loaded.dataset, tokenizer),
        dtype=torch.float32,
        place=place,
        log_to=Untracked(),
        checkpoint=None,
    )
    return stats, place


def poison(what: str, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one number non-finite from the third step on, in the forward or the backward pass."""
    calls = {"num": 0}
    last_norm = [module for name, module in network.named_modules() if name.endswith("norm")][-1]

    def forward_hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls["num"] += module.training
        if calls["num"] <= 2:
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
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    said: str,
    overrides: str,
) -> None:
    loaded = load(*overrides.split(), *SMALL, "train.max_steps=5", "train.logging_steps=1")
    network = build_model(loaded)
    poison(what, network, monkeypatch)
    with pytest.raises(NonFiniteError, match=f"step 3: {said}") as stop:
        fit(loaded, network, tokenizer, tmp_path)
    assert "learning_rate" in str(stop.value)
    assert all(torch.isfinite(p).all() for p in network.parameters() if p.is_floating_point())
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1, 2]


def test_a_fault_between_logging_steps_is_found_before_a_checkpoint(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(
        "optimizer=lora", *SMALL, "train.max_steps=8", "train.logging_steps=8", "train.save_steps=4"
    )
    network = build_model(loaded)
    poison("gradient", network, monkeypatch)
    with pytest.raises(NonFiniteError, match="step 3: the gradient norm is"):
        fit(loaded, network, tokenizer, tmp_path)
    assert all(torch.isfinite(p).all() for p in network.parameters() if p.is_floating_point())
    assert not list(tmp_path.glob("checkpoints/checkpoint-*"))
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1]


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


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [("constant", [0.3] * 5), ("linear", [0.3, 0.25, 0.2, 0.15, 0.1])],
)
def test_beta_is_logged_at_every_logging_step(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, schedule: str, betas: list[float]
) -> None:
    loaded = load(
        "optimizer=lora",
        *SMALL,
        "train.max_steps=5",
        "train.logging_steps=1",
        "beta=0.3",
        "beta_end=0.1",
        f"beta_schedule={schedule}",
    )
    stats, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    assert [line["beta"] for line in place.metrics()] == pytest.approx(betas)
    # TRL's rewards are beta times the log-probabilities: the step really used this beta
    for line in place.metrics():
        assert line["rewards/chosen"] == pytest.approx(
            line["beta"] * line["logps/chosen"], rel=1e-4
        )
    assert stats.steps == 5
    assert stats.pairs_per_second > 0
    assert stats.tokens_per_second > stats.pairs_per_second
    assert stats.peak_memory_bytes > 50e6


@pytest.mark.parametrize(
    "optimizer",
    [
        "optimizer=qlora",
        pytest.param("optimizer=lora", marks=pytest.mark.slow),
        pytest.param("optimizer=adamw", marks=pytest.mark.slow),
        GALORE,
        # After step 4 of periods of 3: in the middle of one
        f"{GALORE} optimizer.bits=8 optimizer.layerwise=true model.dtype=bf16",
        pytest.param(f"{GALORE} optimizer.bits=8", marks=pytest.mark.slow),
        pytest.param(f"{GALORE} optimizer.implementation=galore_torch", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    launch: Launch, tmp_path: Path, optimizer: str
) -> None:
    common = [
        *optimizer.split(),
        *SMALL,
        "train.max_steps=6",
        "train.save_steps=2",
        "train.logging_steps=1",
        "train.num_checkpoints=9",
        "beta_schedule=linear",
    ]
    launch(*common, "hydra.run.dir=whole")
    launch(*common, "hydra.run.dir=half")
    half = tmp_path / "half"
    # As if the run had been killed after step 4
    for late in ("checkpoints/checkpoint-6", "final"):
        subprocess.run(["rm", "-r", str(half / late)], check=True)
    launch(*common, "resume=half")
    weights = [
        next((tmp_path / name / "final").glob("*.safetensors")) for name in ("whole", "half")
    ]
    one, other = (load_file(file) for file in weights)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [RunFolder(tmp_path / name).metrics() for name in ("whole", "half")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


def test_resuming_another_run_is_refused_with_the_difference(
    launch: Launch, tmp_path: Path
) -> None:
    launch("optimizer=lora", *SMALL, "train.max_steps=2", "train.save_steps=1", "hydra.run.dir=run")
    done = launch(
        "optimizer=lora",
        *SMALL,
        "train.max_steps=2",
        "train.save_steps=1",
        "resume=run",
        "beta=0.5",
        expect=1,
    )
    assert "continues another run: beta: 0.1 -> 0.5" in done.stderr
    done = launch("optimizer=lora", *SMALL, "resume=nowhere", expect=1)
    assert "resume=nowhere is not a run folder" in done.stderr
    assert not (tmp_path / "nowhere").exists()
    done = launch("optimizer=lora", *SMALL, "train.max_steps=2", "hydra.run.dir=run", expect=1)
    assert "holds a run already" in done.stderr
    assert (tmp_path / "run" / "final").exists()


def test_steps_are_counted_from_epochs(load: Load) -> None:
    loaded = load("train.max_steps=null", "train.num_epochs=2", "train.batch_size=8")
    assert trainer.count_steps(loaded, 64) == 16
    with pytest.raises(UserError, match=r"train.batch_size=8 is above the 7 training pairs"):
        trainer.count_steps(loaded, 7)


def test_evaluation_during_training_reports_trls_metrics(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=4", "train.eval_steps=2")
    _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    evaluated = [line for line in place.metrics() if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert {"eval_rewards/margins", "eval_preference_accuracy"} <= evaluated[0].keys()


def test_layerwise_galore_logs_and_clips_the_projected_norm(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    common = (GALORE.split()[0], *SMALL, "train.max_steps=3", "train.logging_steps=1")
    norms = {}
    for mode in ("true", "false"):
        loaded = load(*common, f"optimizer.layerwise={mode}")
        stats, place = fit(loaded, build_model(loaded), tokenizer, tmp_path / mode)
        norms[mode] = [line["grad_norm"] for line in place.metrics()]
        assert stats.galore_memory_bytes is not None
    # Projection only loses length, and most of the gradient lies in the basis taken from it
    assert 0.5 * norms["false"][0] < norms["true"][0] < norms["false"][0]
