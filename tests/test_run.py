"""Whole runs, as a user starts them."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from faults import processes
from faults.processes import Done
from orpo_lab import config, data, evaluate, run, tracker
from orpo_lab.errors import NonFiniteError, UserError
from orpo_lab.records import plot, results
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import EXIT_CODE, Stopped
from orpo_lab.sweep.folder import Sweep
from orpo_lab.tracker.base import Untracked
from orpo_lab.training import trainer
from orpo_lab.training.checkpoint import Checkpoint, Made, Spent
from tests.conftest import ROOT, break_import_of_wandb
from tests.test_evaluate import by_argmax, one_by_one
from tests.test_run_folder import TWO_STEPS, start, write_pairs

Launch = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., config.Config]
SLOW = pytest.mark.slow
QUICK = (
    "train.max_steps=4",
    "dataset.num_train=64",
    "dataset.num_eval=16",
    "dataset.num_generations=4",
)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def all_finite(folder: Path) -> bool:
    file = next((folder / "final").glob("*.safetensors"))
    return all(torch.isfinite(weight).all() for weight in load_file(file).values())


TOKEN = "hf_" + "q" * 34


@dataclass(frozen=True)
class Finished:
    """A run that has finished, and what it said."""

    folder: Path
    said: Done


@pytest.fixture(scope="module")
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _server: None
) -> Finished:
    """A finished run of an optimizer.

    That of the default one is as it is typed: in a new interpreter, tracked by W&B. It has a token
    among its settings.
    """
    folder, is_default = tmp_path_factory.mktemp(request.param), request.param == "qlora"
    own = [f"name=run-{TOKEN}", f"tracker.tags=[{TOKEN}]"] if is_default else ["tracker=none"]
    arguments = [f"optimizer={request.param}", *QUICK, *own, "hydra.run.dir=run"]
    running = processes.start(folder / "said", arguments, at=folder, fresh=is_default)
    said = running.wait()
    assert said.code == 0, said.stdout + said.stderr
    return Finished(folder / "run", said)


def of_optimizers(*quick: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Give a test the finished runs of these optimizers."""
    params = [*quick, *(pytest.param(name, marks=SLOW) for name in slow)]
    return pytest.mark.parametrize("finished", params, indirect=True)


@of_optimizers("qlora", "galore_8bit", slow=("lora", "galore", "adamw"))
def test_a_run_leaves_everything_and_a_clean_terminal(finished: Finished) -> None:
    run, said = finished.folder, finished.said
    assert said.stderr == "", "no upstream warning in a normal run"
    assert "| preference_accuracy " in said.stdout
    assert "4 steps are 1 epochs of 64 pairs" in said.stdout
    summary = summary_of(run)
    for when in ("before", "after"):
        keys = {"preference_accuracy", "logp_margin", "chosen_nll", "num_pairs", "exact_match"}
        assert keys <= summary[when].keys()
        assert summary[when]["num_pairs"] == 16
    assert summary["train"]["steps"] == 4
    assert summary["train"]["wall_seconds"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert len(summary["dataset_fingerprint"]["train"]) == 64
    status = json.loads((run / "status.json").read_text())
    assert len(status.pop("config_hash")) == 16
    assert status.pop("results") == summary["config_hash"]
    assert status.pop("sweep_start") is None
    assert status == {"state": "finished", "reason": "", "exit_code": 0, "missing": {}}
    assert not list((run / "checkpoints").iterdir())
    assert (run / "plots" / "training.png").stat().st_size > 20_000
    samples = (run / "samples.md").read_text()
    assert sum(samples.count(f"\nafter ({judged}):\n") for judged in ("right", "wrong")) == 4
    assert all_finite(run)


@of_optimizers("qlora")
def test_a_token_on_the_command_line_is_in_no_file(finished: Finished) -> None:
    files = [file for file in finished.folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run to start in process."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    return RunFolder(Path("run"))


def test_a_tracker_that_cannot_be_imported_is_missing(
    place: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_import_of_wandb(tmp_path / "broken")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    start(*TWO_STEPS, "tracker=wandb", "hydra.run.dir=run")
    assert place.status()["missing"] == {"tracker": "RuntimeError: wandb was imported"}
    assert "tracker is missing (RuntimeError: wandb" in place.file("run.log").read_text()


def test_faulty_rows_are_counted_and_never_reach_a_weight(launch: Launch, tmp_path: Path) -> None:
    good = [
        {"prompt": f"add {i} and 2.", "chosen": f"{i + 2}", "rejected": f"{i + 3}"}
        for i in range(20)
    ]
    faulty = [
        {"prompt": "count " * 300, "chosen": "1", "rejected": "2"},
        {"prompt": "add 1 and 2.", "chosen": "", "rejected": "4"},
        {"prompt": "add 1 and 2.", "chosen": "3", "rejected": "3"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in good + faulty))
    launch(
        "dataset=jsonl",
        "dataset.train_path=rows.jsonl",
        "dataset.eval_path=rows.jsonl",
        "dataset.faults.leaked_prompt=keep",
        "dataset.max_length=128",
        "dataset.max_prompt_length=64",
        "dataset.max_new_tokens=8",
        "train.max_steps=3",
        "tracker=none",
        "hydra.run.dir=run",
    )
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
    assert report["num_kept"] == 20
    assert {fault: entry["num"] for fault, entry in report["dropped"].items()} == {
        "prompt_too_long": 1,
        "empty_completion": 1,
        "chosen_equals_rejected": 1,
    }
    assert all_finite(tmp_path / "run")
    assert math.isfinite(summary_of(tmp_path / "run")["after"]["chosen_nll"])


@of_optimizers("qlora", slow=("adamw",))
def test_the_model_card_shows_how_to_load_final_and_generate(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (finished.folder / "final" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(finished.folder)
    loaded: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), loaded)
    model, tokenizer = loaded["model"], loaded["tokenizer"]
    messages = [{"role": "user", "content": "add 20 and 3."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0])
    assert "<|user|>add 20 and 3.<|assistant|>" in said


RECIPES = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))


@SLOW
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_on_a_small_local_model(
    launch: Launch, tmp_path: Path, assets: Path, recipe: str
) -> None:
    import datasets

    for name, source in {"train_prefs": "train", "test_prefs": "test", "train": "train"}.items():
        lines = (assets / f"data/chat_pairs/{source}_prefs.jsonl").read_text().splitlines()
        file = tmp_path / "uf" / "data" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([json.loads(line) for line in lines]).to_parquet(file)
    shrink = [
        "train.max_steps=2",
        "train.num_epochs=null",
        "train.batch_size=4",
        "train.eval_steps=2",
        "train.save_steps=2",
        "dataset.max_length=256",
        "dataset.max_prompt_length=128",
        "dataset.num_eval=4",
        "dataset.num_generations=2",
        "dataset.max_new_tokens=8",
    ]
    launch(
        f"experiment={recipe}",
        "model=local",
        f"model.path={assets}/models/stories15M",
        f"dataset.path={tmp_path / 'uf'}",
        *shrink,
        "tracker=none",
        "hydra.run.dir=run",
    )
    summary = summary_of(tmp_path / "run")
    assert summary["train"]["steps"] == 2
    assert all_finite(tmp_path / "run")


@SLOW
@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [["optimizer=galore"], ["optimizer=galore_8bit", "optimizer.layerwise=true"]],
    ids=["galore", "layerwise"],
)
def test_galore_killed_at_half_goes_on_to_the_same_metrics(
    assets: Path, overrides: list[str]
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "resume.py")]
    command += [str(assets / "models/stories15M"), str(assets / "data/math_pairs"), *overrides]
    done = subprocess.run(
        [*command, "optimizer.learning_rate=3e-4"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_final_metrics"]
    assert result["same_training_metrics"]
    before, after = result["chosen_nll"]
    assert after < before


@SLOW
@pytest.mark.parametrize(
    "overrides", [[], ["optimizer=galore", "beta=0.2"]], ids=["default", "galore"]
)
def test_the_main_job_learns(launch: Launch, tmp_path: Path, overrides: list[str]) -> None:
    launch(*overrides, "tracker=none", "hydra.run.dir=run")
    summary = summary_of(tmp_path / "run")
    before, after = summary["before"], summary["after"]
    assert after["num_pairs"] >= 200
    assert 0.4 <= before["preference_accuracy"] <= 0.6
    assert after["preference_accuracy"] >= 0.90
    assert after["exact_match"] >= before["exact_match"] + 0.3


@SLOW
@pytest.mark.long
def test_beta_trades_preference_against_quality(launch: Launch, tmp_path: Path) -> None:
    free = {}
    for beta in ("0", "0.1", "1"):
        launch(f"beta={beta}", "tracker=none", f"hydra.run.dir=beta{beta}")
        free[beta] = summary_of(tmp_path / f"beta{beta}")["after"]["by_wording"]["free"]
    accuracy = {beta: figures["preference_accuracy"] for beta, figures in free.items()}
    # One seed; benchmarks/beta.py has three
    assert accuracy["0"] + 0.03 <= accuracy["0.1"] <= accuracy["1"]
    assert free["1"]["exact_match"] <= free["0.1"]["exact_match"] - 0.1


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("it fails")


@pytest.mark.parametrize(
    ("home", "names", "missing"),
    [
        (
            results,
            ("draw_training", "model_card", "versions"),
            {"plots/training.png", "final/README.md", "versions"},
        ),
        (
            evaluate,
            ("generation_metrics",),
            {"evaluation after training", "scores.parquet", "samples.md", "samples.json"},
        ),
    ],
    ids=["results", "evaluation"],
)
def test_what_fails_after_the_last_step_is_missing_and_made_up_for(
    place: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    home: ModuleType,
    names: tuple[str, ...],
    missing: set[str],
) -> None:
    fit = trainer.fit
    with monkeypatch.context() as patch:

        def fit_then_fail(*arguments: Any, **named: Any) -> Any:
            result = fit(*arguments, **named)
            for name in names:
                patch.setattr(home, name, fails)
            return result

        patch.setattr(trainer, "fit", fit_then_fail)
        start(*TWO_STEPS, "hydra.run.dir=run")
    status = place.status()
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert status["missing"].keys() == missing
    first = next(iter(status["missing"]))
    assert f"has finished without {first}" in place.file("run.log").read_text()
    assert all_finite(place.path)
    weights = (place.path / "final" / "adapter_model.safetensors").read_bytes()
    start(*TWO_STEPS, "hydra.run.dir=run", "resume=auto")
    assert place.is_complete()
    assert place.file("plots/training.png").exists()
    assert summary_of(place.path)["after"]["num_pairs"] == 4
    assert (place.path / "final" / "adapter_model.safetensors").read_bytes() == weights
    assert not list(place.file("checkpoints").iterdir())


def trained(place: RunFolder, seed: int, *overrides: str) -> dict[str, torch.Tensor]:
    shutil.rmtree(place.path, ignore_errors=True)
    start(*TWO_STEPS, f"seed={seed}", *overrides, "hydra.run.dir=run")
    return load_file(next(place.file("final").glob("*.safetensors")))


@pytest.mark.parametrize(
    "overrides",
    [
        # All weights are the base's: what is drawn is the order of the pairs alone
        ["optimizer=adamw"],
        # Hardly any learning rate: adapters stay what they began as
        ["optimizer=lora", "optimizer.learning_rate=1e-30"],
    ],
    ids=["order", "adapters"],
)
def test_a_seed_says_in_which_order_pairs_come_and_what_adapters_begin_as(
    place: RunFolder, overrides: list[str]
) -> None:
    first, again, other = (trained(place, seed, *overrides) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    # Adapters move by a hair, into the direction that the pairs' order gives
    assert not all(torch.allclose(first[name], other[name], rtol=0, atol=1e-12) for name in first)


def write_sums(file: Path, numbers: range) -> list[dict[str, str]]:
    """Write pairs whose two answers are of unlike lengths, and return them."""
    rows = [
        {
            "prompt": " and ".join(["what is 2 plus 3?"] * (i % 3) + [f"add {i} and 2."]),
            "chosen": " " + "well, " * (i % 4) + f"it is {i + 2}.",
            "rejected": " " + "so, " * (i % 3) + f"it is {i + 3}.",
        }
        for i in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def encoded(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Return a row's ids: BOS in front, an EOS behind each answer."""
    prompt, chosen, rejected = (
        tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in row
    )
    return {
        "prompt_ids": [tokenizer.bos_token_id, *prompt],
        "chosen_ids": [*chosen, tokenizer.eos_token_id],
        "rejected_ids": [*rejected, tokenizer.eos_token_id],
    }


def test_scores_are_what_base_and_final_make_of_the_held_out_rows(place: RunFolder) -> None:
    """A whole model, trained in fp32 on a base of bf16: what is measured is what is saved."""
    tiny, base = ROOT / "orpo_lab" / "tiny", Path("base").absolute()
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    rows = {
        split: write_sums(Path(f"{split}.jsonl"), numbers)
        for split, numbers in (("train", range(10, 31)), ("held_out", range(40, 47)))
    }
    start(
        *TWO_STEPS,
        "optimizer=adamw",
        "model=local",
        f"model.path={base}",
        "model.dtype=fp32",
        "dataset.train_path=train.jsonl",
        "dataset.eval_path=held_out.jsonl",
        "dataset.as_messages=false",
        "dataset.num_eval=7",
        "dataset.num_generations=3",
        "hydra.run.dir=run",
    )
    tokenizer = AutoTokenizer.from_pretrained(place.file("final"))
    pairs = {split: [encoded(tokenizer, row) for row in rows[split]] for split in rows}
    said = summary_of(place.path)["dataset_fingerprint"]
    for split, ids in pairs.items():
        text = "".join(map(json.dumps, ids))
        assert said[split] == hashlib.sha256(text.encode()).hexdigest()
    scores = pq.read_table(place.file("scores.parquet")).to_pylist()
    weights = load_file(place.file("final/model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for when, folder in (("before", base), ("after", place.file("final"))):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = [row for row in scores if row["when"] == when]
        assert [row["pair"] for row in found] == list(range(7))
        for row, encoded_row in zip(found, pairs["held_out"], strict=True):
            for side in ("chosen", "rejected"):
                logps = one_by_one(network, encoded_row["prompt_ids"], encoded_row[f"{side}_ids"])
                assert row[f"{side}_logp"] == pytest.approx(sum(logps) / len(logps), abs=2e-5)
            assert row["chosen_tokens"] == len(encoded_row["chosen_ids"])
            answer = by_argmax(network, encoded_row["prompt_ids"], [tokenizer.eos_token_id], 4)
            is_answered = row["pair"] < 3
            assert row["generated_tokens"] == (len(answer) if is_answered else None)


def test_a_run_stopped_after_its_last_step_takes_no_other(
    place: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = trainer.fit

    def fit_then_signal(*arguments: Any, **named: Any) -> Any:
        result = fit(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", fit_then_signal)
        with pytest.raises(Stopped):
            start(*TWO_STEPS, "hydra.run.dir=run")
    status = place.status()
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert status["exit_code"] == EXIT_CODE
    trained = place.file("checkpoints/trained-2/adapter_model.safetensors").read_bytes()
    start(*TWO_STEPS, "hydra.run.dir=run", "resume=auto")
    assert place.is_complete()
    assert "resuming from step 2" in place.file("run.log").read_text()
    assert place.file("final/adapter_model.safetensors").read_bytes() == trained


def test_results_are_written_to_their_end_once_they_are_begun(
    place: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = plot.draw_training

    def draw_in_a_hurry(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*arguments)

    monkeypatch.setattr(results, "draw_training", draw_in_a_hurry)
    start(*TWO_STEPS, "hydra.run.dir=run")
    assert place.is_complete()


def test_a_run_does_not_go_on_with_other_held_out_pairs(place: RunFolder) -> None:
    write_sums(Path("held_out.jsonl"), range(40, 47))
    again = (*TWO_STEPS, "dataset.eval_path=held_out.jsonl", "hydra.run.dir=run", "resume=auto")
    with pytest.raises(Stopped):
        start(*again, "train.max_hours=1e-9")
    write_sums(Path("held_out.jsonl"), range(50, 57))
    with pytest.raises(UserError, match="the pairs are not those that the checkpoint was trained"):
        start(*again)


@pytest.mark.parametrize(
    ("folder", "other", "accept_changes", "said"),
    [
        ("checkpoint-2", "nothing", False, ""),
        ("trained-2", "nothing", False, ""),
        ("checkpoint-2", "model", True, "the base model is not the one"),
        ("checkpoint-2", "data", False, "say accept_changes=true"),
        ("checkpoint-2", "data", True, ""),
        ("trained-2", "data", True, "was trained on to its end"),
    ],
)
def test_a_run_goes_on_with_what_it_was_made_of(
    folder: str, other: str, accept_changes: bool, said: str
) -> None:
    made = {"config_hash": "a", "data": "b", "model": "c"}
    start = Checkpoint(Path(folder), Made(**made), Spent(), {})
    now = Made(**{key: f"{value}2" if key == other else value for key, value in made.items()})
    if said:
        with pytest.raises(UserError, match=said):
            run._check_made(start, now, accept_changes=accept_changes)
    else:
        run._check_made(start, now, accept_changes=accept_changes)


class Recorder(Untracked):
    """Keeps what a run's tracker is told."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.codes: list[int] = []

    def start(self, settings: Any, **named: Any) -> "Recorder":
        self.begun = named
        return self

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (UserError("no"), 1), (Stopped("SIGTERM"), EXIT_CODE)]
)
def test_the_tracker_is_told_of_the_sweep_of_what_was_before_and_of_the_end(
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    code: int,
) -> None:
    recorder, place, before = (
        Recorder(),
        RunFolder(tmp_path / "run"),
        RunFolder(tmp_path / "before"),
    )
    for folder in (place, before):
        folder.path.mkdir()
    before.append_metrics(3, {"loss": 0.5})
    monkeypatch.setattr(tracker, "start", recorder.start)
    missing = results.Missing(place)
    metrics, several = before.file("metrics.jsonl"), load("tracker=[wandb,tensorboard]")
    with (
        pytest.raises(type(error)) if error else contextlib.nullcontext(),
        run._tracked(several, place, {}, metrics, "a-sweep", missing, "sft 3fa1b2 > dpo"),
    ):
        if error:
            raise error
    assert recorder.codes == [code, code]
    assert recorder.begun["history"] == [{"step": 3, "loss": 0.5}]
    assert recorder.begun["sweep"] == "a-sweep"
    assert recorder.begun["config"]["road"] == "sft 3fa1b2 > dpo"


@pytest.mark.parametrize("weight", [1.0, math.nan])
def test_a_model_that_could_not_be_measured_is_kept_if_its_weights_are_finite(
    tmp_path: Path, weight: float
) -> None:
    trained, missing = tmp_path / "checkpoints" / "trained-2", results.Missing(RunFolder(tmp_path))
    trained.mkdir(parents=True)
    network = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(network.weight, weight)
    if math.isfinite(weight):
        assert run._measure_after(fails, network, trained, missing) is None
    else:
        with pytest.raises(NonFiniteError, match="step 2: its update left weights"):
            run._measure_after(fails, network, trained, missing)
    assert trained.exists() == math.isfinite(weight)
    assert missing == {"evaluation after training": "ZeroDivisionError: it fails"}


# Of a sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path / "sweep")
    made.begin(accept_changes=False)
    return made


def test_jobs_share_what_does_not_depend_on_where_they_differ(
    load: Load, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    report = {split: {"fingerprint": split} for split in ("train", "held_out")}
    untouched: Any = SimpleNamespace(length_guess=None)
    shared: Any = SimpleNamespace(guessed=lambda guesses: None, report=report)

    def once(sweep: Sweep, name: str, *rest: Any) -> Any:
        names.append(name)
        return shared

    monkeypatch.setattr(Sweep, "once", once)

    def asked(*overrides: str) -> tuple[str, ...]:
        names.clear()
        run._load_data(load(*overrides), None, sweep, today=date.today())
        run._measure_before(load(*overrides), fails, untouched, sweep)
        return tuple(names)

    plain = asked()
    for same in (["seed=1"], ["beta=0.5"], ["optimizer.r=4"], ["train.max_steps=7"]):
        assert asked(*same) == plain
    (pairs_name, _), unquantized = plain, asked("optimizer=lora")
    assert unquantized[0] == pairs_name
    assert unquantized[1] != plain[1]
    in_8_bits = asked("quantization=int8")
    assert in_8_bits[0] == pairs_name
    assert in_8_bits[1] != plain[1]
    assert asked("optimizer=adamw")[1] not in (plain[1], unquantized[1])
    for other in (["dataset.num_eval=7"], ["model=smollm2_135m"]):
        assert not set(asked(*other)) & set(plain)


def test_a_sweeps_job_goes_on_where_it_was_on_the_day_that_the_sweep_was_started(
    load: Load, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((sweep.folder / "sweep.json").read_text())
    begun = record | {"started": "2024-02-29T23:59:00+00:00"}
    (sweep.folder / "sweep.json").write_text(json.dumps(begun))
    days, load_data = [], data.load

    def on_a_day(*arguments: Any, today: date, **options: Any) -> data.Data:
        days.append(today)
        return load_data(*arguments, today=today, **options)

    monkeypatch.setattr(data, "load", on_a_day)
    small = ["optimizer=lora", "dataset.num_train=16", "dataset.num_eval=3", "tracker=none"]
    small += ["dataset.num_generations=0", "train.batch_size=5", "train.max_steps=2"]
    folder, stopped = sweep.folder / "0", load(*small, "train.max_hours=1e-9")
    with pytest.raises(Stopped):
        run.train(stopped, folder, choices={}, overrides=[], sweep=sweep)
    run.train(load(*small), folder, choices={}, overrides=[], sweep=sweep)
    assert "resuming from step 1" in (folder / "run.log").read_text()
    assert RunFolder(folder).is_complete()
    assert days == [date(2024, 2, 29)], "tokenized once"


def test_after_a_run_the_log_is_as_its_caller_had_it(tmp_path: Path) -> None:
    log = logging.getLogger("orpo_lab")
    before = (log.level, log.propagate, [*log.handlers])
    with run._said_in(RunFolder(tmp_path)):
        assert not log.propagate
    assert (log.level, log.propagate, [*log.handlers]) == before


def test_an_adapter_finds_its_base_and_its_card_tells_of_no_machine(
    place: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "orpo_lab" / "tiny", tmp_path / "base")
    start(*TWO_STEPS, "model=local", "model.path=./base", "hydra.run.dir=run")
    adapter = json.loads(place.file("final/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "base")
    card = place.file("final/README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model_name_or_path" not in card.split("---")[1]
    assert "\nbase, trained with ORPO" in card


def test_a_plot_is_drawn_whatever_a_notebook_or_a_matplotlibrc_says(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    code = (
        "from pathlib import Path\n"
        "from orpo_lab.records import plot\n"
        "lines = [{'step': 1, 'loss': 0.5}]\n"
        "plot.draw_training(lines, 'costs $5_$ and {x$', Path('plot.png'))\n"
    )
    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 20_000
