"""Folders that hold something: a user's files, a run that has finished, results half made.

A start that is refused leaves them bit for bit. What fails after the last step takes no model away.
"""

from collections.abc import Callable, Iterator
from functools import partial

from faults import inside
from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Ending, Outcome, contents, refused, silent, state, survived

RUN = "hydra.run.dir=run"
# Starts over a run that has finished without a checkpoint, and what is to be said
OVER_A_FINISHED_RUN = {
    "the same without resume": ((RUN,), "holds a run already"),
    "more steps": ((RUN, "resume=auto", "train.max_steps=8"), "train.max_steps: 6 -> 8"),
    "more steps, accepted": (
        (RUN, "resume=auto", "train.max_steps=8", "accept_changes=true"),
        "no valid checkpoint",
    ),
    "another model, which is not there": (
        (RUN, "resume=auto", "model.path=./nowhere"),
        "other contents|nowhere",
    ),
    "resume=FOLDER beside another folder": (("resume=run", "hydra.run.dir=b"), "two folders"),
}
FOREIGN = ("final/thesis.tex", ".cache/pip/wheel", "config.yaml", "status.json")


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for name in FOREIGN:
        yield Injection(f"a run in a folder with {name}", _foreign(name))
        yield Injection(f"a sweep in a folder with {name}", _foreign(name, "-m", "seed=1,2"))
    for name, (arguments, says) in OVER_A_FINISHED_RUN.items():
        yield Injection(f"over a finished run: {name}", _refused_over_finished(arguments, says))
    for name, function in {"plot": "draw_training", "card": "model_card"}.items():
        yield Injection(
            f"no {name}: it fails", _fails_at_the_end("orpo_lab.records.results", function)
        )
    yield Injection("the trained model's answers fail", _no_evaluation)
    yield Injection("an environment with a notebook's MPLBACKEND", _notebook)
    yield Injection("SIGKILL while the trained model is scored", _killed_in_evaluation)
    yield Injection("two runs that start in the same second", _same_second)


def _foreign(name: str, *sweep: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        mine = bench.path("mine")
        (mine / name).parent.mkdir(parents=True)
        (mine / name).write_text("{}")
        before = contents(mine)
        key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
        done = bench.run(*sweep, *UNTRACKED, f"{key}=mine")
        return refused(done, mine, "is not empty and holds no", untouched=before)

    return happen


def _refused_over_finished(arguments: tuple[str, ...], says: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        run = bench.unharmed(*UNTRACKED, "train.save_steps=null", into="run")
        before = contents(run)
        done = bench.run(*UNTRACKED, "train.save_steps=null", *arguments)
        return refused(done, run, says, untouched=before)

    return happen


def _raise() -> None:
    raise ZeroDivisionError("it fails")


def _fails_at_the_end(module: str, function: str) -> Callable[[Bench], Outcome]:
    """Have what is made of the trained model fail once; the next start makes up for it."""

    def happen(bench: Bench) -> Outcome:
        prepare = partial(inside.at_call, module, function, 1, _raise)
        done = bench.run(*UNTRACKED, RUN, prepare=prepare)
        outcome = survived(done, bench.path("run"), bench.path("run"))
        if outcome.ending != Ending.SURVIVED:
            return outcome
        if "has finished without" not in done.stdout:
            return silent(f"it is not said: {done.stdout[-300:]}")
        return bench.resumed(*UNTRACKED, step=6)

    return happen


def _no_evaluation(bench: Bench) -> Outcome:
    prepare = partial(inside.at_call, "orpo_lab.evaluate", "generate", 2, _raise)
    done = bench.run(*UNTRACKED, RUN, prepare=prepare)
    if done.code != 0 or not list(bench.path("run/final").glob("*.safetensors")):
        return silent(f"the model is lost: {done.code}, {done.stderr[-300:]}")
    if "has finished without evaluation after training" not in done.stdout:
        return silent(f"it is not said: {done.stdout[-300:]}")
    return bench.resumed(*UNTRACKED, step=6)


def _notebook(bench: Bench) -> Outcome:
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = bench.run(*UNTRACKED, RUN, fresh=True, environment=backend)
    if not bench.path("run/plots/training.png").exists():
        return silent(f"there is no plot: {done.stdout[-300:]}")
    return survived(done, bench.path("run"), bench.reference(*UNTRACKED))


def _killed_in_evaluation(bench: Bench) -> Outcome:
    unsaved = (*UNTRACKED, "train.save_steps=null")
    prepare = partial(inside.at_call, "orpo_lab.evaluate", "score", 2, inside.die)
    bench.run(*unsaved, RUN, prepare=prepare)
    return bench.resumed(*unsaved, step=6)


def _same_second(bench: Bench) -> Outcome:
    ended = [process.wait() for process in [bench.start(*UNTRACKED) for _ in range(2)]]
    runs = sorted(bench.path("outputs").iterdir())
    if len(runs) != 2 or any(done.code for done in ended):
        return silent(f"{len(runs)} runs: {[done.stderr[-200:] for done in ended]}")
    expected = state(bench.reference(*UNTRACKED))
    same = all(state(run) == expected for run in runs)
    return Outcome(Ending.SURVIVED) if same else silent("they are not as the unharmed run")
