"""A run that is gone on with under other settings, other data, another base model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.bench import UNTRACKED, Bench, Injection
from faults.families import data
from faults.families.numbers import base_model, change_base
from faults.judge import Ending, Outcome, contents, refused, silent, state, status

# What is changed, and whether accept_changes=true allows it
CHANGES = (
    ("beta=0.5", True),
    ("beta_end=0.2", True),
    ("beta_schedule=cosine", True),
    ("seed=43", True),
    ("optimizer.learning_rate=0.0005", True),
    ("train.batch_size=8", True),
    ("train.max_steps=8", True),
    ("train.lr_scheduler_type=cosine", True),
    ("dataset.num_train=12", True),
    ("dataset.max_length=80", True),
    ("optimizer.r=4", False),
    ("optimizer=lora", False),
    ("optimizer=adamw", False),
    ("quantization=int8", False),
)
FREE = ("train.num_checkpoints=5", "name=another", "train.max_hours=9", "tracker=none")


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for change, is_allowed in CHANGES:
        yield Injection(f"resume=FOLDER {change}", _changed(change, is_allowed=is_allowed))
    yield Injection("resume=auto beta=0.5", _changed_auto)
    for change in FREE:
        yield Injection(f"resume=auto {change}, which changes nothing", _free(change))
    yield Injection("another row in the training file", _other_data("train.jsonl", _replace_a_row))
    yield Injection("training rows in another order", _other_data("train.jsonl", _swap_rows))
    yield Injection("another row in the held-out file", _other_data("eval.jsonl", _replace_a_row))
    yield Injection("another base model in the same folder", _other_base)


def _changed(change: str, *, is_allowed: bool) -> Callable[[Bench], Outcome]:
    key, value = change.split("=")

    def happen(bench: Bench) -> Outcome:
        run = bench.killed_in_step_6(*UNTRACKED)
        before = contents(run)
        arguments = [*UNTRACKED, change, "resume=run"]
        outcome = refused(bench.run(*arguments), run, f"{key}.*{value}", untouched=before)
        if outcome.ending != Ending.REFUSED:
            return outcome
        accepted = bench.run(*arguments, "accept_changes=true")
        if not is_allowed:
            return refused(accepted, run, f"{key}.*{value}", untouched=before)
        if accepted.code != 0 or "Traceback" in accepted.stderr:
            return silent(f"accept_changes=true: {accepted.code}, {accepted.stderr[-300:]}")
        state(run)
        recorded = json.loads((run / "summary.json").read_text())["changes"]
        if status(run) != "finished" or len(recorded) != 2 or key not in recorded[1]:
            return silent(f"the change is not on record: {recorded}")
        return outcome

    return happen


def _changed_auto(bench: Bench) -> Outcome:
    run = bench.killed_in_step_6(*UNTRACKED)
    before = contents(run)
    done = bench.run(*UNTRACKED, "beta=0.5", "resume=auto", "hydra.run.dir=run")
    return refused(done, run, "beta: 0.1 -> 0.5", untouched=before)


def _free(change: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        run = bench.killed_in_step_6(*UNTRACKED)
        done = bench.run(*UNTRACKED, change, "resume=auto", "hydra.run.dir=run")
        if done.code != 0 or state(run) != state(bench.reference(*UNTRACKED)):
            return silent(f"exit code {done.code}: {done.stderr[-300:]}")
        return Outcome(Ending.SURVIVED)

    return happen


def _replace_a_row(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    data.write(file, rows[:-1] + data.pairs(80, 1))


def _swap_rows(file: Path) -> None:
    first, second, *rest = [json.loads(line) for line in file.read_text().splitlines()]
    data.write(file, [second, first, *rest])


def _other_data(name: str, change: Callable[[Path], None]) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        data.write(bench.path("train.jsonl"), data.GOOD)
        data.write(bench.path("eval.jsonl"), data.HELD_OUT)
        run = bench.killed_in_step_6(*data.settings())
        change(bench.path(name))
        before = contents(run)
        done = bench.run(*data.settings(), "resume=auto", "hydra.run.dir=run")
        return refused(done, run, "the pairs are not those", untouched=before)

    return happen


def _other_base(bench: Bench) -> Outcome:
    base_model(bench.path("base"))
    arguments = (*UNTRACKED, "model=local", "model.path=./base")
    run = bench.killed_in_step_6(*arguments)
    change_base(bench, "model.norm.weight", lambda weight: weight + 1)
    before = contents(run)
    done = bench.run(*arguments, "resume=auto", "hydra.run.dir=run")
    return refused(done, run, "the base model is not the one", untouched=before)
