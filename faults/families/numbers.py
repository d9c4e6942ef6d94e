"""Numbers that are none, or leave the range of floating point."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from faults.bench import UNTRACKED, Bench, Injection
from faults.inside import die, in_step, poison_step
from faults.judge import Outcome, refused, resumed_from, silent, survived
from faults.processes import ROOT, Done

OPTIMIZERS = ("qlora", "lora", "galore", "adamw")
# A line that says so, whatever it was found in
NOT_FINITE = "(loss|gradient norm) is (nan|inf)|not finite|nothing finite"
UNBOUNDED = ("train.max_grad_norm=0", "train.lr_scheduler_type=constant")


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for optimizer in OPTIMIZERS:
        diverging = (f"optimizer={optimizer}", "optimizer.learning_rate=1e30", *UNBOUNDED)
        yield Injection(f"learning rate 1e30, {optimizer}", _refuses(*diverging))
    yield Injection("beta 1e38", _refuses("beta=1e38"))
    yield Injection("beta 1e300", _refuses("beta=1e300"))
    for what, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        for tensor in ("model.norm.weight", "model.layers.2.self_attn.q_proj.weight"):
            yield Injection(f"{what} in {tensor} of the base model", _bad_base(tensor, value))
    for what in ("loss", "gradient"):
        for optimizer in OPTIMIZERS:
            poison = partial(poison_step, what, 3)
            yield Injection(
                f"a {what} that is NaN in step 3, {optimizer}", _poisoned(poison, optimizer)
            )
    for optimizer in OPTIMIZERS:
        yield Injection(f"a step that is skipped, {optimizer}", _skipped(optimizer))
    yield Injection("a skipped step, then SIGKILL in step 6", _skipped_and_killed)
    yield Injection("more skipped steps than may be", _too_many_skipped)
    for factor in (10.0, 100.0, 1000.0):
        name = f"a base model that is certain, P = 1, its last norm times {factor:g}"
        yield Injection(name, _certain_base(factor))


def _refuses(*overrides: str, says: str = NOT_FINITE) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        done = bench.run(*UNTRACKED, *overrides, "hydra.run.dir=run")
        return refused(done, bench.path("run"), says)

    return happen


def _poisoned(poison: Callable[[], None], optimizer: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        arguments = (*UNTRACKED, f"optimizer={optimizer}", "hydra.run.dir=run")
        done = bench.run(*arguments, prepare=poison)
        return refused(done, bench.path("run"), "step 3: the (loss|gradient norm) is nan")

    return happen


def base_model(folder: Path) -> Path:
    """Copy the embedded model to a folder of its own."""
    folder.mkdir()
    for file in (ROOT / "orpo_lab" / "tiny").iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _skipping(bench: Bench, into: str, prepare: Callable[[], None], *more: str) -> Done:
    arguments = (*UNTRACKED, "train.on_nonfinite=skip", *more, f"hydra.run.dir={into}")
    return bench.run(*arguments, prepare=prepare)


def _skipped(optimizer: str) -> Callable[[Bench], Outcome]:
    """Whatever was not finite, the skipped step leaves weights and optimizer as they were."""

    def happen(bench: Bench) -> Outcome:
        for what in ("loss", "gradient"):
            prepare = partial(poison_step, what, 3)
            done = _skipping(bench, what, prepare, f"optimizer={optimizer}")
            if done.code != 0 or "step 3: " not in done.stdout or "skipped" not in done.stdout:
                return silent(f"exit code {done.code}: {done.stderr[-300:]}")
            summary = json.loads(bench.path(f"{what}/summary.json").read_text())
            if summary["train"]["skipped_steps"] != 1:
                return silent(f"it counts {summary['train']['skipped_steps']} skipped steps")
        runs = bench.path("gradient"), bench.path("loss")
        return survived(done, *runs, apart_from_step=3)

    return happen


def _skipped_and_killed(bench: Bench) -> Outcome:
    poison = partial(poison_step, "loss", 3)
    _skipping(bench, "whole", poison)
    _skipping(bench, "run", partial(_poison_and_kill, 3, 6))
    done = _skipping(bench, "run", poison, "resume=auto")
    if resumed_from(done) != 4:
        return silent(f"it goes on from step {resumed_from(done)}: {done.stderr[-300:]}")
    return survived(done, bench.path("run"), bench.path("whole"))


def _poison_and_kill(poisoned: int, killed: int) -> None:
    poison_step("loss", poisoned)
    in_step(killed, die)


def _too_many_skipped(bench: Bench) -> Outcome:
    prepare = partial(poison_step, "loss", 2, 3, 4)
    done = _skipping(bench, "run", prepare, "train.max_skipped_steps=2")
    return refused(done, bench.path("run"), "step 4: .*train.max_skipped_steps=2")


def _certain_base(factor: float) -> Callable[[Bench], Outcome]:
    """A model may be certain of an answer, right or wrong: its pairs are trained all the same."""

    def happen(bench: Bench) -> Outcome:
        change_base(bench, "model.norm.weight", lambda weight: weight * factor)
        arguments = (*UNTRACKED, "model=local", "model.path=./base")
        reference = bench.unharmed(*arguments, into="reference")
        done = bench.run(*arguments, "hydra.run.dir=run")
        _read_strictly(reference)
        return survived(done, bench.path("run"), reference)

    return happen


def _read_strictly(run: Path) -> None:
    """Read what a run has written as JSON.

    Raises:
        ValueError: it holds NaN or infinity, which JSON has not.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    texts = [file.read_text() for file in run.glob("*.json")]
    for text in [*texts, *(run / "metrics.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=refuse)


def _bad_base(tensor: str, value: float) -> Callable[[Bench], Outcome]:
    def bad(weight: Any) -> Any:
        weight.flat[0] = value
        return weight

    def happen(bench: Bench) -> Outcome:
        change_base(bench, tensor, bad)
        return _refuses("model=local", "model.path=./base")(bench)

    return happen


def change_base(bench: Bench, tensor: str, change: Callable[[Any], Any]) -> None:
    """Change a tensor of the base model in `base`, which is the embedded one at first."""
    from safetensors.numpy import load_file, save_file

    file = bench.path("base/model.safetensors")
    if not file.exists():
        base_model(bench.path("base"))
    weights = load_file(file)
    weights[tensor] = change(weights[tensor])
    save_file(weights, file, metadata={"format": "pt"})
