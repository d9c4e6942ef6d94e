"""Variables that libraries read: a run is what its configuration says, whatever is set."""

from collections.abc import Callable, Iterator

from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Ending, Outcome, refused, silent, survived

RUN = "hydra.run.dir=run"
# Set for a run, which must say so and be the run without
SAID = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "NVIDIA_TF32_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "USE_HUB_KERNELS": "YES",
}
# What a shell or a scheduler leaves behind, and what may be different from start to start
HARMLESS = (
    {"WORLD_SIZE": ""},
    {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    {"LOCAL_RANK": "0"},
    {"PYTHONHASHSEED": "1"},
)


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for name, value in SAID.items():
        yield Injection(f"{name}={value}", _same({name: value}, f"{name}={value} is not read"))
    for variables in HARMLESS:
        name = " ".join(f"{name}={value}" for name, value in variables.items())
        yield Injection(name, _same(variables, ""))
    yield Injection("WORLD_SIZE=two", _world_size)


def _same(variables: dict[str, str], says: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        done = bench.run(*UNTRACKED, RUN, environment={**variables}, fresh=True)
        outcome = survived(done, bench.path("run"), bench.reference(*UNTRACKED))
        if outcome.ending == Ending.SURVIVED and says not in done.stdout:
            return silent(f"it does not say that {says}")
        return outcome

    return happen


def _world_size(bench: Bench) -> Outcome:
    done = bench.run(*UNTRACKED, RUN, environment={"WORLD_SIZE": "two"})
    return refused(done, bench.path("run"), "WORLD_SIZE=two asks for several.*unset WORLD_SIZE")
