"""Numbers that are none, or leave the range of floating point."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults.bench import UNTRACKED, Bench, Fault
from benchmarks.faults.inside import poison_step
from benchmarks.faults.judge import Outcome, refused
from benchmarks.faults.processes import ROOT

OPTIMIZERS = ("qlora", "lora", "galore", "adamw")
NOT_FINITE = "(loss|gradient norm) is|not finite|non-finite"
UNBOUNDED = ("train.max_grad_norm=0", "train.lr_scheduler_type=constant")


def faults(bench: Bench) -> Iterator[Fault]:
    """Return the faults."""
    for optimizer in OPTIMIZERS:
        diverging = (f"optimizer={optimizer}", "optimizer.learning_rate=1e30", *UNBOUNDED)
        yield Fault(f"learning rate 1e30, {optimizer}", _refuses(*diverging))
    yield Fault("beta 1e38", _refuses("beta=1e38"))
    yield Fault("beta 1e300", _refuses("beta=1e300"))
    for what, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        for tensor in ("model.norm.weight", "model.layers.2.self_attn.q_proj.weight"):
            yield Fault(f"{what} in {tensor} of the base model", _bad_base(tensor, value))
    for what in ("loss", "gradient"):
        for optimizer in OPTIMIZERS:
            poison = partial(poison_step, what, 3)
            yield Fault(f"a {what} that is NaN in step 3, {optimizer}", _poisoned(poison, optimizer))


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


def _bad_base(tensor: str, value: float) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        from safetensors.numpy import load_file, save_file

        file = base_model(bench.path("base")) / "model.safetensors"
        weights = load_file(file)
        weights[tensor].flat[0] = value
        save_file(weights, file, metadata={"format": "pt"})
        return _refuses("model=local", "model.path=./base")(bench)

    return happen
